"""What each change of a deployment comes to (changes.py), compiled, and ranked by the dollars that it saves.

Every alternative is compiled: its decode steps and prompts make what the traffic costs in steady state
(drivers/deployment.py). `advise.py` is how it is asked and shown.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from ..profiling import targets
from ..profiling.assumptions import Assumptions
from .changes import SAME, Change, Request, Wanted, batches, changes, meshes
from .drivers import sweep
from .drivers.deployment import Deployment, Misses, Served, serve
from .drivers.serving import AUTO
from .flags import UsageError

MOST_TENSOR = 8  # chips of a replica that are tried for the sake of latency


@dataclass(frozen=True)
class Outcome:
    """What a deployment comes to; None with the reason where it does not run."""

    served: Served | None
    reason: str = ""


@dataclass
class Compiler:
    """Compiles what deployments need, each step once."""

    known: Assumptions
    jobs: int | None = None
    bills: dict[sweep.Point, sweep.Outcome] = field(default_factory=dict)

    def outcomes(self, wanted: Sequence[Wanted], tries: Sequence[int]) -> list[Outcome]:
        """Of each, on as few chips as hold it; and where these are too slow, on twice as many, so often as `tries`
        of it say."""
        found: dict[int, Outcome] = {}
        todo = dict(enumerate(wanted))
        left = list(tries)
        while todo:
            placed: dict[int, Deployment] = {}
            for n, one in todo.items():
                try:
                    targets.require(one.deployment.target)
                    placed[n] = one.placed()
                except (UsageError, targets.MissingExtra) as error:
                    found.setdefault(n, Outcome(None, _plain(str(error))))  # or as late as fewer chips are
            missing = [p for one in placed.values() for p in one.points() if p not in self.bills]
            self.bills |= sweep.sweep(missing, self.jobs)
            again = {}
            for n, one in placed.items():
                found[n] = outcome = self._outcome(one)
                chips = sweep.mesh_of(one.mesh).get("tensor", 1)
                late = outcome.served is not None and outcome.served.missed and one.in_time
                if late and left[n] and chips < MOST_TENSOR:
                    left[n] -= 1
                    again[n] = replace(todo[n], times=todo[n].times * 2)
            todo = again
        return [found[n] for n in range(len(wanted))]

    def _outcome(self, placed: Deployment) -> Outcome:
        try:
            return Outcome(serve(placed, self.bills, self.known))
        except Misses as error:
            late = serve(replace(placed, in_time=False), self.bills, self.known)
            return Outcome(replace(late, deployment=placed, missed=str(error)))
        except UsageError as error:
            return Outcome(None, _plain(str(error)))


def _plain(error: str) -> str:
    """An error of flags, of what nobody gave as one."""
    return re.sub(r"^--\w+=\S*: ", "", error)


@dataclass(frozen=True)
class Alternative:
    """A change and what it comes to, against now."""

    change: Change
    outcome: Outcome
    now: Served

    @property
    def served(self) -> Served | None:
        return self.outcome.served

    @property
    def in_time(self) -> bool:
        return self.served is not None and not self.served.missed

    @property
    def reason(self) -> str:
        """Why it does not run, or why it is late; "" where it does and is not."""
        return self.outcome.reason if self.served is None else self.served.missed

    @property
    def saved(self) -> float | None:
        """The share of the dollars that it saves; negative where it is dearer; None where that cannot be told."""
        before = self.now.dollars_per_request
        after = self.served.dollars_per_request if self.served else None
        return None if not before or after is None else 1 - after / before

    @property
    def saved_per_month(self) -> float | None:
        """Dollars."""
        before, after = self.now.dollars_per_month, self.served.dollars_per_month if self.served else None
        return None if before is None or after is None else before - after

    @property
    def saves(self) -> bool:
        """Whether it is in time and cheaper."""
        return self.in_time and (self.saved or 0) > 0

    @property
    def is_exact(self) -> bool:
        """Whether it saves, and quality stays as it is."""
        return self.saves and self.change.risk.is_exact


def compared(asked: Request) -> tuple[Served, tuple[Alternative, ...]]:
    """(What is deployed, the alternatives), from the one on that saves most; those that are late, and those that do
    not run, last. UsageError where what is deployed does not run, or nothing keeps its latencies."""
    compiler = Compiler(asked.known, asked.jobs)
    (first,) = compiler.outcomes([Wanted(asked.now)], [3 if asked.now.mesh == AUTO else 0])
    now = first.served
    if now is None:
        raise UsageError(f"--mesh={asked.now.mesh}: {first.reason}")
    fewest = sweep.mesh_of(asked.now.placed().mesh).get("tensor", 1)
    wanted = Wanted(asked.now, now.chips / fewest)
    found = _applied(compiler, wanted, [*changes(asked), *meshes(wanted, now.chips), *batches(asked, now)], now)
    found += _applied(compiler, wanted, list(_combinations(found)), now)
    if now.missed and not any(one.in_time for one in found):
        raise UsageError(f"--scenario={asked.name}: {now.missed}; none of {len(found)} alternatives is in time")
    return now, tuple(sorted(found, key=_rank))


def _applied(compiler: Compiler, wanted: Wanted, listed: Sequence[Change], now: Served) -> list[Alternative]:
    starts = [one.apply(wanted) for one in listed]
    tries = [2 if one.deployment.target != wanted.deployment.target else 0 for one in starts]
    outcomes = compiler.outcomes(starts, tries)
    return [Alternative(change, outcome, now) for change, outcome in zip(listed, outcomes, strict=True)]


def _rank(one: Alternative) -> tuple[int, float]:
    return (2 if one.served is None else 0 if one.in_time else 1, -(one.saved or 0.0))


def _combinations(found: Sequence[Alternative]) -> Iterator[Change]:
    """The best of each part together: of those that keep quality exactly, and of those that are safe."""
    for name, is_in in (("exact", lambda risk: risk.is_exact), ("safe", lambda risk: risk.is_safe)):
        best: dict[str, Change] = {}
        for one in sorted(found, key=_rank):
            if one.saves and one.change.part and is_in(one.change.risk):
                best.setdefault(one.change.part, one.change)
        if name == "safe" and all(one.risk.is_exact for one in best.values()):
            return  # the same again
        # A draft saves least where the batch is large, which others make it: with and without.
        for parts in dict.fromkeys((tuple(best), tuple(part for part in best if part != "draft"))):
            if len(parts) > 1:
                yield _together(name, [best[part] for part in sorted(parts)])  # a chip before the mesh of it


def _together(name: str, several: Sequence[Change]) -> Change:
    losses = [one.risk.loss for one in several if one.risk.loss is not None]
    worst = next((one.risk for one in several if not one.risk.is_exact), None)
    risk = SAME if worst is None else replace(worst, loss=sum(losses))
    needs = "; ".join(one.needs for one in several if one.needs)
    title = " + ".join(one.name for one in several)
    return Change(
        f"together, {name}: {title}", "", lambda one: reduce(lambda so, c: c.apply(so), several, one), risk, needs
    )
