"""`python -m stepbill.experiments.advise`: what dominates the cost of given traffic, and what would make it cheaper.

    python -m stepbill.experiments.advise --scenario=chat-support --model=llama3-8b --target=h200
    python -m stepbill.experiments.advise --scenario=my_traffic.json --chips=h100,b200 --format=json

What could be changed is in changes.py, what that comes to in alternatives.py; here is how it is asked and shown.
Alternatives are ranked by the dollars that they save; beside each stand its latencies, and its risk to quality with how
that risk is known: `none` (the same model does the same), `measured here` (of the small models of quality.py),
`published`, or `unknown`.
"""

import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from absl.flags import FlagValues

from ..profiling.assumptions import Assumptions, Scenario
from . import command, flags, quality
from .alternatives import Alternative, compared
from .assumptions import define_assume, facts
from .changes import MLA, SAME, Request
from .drivers import finding
from .drivers.deployment import Deployment, Served
from .drivers.driver import again, checked, define_output, require_times
from .drivers.finding import Finding, Plot, Quantity, Table, cell
from .drivers.serving import AUTO
from .flags import UsageError

SCHEMA = 1
MOST = 1e15  # of a number of a scenario
CHIPS = "h100,h200,b200,v5e,v6e"
DRAWN = 8  # alternatives, the cheapest
INTRODUCTION = """advise: what dominates the cost of given traffic, and what would make it cheaper

  python -m stepbill.experiments.advise --scenario=chat-support --model=llama3-8b --target=h200
  python -m stepbill.experiments.advise --scenario=FILE.json --format=json

FILE.json has all of: input_tokens, cached_tokens, output_tokens, reasoning_tokens, requests_per_second, ttft_seconds,
tpot_seconds.
"""


# --- what is asked ---------------------------------------------------------------------------------------------------


def define(values: FlagValues) -> None:
    """Adds every flag."""
    to = flags.Definer(values)
    to.string("scenario", None, "the traffic: one of stepbill.experiments.assumptions --only=scenario, or a JSON file")
    flags.define_model(to)
    values.set_default("model", "llama3-8b")
    flags.define_storage(to)
    to.string("target", "h200", "the chip that it runs on now")
    to.string("mesh", AUTO, "chips of a replica, such as tensor=4; auto: the fewest that hold a few requests in time")
    to.count("batch", None, "requests in flight in a replica, at most, in the mean. Default: as many as are in time")
    to.string("chips", CHIPS, "other chips to try, with commas")
    quality.define_quality(to)
    define_assume(to)
    define_output(to, "how it is printed")


