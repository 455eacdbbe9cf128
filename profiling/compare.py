"""Bills side by side, what differs most first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .bill import SCHEMA, Bill, Work


@dataclass(frozen=True)
class Line:
    """One row of each of several bills, in their order; without work where a bill has no such row.

    component: None is the work that no component can be named for.
    """

    component: str | None
    phase: str
    tax: str | None
    works: tuple[Work, ...]

    @property
    def spread(self) -> tuple[int, ...]:
        """How far apart the bills are, as `Work.magnitude` has it; zeros where they are alike."""
        if not self.differs:
            return ()
        return tuple(max(amounts) - min(amounts) for amounts in zip(*(w.magnitude for w in self.works), strict=True))

    @property
    def differs(self) -> bool:
        """Whether any bill has other work here than the first."""
        return any(work != self.works[0] for work in self.works)


@dataclass(frozen=True)
class Comparison:
    """Two or more bills by name. All are held against the first. Amounts are per chip, as in each of them."""

    bills: Mapping[str, Bill]

    @property
    def timed(self) -> bool:
        """Whether all have a roofline time. If not, bytes are what lines are ranked by."""
        return all(bill.timed for bill in self.bills.values())

    @property
    def lines(self) -> list[Line]:
        """Every row of any bill and the unattributed one, those that differ most in time (else bytes) first."""
        tables = [
            {(row.component, row.phase, row.tax): row.work for row in bill.rows}
            | {(None, "forward", None): bill.unattributed}
            for bill in self.bills.values()
        ]
        keys = dict.fromkeys(key for table in tables for key in table)
        lines = [Line(*key, tuple(table.get(key, Work()) for table in tables)) for key in keys]
        if self.timed:
            return sorted(lines, key=lambda line: line.spread, reverse=True)
        return sorted(lines, key=lambda line: line.spread[1:], reverse=True)

    def to_json(self) -> dict[str, Any]:
        """`bills`, each with its name, and `differences`: what each has more than the first, ranked row by row."""
        (first, base), *others = self.bills.items()
        differences = []
        for name, bill in others:
            more = (bill - base).to_json()
            differences.append(
                {"bill": name, "minus": first} | {key: more[key] for key in ("rows", "unattributed", "total")}
            )
        bills = [{"name": name} | bill.to_json() for name, bill in self.bills.items()]
        return {"schema": SCHEMA, "bills": bills, "differences": differences}
