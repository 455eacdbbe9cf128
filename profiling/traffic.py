"""Bytes of one kernel: what it reads and writes of HBM, of its host's memory, and what it sends over links.

A kernel is a top-level instruction of an executed computation; inside a fusion nothing touches memory. It is charged at
its boundary: each operand once, each result once. What of that is really touched:

| kernel, or who reads inside a fusion | reads | writes |
|---|---|---|
| slice, dynamic-slice, gather | what it selects | its result |
| dynamic-update-slice, in place | the update | the update |
| scatter, in place | updates, indices; the rows, if it combines | the rows |
| either, not in place | besides, what it does not update: a tax | the same |
| custom-call | what its rule or its author says, else operands | its results, without a library's workspace |
| tuple, get-tuple-element, bitcast, parameter, constant, ... | nothing | nothing |
| an asynchronous pair | all of it at the `-start`, nothing at the `-done` | the same |
| a collective | its operands, which are what it sends, too | its results |

The layout says where an array lies: no `S(n)`, in HBM; `S(5)`, in the host's memory, over a link of its own; any other,
on the chip (`S(1)` is a TPU's VMEM), where nothing is charged: a prefetch into it is the one HBM read. It says as well
how: tiles pad, and the padded size moves; `E(4)` packs two elements in a byte.

All amounts are per chip and per execution; who runs how often is the caller's business (loops.py).
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from . import calls
from .flops import in_flight, is_elementwise
from .hlo import HBM, HOST, RUNS, Computation, Instruction, Shape


class Access(NamedTuple):
    """One kernel touching one value.

    Attributes:
      value, leaf: the top-level instruction whose result it is, and which array of it where that is a tuple.
      write: else read.
      bytes: logical; padding: what the tiled layout adds.
      on_host: whether it lies in the host's memory, and is moved over the link to the host; on_chip: whether it lies in
        memory on the chip, so that nothing moves; else it is in HBM.
      by: the innermost instruction that asks for it, so that one fusion can serve several components.
      tax: "layout" where a copy is forced by an update that is not in place, else None (see attribution).
    """

    value: Instruction
    leaf: int
    write: bool
    bytes: int
    padding: int
    by: Instruction
    tax: str | None = None
    on_host: bool = False
    on_chip: bool = False


# No kernel runs, or another instruction carries the bill: a `-done` is paid at its `-start`, a while by its body.
FREE = RUNS | frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier optimization-barrier add-dependency "
    "async-update call-update partition-id replica-id domain get-dimension-size".split()
)
# A value seen through these is the same elements: reading a part of one reads that part of the other.
_VIEWS = frozenset(["bitcast", "reshape"])
_SELECTING = frozenset(["slice", "dynamic-slice", "gather"])
_SAME_ELEMENTS = _VIEWS | frozenset(["convert", "copy", "transpose", "negate"])
_MOVERS = frozenset("broadcast concatenate pad reverse".split())
_COLLECTIVES = frozenset(
    "all-gather all-reduce reduce-scatter all-to-all collective-permute collective-broadcast ragged-all-to-all "
    "send".split()
)
_LINKED = _COLLECTIVES | {f"{opcode}-start" for opcode in _COLLECTIVES}


def is_free(instruction: Instruction) -> bool:
    """Whether no kernel runs for it, or another instruction carries its bill."""
    return instruction.opcode in FREE or instruction.opcode.endswith("-done")


def first_result(start: Instruction) -> int:
    """Which leaf of an instruction's shape is its first result: most asynchronous starts put their operands first."""
    operands = sum(len(operand.shape.leaves) for operand in start.operands)
    if not start.opcode.endswith("-start") or start.opcode == "copy-start" or len(start.shape.leaves) <= operands:
        return 0
    return operands


def boundary(kernel: Instruction) -> list[Access]:
    """Every operand read once and every result written once: what a kernel moves at least, whatever it does."""
    reads = [access for operand in dict.fromkeys(kernel.operands) for access in _read(operand, None, kernel)]
    return [*reads, *(one for leaf in range(len(kernel.shape.leaves)) for one in _write(kernel, leaf, None, kernel))]


