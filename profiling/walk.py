"""From an optimised HLO module to its bill: one walk over all that is executed.

Every kernel's work is summed twice, by two ways that must agree: whole, into the total, and split by who asked for it,
into rows and the unattributed row. What a kernel was measured to take is split as its roofline time is.
"""

from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import compress
from typing import Any, NamedTuple

from . import calls, on_chip, ragged
from . import flops as flops_rules
from .attribution import NOBODY, PERSISTENT, Blame, Dataflow, Origin
from .bill import MOST, Bill, Row, Unknown, Work, apportion
from .calibration import Calibration
from .chips import Chip
from .flops import Flops, Product, flops, product
from .hlo import HBM, RUNS, Computation, HloError, Instruction, Module, collection_paused, parse
from .loops import executed, trip_count, while_parts
from .memory import Plan, picture
from .names import Names
from .roofline import Assumed, kernel_picoseconds, predict
from .traffic import Access, boundary, inside, is_free, link_bytes, requests

# What a rule raises of an instruction whose text is not what its opcode must have.
GARBLED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Where a chip's peaks are not known, a kernel's time is split as though it did so many FLOPs while it moves a byte.
FLOPS_PER_BYTE = 16
_REORDERS = frozenset(["transpose", "reverse"])


class Kernel(NamedTuple):
    """One kernel as it was charged: how often it runs, and what it does each time. Of `hbm_bytes`, which it would move
    without a cache, it reads `served_bytes` from one.

    products: what of `flops` is matmul; vector_flops, transcendentals: what is not. picoseconds: of the roofline.
    reorders: whether it writes elements in another order than it reads them. written_bytes: what of `hbm_bytes` it
    writes. reaches: (bytes, reuse distance) of each access to HBM, see on_chip.distances; () where it is not known.
    """

    instruction: Instruction
    times: int
    flops: int
    hbm_bytes: int
    served_bytes: int = 0
    products: tuple[Product, ...] = ()
    vector_flops: int = 0
    transcendentals: int = 0
    picoseconds: int = 0
    reorders: bool = False
    written_bytes: int = 0
    reaches: tuple[tuple[int, int], ...] = ()


Key = tuple[str | None, str, str | None, str]  # component, phase, tax, source
NOBODYS: Key = (None, "forward", None, "scope")
Masked = Mapping[Any, Fraction]  # by component, or by (component, phase)


