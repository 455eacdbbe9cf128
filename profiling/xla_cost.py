"""What XLA's own cost analysis counts, instruction by instruction: a model of it, to hold a bill against.

XLA gives three totals with a compiled program: `flops`, `transcendentals` (apart from flops) and `bytes accessed`. How
it comes by them is published (openxla/xla, `xla/service/hlo_cost_analysis.cc`); what TPU's compiler does differently is
not, and was found by compiling small programs (jaxlib 0.10.2 and 0.12.0.1, libtpu as `jax[tpu]` pins it). What matters:

- A computation is counted once for each instruction that calls it, the body of a loop too, however often it runs; of a
  conditional, each quantity is that of the branch that has most of it.
- Bytes are those of the result and of each operand, in whatever memory; an operand that is named twice counts twice.
  Slices, gathers and updates count what they touch when they stand alone. Of a fusion's operand only the direct users
  are looked at, for slices and updates.
- A change of type is a FLOP an element; a sum of n values is n - 1 additions; a library call has no cost, which is -1.
- All is added up in 32-bit floating point numbers.
"""

import math
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from operator import add
from typing import Any, NamedTuple

from . import flops as flops_rules
from .flops import in_flight
from .hlo import Computation, Instruction, Module, Shape
from .loops import while_parts

TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan2 atanh cbrt cosh cosine erf exponential exponential-minus-one log log-plus-one "
    "logistic power rsqrt sine sinh sqrt tan tanh".split()
)
# One FLOP for each element of the result, of whatever type.
ELEMENTWISE = frozenset(
    "abs add and bitcast-convert ceil clamp compare complex convert count-leading-zeros divide floor imag is-finite "
    "maximum minimum multiply negate not or popcnt real reduce-precision remainder round-nearest-afz "
    "round-nearest-even select shift-left shift-right-arithmetic shift-right-logical sign stochastic-convert subtract "
    "xor".split()
)
CONTAINERS = frozenset("while conditional call call-start async-start".split())
UNKNOWN = -1  # of a custom call
_FREE = frozenset("parameter constant get-tuple-element bitcast domain after-all add-dependency".split())
# Of a gather or scatter: dimensions that a window is one wide in, and that no dimension of what is picked is of.
_ONE_WIDE = ("collapsed_slice_dims", "operand_batching_dims", "inserted_window_dims", "input_batching_dims")
# What is asynchronous by itself. Any other `x-start` is a computation of one x, which the text leaves out.
_STARTS = frozenset("all-gather-start all-reduce-start collective-permute-start copy-start".split())

# Of a TPU: the least that a value takes; a slice that is gathered; and, in the memories S(2) and S(4), what an
# asynchronous copy is waited for with.
_TPU_LEAST_BYTES, _TPU_LEAST_SLICE, _TPU_SEMAPHORE_BYTES = 512, 1024, 4096
_TPU_SEMAPHORES = (2, 4)


class Totals(NamedTuple):
    """What XLA says of a compiled program: FLOPs, transcendentals left out, and bytes accessed."""

    flops: float
    bytes_accessed: float


def totals(compiled: Any) -> Totals | None:
    """XLA's own totals of a jax.stages.Compiled; None where it gives none (a GPU that is not there)."""
    costs = compiled.cost_analysis()
    return Totals(costs.get("flops", 0.0), costs.get("bytes accessed", 0.0)) if costs else None


def pointer_bytes() -> int:
    """What jaxlib's cost analysis takes one entry of a tuple for: seen 8 in version 0.10.2, 4 in 0.12.0.1."""
    return 8 if metadata.version("jaxlib").startswith("0.10.") else 4


class Count(NamedTuple):
    """What XLA counts for one instruction; bytes apart for results, large constants of a fusion, and each operand."""

    flops: int = 0
    transcendentals: int = 0
    results: tuple[int, ...] = ()
    constants: tuple[int, ...] = ()
    operands: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(self.results) + sum(self.constants) + sum(self.operands)


_Exact = tuple[int, int, int]
_Rounded = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Total:
    """FLOPs, transcendentals and bytes of a computation: as they are, and as XLA adds them up."""

    exact: _Exact = (0, 0, 0)
    rounded: _Rounded = (0.0, 0.0, 0.0)

    def __add__(self, other: "Total") -> "Total":
        flops, transcendentals, size = map(add, self.exact, other.exact)
        a, b, c = map(_single, map(add, self.rounded, other.rounded))
        return Total((flops, transcendentals, size), (a, b, c))


