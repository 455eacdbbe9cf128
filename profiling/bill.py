"""The bill: rows of work by component, phase and tax, that add up to the whole program exactly.

Amounts are integers, per chip and per execution of the program; time is counted in whole picoseconds so that it adds up
too. `walk.py` makes a bill of a compiled program; this is what it is, its sums and differences, and its JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..model.scopes import ENCODERS
from .roofline import PICOSECONDS
from .traffic import Access

SCHEMA = 1
GROUPS = ("attention", "mlp", "cache", "other")
FLOP_KINDS = ("matmul", "elementwise", "transcendental")
MOST = 1 << 256  # larger amounts are no bill's


def apportion(amount: int, weights: list[int]) -> list[int]:
    """Splits an integer by weights, exactly: largest remainders get the units that rounding leaves."""
    total = sum(weights)
    if not weights:
        return []
    if not total:
        return [amount, *[0] * (len(weights) - 1)]
    shares = [amount * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda n: -(amount * weights[n] % total))
    for n in by_remainder[: amount - sum(shares)]:
        shares[n] += 1
    return shares


@dataclass(slots=True)
class Work:
    """What was done, in integers that add up.

    Attributes:
      matmul, elementwise, transcendental: FLOPs.
      hbm_read, hbm_write: bytes by role, after what on-chip memory serves (see on_chip.py).
      link_bytes: sent over the chip's links to other chips.
      host_link_bytes: moved between the chip and its host's memory, either way.
      picoseconds: roofline time.
      requested_bytes: read and written by kernels, whatever memory it is that serves them, but for the host's.
      measured_picoseconds: device time by a trace, of a bill that has one (see trace.py); else 0.
      reread_bytes: HBM reads of operands that large products and attention read more than once (see on_chip.py). Not in
        `hbm_read`, where each is counted once: what has to be moved in whatever order it is computed.
      predicted_picoseconds: what it will take (see roofline.py), of a bill that predicts; else 0.
    """

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0
    hbm_read: dict[str, int] = field(default_factory=dict)
    hbm_write: dict[str, int] = field(default_factory=dict)
    link_bytes: int = 0
    picoseconds: int = 0
    host_link_bytes: int = 0
    requested_bytes: int = 0
    measured_picoseconds: int = 0
    predicted_picoseconds: int = 0
    reread_bytes: int = 0

    @property
    def flops(self) -> int:
        """All FLOPs: matmul, elementwise and transcendental."""
        return self.matmul + self.elementwise + self.transcendental

    @property
    def hbm_read_bytes(self) -> int:
        return sum(self.hbm_read.values())

    @property
    def hbm_write_bytes(self) -> int:
        return sum(self.hbm_write.values())

    @property
    def hbm_bytes(self) -> int:
        return self.hbm_read_bytes + self.hbm_write_bytes

    @property
    def seconds(self) -> float:
        """Roofline seconds."""
        return self.picoseconds * 1e-12

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds `times` times `other` to this one."""
        self.matmul += other.matmul * times
        self.elementwise += other.elementwise * times
        self.transcendental += other.transcendental * times
        self.link_bytes += other.link_bytes * times
        self.host_link_bytes += other.host_link_bytes * times
        self.picoseconds += other.picoseconds * times
        self.requested_bytes += other.requested_bytes * times
        self.measured_picoseconds += other.measured_picoseconds * times
        self.predicted_picoseconds += other.predicted_picoseconds * times
        self.reread_bytes += other.reread_bytes * times
        for mine, theirs in ((self.hbm_read, other.hbm_read), (self.hbm_write, other.hbm_write)):
            for role, amount in theirs.items():
                mine[role] = mine.get(role, 0) + amount * times

    def __add__(self, other: "Work") -> "Work":
        total = Work()
        total.add(self)
        total.add(other)
        return total

    def __sub__(self, other: "Work") -> "Work":
        total = Work()
        total.add(self)
        total.add(other, -1)
        return total

    @property
    def magnitude(self) -> tuple[int, ...]:
        """By which work, or a difference of work, is ranked: time, then HBM bytes, FLOPs and bytes on links."""
        return tuple(map(abs, (self.picoseconds, self.hbm_bytes, self.flops, self.link_bytes, self.host_link_bytes)))

    def __bool__(self) -> bool:
        links = self.link_bytes, self.host_link_bytes
        moved = (self.requested_bytes, self.reread_bytes, *self.hbm_read.values(), *self.hbm_write.values())
        times = self.picoseconds, self.measured_picoseconds, self.predicted_picoseconds
        return any((self.flops, *links, *times, *moved))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Work) and not (self - other)

    def charge(self, access: Access, role: str, amount: int, served: int = 0) -> None:
        """Adds `amount` bytes to the role's reads or writes, less what a cache has `served` of them; or to what goes
        over the link to the host."""
        if access.on_host:
            self.host_link_bytes += amount
            return
        self.requested_bytes += amount
        side = self.hbm_write if access.write else self.hbm_read
        side[role] = side.get(role, 0) + amount - served

    def to_json(self) -> dict[str, Any]:
        """The keys of schema 1."""
        return {
            "flops": {kind: getattr(self, kind) for kind in FLOP_KINDS},
            "hbm_read": {role: n for role, n in sorted(self.hbm_read.items()) if n},
            "hbm_write": {role: n for role, n in sorted(self.hbm_write.items()) if n},
            "link_bytes": self.link_bytes,
            "host_link_bytes": self.host_link_bytes,
            "requested_bytes": self.requested_bytes,
            "reread_bytes": self.reread_bytes,
            "roofline_picoseconds": self.picoseconds,
            "measured_picoseconds": self.measured_picoseconds,
            "predicted_picoseconds": self.predicted_picoseconds,
            "seconds": {
                "roofline": self.seconds,
                "measured": self.measured_picoseconds * 1e-12,
                "predicted": self.predicted_picoseconds * 1e-12,
            },
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Work":
        """What `to_json` wrote; ValueError, KeyError, TypeError or AttributeError for what it did not."""
        picoseconds = entry.get("roofline_picoseconds")
        if picoseconds is None:  # not known, or written before there was this key
            picoseconds = round((entry["seconds"]["roofline"] or 0) * PICOSECONDS)
        read, write = ({role: _whole(n) for role, n in entry[side].items()} for side in ("hbm_read", "hbm_write"))
        matmul, elementwise, transcendental = (_whole(entry["flops"][kind]) for kind in FLOP_KINDS)
        links = (_whole(entry["link_bytes"]), _whole(entry.get("host_link_bytes", 0)))  # once there was one link
        requested = entry.get("requested_bytes", sum((*read.values(), *write.values())))  # once there was no model
        measured, predicted = (_whole(entry.get(f"{how}_picoseconds") or 0) for how in ("measured", "predicted"))
        again = _whole(entry.get("reread_bytes", 0))
        amounts = (links[0], _whole(picoseconds), links[1], _whole(requested), measured, predicted, again)
        return cls(matmul, elementwise, transcendental, read, write, *amounts)


@dataclass(slots=True)
class Row:
    """The work of one component in one phase under one tax (None: work the model asks for).

    source: what names most of it, one of names.SOURCES.
    """

    component: str
    phase: str
    tax: str | None
    work: Work
    bound: str = "latency"
    source: str = "scope"


@dataclass(frozen=True, slots=True)
class Unknown:
    """What could not be costed: the total may be too small by what this instruction does beyond its operands."""

    instruction: str
    reason: str
    hbm_bytes_at_least: int


@dataclass
class Bill:
    """Rows + unattributed = total, exactly.

    Attributes:
      program: what was billed: model, step, batch, target, chips, ... (JSON values).
      rows, unattributed, unknown: the bill. total: summed kernel by kernel, apart from the rows.
      ideal_flops, ideal_hbm_bytes: the least any program could do for the same result.
      xla, closed_form, differences: the reconciliation; None and [] where there is nothing to hold it against.
      memory, price: bytes by what they hold; dollars. See `to_json`.
      notes: lines that a reader must know (how it was compiled, what was assumed).
      measured: what a run on a device took as a whole, and how it was timed (see trace.py); None without one.
      predicted: by what its time is predicted (see roofline.Assumed); None where a peak is not known.
      remade_flops: matmul FLOPs that the compiler itself chose to do again, to save memory; in phase recompute.
      timed: whether every kernel's roofline time is known; else no time is, and picoseconds are all zero.
    """

    program: dict[str, Any]
    rows: list[Row]
    unattributed: Work
    unknown: list[Unknown]
    total: Work
    ideal_flops: int | None = None
    ideal_hbm_bytes: int | None = None
    xla: dict[str, int] | None = None
    closed_form: dict[str, int] | None = None
    differences: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)
    price: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unattributed_bound: str = "latency"
    timed: bool = True
    remade_flops: int = 0
    measured: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises AssertionError where rows and unattributed do not make the total."""
        summed = Work()
        for row in self.rows:
            summed.add(row.work)
        summed.add(self.unattributed)
        if summed != self.total:
            raise AssertionError(f"the bill does not add up: rows + unattributed = {summed}, total = {self.total}")

    def group(self, name: str) -> Work:
        """One headline group: "attention", "mlp", "cache" or "other" (what is left of the rows).

        Cache is every byte of role cache, whichever component moves it, and all else of attention/cache; so the four
        groups and the unattributed row add up to the total. Where a row is bound by HBM, its time follows its bytes.
        """
        if name not in GROUPS:
            raise KeyError(f"group {name!r} is not one of {', '.join(GROUPS)}")
        found = Work()
        for row in self.rows:
            home = _home_group(row.component)
            moved, rest = _split_cache(row)
            if name == home:
                found.add(rest)
            if name == "cache":
                found.add(moved)
        for side in (found.hbm_read, found.hbm_write):
            for role in [role for role, amount in side.items() if not amount]:
                del side[role]
        return found

    def component(self, prefix: str, phase: str | None = None) -> Work:
        """Everything under one component path, in one phase or in all."""
        found = Work()
        for row in self.rows:
            if (row.component == prefix or row.component.startswith(prefix + "/")) and phase in (None, row.phase):
                found.add(row.work)
        return found

    def tax(self, name: str) -> Work:
        """Everything charged to one tax."""
        found = Work()
        for row in self.rows:
            if row.tax == name:
                found.add(row.work)
        return found

    def __add__(self, other: "Bill") -> "Bill":
        return self._combine(other, 1)

    def __sub__(self, other: "Bill") -> "Bill":
        """What this bill has more than the other, row by row: only those that differ, those that do most first."""
        bill = self._combine(other, -1)
        bill.rows = sorted((row for row in bill.rows if row.work), key=lambda row: row.work.magnitude, reverse=True)
        return bill

    def _combine(self, other: "Bill", sign: int) -> "Bill":
        rows = {
            (row.component, row.phase, row.tax): replace(row, work=row.work + Work()) for row in self.rows
        }  # copies: the sum must not change its parts
        for row in other.rows:
            key = (row.component, row.phase, row.tax)
            rows.setdefault(key, Row(row.component, row.phase, row.tax, Work(), row.bound)).work.add(row.work, sign)
        unattributed, total = self.unattributed + Work(), self.total + Work()
        unattributed.add(other.unattributed, sign)
        total.add(other.total, sign)
        bill = Bill({"of": [self.program, other.program]}, list(rows.values()), unattributed, [], total)
        bill.unknown = [*self.unknown, *other.unknown]
        bill.timed = self.timed and other.timed
        if not bill.timed:
            bill.forget_time()
        bill.check()
        return bill

    def forget_time(self) -> None:
        """No time at all, where that of some kernel is not known: a sum of the others would pass for the whole."""
        for work in (self.total, self.unattributed, *(row.work for row in self.rows)):
            work.picoseconds = work.predicted_picoseconds = 0

    @property
    def efficiency(self) -> float | None:
        """total / ideal HBM bytes: 1 is a program that moves nothing it need not."""
        return self.total.hbm_bytes / self.ideal_hbm_bytes if self.ideal_hbm_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Schema 1, documented in the README. All amounts are per chip."""
        per_picosecond = self._dollars_per_picosecond()

        def entry(work: Work, bound: str | None = None) -> dict[str, Any]:
            out = work.to_json()
            if not self.timed:
                out["seconds"]["roofline"] = out["roofline_picoseconds"] = None
                bound = None if bound is None else "unknown"
            if self.measured is None:
                out["seconds"]["measured"] = out["measured_picoseconds"] = None
            if self.predicted is None:
                out["seconds"]["predicted"] = out["predicted_picoseconds"] = None
            over = work.measured_picoseconds / work.picoseconds if self.measured and work.picoseconds else None
            out["over_roofline"] = over
            out["share"] = work.picoseconds / self.total.picoseconds if self.total.picoseconds else None
            out["dollars_per_million_tokens"] = None if per_picosecond is None else work.picoseconds * per_picosecond
            return out if bound is None else out | {"bound": bound}

        return {
            "schema": SCHEMA,
            "program": self.program,
            "rows": [
                {"component": r.component, "phase": r.phase, "tax": r.tax, "source": r.source} | entry(r.work, r.bound)
                for r in self.rows
            ],
            "groups": {name: entry(self.group(name)) for name in GROUPS},
            "unattributed": entry(self.unattributed, self.unattributed_bound),
            "unknown": [
                {"instruction": u.instruction, "reason": u.reason, "hbm_bytes_at_least": u.hbm_bytes_at_least}
                for u in self.unknown
            ],
            "total": entry(self.total),
            "reconcile": {"xla": self.xla, "closed_form": self.closed_form, "differences": self.differences},
            "ideal": {"flops": self.ideal_flops, "hbm_bytes": self.ideal_hbm_bytes},
            "memory": self.memory,
            "price": self.price,
            "measured": self.measured,
            "predicted": self.predicted,
            "notes": self.notes,
        }

    @classmethod
    def from_json(cls, saved: Any) -> "Bill":
        """The bill that `to_json` wrote, here or in a file; ValueError says what is wrong with what it did not."""
        try:
            if saved["schema"] != SCHEMA:
                raise ValueError(f"schema is {saved['schema']!r}; it must be {SCHEMA}")
            unattributed, total, against = saved["unattributed"], saved["total"], saved["reconcile"]
            bill = cls(
                _program(saved["program"]),
                rows=[_row(row) for row in saved["rows"]],
                unattributed=Work.from_json(unattributed),
                unknown=[_unknown(one) for one in saved["unknown"]],
                total=Work.from_json(total),
                ideal_flops=_known(saved["ideal"]["flops"]),
                ideal_hbm_bytes=_known(saved["ideal"]["hbm_bytes"]),
                xla=None if against["xla"] is None else _numbers(against["xla"]),
                closed_form=None if against["closed_form"] is None else _numbers(against["closed_form"]),
                differences=[_difference(one) for one in against["differences"]],
                memory=_memory(saved["memory"]),
                price=_numbers(saved["price"]),
                notes=[_text(note) for note in saved["notes"]],
                unattributed_bound=_text(unattributed["bound"]),
                timed=total["seconds"]["roofline"] is not None,
                measured=None if saved.get("measured") is None else _measured(saved["measured"]),
                predicted=None if saved.get("predicted") is None else _predicted(saved["predicted"]),
            )
            bill.check()
        except KeyError as error:
            raise ValueError(f"it has no {error}") from None
        except (TypeError, AttributeError, AssertionError, OverflowError) as error:
            raise ValueError(str(error)) from None
        return bill

    def _dollars_per_picosecond(self) -> float | None:
        dollars = self.price.get("dollars_per_million_tokens")
        return dollars / self.total.picoseconds if dollars is not None and self.total.picoseconds else None

    def __str__(self) -> str:
        from .render import to_text

        return to_text(self)

    def dumps(self) -> str:
        """The JSON text."""
        return json.dumps(self.to_json())