def accesses(kernel: Instruction) -> list[Access]:
    """What `kernel` reads from and writes to HBM and the host's memory, one entry a value and asking instruction; [] if
    it is free."""
    return [access for access in requests(kernel) if not access.on_chip]


def requests(kernel: Instruction) -> list[Access]:
    """What `kernel` reads and writes of any memory."""
    opcode = kernel.opcode
    if is_free(kernel):
        return []
    if kernel.is_fusion:
        return [*_fusion_reads(kernel), *_fusion_writes(kernel)]
    if opcode in _VIEWS and not kernel.shape.tiles:
        return []  # a reshape of an untiled array only renames it
    if opcode in ("copy-start", "slice-start"):
        return _prefetch(kernel)
    if opcode == "custom-call" and calls.FREE_CALLS.fullmatch(kernel.custom_call_target):
        return []
    found: list[Access] = []
    if kernel.opcode == "custom-call" and (said := calls.reads(kernel)):
        for operand, elements in zip(kernel.operands, said, strict=True):
            found += _read(operand, elements, kernel, again=True)
    else:
        for position, operand in enumerate(dict.fromkeys(kernel.operands)):
            elements = _elements_read(kernel, position)
            found += _read(operand, elements, kernel)
    if opcode in ("send", "recv"):  # (the data, a context, a token); what is sent stays where it is
        leaves = range(len(kernel.shape.leaves) - 2) if opcode == "recv" else ()
        found += [access for leaf in leaves for access in _write(kernel, leaf, None, kernel)]
    elif opcode.removesuffix("-start") in ("dynamic-update-slice", "scatter"):
        found += _update_writes(kernel, kernel, kernel.operands[0], first_result(kernel), converted=False)
    elif opcode.endswith("-start"):
        first = first_result(kernel)
        results = range(first, min(first + len(kernel.operands), len(kernel.shape.leaves)))  # then come contexts
        found += [access for leaf in results for access in _write(kernel, leaf, None, kernel)]
    else:
        unused = calls.workspace(kernel) if opcode == "custom-call" else ()
        results = (leaf for leaf in range(len(kernel.shape.leaves)) if leaf not in unused)
        found += [access for leaf in results for access in _write(kernel, leaf, None, kernel)]
    if _is_host_transfer(kernel):
        found += [access._replace(on_host=True, on_chip=False, padding=0) for access in found]
    return found


def _is_host_transfer(kernel: Instruction) -> bool:
    """Whether what it reads goes to the host, and what it writes comes from there."""
    if kernel.opcode in ("send", "recv"):
        return kernel.attribute("is_host_transfer") == "true"
    return kernel.opcode == "custom-call" and kernel.custom_call_target in calls.FROM_A_GPU


def _read(value: Instruction, elements: int | None, by: Instruction, again: bool = False) -> Iterator[Access]:
    """A read of `elements` of `value` (None: all of it); `again`: of some more than once."""
    if elements == 0:
        return
    for leaf, shape in enumerate(value.shape.leaves):
        yield from _access(value, leaf, shape, elements, by, write=False, again=again)


def _write(value: Instruction, leaf: int, elements: int | None, by: Instruction) -> Iterator[Access]:
    yield from _access(value, leaf, value.shape.leaves[leaf], elements, by, write=True)


def _access(
    value: Instruction,
    leaf: int,
    shape: Shape,
    elements: int | None,
    by: Instruction,
    write: bool,
    tax: str | None = None,
    again: bool = False,
) -> Iterator[Access]:
    if not shape.bytes:
        return
    logical, padded = shape.bytes, shape.padded_bytes
    if elements is not None and (elements < shape.elements or again):
        logical = (elements * shape.bits + 7) // 8
        padded = logical * shape.padded_bytes // shape.bytes
    if logical > 0:
        on_chip = shape.space not in (HBM, HOST)
        yield Access(value, leaf, write, logical, padded - logical, by, tax, shape.space == HOST, on_chip)


