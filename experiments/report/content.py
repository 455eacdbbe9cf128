"""What the report says, before it is a page: every driver's finding or why there is none, and the published figures."""

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from typing import Any

from ...profiling import render
from ...profiling.assumptions import GIVEN, HISTORY
from .. import published
from ..drivers.finding import Finding
from ..published import Case
from .registry import Entry

SCHEMA = 1
PACKAGES = ("stepbill", "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
STALE_DAYS = 180  # after which a price may be another
NAMED = 3  # drivers in the answer


@dataclass(frozen=True)
class Section:
    """A driver's. failure: why there is no finding, in one line."""

    entry: Entry
    question: str
    command: str
    finding: Finding | None
    failure: str = ""

    @property
    def verdict(self) -> str:
        return self.finding.verdict if self.finding else "no finding"

    @property
    def headline(self) -> str:
        if self.finding is None:
            return self.failure
        return self.finding.headline or self.finding.evidence

    @property
    def factor(self) -> float | None:
        return self.finding.factor if self.finding else None


@dataclass(frozen=True)
class Figure:
    """A published figure and what comes out here; None where its step could not be compiled."""

    case: Case
    ours: float | None

    @property
    def verdict(self) -> str:
        return "not compiled" if self.ours is None else published.verdict(self.case, self.ours)

    @property
    def difference(self) -> float | None:
        """As a share of the published one."""
        return None if self.ours is None else self.ours / self.case.published - 1


@dataclass(frozen=True)
class Price:
    """name: of the assumption. date: as it was given, such as 2026-11. days: how old it may be, at most."""

    name: str
    date: str
    days: int


@dataclass(frozen=True)
class Report:
    """All of it. made: on which day. title: of the target. command: that makes it again."""

    target: str
    title: str
    made: date
    command: str
    sections: tuple[Section, ...]
    figures: tuple[Figure, ...]
    versions: Mapping[str, str]

    @property
    def findings(self) -> list[Finding]:
        return [section.finding for section in self.sections if section.finding is not None]

    @property
    def ranked(self) -> list[Section]:
        """Those of which a factor is known, the largest first."""
        known = [section for section in self.sections if section.factor is not None]
        return sorted(known, key=lambda section: -(section.factor or 0))

    @property
    def counts(self) -> dict[str, int]:
        """How many claims hold, do not, or cannot be told."""
        verdicts = [finding.verdict for finding in self.findings]
        return {verdict: verdicts.count(verdict) for verdict in ("holds", "does not hold", "cannot be told")}

    @property
    def answer(self) -> tuple[str, ...]:
        """The question of the title, answered from what was found, in sentences."""
        if not self.findings:
            return (f"On {self.title} nothing could be told: no driver has a finding.",)
        told = []
        if largest := self.ranked[:NAMED]:
            each = joined([f"{section.entry.topic} (up to {times(section.factor)})" for section in largest])
            more = len(self.ranked) - len(largest)
            beside = f", and {more} more {'factor' if more == 1 else 'factors'} below" if more else ""
            told.append(f"Because what a token costs is a product of many factors, the largest of them {each}{beside}.")
        counts = [f"{count} {_plural(verdict, count)}" for verdict, count in self.counts.items() if count]
        whole = len(self.findings)
        claims = "The claim" if whole == 1 else f"Of {whole} claims"
        told.append(f"{claims} about it, tested below on {self.title}: {joined(counts)}.")
        return tuple(told)

    @property
    def prices(self) -> list[Price]:
        """Every price that was used, once, the oldest first."""
        used = {
            one["name"]: one["date"]
            for finding in self.findings
            for one in finding.assumptions
            if str(one.get("unit", "")).startswith("$")
            and one.get("status") not in (HISTORY, GIVEN)
            and one.get("date")
        }
        found = [Price(name, said, (self.made - _earliest(said)).days) for name, said in used.items()]
        return sorted(found, key=lambda price: (-price.days, price.name))

    @property
    def stale(self) -> list[Price]:
        """Those that are so old that they may be others by now."""
        return [price for price in self.prices if price.days > STALE_DAYS]

    def to_json(self) -> dict[str, Any]:
        """All that the page shows."""
        prices = self.prices
        return {
            "schema": SCHEMA,
            "target": self.target,
            "made": self.made.isoformat(),
            "command": self.command,
            "versions": dict(self.versions),
            "answer": list(self.answer),
            "prices": {
                "oldest": asdict(prices[0]) if prices else None,
                "newest": asdict(prices[-1]) if prices else None,
                "may_be_stale": [asdict(price) for price in self.stale],
            },
            "sections": [
                {
                    **asdict(section.entry),
                    "question": section.question,
                    "command": section.command,
                    "verdict": section.verdict,
                    "failure": section.failure,
                    "finding": section.finding and section.finding.to_json(),
                }
                for section in self.sections
            ],
            "published": [
                asdict(figure.case) | {"ours": figure.ours, "difference": figure.difference, "verdict": figure.verdict}
                for figure in self.figures
            ],
        }


def times(factor: float | None) -> str:
    """12.34 -> "12×"; 1.234 -> "1.2×"."""
    if factor is None:
        return render.NONE
    return f"{factor:,.0f}×" if factor >= 10 else f"{factor:.1f}×"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _plural(verdict: str, count: int) -> str:
    return verdict if count == 1 else {"holds": "hold", "does not hold": "do not hold"}.get(verdict, verdict)


def _earliest(said: str) -> date:
    """The first day that 2026, 2026-11 or 2026-11-24 may mean."""
    year, month, day = (*map(int, re.findall(r"\d+", said)), 1, 1)[:3]
    return date(year, month, day)


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