# What a saved bill must be made of; ValueError where it is not.


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) > MOST:
        raise ValueError(f"{value!r} must be a whole number")
    return value


def _known(value: Any) -> Any:
    """A number, or None for what is not known."""
    if value is not None and (type(value) not in (int, float) or not abs(value) <= MOST):
        raise ValueError(f"{value!r} must be a number")
    return value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _known(value) for name, value in values.items()}


def _memory(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, but for what names the moment of the peak and what is alive then."""
    memory = dict(values)
    named = {key: memory.pop(key) for key in ("by_role", "plan", "peak_at", "largest") if key in memory}
    for one in (*named.get("largest", ()), *filter(None, [named.get("peak_at")])):
        for key, value in one.items():
            _whole(value) if key == "bytes" else value is None or _text(value)
    _numbers(named.get("by_role", {}))
    return _numbers(memory) | named


def _measured(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers, but for texts and lists of numbers, those of trace.facts."""
    numbers = dict(facts)
    for name in ("device", "how", "split"):
        _text(numbers.pop(name))
    for name in ("traced_seconds", "traced_clock_seconds", "untraced_seconds"):
        times = numbers.pop(name)
        if times is not None and not [_some(time) for time in times]:
            raise ValueError(f"{name} is {times!r}; it must have a number or be null")
    if facts["traced_seconds"] is None:
        raise ValueError("traced_seconds is null; it must be numbers")
    for name in ("gaps", "unjoined"):
        for value in numbers.pop(name).values():
            _some(value)
    for name in ("busy_seconds", "idle_seconds", "loop_seconds", "traced_median_seconds"):
        _some(numbers.pop(name))
    for name in (
        *("steps", "joined", "coverage", "seconds", "flops_per_second", "hbm_bytes_per_second", "mfu", "mbu"),
        *("traced_clock_median_seconds", "untraced_median_seconds"),
    ):
        _known(numbers.pop(name))
    return dict(facts) | {"gaps": {name: _some(facts["gaps"][name]) for name in ("count", "largest_seconds")}}


def _some(value: Any) -> float:
    """A number, and known."""
    if _known(value) is None:
        raise ValueError("null must be a number")
    return value


def _predicted(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As roofline.Assumed has it, and the number of kernels."""
    _text(facts["peaks"])
    _whole(facts["kernels"])
    for name in ("launch_seconds", "dispatch_seconds"):
        _some(facts[name])
    if (of := facts["measured_on"]) is not None:
        for name in ("device", "date", "jax"):
            _text(of[name])
    return dict(facts)


def _program(about: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [
        about[name] for name in ("parameters", "batch", "context", "tokens", "chips") if about.get(name) is not None
    ]
    for size in (*sizes, *(about.get("mesh") or {}).values()):
        _whole(size)
    return dict(about)


def _unknown(one: Mapping[str, Any]) -> Unknown:
    return Unknown(_text(one["instruction"]), _text(one["reason"]), _whole(one["hbm_bytes_at_least"]))


def _difference(one: Mapping[str, Any]) -> dict[str, Any]:
    return dict(one) | {
        "quantity": _text(one["quantity"]),
        "amount": _whole(one["amount"]),
        "reason": _text(one["reason"]),
    }


def _row(row: Mapping[str, Any]) -> Row:
    tax = None if row["tax"] is None else _text(row["tax"])
    component, phase, bound = (_text(row[key]) for key in ("component", "phase", "bound"))
    return Row(component, phase, tax, Work.from_json(row), bound, _text(row.get("source", "scope")))


def _home_group(component: str) -> str:
    if component == "attention/cache":
        return "cache"
    top, _, rest = component.partition("/")
    if top in ENCODERS:
        top = rest.partition("/")[0]
    return {"attention": "attention", "mlp": "mlp", "moe": "mlp"}.get(top, "other")


def _split_cache(row: Row) -> tuple[Work, Work]:
    """(the bytes of role cache and, where bytes are what takes the time, their share of it; all the rest)."""
    work = row.work
    moved = Work(hbm_read={"cache": work.hbm_read.get("cache", 0)}, hbm_write={"cache": work.hbm_write.get("cache", 0)})
    moved.requested_bytes = moved.hbm_bytes
    if row.bound == "hbm" and work.hbm_bytes:
        moved.picoseconds = work.picoseconds * moved.hbm_bytes // work.hbm_bytes
        moved.measured_picoseconds = work.measured_picoseconds * moved.hbm_bytes // work.hbm_bytes
        moved.predicted_picoseconds = work.predicted_picoseconds * moved.hbm_bytes // work.hbm_bytes
    return moved, work - moved
