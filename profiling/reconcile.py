"""Holds a bill against what others say of the same program, difference by difference, each with a named reason.

An amount is what the bill has more (or less, below zero) than the other, so that for each quantity the bill's total
less its differences is the other's number, to the last unit. What no reason explains is one of them, `unexplained`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..model.scopes import ENCODERS
from .bill import Bill
from .flops import NOTHING, flops
from .hlo import HBM, HOST, Computation, Instruction, Module, Shape
from .traffic import Access, accesses, fused_results, inside
from .walk import GARBLED, Kernel, costliest
from .xla_cost import CONTAINERS, UNKNOWN, CostModel, Count, Totals, counted_as, counted_once

UNEXPLAINED = "unexplained"

# What a program does beyond the closed form.
UNATTRIBUTED = "not attributed to a component"
MOVED = "billed to another component"  # with which the compiler has merged or named it
REMADE = "run again by the compiler, to save memory"
REMAT = "run again in the backward pass, as the model asks"
AGAIN = "run again inside the backward kernels"
MASKED = {
    "attention/core": "causal half masked",
    "moe/experts": "rows of experts that no token is in",
    **{f"{encoder}/attention/core": "filled up to whole blocks and heads of a kernel" for encoder in ENCODERS},
}

# What XLA's cost analysis does otherwise.
LOOP = "loop body counted once"
BRANCH = "of a conditional, the most of any branch counted"
TRANSCENDENTAL = "transcendentals counted apart"
CONVERT = "change of type counted as a FLOP"
SUM = "sum of n counted as n - 1 additions"
CALL = "library call without a cost"
GATHER = "gather charged whole"
SLICE = "slice charged whole"
UPDATE = "update in place charged whole"
COPY = "update that copies charged as one in place"
ALONE = "other work in the kernel of a gather or scatter not counted"
TILES = "gather or scatter charged in whole tiles"
SERVED = "read from the cache, as it is modelled"
CHIP = "on-chip memory counted"
AWAY = "memory of the host counted"
TWICE = "operand used twice counted twice"
PART = "operand of a fusion read in part charged whole"
SHARED = "operand with several readers in a fusion counted for each"
WAIT = "asynchronous copy counted at its start and its end"
POINTERS = "pointers of a tuple counted"
SCALAR = "scalar counted as a whole tile"
CONSTANT = "constant inside a fusion counted"
RENAMED = "array that is only renamed counted"
ROUNDED = "added up in 32-bit floating point"

Reasons = Counter[str]
# By opcode, of differences in FLOPs. A multiply and a reduce may together be a product.
_FLOPS = {
    **dict.fromkeys(("convert", "bitcast-convert"), CONVERT),
    **dict.fromkeys(("reduce", "multiply"), SUM),
    "sort": "comparisons of a sort counted over all rows at once",
    "reduce-window": "windows counted where they reach over the edge",
}


# --- the closed form -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """What the closed form says of a step, per chip.

    Attributes:
      matmul: matmul FLOPs by component, as executed.
      ideal_flops: matmul FLOPs of the least program: nothing that is masked away, nothing twice.
      weights_read, cache_read, cache_write: bytes of an inference step; None where the closed form does not say.
    """

    matmul: Mapping[str, int]
    ideal_flops: int
    weights_read: int | None = None
    cache_read: int | None = None
    cache_write: int | None = None


def against_closed_form(
    bill: Bill, even: Expected, shared: Expected | None = None, replicated: str = "replicated"
) -> None:
    """Fills the bill's `closed_form` and appends `differences` (bill - closed form). All amounts per chip.

    Args:
      even: were everything split evenly over the chips.
      shared: with what each of several chips has or does for itself, if any; `replicated`: the reason.
    """
    matmul, shared = even.matmul, shared or even
    bill.closed_form = {"matmul_flops": sum(matmul.values()), "ideal_flops": even.ideal_flops}
    left = {}
    for component in sorted({*matmul, *(row.component for row in bill.rows if row.work.matmul)}):
        again = shared.matmul.get(component, 0) - matmul.get(component, 0)
        _note(bill, "matmul_flops", again, f"{component}: {replicated}")
        left[component] = bill.component(component).matmul - matmul.get(component, 0) - again
    reason = MOVED if not sum(left.values()) + bill.unattributed.matmul else UNEXPLAINED
    if bill.remade_flops and sum(left.values()) == bill.remade_flops:
        reason = REMADE
    for component, amount in left.items():
        _note(bill, "matmul_flops", amount, f"{component}: {reason}")
    _note(bill, "matmul_flops", bill.unattributed.matmul, UNATTRIBUTED)
    again = shared.ideal_flops - even.ideal_flops
    _note(bill, "ideal_flops", again, replicated)
    _itemize_waste(bill, shared.ideal_flops)
    for role, side in (("weights", "read"), ("cache", "read"), ("cache", "write")):
        expected, with_copies = (getattr(one, f"{role}_{side}") for one in (even, shared))
        if expected is not None:
            bill.closed_form[f"{role}_bytes"] = bill.closed_form.get(f"{role}_bytes", 0) + expected
            _note(bill, f"{role}_{side}_bytes", with_copies - expected, replicated)
            _itemize_role(bill, role, side, with_copies)


def _itemize_waste(bill: Bill, ideal_flops: int) -> None:
    """What is computed beyond the least: masked away, or a second time."""
    found: Reasons = Counter({REMADE: bill.remade_flops, REMAT: -bill.remade_flops})
    passes: dict[str, Counter[str]] = {}  # component -> phase -> FLOPs
    for row in bill.rows:
        if row.tax == "masked":
            found[f"{row.component}: {MASKED.get(row.component, 'masked')}"] += row.work.matmul
        elif row.phase == "recompute":
            found[REMAT] += row.work.matmul
        else:
            passes.setdefault(row.component, Counter())[row.phase] += row.work.matmul
    for component, by_phase in passes.items():  # of each product there are two backward
        again = by_phase["backward"] - 2 * by_phase["forward"]
        found[f"{component}: {AGAIN}"] += max(0, again)
    for reason, amount in found.items():
        _note(bill, "ideal_flops", amount, reason)
    _note(bill, "ideal_flops", bill.total.matmul - found.total() - ideal_flops, UNEXPLAINED)


def _itemize_role(bill: Bill, role: str, side: str, expected: int) -> None:
    """One difference a tax, and what is left."""
    taxes: dict[str, int] = {}
    needed = 0
    for row in bill.rows:
        amount = (row.work.hbm_read if side == "read" else row.work.hbm_write).get(role, 0)
        if row.tax is None:
            needed += amount
        else:
            taxes[row.tax] = taxes.get(row.tax, 0) + amount
    quantity = f"{role}_{side}_bytes"
    for tax, amount in sorted(taxes.items()):
        _note(bill, quantity, amount, f"tax: {tax}")
    unattributed = (bill.unattributed.hbm_read if side == "read" else bill.unattributed.hbm_write).get(role, 0)
    _note(bill, quantity, unattributed, UNATTRIBUTED)
    _note(bill, quantity, needed - expected, UNEXPLAINED)


# --- XLA's cost analysis -------------------------------------------------------------------------------------------


def against_xla(bill: Bill, module: Module, kernels: Sequence[Kernel], platform: str, said: Totals | None) -> None:
    """Records XLA's own totals and appends `differences` (bill - XLA): one for each reason, the largest first, and one
    for what is left of each quantity, which is there even if it is zero. Nothing where XLA gives no totals.

    Args:
      module, kernels: what was billed.
      platform: of its chip.
      said: XLA's totals.
    """
    if said is None:
        return
    model = CostModel(module, platform)
    of_flops, of_bytes = Counter[str](), Counter[str]()
    try:
        total = model.total()
        _compare(model, kernels, of_flops, of_bytes)
        of_flops[ROUNDED] += total.exact[0] - int(total.rounded[0])
        of_bytes[ROUNDED] += total.exact[2] - int(total.rounded[2])
    except GARBLED as error:  # then nothing is explained, and that is what it says
        bill.notes.append(f"XLA's cost analysis cannot be followed: {type(error).__name__}: {error}"[:200])
        of_flops, of_bytes = Counter[str](), Counter[str]()
    bill.xla = {"flops": int(said.flops), "bytes": int(said.bytes_accessed)}
    for key, ours, found in (("flops", bill.total.flops, of_flops), ("bytes", bill.total.hbm_bytes, of_bytes)):
        for reason, amount in sorted(found.items(), key=lambda pair: -abs(pair[1])):
            _note(bill, f"xla_{key}", amount, reason)
        left = ours - found.total() - bill.xla[key]
        bill.differences.append({"quantity": f"xla_{key}", "amount": left, "reason": UNEXPLAINED})


def _compare(model: CostModel, kernels: Sequence[Kernel], of_flops: Reasons, of_bytes: Reasons) -> None:
    """Adds bill - XLA, instruction by instruction."""
    billed = {kernel.instruction: kernel for kernel in kernels}
    counted = _counted(model, of_flops, of_bytes)
    for computation, times in counted.items():
        for i in computation.instructions:
            if i.opcode not in CONTAINERS:
                kernel = billed.get(i) or Kernel(i, 0, 0, 0)
                count = model.count(i)
                _add(of_flops, _flops_reasons(model, kernel, count), times)
                _add(of_bytes, _bytes_reasons(model, kernel, count), times)
    for kernel in kernels:
        of_flops[LOOP] += kernel.times * kernel.flops
        of_bytes[LOOP] += kernel.times * kernel.hbm_bytes
        of_bytes[SERVED] -= kernel.times * kernel.served_bytes
    for kernel in billed.values():
        times = counted.get(kernel.instruction.computation, 0)
        of_flops[LOOP] -= times * kernel.flops
        of_bytes[LOOP] -= times * kernel.hbm_bytes


def _add(reasons: Reasons, more: Mapping[str, int], times: int) -> None:
    for reason, amount in more.items():
        reasons[reason] += amount * times


def _counted(model: CostModel, of_flops: Reasons, of_bytes: Reasons) -> dict[Computation, int]:
    """How often XLA counts each computation; of a conditional, the branch that is billed, and the rest as a reason."""
    counted = {model.module.entry: 1}
    for computation in _callers_first(model.module):
        times = counted.get(computation, 0)
        for i in computation.instructions if times else ():
            if i.opcode not in CONTAINERS:
                continue
            called = counted_once(i)
            if i.opcode == "conditional":
                called = [called[costliest(i)]]
                most, chosen = model.of_branches(i), model.of_computation(called[0]).exact
                of_flops[BRANCH] += times * (chosen[0] - most[0])
                of_bytes[BRANCH] += times * (chosen[2] - most[2])
            for one in called:
                counted[one] = counted.get(one, 0) + times
    return counted


def _callers_first(module: Module) -> list[Computation]:
    """The computations that are executed, each after all that call it."""
    called_first: list[Computation] = []
    done: set[Computation] = set()
    stack = [(module.entry, False)]
    while stack:
        computation, is_ready = stack.pop()
        if is_ready:
            called_first.append(computation)
        elif computation not in done:
            done.add(computation)
            stack.append((computation, True))
            containers = (i for i in computation.instructions if i.opcode in CONTAINERS)
            stack += [(one, False) for i in containers for one in counted_once(i)]
    return called_first[::-1]


def _rest(reasons: Reasons, difference: int, otherwise: str) -> Reasons:
    """The reasons, and what they leave of the difference."""
    reasons[otherwise] += difference - reasons.total()
    return reasons


# -- FLOPs


def _flops_reasons(model: CostModel, kernel: Kernel, count: Count) -> Reasons:
    i = kernel.instruction
    reasons: Reasons = Counter()
    if not kernel.flops and not count.flops:
        return reasons
    alone = counted_as(i)
    for one in inside(i):
        try:
            ours = flops(one) or NOTHING
        except GARBLED:
            ours = NOTHING
        theirs = model.flops(one)[0] if alone in (i, one) else 0
        if ours.transcendental:
            reasons[TRANSCENDENTAL] += ours.transcendental
        left = ours.matmul + ours.elementwise - theirs
        if left:
            reasons[_flops_reason(one, theirs) if alone in (i, one) else ALONE] += left
    return _rest(reasons, kernel.flops - count.flops, _otherwise(i))


def _flops_reason(i: Instruction, theirs: int) -> str:
    if i.opcode == "custom-call" and theirs in (0, UNKNOWN):
        return CALL
    return _FLOPS.get(i.opcode) or _otherwise(i)


def _otherwise(i: Instruction) -> str:
    return f"{i.opcode} counted otherwise"


# -- bytes


def _bytes_reasons(model: CostModel, kernel: Kernel, count: Count) -> Reasons:
    i, difference = kernel.instruction, kernel.hbm_bytes - count.bytes
    reasons: Reasons = Counter()
    if not difference:
        return reasons
    if i.opcode.endswith(("-start", "-done")):
        return _rest(reasons, difference, WAIT)
    if i.opcode == "custom-call":
        return _rest(reasons, difference, CALL if count.bytes in (0, UNKNOWN) else _otherwise(i))
    if i.opcode in ("tuple", "opt-barrier", "optimization-barrier"):
        return _rest(reasons, difference, POINTERS)
    if i.opcode == "reshape":
        return _rest(reasons, difference, RENAMED)
    alone = counted_as(i)
    if alone is not i:
        return _rest(reasons, difference, TILES if model.is_tpu else ALONE)
    try:
        touched = [access for access in accesses(i) if not access.on_host]
    except GARBLED:
        return _rest(reasons, difference, _otherwise(i))
    reasons[CONSTANT] -= sum(count.constants)
    results = fused_results(i) if i.is_fusion else []
    updated = {result.updates for result in results}
    reads: dict[Instruction, list[Access]] = {value: [] for value in i.operands}
    writes = [0] * len(i.shape.leaves)
    for access in touched:
        if access.write:
            writes[access.leaf] += access.bytes + access.padding
        else:
            reads.setdefault(access.value, []).append(access)
    theirs: dict[Instruction, list[int]] = {value: [] for value in reads}
    for value, size in zip(i.operands, count.operands, strict=False):
        theirs[value].append(size)
    for value, found in reads.items():
        _reads(model, value, found, theirs[value], value in updated, reasons)
    _writes(i, writes, count.results, [result.updates is not None for result in results], reasons)
    return _rest(reasons, difference, _otherwise(i))


def _elsewhere(leaves: Sequence[Shape]) -> str | None:
    """The reason for what is not billed because of where it lies, and for a scalar."""
    if not leaves[0].dims and len(leaves) == 1:
        return SCALAR
    if all(leaf.space == HOST for leaf in leaves):
        return AWAY
    return CHIP if all(leaf.space != HBM for leaf in leaves) else None


def _reads(
    model: CostModel,
    value: Instruction,
    reads: Sequence[Access],
    theirs: Sequence[int],
    is_updated: bool,
    reasons: Reasons,
) -> None:
    """Adds what is read of one operand, less what XLA counts for it."""
    once, whole = max(theirs, default=0), model.size(value.shape)
    reasons[TWICE] -= sum(theirs) - once
    if once > whole:
        reasons[SHARED] -= once - whole
        once = whole
    ours = sum(access.bytes + access.padding for access in reads)
    if ours == once:
        return
    opcodes = {access.by.opcode for access in reads}
    reason = _elsewhere(value.shape.leaves)
    if reason is None and is_updated:
        reason = UPDATE if ours < once else COPY
    elif reason is None and ours > once:
        reason = "operand of a fusion read more than is counted"
    elif reason is None:
        reason = GATHER if "gather" in opcodes else SLICE if opcodes & {"slice", "dynamic-slice"} else PART
    reasons[reason] += ours - once


def _writes(
    kernel: Instruction, ours: Sequence[int], theirs: Sequence[int], are_updates: Sequence[bool], reasons: Reasons
) -> None:
    """Adds what is written of the results, less what XLA counts for them."""
    if len(ours) != len(theirs):  # a tuple that counts as one
        reasons[_otherwise(kernel)] += sum(ours) - sum(theirs)
        return
    for n, (leaf, size) in enumerate(zip(kernel.shape.leaves, theirs, strict=True)):
        reason = _elsewhere([leaf])
        if reason is None and n < len(are_updates) and are_updates[n]:
            reason = UPDATE if ours[n] < size else COPY
        reasons[reason or _otherwise(kernel)] += ours[n] - size


def _note(bill: Bill, quantity: str, amount: int, reason: str) -> None:
    if amount:
        bill.differences.append({"quantity": quantity, "amount": amount, "reason": reason})