class CostModel:
    """XLA's cost analysis of one module.

    Args:
      platform: "cpu", "cuda" or "tpu": a TPU's compiler has rules of its own.
    """

    def __init__(self, module: Module, platform: str):
        self.module, self.is_tpu, self.pointer_bytes = module, platform == "tpu", pointer_bytes()
        self._totals: dict[Computation, Total] = {}

    # -- totals

    def total(self) -> Total:
        """Of the whole program."""
        return self.of_computation(self.module.entry)

    def of_computation(self, computation: Computation) -> Total:
        found = self._totals.get(computation)
        if found is None:
            found = Total()
            for i in _visited(computation):
                found += self._of_container(i) if i.opcode in CONTAINERS else self._of_instruction(i)
            self._totals[computation] = found
        return found

    def of_branches(self, conditional: Instruction) -> _Exact:
        """Of a conditional, the most of each quantity that any branch has."""
        return self._of_container(conditional).exact

    def _of_container(self, container: Instruction) -> Total:
        parts = [self.of_computation(called) for called in counted_once(container)]
        if container.opcode != "conditional":
            return sum(parts, Total())
        a, b, c = (max(part.exact[n] for part in parts) for n in range(3))
        d, e, f = (max(part.rounded[n] for part in parts) for n in range(3))
        return Total((a, b, c), (d, e, f))

    def _of_instruction(self, i: Instruction) -> Total:
        count = self.count(i)
        size = 0.0
        for part in (*count.results, *count.constants, *count.operands):
            size = _single(size + _single(part))
        flops, transcendentals = _single(count.flops), _single(count.transcendentals)
        if i.is_fusion and counted_as(i) is i:
            flops, transcendentals, _ = self.of_computation(i.called[0]).rounded
        return Total((count.flops, count.transcendentals, count.bytes), (flops, transcendentals, size))

    # -- one instruction

    def count(self, i: Instruction) -> Count:
        """Of an instruction that is no container."""
        if i.is_fusion:
            return self._fusion(i)
        flops, transcendentals = self.flops(i)
        results, operands = self._bytes(i)
        return Count(flops, transcendentals, results, (), operands)

    def flops(self, i: Instruction) -> tuple[int, int]:
        """(FLOPs, transcendentals) of an instruction that is neither fusion nor container."""
        if i.opcode in ELEMENTWISE:
            return i.shape.elements, 0
        if i.opcode in TRANSCENDENTAL:
            return 0, i.shape.elements
        rule = _FLOPS.get(i.opcode.removesuffix("-start"))
        return (0, 0) if rule is None else rule(self, i)

    def size(self, shape: Shape) -> int:
        """Bytes of a value: a tuple is an array of pointers; on a TPU, nothing is smaller than a tile."""
        if shape.dtype == "tuple":
            if self.is_tpu:
                return -(-4 * len(shape.parts) // _TPU_LEAST_BYTES) * _TPU_LEAST_BYTES
            return self.pointer_bytes * len(shape.parts)
        if self.is_tpu and shape.space in _TPU_SEMAPHORES:
            return max(_TPU_SEMAPHORE_BYTES, shape.bytes)
        if self.is_tpu and shape.tiles and not shape.dims:
            return math.prod(shape.tiles[0]) * shape.bits // 8
        return shape.padded_bytes

    def _bytes(self, i: Instruction) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(of the results, of each operand)."""
        opcode, shape, size = i.opcode, i.shape, self.size
        if opcode in _FREE or (opcode == "transpose" and _is_renamed(i)):
            return (), ()
        if opcode == "tuple":
            return (size(shape),), ()
        if opcode.endswith("-start") and opcode not in _STARTS:
            opcode, shape = opcode.removesuffix("-start"), shape.parts[1]
        inputs = tuple(size(operand.shape) for operand in i.operands)
        if opcode == "slice":
            return (size(shape),), (size(shape),)
        if opcode == "dynamic-slice":
            return (size(shape),), (size(shape), *inputs[1:2])
        if opcode == "dynamic-update-slice":
            return (inputs[1],), (0, inputs[1], *inputs[2:3])
        if opcode == "gather":
            window = i.integers("slice_sizes")
            return (size(shape),), (self._picked(i, shape, i.integers("offset_dims"), window), inputs[1])
        if opcode == "scatter":
            count = len(inputs) // 2
            window = _update_window(i)
            updates = [update.shape for update in i.operands[count + 1 :]]
            touched = [self._picked(i, update, i.integers("update_window_dims"), window) for update in updates]
            return (sum(touched),), (*touched, *inputs[count:])
        if opcode == "custom-call" and not self._is_topk(i):
            return (self._estimate(i)[2],), ()
        if opcode == "triangular-solve":
            return (size(shape),), (inputs[0] // 2, inputs[1])
        if opcode == "cholesky":
            return (inputs[0] // 2,), (inputs[0] // 2,)
        return (sum(map(size, shape.leaves)),), inputs

    def _picked(self, i: Instruction, picked: Shape, offsets: tuple[int, ...], window: tuple[int, ...]) -> int:
        """Bytes that a gather or scatter touches of its operand, a window for each of those picked or updated; of a
        TPU's, whole tiles for each, and for what fills up the tiles of the others.

        offsets: the dimensions of `picked` that are a window's.
        """
        if not self.is_tpu:
            return self.size(picked)
        one = resized(i.operands[0].shape, window)
        single = _one_wide(i)
        wide = [d for d in range(len(one.dims)) if d not in single]
        if _order(one, wide) != _order(picked, offsets):  # a window counts as it is put down
            one = resized(picked, tuple(n if d in offsets else 1 for d, n in enumerate(picked.dims)))
        tile = picked.tiles[0] if picked.tiles else ()
        step = dict(zip(picked.minor_to_major, reversed(tile), strict=False))
        others = [d for d in range(len(picked.dims)) if d not in offsets]
        windows = math.prod(-(-picked.dims[d] // step.get(d, 1)) * step.get(d, 1) for d in others)
        return windows * max(one.padded_bytes * 8 // one.bits, _TPU_LEAST_SLICE) * picked.bits // 8

    def _is_topk(self, call: Instruction) -> bool:
        """Whether it is the one library call that is counted: a TPU's."""
        return self.is_tpu and call.custom_call_target == "TopK"

    def _estimate(self, call: Instruction) -> _Exact:
        """Of a custom call: nothing is known of most. Of a Pallas kernel for TPU it is what its author estimated, or
        nothing at all; as of an allocation."""
        if not self.is_tpu or call.custom_call_target not in ("tpu_custom_call", "AllocateBuffer"):
            return UNKNOWN, 0, UNKNOWN
        found = re.search(r'"cost_estimate":\{([^}]*)\}', call.backend_config)
        said = {key: int(n) for key, n in re.findall(r'"(\w+)": ?"?(\d+)"?', found[1])} if found else {}
        return said.get("flops", 0), said.get("transcendentals", 0), said.get("bytes_accessed", 0)

    def of_call(self, call: Instruction) -> tuple[int, int]:
        """(FLOPs, transcendentals) of a custom call."""
        if self._is_topk(call):
            return call.operands[0].shape.elements * call.shape.leaves[0].dims[-1], 0
        return self._estimate(call)[:2]

    # -- fusions

    def _fusion(self, fusion: Instruction) -> Count:
        body, alone = fusion.called[0], counted_as(fusion)
        if alone is not fusion:
            return self.count(alone)
        flops, transcendentals, _ = self.of_computation(body).exact
        carried = _carried(fusion)
        shape = fusion.shape if fusion.opcode == "fusion" else fusion.shape.parts[1]
        made = body.root.operands if body.root.opcode == "tuple" else [body.root] * len(shape.leaves)
        results = (
            0 if by in carried else self.size(by.operands[1].shape if by.opcode == "dynamic-update-slice" else leaf)
            for by, leaf in zip(made, shape.leaves, strict=False)
        )
        constants = (i.shape for i in body.instructions if i.opcode == "constant" and i.shape.elements > 1)
        operands = (0 if parameter in carried else self._reads(parameter) for parameter in body.parameters)
        return Count(flops, transcendentals, tuple(results), tuple(map(self.size, constants)), tuple(operands))

    def _reads(self, parameter: Instruction) -> int:
        """Bytes of a fusion's operand."""
        if parameter.shape.parts:
            return sum(self._reads(user) for user in parameter.users if user.opcode == "get-tuple-element")
        whole = self.size(parameter.shape)
        found, shared = 0, 0  # what users read each for itself, and what the others read together
        for user in dict.fromkeys(parameter.users):
            if user.is_fusion:
                for operand, inner in zip(user.operands, user.called[0].parameters, strict=False):
                    found += self._nested_reads(user, inner) if operand is parameter else 0
            elif user.opcode in ("broadcast", "reshape"):
                found += whole
            elif (part := self._part(parameter, user)) is None:
                shared = whole
            else:
                found += part
        return found + shared

    def _part(self, value: Instruction, user: Instruction) -> int | None:
        """Bytes that a user of a value reads of it by itself; None where it can share a read of all of it."""
        is_first = user.operands[0] is value
        if user.opcode == "slice" or (user.opcode == "dynamic-slice" and is_first):
            return self.size(user.shape)
        if user.opcode == "dynamic-update-slice" and is_first:
            return 0
        return None

    def _nested_reads(self, fusion: Instruction, parameter: Instruction) -> int:
        """Bytes of an operand of a fusion in a fusion, told by the users of what it makes."""
        root = fusion.called[0].root
        is_simple = not root.operands or root.operands[0] is parameter
        found, shared = 0, 0
        for user in dict.fromkeys(fusion.users):
            part = self._part(fusion, user) if is_simple else None
            if part is not None:
                found += part
            elif is_simple and user.opcode in ("dynamic-slice", "dynamic-update-slice"):
                shared = shared or self.size(fusion.shape)
            else:
                shared = shared or self._reads(parameter)
        return found + shared


def counted_once(container: Instruction) -> list[Computation]:
    """What an instruction runs and XLA counts once for it."""
    return list(while_parts(container)) if container.opcode == "while" else list(container.called)


def counted_as(i: Instruction) -> Instruction:
    """The gather or scatter as which a compiler's own kernel counts, if it holds one; else the instruction itself."""
    if i.is_fusion and i.attribute("kind") == "kCustom":
        return next((one for one in i.called[0].instructions if one.opcode in ("gather", "scatter")), i)
    return i


def resized(shape: Shape, dims: tuple[int, ...]) -> Shape:
    """An array of other sizes in the same layout."""
    tiles = "".join(f"({','.join('*' if n < 0 else str(n) for n in tile)})" for tile in shape.tiles)
    layout = ",".join(map(str, shape.minor_to_major)) + (f":T{tiles}" if tiles else ":") + f"E({shape.bits})"
    return Shape(shape.dtype, dims, layout)


def _order(shape: Shape, dims: Sequence[int]) -> list[int]:
    """Which of these dimensions is the minor-most, the next one, and so on."""
    return [sorted(dims).index(d) for d in shape.minor_to_major if d in dims]


def _one_wide(i: Instruction) -> set[int]:
    """The dimensions that a window of a gather or scatter is one wide in."""
    return {n for name in _ONE_WIDE for n in i.integers(name)}


def _update_window(scatter: Instruction) -> tuple[int, ...]:
    """The sizes of one update, in the dimensions of what is updated."""
    update = scatter.operands[-1].shape
    sizes = [update.dims[d] for d in scatter.integers("update_window_dims")]
    single = _one_wide(scatter)
    return tuple(1 if d in single else sizes.pop(0) for d in range(len(scatter.operands[0].shape.dims)))


def _carried(fusion: Instruction) -> set[Instruction]:
    """What a TPU's fusion holds of a collective that is under way meanwhile: its operands, results and contexts, which
    are handed from fusion to fusion. Neither the fusion that starts it nor the one that ends it is one of these."""
    body = fusion.called[0]
    if fusion.attribute("kind") == "kCustom" or body.root.opcode != "tuple":
        return set()
    found = {i for i in body.instructions if in_flight(i)}
    return found | {i for i in body.root.operands if i.opcode == "parameter"} if found else set()


def _visited(computation: Computation) -> Iterator[Instruction]:
    """In the order in which XLA adds up: operands first, from what nobody uses to the root."""
    done: set[Instruction] = set()
    waited_for = {name for i in computation.instructions for name in _waits_for(i)}
    ends = [i for i in computation.instructions if not i.users and i.name not in waited_for]
    for end in (*(i for i in ends if i is not computation.root), computation.root):
        stack = [(end, False)]
        while stack:
            i, is_ready = stack.pop()
            if i in done:
                continue
            if is_ready:
                done.add(i)
                yield i
                continue
            stack.append((i, True))
            before = [*i.operands, *(computation.by_name[name] for name in _waits_for(i))]
            stack += [(one, False) for one in reversed(before) if one not in done]


def _waits_for(i: Instruction) -> list[str]:
    text = i.attribute("control-predecessors")
    return re.findall(r"[\w.\-]+", text) if text else []


_FLOAT = struct.Struct("f")


def _single(number: float) -> float:
    """The nearest 32-bit floating point number."""
    return _FLOAT.unpack(_FLOAT.pack(number))[0]


def _is_renamed(transpose: Instruction) -> bool:
    """Whether a transpose leaves the elements where they lie in memory."""
    order, source = transpose.integers("dimensions"), transpose.operands[0].shape
    layout = transpose.shape.minor_to_major
    return bool(layout) and tuple(order[d] for d in layout) == source.minor_to_major


# --- FLOPs by opcode: (FLOPs, transcendentals) ---------------------------------------------------------------------

_Rule = Callable[[CostModel, Instruction], tuple[int, int]]
_FLOPS: dict[str, _Rule] = {"custom-call": CostModel.of_call}


def _rule(*opcodes: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _FLOPS.update(dict.fromkeys(opcodes, function))
        return function

    return register


@_rule("dot", "scaled-dot", "convolution")
def _products(_: CostModel, i: Instruction) -> tuple[int, int]:
    work = flops_rules.flops(i)
    return (work.matmul if work else 0), 0


@_rule("ragged-dot")
def _ragged_dot(model: CostModel, i: Instruction) -> tuple[int, int]:
    """As if the first dimension of the result were that of the groups."""
    return _products(model, i)[0] // i.shape.dims[0], 0


def _times(model: CostModel, region: Computation, count: int) -> tuple[int, int]:
    flops, transcendentals, _ = model.of_computation(region).exact
    return flops * count, transcendentals * count


@_rule("reduce")
def _reduce(model: CostModel, i: Instruction) -> tuple[int, int]:
    return _times(model, i.called[0], i.operands[0].shape.elements - i.shape.leaves[0].elements)


@_rule("map")
def _map(model: CostModel, i: Instruction) -> tuple[int, int]:
    return _times(model, i.called[0], i.shape.elements)


@_rule("scatter")
def _scatter(model: CostModel, i: Instruction) -> tuple[int, int]:
    return _times(model, i.called[0], i.operands[-1].shape.elements)


@_rule("reduce-window")
def _reduce_window(model: CostModel, i: Instruction) -> tuple[int, int]:
    """One less than the window for each element of the result; but a row reduced and spread over itself, which is
    written as a window of 2 n - 1, counts n - 1 and the number of rows."""
    window = dict(re.findall(r"(\w+)=([\w\-]+)", i.attribute("window") or ""))
    sizes = [int(n) for n in window.get("size", "1").split("x")]
    pads = [tuple(map(int, pad.split("_"))) for pad in window["pad"].split("x")] if "pad" in window else []
    out = i.shape.leaves[0]
    count = (math.prod(sizes) - 1) * out.elements
    wide = [d for d, size in enumerate(sizes) if size != 1]
    if len(wide) == 1 and [d for d, pad in enumerate(pads) if any(pad)] == wide and not i.shape.parts:
        (d,) = wide
        low, high = pads[d]
        if low == high == out.dims[d] - 1 and sizes[d] == 2 * low + 1:
            count = out.elements // out.dims[d] + out.dims[d] - 1
    return _times(model, i.called[0], count)


@_rule("select-and-scatter")
def _select_and_scatter(model: CostModel, i: Instruction) -> tuple[int, int]:
    window = re.search(r"size=([\dx]+)", i.attribute("window") or "")
    size = math.prod(int(n) for n in window[1].split("x")) if window else 1
    source = i.operands[1].shape.elements
    select, scatter = (_times(model, region, source) for region in i.called)
    return select[0] * (size - 1) + scatter[0], select[1] * (size - 1) + scatter[1]


@_rule("all-reduce")
def _all_reduce(_: CostModel, i: Instruction) -> tuple[int, int]:
    return sum(leaf.elements for leaf in i.shape.leaves), 0


@_rule("rng", "rng-bit-generator")
def _rng(_: CostModel, i: Instruction) -> tuple[int, int]:
    return 0, sum(leaf.elements for leaf in i.shape.leaves)


@_rule("sort")
def _sort(_: CostModel, i: Instruction) -> tuple[int, int]:
    elements = i.operands[0].shape.elements
    return elements * max(0, elements - 1).bit_length(), 0


@_rule("fft")
def _fft(_: CostModel, i: Instruction) -> tuple[int, int]:
    logs = math.prod(length.bit_length() - 1 for length in i.integers("fft_length"))
    return 8 * logs * i.operands[0].shape.elements, 0


@_rule("triangular-solve")
def _triangular_solve(_: CostModel, i: Instruction) -> tuple[int, int]:
    return 2 * i.operands[0].shape.dims[-1] * i.operands[1].shape.elements, 0


@_rule("cholesky")
def _cholesky(_: CostModel, i: Instruction) -> tuple[int, int]:
    square = i.operands[0].shape
    return square.dims[-1] * square.elements // 3, 0