def _prefetch(start: Instruction) -> list[Access]:
    """copy-start and slice-start: (destination, source, ...) and ((sources), destination, ...)."""
    source = start.operands[0]
    if _is_next_runs_prefetch(start):
        return []
    destination = first_result(start)
    target = start.shape.leaves[destination]
    return [*_read(source, target.elements, start), *_write(start, destination, None, start)]


def _is_next_runs_prefetch(start: Instruction) -> bool:
    """Whether this copy serves the program's next run: TPU fetches the first weight at the end of the run before.

    Both copies are in the text; in a steady state one of them runs. The one that nobody reads is left out.
    """
    done = [user for user in start.users if user.opcode.endswith("-done")]
    return bool(done) and not any(d.users or d is d.computation.root for d in done)


# --- fusions -----------------------------------------------------------------------------------------------------


def _fusion_reads(fusion: Instruction) -> Iterator[Access]:
    computation = fusion.called[0]
    seen: dict[Instruction, tuple[int, Instruction]] = {}
    known = Known.of(fusion)
    for operand, parameter in zip(fusion.operands, computation.parameters, strict=False):
        asked = _readers(parameter, (), known)
        full = next((by for elements, by in asked if elements >= parameter.shape.elements), None)
        if full is not None:
            elements, by = parameter.shape.elements, full
        else:
            elements = min(sum(elements for elements, _ in asked), parameter.shape.elements)  # parts may overlap
            by = asked[0][1] if asked else fusion
        if operand in seen:  # the same value twice: the larger part, once
            elements, by = max(seen[operand], (elements, by), key=lambda pair: pair[0])
        seen[operand] = elements, by
    for operand, (elements, by) in seen.items():
        yield from _read(operand, None if operand.shape.parts else elements, by)


def fusion_readers(fusion: Instruction, operand: Instruction) -> list[Instruction]:
    """The instructions inside a fusion that read one of its operands."""
    pairs = zip(fusion.operands, fusion.called[0].parameters, strict=False)
    return [by for o, parameter in pairs if o is operand for _, by in _readers(parameter, (), Known.of(fusion))]


Callers = tuple[Instruction, ...]
Readers = list[tuple[int, Instruction]]
MAX_CHAIN = 200  # how far a value is followed from copy to copy inside a fusion; compilers write a few in a row


class Known(NamedTuple):
    """What has been found of a kernel, because two ways may lead to one value; and whether anything in it selects a
    part of a value, without which none is read in part."""

    readers: dict[tuple[Instruction, Callers], Readers]
    selects: bool

    @classmethod
    def of(cls, fusion: Instruction) -> "Known":
        return cls({}, any(instruction.opcode in _SELECTING for instruction in inside(fusion)))


def _readers(value: Instruction, callers: Callers, known: Known, chain: int = 0) -> Readers:
    """(elements, asking instruction) of everything inside a fusion that reads `value`.

    Args:
      value: an instruction of a fused computation, the same elements as one of the kernel's parameters.
      callers: the nested fusions that lead to it, outermost first; a value that leaves one goes on with its users.
      chain: how many copies lead to it.
    """
    key = (value, callers)
    if key not in known.readers:
        known.readers[key] = _find_readers(value, callers, known, chain + 1)
    return known.readers[key]


def _find_readers(value: Instruction, callers: Callers, known: Known, chain: int) -> Readers:
    if chain > MAX_CHAIN:
        return [(value.shape.elements, value)]
    if value is value.computation.root:
        if callers:
            return _readers(callers[-1], callers[:-1], known, chain) or [(value.shape.elements, callers[-1])]
        return [(value.shape.elements, value)]
    found: Readers = []
    for user in dict.fromkeys(value.users):
        if user.opcode in _SAME_ELEMENTS:
            found += _readers(user, callers, known, chain)
        elif user.opcode in _MOVERS:
            # Asks on behalf of whoever computes with it; XLA merges weights of one product so, under any name.
            downstream = _readers(user, callers, known, chain)
            found.append((value.shape.elements, downstream[0][1] if downstream else user))
        elif user.is_fusion:
            for operand, parameter in zip(user.operands, user.called[0].parameters, strict=False):
                if operand is value:
                    found += _readers(parameter, (*callers, user), known, chain)
        elif known.selects and is_elementwise(user) and user.shape.elements == value.shape.elements:
            # What nobody asks of its result is not computed, and so not read.
            asked = sum(elements for elements, _ in _readers(user, callers, known, chain))
            found.append((min(asked, value.shape.elements), user))
        else:
            for position, operand in enumerate(user.operands):
                if operand is value:
                    elements = _elements_read(user, position)
                    found.append((value.shape.elements if elements is None else elements, user))
    return found


