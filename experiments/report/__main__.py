"""`python -m stepbill.experiments.report --out=DIR --target=h200`: every driver's finding, on one page.

The steps of all drivers are compiled in one sweep, whose bills are kept: stopped and started again, it goes on.
"""

import json
import shlex
import sys
import textwrap
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from absl.flags import FlagValues

from ...profiling import render, targets
from ...profiling.kept import write_whole
from .. import command, flags, published
from ..assumptions import define_assume
from ..drivers import finding, sweep
from ..drivers.driver import Bills, Driver, checked, define_output
from ..drivers.sweep import Point
from ..flags import UsageError
from ..published import Case
from ..run_folder import check_writable
from . import page, registry
from .content import Figure, Report, Section, times, versions
from .registry import PUBLISHED, Entry

INTRODUCTION = """report: why are large language models so expensive? Every driver of cost, on one page

  python -m stepbill.experiments.report --out=DIR --target=h200
  python -m stepbill.experiments.report --out=DIR --target=v5e --only=context,cache --assume=power.pue=1.1
"""
PAGE, DATA = "index.html", "report.json"


def define(values: FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("out", None, f"the folder for {PAGE} and {DATA}")
    to.string("target", "h200", "the chip")
    to.string("only", "", f"sections, with commas: {', '.join(registry.NAMES)}. Default: all")
    define_assume(to)
    define_output(to, "what is printed besides")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where the flags are wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: FlagValues) -> None:
    checked(values)
    only = registry.chosen(values.only)
    if values.out is None:
        raise UsageError(f"--out: it must be given, the folder for {PAGE}")
    out, logdir = Path(values.out).expanduser(), flags.logdir(values.logdir)
    check_writable(out, "out")
    report = made([entry for entry in registry.ENTRIES if entry.name in only], PUBLISHED in only, values)
    data = json.dumps(report.to_json(), indent=1) + "\n"
    write_whole(out / DATA, data)
    write_whole(out / PAGE, page.html(report))
    if logdir is not None:
        for found in report.findings:
            finding.write(logdir, found)
    sys.stdout.write(data if values.format == "json" else text(report) + f"\n{out / PAGE}\n")


def made(entries: Sequence[Entry], with_figures: bool, values: FlagValues) -> Report:
    """The report of these drivers, with --target, --assume and --jobs of `values`; published figures, if wanted."""
    given = [f"--target={values.target}", *(f"--assume={name}={value}" for name, value in values.assume)]
    with command.status() as say:
        runs = [_Run(entry, entry.driver(), given, say) for entry in entries]
    billed = [point for point in published.BILLED.values() if with_figures and _can_compile(point)]
    outcomes = sweep.sweep([*(point for run in runs for point in run.points), *billed], values.jobs)
    with command.status() as say:
        sections = [run.section(outcomes, say) for run in runs]
        say("published figures")
        figures = [Figure(case, _ours(case, outcomes)) for case in published.cases()] if with_figures else []
    only = [f"--only={values.only}"] if values.only else []
    again = ["python", "-m", "stepbill.experiments.report", "--out=DIR", *only, *given]
    title = targets.chip(values.target).title
    return Report(values.target, title, date.today(), shlex.join(again), tuple(sections), tuple(figures), versions())


class _Run:
    """A driver on its way to a section. points: none where its flags are wrong for this target, as `failure` says."""

    def __init__(self, entry: Entry, driver: Driver, given: Sequence[str], say: command.Say):
        say(f"planning: {driver.question}")
        self.entry, self.driver = entry, driver
        self.values = driver.parse(given)
        self.points: list[Point] = []
        self.failure = ""
        try:
            self.points = driver.points(self.values)
        except UsageError as error:
            self.failure = str(error)

    def section(self, outcomes: Bills, say: command.Say) -> Section:
        """With its finding, or why there is none."""
        say(self.driver.question)
        found = None
        try:
            if not self.failure:
                found = self.driver.finding(self.values, {point: outcomes[point] for point in self.points})
        except UsageError as error:
            self.failure = str(error)
        return Section(self.entry, self.driver.question, self.driver.command(self.values), found, self.failure)


def _can_compile(point: Point) -> bool:
    try:
        targets.require(point.target)
    except targets.MissingExtra:
        return False
    return True


def _ours(case: Case, outcomes: Bills) -> float | None:
    """What comes out here; None of a step that could not be compiled."""
    if case.by != published.BILL:
        return published.OURS[case.name]()
    outcome = outcomes.get(published.BILLED[case.name])
    return None if outcome is None or isinstance(outcome, sweep.Refusal) else published.of_bill(outcome)


def text(report: Report) -> str:
    """The answer, then a line each: driver, verdict, the factor if it has one, and what says most."""
    rows = [
        {
            "driver": section.entry.name,
            "the claim": section.verdict,
            "factor": times(section.factor),
            "found": textwrap.shorten(section.headline, 110),
        }
        for section in report.sections
    ]
    parts = [" ".join(report.answer), render.columns(rows).rstrip() if rows else ""]
    if report.figures:
        differing = [figure.case.name for figure in report.figures if figure.verdict != "agrees"]
        parts.append(f"{len(report.figures) - len(differing)} of {len(report.figures)} published figures come out")
        parts[-1] += f"; not: {', '.join(differing)}" if differing else ""
    if prices := report.prices:
        parts.append(f"prices from {prices[0].date} ({prices[0].name}) to {prices[-1].date}; may be stale: ")
        parts[-1] += ", ".join(price.name for price in report.stale) or "none"
    return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
    sys.exit(main())
