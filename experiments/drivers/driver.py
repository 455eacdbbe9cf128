"""What every driver of cost does alike: which steps it compiles, what it makes of their bills, and its command.

A driver is one question. It names the steps that it needs (`points`) and makes a finding of their bills (`find`); it
compiles nothing itself, so that a report can compile the steps of all drivers in one sweep.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from absl.flags import FlagValues

from ...profiling import chips, targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from .. import command, flags
from ..assumptions import define_assume, facts
from ..flags import UsageError
from . import finding, sweep
from .finding import Finding
from .sweep import Outcome, Point

FORMATS = ("table", "json")
NO_MATTER = ("format", "logdir", "jobs")  # flags that change nothing of a finding
Bills = Mapping[Point, Outcome]


@dataclass(frozen=True)
class Driver:
    """One driver of cost.

    name: of its module. question: that it answers, in one line.
    define: adds the flags that it has beside those of `define_common`.
    points: the steps that it needs, by its flags; UsageError where these are wrong.
    find: what their bills say, those that were refused included, and the facts of the world that it needs.
    model: the architecture, unless --model says another.
    """

    name: str
    question: str
    define: Callable[[flags.Definer], None]
    points: Callable[[FlagValues], list[Point]]
    find: Callable[[FlagValues, Bills, Assumptions], Finding]
    model: str

    def parse(self, argv: Sequence[str]) -> FlagValues:
        """Its flags; UsageError."""
        return checked(flags.parse(argv, self.define_all))

    def define_all(self, values: FlagValues) -> None:
        """Adds every flag of its command."""
        to = flags.Definer(values)
        flags.define_model(to)
        values.set_default("model", self.model)
        to.string("target", "h200", "the chip")
        self.define(to)
        define_assume(to)
        define_output(to, "how the finding is printed")

    def command(self, values: FlagValues) -> str:
        """What makes the finding again: the flags that were given."""
        return again(f"drivers.{self.name}", values)

    def finding(self, values: FlagValues, outcomes: Bills) -> Finding:
        """What the outcomes of its points say, at the prices of `values`; with every assumption that was used."""
        known = facts(values)
        priced = {point: _priced(outcome, known) for point, outcome in outcomes.items()}
        found = self.find(values, priced, known)
        return replace(found, assumptions=tuple(one.to_json() for one in known.used))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs its command: 0; 2 where the flags are wrong."""
        return command.run(self._run, self.define_all, f"{self.name}: {self.question}\n", argv)

    def _run(self, values: FlagValues) -> None:
        checked(values)
        found = self.finding(values, sweep.sweep(self.points(values), values.jobs))
        if values.logdir is not None:
            finding.write(Path(values.logdir), found)
        finding.show(found, values.format)


def define_output(to: flags.Definer, printed: str) -> None:
    """Adds the flags that every command over a sweep ends with. printed: what --format says."""
    to.count("jobs", None, "processes that compile at the same time. Default: one a core")
    to.string("logdir", None, "a folder for TensorBoard")
    to.one_of(FORMATS, "format", FORMATS[0], f"{printed}: {' or '.join(FORMATS)}")
    flags.define_help(to)


def again(module: str, values: FlagValues) -> str:
    """The command of an experiment with the flags that were given and that change something of its result."""
    given = {name: value for name, value in flags.given_flags(values).items() if name not in NO_MATTER}
    assumed = [f"{name}={value}" for name, value in given.pop("assume", ())]
    parts = [*(f"--{name}={value}" for name, value in given.items()), *(f"--assume={one}" for one in assumed)]
    return shlex.join(["python", "-m", f"stepbill.experiments.{module}", *parts])


def checked(values: FlagValues) -> FlagValues:
    """The same flags; UsageError where --target is no chip that can be compiled for here."""
    try:
        targets.chip(values.target)
        targets.require(values.target)
    except ValueError as error:
        raise flags.as_usage(error) from None
    except targets.MissingExtra as error:
        raise UsageError(f"--target={values.target}: {error}") from None
    return values


def _priced(outcome: Outcome, known: Assumptions) -> Outcome:
    """A bill at today's price of the chip, and not at that of the day on which it was kept."""
    if isinstance(outcome, sweep.Refusal) or outcome.price.get("chip_dollars_per_hour") is None:
        return outcome
    price = dict(outcome.price)
    hourly = chips.priced(targets.chip(outcome.program["target"]), known).dollars_per_hour
    for name in ("dollars_per_run", "dollars_per_million_tokens"):
        dollars = price.get(name)
        if hourly is not None and dollars is not None:
            price[name] = dollars * (hourly / (price["chip_dollars_per_hour"] or 1))
    price["chip_dollars_per_hour"] = hourly
    return replace(outcome, price=price)


def bill(bills: Bills, point: Point) -> Bill:
    """The bill of a point that the finding cannot do without; UsageError where it was refused."""
    outcome = bills[point]
    if isinstance(outcome, sweep.Refusal):
        raise UsageError(outcome.text)
    return outcome


def numbers(name: str, text: str, least: int = 1) -> list[int]:
    """`1024,4096` of a flag: whole numbers from `least` on, in order; UsageError."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < least:
        raise UsageError(f"--{name}={text}: it must be whole numbers from {least} on, with commas between")
    return found


def require_times(target: str) -> None:
    """UsageError where the target's step times cannot be known."""
    if targets.chip(target).hbm_bytes_per_second is None:
        raise UsageError(f"--target={target}: its step times are not known; it must be a chip")