def _elements_read(user: Instruction, position: int) -> int | None:
    """How many elements of operand number `position` the instruction `user` reads; None: all."""
    if user.opcode == "tuple":
        return None if _is_made(user.operands[position]) else 0
    if "AsyncCollective" in user.attributes or in_flight(user):
        return 0  # handed through as it is
    if position == 0:
        opcode = user.opcode.removesuffix("-start")
        if opcode in _SELECTING:
            return user.shape.leaves[first_result(user)].elements
        if opcode == "dynamic-update-slice":
            return 0 if _is_result(user) else None  # what a copy would read is charged with the write
        if opcode == "scatter" and _is_result(user):
            # Read, combined and written back; where nothing is combined the old values are not needed.
            combines = any(len(region.instructions) > len(region.parameters) for region in user.called)
            return user.operands[-1].shape.elements if combines else 0
    return None


def _is_made(value: Instruction) -> bool:
    """Whether a value is one that a fusion computes, not one that it was given and hands through as it is."""
    value = _unview(value)
    return value.computation.fused and value.opcode != "parameter"


def _is_result(update: Instruction) -> bool:
    """Whether `update` is a kernel's result, but for renaming and type. Inside a fusion, an update that is none is
    built on the fly, from the whole of its operand."""
    value = update
    while value.computation.fused and value is not value.computation.root:
        if any(user.opcode == "tuple" and user is user.computation.root for user in value.users):
            return True
        if len(value.users) != 1 or value.users[0].opcode not in _SAME_ELEMENTS:
            return False
        value = value.users[0]
    return True


def _fusion_writes(fusion: Instruction) -> Iterator[Access]:
    for leaf, result in enumerate(fused_results(fusion), start=first_result(fusion)):
        if result.updates is not None:
            yield from _update_writes(result.by, fusion, result.updates, leaf, result.converted)
        elif "AsyncCollectiveStart" in result.by.attributes:
            yield from _write(fusion, 1, None, result.by)  # its leaves: operand, result, contexts
        elif not _handed_through(result.by):
            yield from _write(fusion, leaf, None, result.by)


def _handed_through(result: Instruction) -> bool:
    return result.opcode == "parameter" or "AsyncCollectiveDone" in result.attributes or in_flight(result)


class Result(NamedTuple):
    """One result of a fusion: the inner instruction that makes it; the operand it is an update of, if it is; whether
    the types differ, so that the update cannot be in place."""

    by: Instruction
    updates: Instruction | None
    converted: bool


def fused_results(fusion: Instruction) -> list[Result]:
    """The results of a fusion in the order of its shape's leaves."""
    found: list[Result] = []
    computation = fusion.called[0]
    root = _unview(computation.root)
    # A sort, reduce or scatter of several arrays is a tuple by itself.
    for n, value in enumerate(root.operands if root.opcode == "tuple" else [root] * len(root.shape.leaves)):
        value = _unview(value)
        if value.is_fusion and not value.shape.parts:
            by, source, converted = fused_results(value)[0]
        else:
            by, converted = _unconvert(value)
            if by.opcode not in ("dynamic-update-slice", "scatter"):
                found.append(Result(value, None, False))
                continue
            source = by.operands[n if by is root else 0]
        if source is None:
            found.append(Result(by, None, False))
            continue
        source, also_converted = _unconvert(source)
        if source.opcode == "parameter":
            target = fusion.operands[source.number]
            found.append(Result(by, target, converted or also_converted))
        else:
            found.append(Result(by, None, False))
    return found


def _unview(value: Instruction) -> Instruction:
    while value.opcode in _VIEWS:
        value = value.operands[0]
    return value


