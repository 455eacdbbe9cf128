"""The bill: rows of work by component, phase and tax, that add up to the whole program exactly.

`itemize` walks an optimised HLO module once. Every kernel's work is summed twice, by two ways that must agree: whole,
into the total, and split by who asked for it, into rows and the unattributed row. Amounts are integers, per chip and
per execution of the program; time is counted in whole picoseconds so that it adds up too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

from . import flops as flops_rules
from . import on_chip
from .attribution import PERSISTENT, Blame, Dataflow, Origin
from .chips import Chip
from .flops import Flops, flops
from .hlo import HBM, RUNS, Computation, HloError, Instruction, Module, collection_paused, parse
from .loops import executed, trip_count, while_parts
from .memory import Plan, picture
from .names import Names
from .roofline import PICOSECONDS, kernel_picoseconds
from .traffic import Access, boundary, inside, is_free, link_bytes, requests

SCHEMA = 1
GROUPS = ("attention", "mlp", "cache", "other")
FLOP_KINDS = ("matmul", "elementwise", "transcendental")
MOST = 1 << 256  # larger amounts are no bill's
# What a rule raises of an instruction whose text is not what its opcode must have.
GARBLED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


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
        moved = (self.requested_bytes, *self.hbm_read.values(), *self.hbm_write.values())
        return any((self.flops, *links, self.picoseconds, *moved))

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
            "roofline_picoseconds": self.picoseconds,
            "seconds": {"roofline": self.seconds, "measured": None},
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
        amounts = (links[0], _whole(picoseconds), links[1], _whole(requested))
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
            work.picoseconds = 0

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
    top = component.split("/", 1)[0]
    return {"attention": "attention", "mlp": "mlp", "moe": "mlp"}.get(top, "other")


def _split_cache(row: Row) -> tuple[Work, Work]:
    """(the bytes of role cache and, where bytes are what takes the time, their share of it; all the rest)."""
    work = row.work
    moved = Work(hbm_read={"cache": work.hbm_read.get("cache", 0)}, hbm_write={"cache": work.hbm_write.get("cache", 0)})
    moved.requested_bytes = moved.hbm_bytes
    if row.bound == "hbm" and work.hbm_bytes:
        moved.picoseconds = work.picoseconds * moved.hbm_bytes // work.hbm_bytes
    return moved, work - moved


# --- from a module to a bill ---------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """One kernel as it was charged: how often it runs, and what it does each time. Of `hbm_bytes`, which it would move
    without a cache, it reads `served_bytes` from one."""

    instruction: Instruction
    times: int
    flops: int
    hbm_bytes: int
    served_bytes: int = 0


Key = tuple[str | None, str, str | None, str]  # component, phase, tax, source
NOBODYS: Key = (None, "forward", None, "scope")
Masked = Mapping[Any, Fraction]  # by component, or by (component, phase)


class _Walker:
    """Charges every executed kernel of a module, once whole and once split."""

    def __init__(
        self, module: Module, dataflow: Dataflow, chip: Chip, masked: Masked, kernels: list[Kernel] | None = None
    ):
        self.module, self.dataflow, self.chip, self.masked = module, dataflow, chip, masked
        self.kernels = kernels
        self.rows: dict[Key, Work] = {}
        self.limits: dict[Key, dict[str, int]] = {}
        self.total = Work()
        self.unknown: list[Unknown] = []
        self._guessed: dict[Instruction, str] = {}  # which loops and branches, and how
        self.touched: dict[tuple[int, bool], int] = {}
        self._originals: dict[tuple[Computation, str], Instruction] = {}
        self.remade = 0  # matmul FLOPs that the compiler chose to do again
        self.timed = True  # until a kernel needs a peak that the chip's datasheet does not say
        self._is_again = False  # whether a kernel is charged that has been before, for other trips of its loop
        self._requests: dict[Instruction, list[Access]] = {}
        self._served: dict[Instruction, on_chip.Runs] = {}

    def run(self) -> None:
        if capacity := on_chip.capacity(self.chip):
            self._served = on_chip.served(self.module.entry, capacity, self._touches, costliest)
        firsts = {self.module.entry: 1}  # how often each runs as the first trip of a loop
        for kernel, times in executed(self.module.entry, self._trips, self._branch):
            if reason := self._guessed.get(kernel):
                self._unknown(kernel, reason)
            if kernel.opcode in RUNS:
                first = times if kernel.opcode == "while" else firsts.get(kernel.computation, 0)
                for called in kernel.called:
                    firsts[called] = firsts.get(called, 0) + first
            elif times and not is_free(kernel):
                first = min(firsts.get(kernel.computation, 0), times)
                self._kernel(kernel, times, first, self._served.get(kernel))

    def _touches(self, kernel: Instruction) -> list[on_chip.Touch]:
        """What a kernel touches of HBM, for the model of the cache; of other memories, nothing."""
        touches = []
        for one in self._accesses(kernel):
            size = 0 if one.on_chip or one.on_host else one.value.shape.leaves[one.leaf].bytes
            node = self.dataflow.node(one.value, one.leaf)
            touches.append(on_chip.Touch(node, min(one.bytes, size), size, one.write))
        return touches

    def _accesses(self, kernel: Instruction) -> list[Access]:
        """What a kernel reads and writes, remembered; at least its operands and results, where its text is garbled."""
        if kernel not in self._requests:
            try:
                self._requests[kernel] = requests(kernel)
            except GARBLED as error:
                self._requests[kernel] = boundary(kernel)
                self._unknown(kernel, f"what it moves cannot be told from its text: {_said(error)}")
        return self._requests[kernel]

    def _trips(self, loop: Instruction) -> int | None:
        count = trip_count(loop)
        if count is None:
            body, _ = while_parts(loop)
            self._guessed[loop] = f"trip count not known: body {body.name} billed for one trip"
        return count

    def _branch(self, conditional: Instruction) -> int:
        """The branch with most work; which one will run is not in the program, so the others are named."""
        chosen = costliest(conditional)
        sizes = [_size(branch)[0] for branch in conditional.called]
        of = f"{len(sizes)} branches of {min(sizes):,} to {max(sizes):,} FLOPs"
        self._guessed[conditional] = f"{of}: the costliest, number {chosen}, is billed"
        return chosen

    def _unknown(self, instruction: Instruction, reason: str) -> None:
        if self._is_again:
            return
        at_least = 0
        if instruction.opcode == "custom-call" or not (instruction.opcode in RUNS or instruction.computation.fused):
            at_least = sum(o.shape.bytes for o in instruction.operands) + instruction.shape.bytes
        self.unknown.append(Unknown(instruction.name, reason, at_least))

    def _kernel(self, kernel: Instruction, times: int, first: int, served: on_chip.Runs | None) -> None:
        """Charges a kernel that runs so many times, and so many of these on the first trip of a loop."""
        if served is None or served.first == served.others:
            self._run(kernel, times, served.first if served else ())
        else:
            self._run(kernel, first, served.first)
            self._is_again = True
            self._run(kernel, times - first, served.others)
            self._is_again = False
        self._requests.pop(kernel, None)

    def _run(self, kernel: Instruction, times: int, served: Sequence[int]) -> None:
        """Charges a kernel `times` times; `served`: what the cache has of each of its accesses."""
        if not times:
            return
        whole = Work()
        matmuls: dict[str, int] = {}
        charges: dict[Key, tuple[Work, dict[str, int]]] = {}

        remade = self._is_remade(kernel)

        def charge(blame: Blame, tax: str | None) -> tuple[Work, dict[str, int]]:
            phase = "recompute" if remade and blame.phase != "update" else blame.phase
            key = (blame.component, phase, tax, blame.source) if blame.component else NOBODYS
            found = charges.get(key)
            if found is None:
                found = charges[key] = (Work(), {})
            return found

        for instruction in inside(kernel):
            work, sent = self._work(instruction)
            if work is flops_rules.NOTHING and not sent:
                continue
            blame = self.dataflow.blame(instruction, kernel)
            whole.matmul += work.matmul
            whole.elementwise += work.elementwise
            whole.transcendental += work.transcendental
            whole.link_bytes += sent
            if work.matmul:
                matmuls[work.precision] = matmuls.get(work.precision, 0) + work.matmul
            for tax, part in self._masked_parts(blame, work):
                row, precisions = charge(blame, tax)
                row.matmul += part.matmul
                row.elementwise += part.elementwise
                row.transcendental += part.transcendental
                if part.matmul:
                    precisions[work.precision] = precisions.get(work.precision, 0) + part.matmul
            if sent:
                charge(blame, None)[0].link_bytes += sent
        found = self._accesses(kernel)
        if not self.module.sized:
            self._find_unsized(kernel)
        moves = self.dataflow.movement_tax(kernel) if any(not access.on_chip for access in found) else None
        source = None
        copies = kernel.opcode in ("copy", "copy-start") and not any(access.on_host for access in found)
        if moves or (copies and kernel.shape.leaves[0].elements > 1):
            largest = max(kernel.operands, key=lambda operand: operand.shape.elements, default=None)
            source = None if largest is None else self.dataflow.origin(largest).role
        for access, hits in zip(found, served or [0] * len(found), strict=True):
            blame = self.dataflow.blame(access.by, kernel)
            if access.on_chip:
                for work in (whole, charge(blame, None)[0]):
                    work.requested_bytes += access.bytes + access.padding
                continue
            origin = self.dataflow.origin(access.value, access.leaf)
            tax = access.tax or self._access_tax(access, origin, moves, source)
            whole.charge(access, origin.role, access.bytes + access.padding, hits)
            charge(blame, tax)[0].charge(access, origin.role, access.bytes, hits)
            if access.padding:
                charge(blame, tax or "padding")[0].charge(access, origin.role, access.padding)
            if tax is None and origin.tax is None and not access.on_host:
                touched = self.dataflow.node(access.value, access.leaf), access.write
                self.touched[touched] = self.touched.get(touched, 0) + access.bytes * times
        # The kernel's time is split over its charges by what each would take alone, to the last picosecond.
        whole.picoseconds, _ = self._picoseconds(whole, matmuls)
        alone = [self._picoseconds(work, precisions) for work, precisions in charges.values()]
        shares = apportion(whole.picoseconds, [picoseconds for picoseconds, _ in alone])
        self.total.add(whole, times)
        if self.kernels is not None:
            hits = sum(served)
            self.kernels.append(Kernel(kernel, times, whole.flops, whole.hbm_bytes + hits, hits))
        if remade:
            self.remade += whole.matmul * times
        for (key, (work, _)), (_, bound), share in zip(charges.items(), alone, shares, strict=True):
            work.picoseconds = share
            self.rows.setdefault(key, Work()).add(work, times)
            limits = self.limits.setdefault(key, {})
            limits[bound] = limits.get(bound, 0) + share * times

    def _is_remade(self, kernel: Instruction) -> bool:
        """Whether the compiler runs this kernel a second time. Short of memory, it clones what it can as `x.remat`,
        `x.remat2`, ...; the original may be gone, so the first of them to run is the work and the others are again."""
        name, marked, _ = kernel.name.partition(".remat")
        key = (kernel.computation, name)
        first = self._originals.setdefault(key, kernel)
        return bool(marked) and first is not kernel

    @staticmethod
    def _access_tax(access: Access, origin: Origin, moves: str | None, source: str | None) -> str | None:
        """The tax on one access of a kernel that moves data of role `source`, and would be taxed as `moves`.

        Of a persistent value the first read is needed, whoever does it; the copy it makes is the tax, written and
        read. A copy of an activation is a tax whole: its consumer could have read the original. But a copy of new
        data into an argument's own buffer is the write that is asked for.
        """
        if not access.write:
            return origin.tax or (None if origin.role in PERSISTENT else moves)
        if source is not None and origin.role in PERSISTENT and origin.tax is None:
            return (moves or "layout") if source in PERSISTENT else None
        return moves

    def _work(self, instruction: Instruction) -> tuple[Flops, int]:
        """FLOPs of an instruction, and the bytes that it sends."""
        try:
            work, sent = flops(instruction), link_bytes(instruction, self.module.num_partitions)
            if min(*(work or flops_rules.NOTHING)[:3], sent) < 0:
                raise ValueError("a negative amount")
        except GARBLED as error:
            self._unknown(instruction, f"what {instruction.opcode} does cannot be told from its text: {_said(error)}")
            return flops_rules.NOTHING, 0
        if work is None:
            if instruction.opcode == "custom-call":
                self._unknown(instruction, f"no rule for custom call {instruction.custom_call_target}")
            else:
                self._unknown(instruction, f"no rule for opcode {instruction.opcode}")
            return flops_rules.NOTHING, sent
        return work, sent

    def _find_unsized(self, kernel: Instruction) -> None:
        """Lists a kernel that touches arrays of which nobody knows how large they are."""
        values = (kernel, *kernel.operands)
        if unsized := dict.fromkeys(f"{leaf!r}" for value in values for leaf in value.shape.leaves if not leaf.sized):
            self._unknown(kernel, f"size not known, counted as no bytes: {', '.join([*unsized][:3])}")

    def _masked_parts(self, blame: Blame, work: Flops) -> Iterable[tuple[str | None, Flops]]:
        fraction = self.masked.get((blame.component, blame.phase), self.masked.get(blame.component or ""))
        if not fraction:
            return ((None, work),)
        matmul, elementwise, transcendental = (int(n * fraction) for n in work[:3])
        wasted = Flops(matmul, elementwise, transcendental, work.precision)
        useful = Flops(
            work.matmul - matmul,
            work.elementwise - elementwise,
            work.transcendental - transcendental,
            work.precision,
        )
        return ((None, useful), ("masked", wasted))

    def _picoseconds(self, work: Work, matmuls: Mapping[str, int]) -> tuple[int, str]:
        ps, bound = kernel_picoseconds(
            self.chip,
            matmuls,
            work.elementwise + work.transcendental,
            work.hbm_bytes,
            work.link_bytes,
            work.host_link_bytes,
        )
        if ps is None:
            self.timed = False
        return ps or 0, bound or "unknown"


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:100]


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


def costliest(conditional: Instruction) -> int:
    """Which of its branches is billed: the one with most work."""
    sizes = [_size(branch) for branch in conditional.called]
    return sizes.index(max(sizes))


def _size(branch: Computation) -> tuple[int, int]:
    """(FLOPs, bytes of results) of a branch, its loops unrolled: how the branches of a conditional are ranked."""
    work = size = 0
    for i, times in executed(branch, trip_count, lambda nested: 0):
        work += times * sum(sum(one[:3]) for one in map(flops, inside(i)) if one is not None)
        size += 0 if is_free(i) else times * i.shape.bytes
    return work, size


def itemize_module(
    module: Module,
    chip: Chip,
    *,
    roles: Mapping[str, str] | None = None,
    masked: Masked | None = None,
    components: tuple[str, ...] | Mapping[str, str] | None = None,
    program: Mapping[str, Any] | None = None,
    kernels: list[Kernel] | None = None,
    plan: Plan | None = None,
) -> Bill:
    """The bill of an optimised module on `chip`.

    Args:
      roles: argument name -> role, for what the arguments' own names do not say.
      masked: component, or (component, phase) -> share of its FLOPs that the program computes and then masks away.
      components: a table of patterns -> components beside our own (see names.Names), or the only scopes to look for.
      program: what to say about it (model, step, ...).
      kernels: a list that every kernel is to be added to, where somebody wants to know them one by one.
      plan: what the compiler says of its memory; without it, that is worked out from the schedule.

    Raises:
      HloError: the amounts are larger than any program's.
    """
    with collection_paused():
        return _itemize(module, chip, roles or {}, masked or {}, components, dict(program or {}), kernels, plan)


def _itemize(
    module: Module,
    chip: Chip,
    roles: Mapping[str, str],
    masked: Masked,
    components: tuple[str, ...] | Mapping[str, str] | None,
    program: dict[str, Any],
    kernels: list[Kernel] | None,
    plan: Plan | None,
) -> Bill:
    names = Names(components)
    dataflow = Dataflow(module, roles, names)
    walker = _Walker(module, dataflow, chip, masked, kernels)
    walker.run()
    if max(walker.total.magnitude) > MOST:
        raise HloError(f"its loops and sizes make amounts of more than 2^{MOST.bit_length() - 1}: no chip runs that")
    bill = Bill(
        program,
        _rows(walker, names),
        walker.rows.get(NOBODYS, Work()),
        walker.unknown,
        walker.total,
        unattributed_bound=_bound(walker.limits.get(NOBODYS, {})),
        notes=_sources(walker),
    )
    bill.ideal_flops = (
        bill.total.matmul
        - bill.tax("masked").matmul
        - sum(row.work.matmul for row in bill.rows if row.phase == "recompute" and row.tax is None)
    )
    bill.ideal_hbm_bytes = _ideal_bytes(dataflow, walker.touched)
    bill.timed = walker.timed
    bill.remade_flops = walker.remade
    bill.memory = picture(dataflow, plan, chip.usable_hbm_bytes)
    if not bill.timed:
        bill.forget_time()
    bill.check()
    return bill


def _rows(walker: _Walker, names: Names) -> list[Row]:
    """One a component, phase and tax, in the order of `names`."""
    found: dict[tuple[str, str, str | None], Row] = {}
    limits: dict[tuple[str, str, str | None], dict[str, int]] = {}
    most: dict[tuple[str, str, str | None], tuple[int, ...]] = {}
    for key, work in walker.rows.items():
        component, phase, tax, source = key
        if component is None or not work:
            continue
        whole = component, phase, tax
        row = found.setdefault(whole, Row(component, phase, tax, Work()))
        row.work.add(work)
        if work.magnitude > most.get(whole, ()):
            most[whole], row.source = work.magnitude, source
        for bound, picoseconds in walker.limits[key].items():
            of_row = limits.setdefault(whole, {})
            of_row[bound] = of_row.get(bound, 0) + picoseconds
    for key, row in found.items():
        row.bound = _bound(limits[key])
    order = {name: n for n, name in enumerate(names.order)}
    return sorted(
        found.values(),
        key=lambda row: (order.get(row.component, len(order)), row.component, row.phase, row.tax or ""),
    )


_NAMED_BY = {
    "scope": "scopes",
    "synonym": "names that are known as synonyms",
    "argument": "the names of arguments",
    "inferred": "the shape of the dataflow",
    None: "nothing",
}


def _sources(walker: _Walker) -> list[str]:
    """A line that says by what how much is named, where anything but scopes does."""
    named: dict[str | None, Work] = {}
    for (component, _, _, source), work in walker.rows.items():
        named.setdefault(None if component is None else source, Work()).add(work)
    if named.keys() <= {"scope", None}:
        return []
    flops, moved = max(1, walker.total.matmul), max(1, walker.total.hbm_bytes)
    shares = [
        f"{said} {named[source].matmul / flops:.1%} / {named[source].hbm_bytes / moved:.1%}"
        for source, said in _NAMED_BY.items()
        if source in named
    ]
    return [f"matmul FLOPs / HBM bytes that are told apart by {'; by '.join(shares)}"]


def _bound(limits: Mapping[str, int]) -> str:
    return max(limits, key=lambda bound: limits[bound]) if limits else "latency"


def _ideal_bytes(dataflow: Dataflow, touched: Mapping[tuple[int, bool], int]) -> int:
    """The least HBM traffic for the same arguments and results: what was touched of each argument, at most once, what
    was changed of each donated one, at most once, and each new result written once."""
    module = dataflow.module
    size: dict[int, int] = {}
    donated: set[int] = set()
    for parameter in module.entry.parameters:
        for leaf, shape in enumerate(parameter.shape.leaves):
            node = dataflow.node(parameter, leaf)
            size[node] = size.get(node, 0) + shape.bytes
            if parameter.number not in module.entry.kept:
                donated.add(node)
    least = 0
    for (node, write), amount in touched.items():
        if node in size and (not write or node in donated):
            least += min(amount, size[node])
    leaves = enumerate(module.entry.root.shape.leaves)
    return least + sum(shape.bytes for leaf, shape in leaves if leaf not in module.aliases and shape.space == HBM)


def itemize_text(text: str, chip: Chip, **options: Any) -> Bill:
    """The bill of optimised HLO text; see `itemize_module`."""
    with collection_paused():
        return itemize_module(parse(text), chip, **options)