class _Walker:
    """Charges every executed kernel of a module, once whole and once split."""

    def __init__(
        self,
        module: Module,
        dataflow: Dataflow,
        chip: Chip,
        masked: Masked,
        kernels: list[Kernel] | None = None,
        measured: Mapping[str, int] | None = None,
        calibrated: bool = False,
    ):
        self.module, self.dataflow, self.chip, self.masked = module, dataflow, chip, masked
        self.kernels, self.measured = [] if kernels is None else kernels, measured
        self.calibrated = calibrated
        self._shares: dict[str, dict[Key, int]] = {}  # of each kernel by name: by what its time is split
        self.rows: dict[Key, Work] = {}
        self.limits: dict[Key, dict[str, int]] = {}
        self.total = Work()
        self.unknown: list[Unknown] = []
        self.remarks: dict[str, None] = {}  # on what kernels cost
        self._guessed: dict[Instruction, str] = {}  # which loops and branches, and how
        self.touched: dict[tuple[int, bool], int] = {}
        self._originals: dict[tuple[Computation, str], Instruction] = {}
        self.remade = 0  # matmul FLOPs that the compiler chose to do again
        self.timed = True  # until a kernel needs a peak that the chip's datasheet does not say
        self._is_again = False  # whether a kernel is charged that has been before, for other trips of its loop
        self._requests: dict[Instruction, list[Access]] = {}
        self._served: dict[Instruction, on_chip.Runs] = {}
        self._distances: dict[Instruction, on_chip.Runs] = {}

    def run(self) -> None:
        if capacity := on_chip.capacity(self.chip):
            self._served = on_chip.served(self.module.entry, capacity, self._touches, costliest)
        elif self.calibrated:
            self._distances = on_chip.distances(self.module.entry, self._touches, costliest)
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
                self._kernel(kernel, times, first)
        if self.measured is not None:
            self.charge_times("measured_picoseconds", self.measured)

    def charge_times(self, what: str, times: Mapping[str, int]) -> None:
        """Splits what each instruction takes, which is that attribute of Work, by the shares of its kernel. Of an
        instruction that does no work by our rules, all is of whoever its name says; what no instruction is named for is
        nobody's."""

        def charge(work: Work, picoseconds: int) -> None:
            setattr(work, what, getattr(work, what) + picoseconds)

        for name, picoseconds in times.items():
            shares = self._shares.get(name)
            if not shares:
                found = self.module.instructions.get(name)
                blame = NOBODY if found is None else self.dataflow.blame(found, found)
                key = (blame.component, blame.phase, None, blame.source) if blame.component else NOBODYS
                shares = {key: 1}
            for key, share in zip(shares, apportion(picoseconds, [*shares.values()]), strict=True):
                charge(self.rows.setdefault(key, Work()), share)
                self.limits.setdefault(key, {})
            charge(self.total, picoseconds)

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

    def _kernel(self, kernel: Instruction, times: int, first: int) -> None:
        """Charges a kernel that runs so many times, and so many of these on the first trip of a loop."""
        nothing = on_chip.Runs((), ())
        served, distances = (of.get(kernel, nothing) for of in (self._served, self._distances))
        if served.first == served.others and distances.first == distances.others:
            first = times
        self._run(kernel, first, served.first, distances.first)
        self._is_again = True
        self._run(kernel, times - first, served.others, distances.others)
        self._is_again = False
        self._requests.pop(kernel, None)

    def _run(self, kernel: Instruction, times: int, served: Sequence[int], distances: Sequence[int]) -> None:
        """Charges a kernel `times` times; `served`: what the cache has of each of its accesses; `distances`: how far
        back each reaches."""
        if not times:
            return
        whole = Work()
        matmuls: dict[str, int] = {}
        products: list[Product] = []
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
                products.append(product(instruction, work, calls.said_rows(instruction)))
                if again := self._reread(instruction, products[-1]):
                    whole.reread_bytes += again
                    charge(blame, None)[0].reread_bytes += again
            for tax, part in self._masked_parts(blame, work, ragged.groups(instruction, kernel)):
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
        hits = sum(served)
        work = whole.flops, whole.hbm_bytes + hits, hits, tuple(products), whole.elementwise, whole.transcendental
        reorders = any(instruction.opcode in _REORDERS for instruction in inside(kernel))
        in_hbm = (not (access.on_chip or access.on_host) for access in found)
        moved = (access.bytes + access.padding for access in found)
        reaches = tuple(compress(zip(moved, distances, strict=True), in_hbm)) if distances else ()
        written = sum(whole.hbm_write.values())
        self.kernels.append(Kernel(kernel, times, *work, whole.picoseconds, reorders, written, reaches))
        if remade:
            self.remade += whole.matmul * times
        for (key, (work, _)), (_, bound), share in zip(charges.items(), alone, shares, strict=True):
            stated = self._shares.setdefault(kernel.name, {})
            weight = share or (0 if whole.picoseconds else FLOPS_PER_BYTE * work.hbm_bytes + work.flops)
            stated[key] = stated.get(key, 0) + weight * times
            work.picoseconds = share
            self.rows.setdefault(key, Work()).add(work, times)
            limits = self.limits.setdefault(key, {})
            limits[bound] = limits.get(bound, 0) + share * times

    def _reread(self, instruction: Instruction, made: Product) -> int:
        """What a product of two arrays, or a kernel that says in what waves it runs, reads of its operands more than
        once; of a batch of products nothing is known."""
        if waves := calls.said_waves(instruction):
            return on_chip.reread_by_waves(self.chip, waves)
        if instruction.opcode != "dot" and not calls.is_matmul_of_library(instruction):
            return 0
        lhs, rhs = (operand.shape for operand in instruction.operands[:2])
        if lhs.elements != made.m * made.k or rhs.elements != made.k * made.n:
            return 0
        return on_chip.reread(self.chip, made.m, made.n, lhs.bytes, rhs.bytes)

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
            if instruction.opcode != "custom-call":
                self._unknown(instruction, f"no rule for opcode {instruction.opcode}")
            else:
                self._unknown(instruction, calls.unknown(instruction))
            return flops_rules.NOTHING, sent
        if instruction.opcode == "custom-call" and (remark := calls.remark(instruction)):
            self.remarks.setdefault(remark)
        return work, sent

    def _find_unsized(self, kernel: Instruction) -> None:
        """Lists a kernel that touches arrays of which nobody knows how large they are."""
        values = (kernel, *kernel.operands)
        if unsized := dict.fromkeys(f"{leaf!r}" for value in values for leaf in value.shape.leaves if not leaf.sized):
            self._unknown(kernel, f"size not known, counted as no bytes: {', '.join([*unsized][:3])}")

    def _masked_parts(self, blame: Blame, work: Flops, groups: int) -> Iterable[tuple[str | None, Flops]]:
        fraction = self.masked.get((blame.component, blame.phase), self.masked.get(blame.component or ""))
        if not fraction and groups > 1:
            fraction = Fraction(groups - 1, groups)
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
    measured: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
) -> Bill:
    """The bill of an optimised module on `chip`.

    Args:
      roles: argument name -> role, for what the arguments' own names do not say.
      masked: component, or (component, phase) -> share of its FLOPs that the program computes and then masks away.
      components: a table of patterns -> components beside our own (see names.Names), or the only scopes to look for.
      program: what to say about it (model, step, ...).
      kernels: a list that every kernel is to be added to, where somebody wants to know them one by one.
      plan: what the compiler says of its memory; without it, that is worked out from the schedule.
      measured: instruction -> picoseconds that it took in one execution of the program (see trace.py); under a name
        that no instruction has, the time is nobody's. Bill.measured is the caller's to fill.
      calibration: what such a chip was measured to do; its time is predicted by that, else by the datasheet's peaks. A
        host has no datasheet: its roofline is drawn from the fastest that was measured.

    Raises:
      HloError: the amounts are larger than any program's.
    """
    if calibration is not None and chip.platform == "cpu":
        chip = calibration.fastest(chip)
    with collection_paused():
        names = Names(components)
        dataflow = Dataflow(module, roles or {}, names)
        walker = _Walker(module, dataflow, chip, masked or {}, kernels, measured, calibration is not None)
        return _itemize(walker, names, dict(program or {}), plan, calibration)