def scenario(name: str | None, known: Assumptions) -> Scenario:
    """The traffic of that name, or of a JSON file; UsageError says what is wrong with it."""
    names = known.members("scenario")
    if name in names:
        try:
            return known.record(Scenario, f"scenario.{name}")
        except ValueError as error:
            raise UsageError(f"--scenario={name}: {error}") from None
    if name is None or not (name.endswith(".json") or Path(name).exists()):
        said = "it needs a value" if name is None else "there is no such scenario"
        raise UsageError(f"--scenario{'' if name is None else f'={name}'}: {said}; {', '.join(names)}, or a JSON file")
    try:
        return _of_json(json.loads(Path(name).expanduser().read_text()))
    except OSError as error:
        problem = f"cannot read it: {(error.strerror or str(error)).lower()}"
    except json.JSONDecodeError as error:
        problem = f"it is no JSON: {error}"
    except (ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
    raise UsageError(f"--scenario={name}: {problem}")


def _of_json(given: Any) -> Scenario:
    """ValueError names the field that is wrong."""
    types = get_type_hints(Scenario)
    if not isinstance(given, dict):
        raise ValueError(f"it must be an object with {', '.join(types)}")
    for name in given.keys() - types.keys():
        near = difflib.get_close_matches(name, types, n=1)
        raise ValueError(f"there is no field {name!r}; {f'did you mean {near[0]}?' if near else ', '.join(types)}")
    for name, kind in types.items():
        if name not in given:
            raise ValueError(f"it has no {name}; it must have all of {', '.join(types)}")
        value, least = given[name], 0 if name in ("cached_tokens", "reasoning_tokens") else 1
        # Python's JSON reads NaN and Infinity, too; and true is 1.
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST
        if kind is int and not (number and value == int(value) and value >= least):
            raise ValueError(f"{name} is {value!r}; it must be a whole number from {least} on")
        if kind is float and not (number and value > 0):
            raise ValueError(f"{name} is {value!r}; it must be a positive number")
    return Scenario(**{name: kind(given[name]) for name, kind in types.items()})


def request(values: FlagValues) -> Request:
    """UsageError names the flag that is wrong."""
    checked(values)
    require_times(values.target)
    known = facts(values)
    traffic = scenario(values.scenario, known)
    if values.mesh != AUTO and not re.fullmatch(r"(tensor=[1-9]\d*)?", values.mesh):
        raise UsageError(f"--mesh={values.mesh}: it must be tensor=N or auto")
    config = flags.model_config(values, "decode")
    now = Deployment(traffic, config, values.target, values.mesh, batch=values.batch)
    if config.positions == "learned" and now.longest > config.max_context:
        raise UsageError(
            f"--scenario={values.scenario}: a request takes {now.longest} positions; {config.name} has "
            f"{config.max_context}"
        )
    others = [name for name in dict.fromkeys(values.chips.split(",")) if name not in ("", values.target)]
    for name in others:
        try:
            require_times(name)
        except (ValueError, UsageError) as error:
            raise UsageError(f"--chips={values.chips}: {error}") from None
    name = Path(values.scenario).stem
    return Request(name, now, tuple(others), quality.read(values.quality), known, again("advise", values), values.jobs)


# --- the advice ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A part of what a request costs: its phase, what it goes to, and the share of the whole."""

    phase: str
    group: str
    share: float
    dollars_per_month: float | None


@dataclass(frozen=True)
class Advice:
    """What was found. alternatives: from the one on that saves most; those that are late, and those that do not run,
    last."""

    asked: Request
    now: Served
    alternatives: tuple[Alternative, ...]

    @cached_property
    def lines(self) -> tuple[Line, ...]:
        """Where a request's time goes, the largest part first: of each phase reading weights apart, whichever component
        does it, and of each component the rest."""
        amounts: dict[tuple[str, str], int] = {}
        for part in self.now.parts:
            phase, _, group = part.name.partition(": ")
            reading = part.reading_weights or 0
            for name, amount in (("reading weights", reading), (group, part.picoseconds - reading)):
                amounts[phase, name] = amounts.get((phase, name), 0) + amount
        month, whole = self.now.dollars_per_month, self.now.picoseconds
        shares = {key: amount / whole for key, amount in amounts.items() if amount}
        return tuple(
            Line(*key, share, None if month is None else month * share)
            for key, share in sorted(shares.items(), key=lambda one: -one[1])
        )

    @property
    def dominates(self) -> str:
        """In one sentence."""
        by_phase = {
            phase: sum(one.share for one in self.lines if one.phase == phase) for phase in ("prefill", "decode")
        }
        phase = max(by_phase, key=by_phase.__getitem__)
        first = max(self.lines, key=lambda one: one.share)
        what = {"prefill": "reading prompts", "decode": "writing answers"}[phase]
        largest = f"{first.phase}, {first.group}: {first.share:.0%}"
        return f"{what} is {by_phase[phase]:.0%} of the cost; the largest part is {largest}"

    @property
    def best(self) -> Alternative | None:
        """The cheapest that keeps quality exactly."""
        return next((one for one in self.alternatives if one.is_exact and not one.change.needs), None)

    @property
    def exact(self) -> str:
        """In one sentence."""
        start = "the cheapest change that keeps quality exactly"
        if self.best is None or self.best.saved is None:
            return f"{start}: none of these saves anything"
        month = cell(self.best.saved_per_month, "$")
        return f"{start}: {self.best.change.name} saves {self.best.saved:.0%} (${month} a month)"

    def to_json(self) -> dict[str, Any]:
        """`schema` and the rest; keys may be added, none is renamed."""
        asked = self.asked
        return {
            "schema": SCHEMA,
            "scenario": {"name": asked.name} | asdict(asked.now.traffic),
            "model": asked.now.config.name,
            "target": asked.now.target,
            "dominates": self.dominates,
            "exact": self.exact,
            "now": _amounts(self.now) | {"keeps_targets": not self.now.missed, "reason": self.now.missed},
            "drivers": [asdict(one) for one in self.lines],
            "alternatives": [_alternative(one) for one in self.alternatives],
            "assumptions": [one.to_json() for one in asked.known.used],
            "notes": list(self.notes),
            "command": asked.command,
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know."""
        config, longest = self.asked.now.config, self.now.deployment.longest
        said = [
            "step times are the roofline's: a lower bound",
            "dollars are of busy chips, in the mean: a fleet shares what is left of the last replica; chips are those "
            "of whole replicas, if nothing else runs on them",
            "latencies are what 99 of 100 requests keep; prompts are read one by one while those that decode wait",
            "a cached prompt takes memory while its request runs, and no time to be found; keeping it is not counted",
        ]
        if any(one.change.name == MLA for one in self.alternatives):
            said.append("without a kernel of its own a latent vector is read twice, for scores and for values")
        if longest > config.max_context:
            said.append(f"{config.name} is for {config.max_context:,} positions, and a request takes {longest:,}")
        return (*said, *self.now.notes)

    @property
    def finding(self) -> Finding:
        """The same as tables, as drivers of cost have them."""
        asked, saved = self.asked, self.best.saved if self.best else None
        return Finding(
            f"advise-{asked.name}",
            f"What dominates the cost of {asked.name} with {asked.now.config.name}, and what would be cheaper?",
            asked.now.target,
            "Half of the cost or more can be saved without any loss of quality.",
            None if not self.now.dollars_per_request else (saved or 0) >= 0.5,
            f"{self.exact}; {self.dominates}.",
            asked.command,
            (self._drivers(), self._alternatives(), self._risks(), *self._reasons()),
            (self._plot(),),
            assumptions=tuple(one.to_json() for one in asked.known.used),
            notes=self.notes,
            headline=self.exact,
            factor=None if saved is None or saved >= 1 else 1 / (1 - saved),
        )

    def _drivers(self) -> Table:
        columns = (Quantity("phase"), Quantity("goes to"), Quantity("of the cost", "%"), Quantity("a month", "$"))
        rows = tuple((one.phase, one.group, one.share, one.dollars_per_month) for one in self.lines)
        return Table("Where it goes", columns, rows)

    def _alternatives(self) -> Table:
        columns = (
            *(Quantity("alternative"), Quantity("per 1k", "$"), Quantity("saved", "%"), Quantity("a month", "$")),
            *(Quantity("TTFT", "s"), Quantity("TPOT", "s"), Quantity("chips"), Quantity("batch")),
            *(Quantity("in time"), Quantity("risk")),
        )

        def row(name: str, one: Served | None, *rest: Any) -> tuple[Any, ...]:
            *saved, risk = rest
            if one is None:
                return (name, *[None] * 7, "-", risk)
            each = one.dollars_per_request
            chips = f"{one.whole_chips // one.chips} x {one.chips}"
            amounts = (None if each is None else 1000 * each, *saved, one.ttft_seconds, one.tpot_seconds)
            return (name, *amounts, chips, round(one.batch, 1), "late" if one.missed else "yes", risk)

        rows = [row("now", self.now, None, None, "-")]
        for one in self.alternatives:
            risk = one.change.risk.known.removesuffix(" here")
            rows.append(row(one.change.name, one.served, one.saved, one.saved_per_month, risk))
        return Table(
            "Alternatives: dollars for 1,000 requests, and saved a month; replicas x chips; requests in flight",
            columns,
            tuple(rows),
        )

    def _risks(self) -> Table:
        columns = (Quantity("alternative"), Quantity("risk to quality"), Quantity("what is known"), Quantity("needs"))
        rows = tuple(
            (one.change.name, one.change.risk.known, one.change.risk.text, one.change.needs or "-")
            for one in self.alternatives
            if one.change.risk is not SAME or one.change.needs
        )
        return Table("Risk to quality, and how it is known", columns, rows)

    def _reasons(self) -> Iterator[Table]:
        rows = [(one.change.name, one.reason) for one in self.alternatives if one.reason]
        rows = [*([("now", self.now.missed)] if self.now.missed else []), *rows]
        if rows:
            yield Table("What does not run, or not in time", (Quantity("alternative"), Quantity("why")), tuple(rows))

    def _plot(self) -> Plot:
        shown = {"now": self.now}
        shown |= {one.change.name: one.served for one in self.alternatives if one.served and one.in_time}
        lines = {
            name: ((one.tpot_seconds, 1000 * (one.dollars_per_request or 0)),)
            for name, one in list(shown.items())[: DRAWN + 1]
        }
        return Plot("Cost against latency", Quantity("TPOT", "s"), Quantity("1k requests", "$"), lines, False, False)


def _alternative(one: Alternative) -> dict[str, Any]:
    """Keys stay; numbers are null where it does not run."""
    risk = one.change.risk
    return {
        "name": one.change.name,
        "runs": one.served is not None,
        "keeps_targets": one.in_time,
        "reason": one.reason,
        **_amounts(one.served),
        "saved_share": one.saved,
        "saved_dollars_per_month": one.saved_per_month,
        "risk": {"known": risk.known, "text": risk.text, "loss_share": risk.loss},
        "needs": one.change.needs,
    }


def _amounts(one: Served | None) -> dict[str, Any]:
    names = ("dollars_per_request", "dollars_per_month", "dollars_per_million_tokens", "ttft_seconds", "tpot_seconds")
    found: dict[str, Any] = {name: one and getattr(one, name) for name in names}
    mesh = one and (one.deployment.mesh or "tensor=1")
    return found | {
        "target": one and one.deployment.target,
        "mesh": mesh,
        "chips_per_replica": one and one.chips,
        "replicas": one and one.replicas,
        "chips": one and one.whole_chips,
        "requests_in_flight": one and one.batch,
    }


# --- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it: 0; 2 where what is given is wrong."""
    return command.run(_run, define, INTRODUCTION, argv)


def _run(values: FlagValues) -> None:
    asked = request(values)
    logdir = flags.logdir(values.logdir)
    found = Advice(asked, *compared(asked))
    if logdir is not None:
        finding.write(logdir, found.finding)
    if values.format == "json":
        print(json.dumps(found.to_json(), indent=1))
    else:
        finding.show(found.finding, values.format)


if __name__ == "__main__":
    sys.exit(main())