def _unconvert(value: Instruction) -> tuple[Instruction, bool]:
    """What a value is, but for renaming and type, and whether the type was changed on the way."""
    converted = False
    while value.opcode in _VIEWS or value.opcode == "convert":
        converted |= value.opcode == "convert"
        value = value.operands[0]
    return value, converted


def _update_writes(
    update: Instruction, kernel: Instruction, target: Instruction, leaf: int, converted: bool
) -> Iterator[Access]:
    """The write of an update; where it may not overwrite its operand, the whole array is copied and that is a tax."""
    piece = update.operands[-1 if update.opcode == "scatter" else 1].shape.elements
    whole = kernel.shape.leaves[leaf]
    yield from _write(kernel, leaf, piece, update)
    if converted or not overwritable(target, kernel):
        rest, tax = whole.elements - piece, "convert" if converted else "layout"
        yield from _access(target, 0, target.shape.leaves[0], rest, update, write=False, tax=tax)
        yield from _access(kernel, leaf, whole, rest, update, write=True, tax=tax)


def overwritable(target: Instruction, kernel: Instruction) -> bool:
    """Whether `kernel` may write into the buffer of its operand `target`.

    Not where a later instruction still reads it, and not where it is an argument of the program that was not donated.
    """
    value = target
    while True:
        if any(user.index > kernel.index and user.opcode != "tuple" for user in value.users):
            return False
        if value.opcode not in _VIEWS:
            break
        value = value.operands[0]
    if value.opcode == "constant":
        return False
    return value.opcode != "parameter" or value.number not in value.computation.kept


# --- links -------------------------------------------------------------------------------------------------------


def link_bytes(instruction: Instruction, partitions: int) -> int:
    """Bytes one chip sends over its links, for a ring of the participants.

    all-reduce 2(n-1)/n of the buffer, all-gather and reduce-scatter (n-1)/n of the whole, all-to-all (n-1)/n,
    collective-permute 1. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
    """
    if instruction.opcode not in _LINKED or in_flight(instruction) or _is_host_transfer(instruction):
        return 0
    opcode = instruction.opcode.removesuffix("-start")
    sent = sum(operand.shape.bytes for operand in instruction.operands if operand.shape.dtype != "token")
    if opcode in ("collective-permute", "send"):
        return sent
    n = participants(instruction, partitions)
    if n <= 1:
        return 0
    if opcode == "all-gather":
        return sent * (n - 1)  # the operand is one shard of the whole
    if opcode == "all-reduce":
        if instruction.computation.fused and any(user.opcode == "dynamic-slice" for user in instruction.users):
            return sent * (n - 1) // n  # TPU writes a reduce-scatter as a fused all-reduce and dynamic-slice
        return 2 * sent * (n - 1) // n
    return sent * (n - 1) // n


def participants(collective: Instruction, partitions: int) -> int:
    """How many chips take part: from replica_groups as a list, an iota `[groups,size]<=[...]` or a mesh axis."""
    text = collective.attribute("replica_groups") or ""
    iota = re.match(r"\[(\d+),(\d+)\]<=", text)
    if iota:
        return int(iota[2])
    groups = re.match(r"\{\{([\d,]*)\}", text)
    if groups:
        return len(groups[1].split(","))
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", collective.attributes)
    if axes:
        sizes = dict(re.findall(r"(\w+)'?=(\d+)", axes[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", axes[2]) if axis in sizes)
    return partitions


def inside(kernel: Instruction) -> Sequence[Instruction]:
    """Every instruction that a kernel runs: itself or, of a fusion, those fused, nested fusions written out."""
    return _written_out(kernel.called[0]) if kernel.is_fusion else (kernel,)


def _written_out(computation: Computation) -> Sequence[Instruction]:
    """Remembered: a fusion is asked for what it holds by everyone who reads it."""
    if computation.written_out is None:
        nested = any(instruction.is_fusion for instruction in computation.instructions)
        written = [one for instruction in computation.instructions for one in inside(instruction)]
        computation.written_out = written if nested else computation.instructions
    return computation.written_out