def _itemize(
    walker: _Walker, names: Names, program: dict[str, Any], plan: Plan | None, calibration: Calibration | None
) -> Bill:
    dataflow, chip = walker.dataflow, walker.chip
    walker.run()
    if max(walker.total.magnitude) > MOST:
        raise HloError(f"its loops and sizes make amounts of more than 2^{MOST.bit_length() - 1}: no chip runs that")
    memory = picture(dataflow, plan, chip.usable_hbm_bytes)
    predicted = _predict(walker, memory["peak_bytes"], calibration)
    bill = Bill(
        program,
        _rows(walker, names),
        walker.rows.get(NOBODYS, Work()),
        walker.unknown,
        walker.total,
        unattributed_bound=_bound(walker.limits.get(NOBODYS, {})),
        notes=[*_sources(walker), *walker.remarks],
    )
    bill.ideal_flops = (
        bill.total.matmul
        - bill.tax("masked").matmul
        - sum(row.work.matmul for row in bill.rows if row.phase == "recompute" and row.tax is None)
    )
    bill.ideal_hbm_bytes = _ideal_bytes(dataflow, walker.touched)
    bill.timed = walker.timed
    bill.remade_flops = walker.remade
    bill.memory = memory
    bill.predicted = predicted
    if not bill.timed:
        bill.forget_time()
    bill.check()
    return bill


def _predict(walker: _Walker, footprint: int, calibration: Calibration | None) -> dict[str, Any] | None:
    """Charges what each kernel will take; and says by what it is predicted. None where a peak is not known."""
    if not walker.timed:
        return None
    assumed = Assumed(walker.chip, calibration, footprint)
    times: dict[str, int] = {}
    for kernel in walker.kernels:
        name = kernel.instruction.name
        times[name] = times.get(name, 0) + kernel.times * predict(kernel, assumed)
    walker.charge_times("predicted_picoseconds", times | {"": assumed.dispatch_picoseconds})
    return assumed.to_json() | {"kernels": sum(kernel.times for kernel in walker.kernels)}


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
        if not work.flops and not work.requested_bytes:
            continue  # time alone
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
