"""FLOPs of one instruction: matmul, elementwise and transcendental, kept apart. One multiply-add is 2 FLOPs.

One rule per opcode, in one table (`RULES`); one per custom call target, in another (`CALLS`). To add an opcode or a
kernel, write a function and register it. Containers (fusion, while, call, conditional) have no rule: whoever walks the
program recurses into them. Work that a compiler writes in another form is recognised here and nowhere else: a matmul
that became a convolution (TPU), a multiply and a reduce (GPU, small contractions), or a library call.
"""

import json
import math
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from .hlo import Instruction, Shape


class Flops(NamedTuple):
    """FLOPs of one execution. `precision` names the peak that bounds the matmul: "bf16", "int8", "fp8", "f32"."""

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0
    precision: str = "bf16"


NOTHING = Flops()
MAX_WINDOW = 1 << 16  # positions of one dimension
MAX_BLOCKS = 1 << 20  # of queries or keys, in one kernel
Rule = Callable[[Instruction], Flops]
RULES: dict[str, Rule] = {}
CallRule = Callable[[Instruction], Flops | None]
CALLS: list[tuple[re.Pattern[str], CallRule]] = []


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Registers a function as the FLOP rule of `opcodes`."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(opcodes, function))
        return function

    return add


def register(target: str) -> Callable[[CallRule], CallRule]:
    """Registers a function as the FLOP rule of custom calls whose target matches the regular expression `target`.

    A later registration wins, so a user's rule overrides ours; one that gives None leaves the call to those before it.
    """

    def add(function: CallRule) -> CallRule:
        CALLS.insert(0, (re.compile(target), function))
        return function

    return add


def flops(instruction: Instruction) -> Flops | None:
    """The FLOPs of `instruction` itself; None where there is no rule for it (then the bill lists it as unknown)."""
    opcode = instruction.opcode
    found = RULES.get(opcode)
    if found is not None:
        return found(instruction)
    if opcode in ("custom-call", "custom-call-start"):
        return _custom_call(instruction)
    if opcode.endswith("-done"):
        return NOTHING
    found = RULES.get(opcode.removesuffix("-start"))
    return found(instruction) if found else None


def _custom_call(instruction: Instruction) -> Flops | None:
    target = instruction.custom_call_target
    for pattern, found in CALLS:
        if pattern.fullmatch(target) and (work := found(instruction)) is not None:
            return work
    # Pallas kernels carry their author's estimate in the text: Mosaic's (TPU) anyhow, Triton's (GPU) as metadata.
    estimate = re.search(r'"cost_estimate":\{([^}]*)\}', instruction.backend_config)
    said = estimate[1] if estimate else kernel_metadata(instruction).get("cost_estimate")
    if said:
        numbers = {key: int(value) for key, value in re.findall(r'"(\w+)": ?"?(\d+)"?', said)}
        return Flops(numbers.get("flops", 0), 0, numbers.get("transcendentals", 0), precision(instruction))
    return None


def kernel_metadata(call: Instruction) -> dict[str, str]:
    """What a Pallas kernel says of itself by `pallas_call(metadata=...)`; {} where it says nothing.

    Read here: "cost_estimate", the JSON of a pallas.CostEstimate; "operand_reads", how many elements of each operand
    the kernel reads, comma-separated ("" for an operand: all, once).
    """
    mosaic = re.search(r"kernel_metadata=(\{.*?\})\}", call.attributes)
    triton = re.search(r'serialized_metadata = "((?:[^"\\]|\\.)*)"', call.backend_config)
    if mosaic:
        text = mosaic[1]
    elif triton:  # MLIR writes quotes and backslashes as \22 and \5C
        text = re.sub(r"\\([0-9A-F]{2}|\\)", lambda m: "\\" if m[1] == "\\" else chr(int(m[1], 16)), triton[1])
    else:
        return {}
    try:
        return json.loads(text)
    except ValueError:
        return {}


def precision(instruction: Instruction) -> str:
    """Which of a chip's matmul peaks the operands use."""
    types = [operand.shape.dtype for operand in instruction.operands if operand.shape.dtype not in ("tuple", "s32")][:2]
    if any(t.startswith("f8") or t.startswith("f4") for t in types):
        return "fp8"
    if types and all(t in ("s8", "u8", "s4", "u4") for t in types):
        return "int8"
    return "f32" if types and all(t in ("f32", "f64", "c64", "c128") for t in types) else "bf16"


# --- matmuls -----------------------------------------------------------------------------------------------------


@rule("dot")
def _dot(dot: Instruction) -> Flops:
    """2 x result elements x contracted sizes."""
    lhs = dot.operands[0].shape
    contracted = math.prod(lhs.dims[d] for d in dot.integers("lhs_contracting_dims"))
    return Flops(2 * dot.shape.elements * contracted, precision=precision(dot))


@rule("ragged-dot")
def _ragged_dot(dot: Instruction) -> Flops:
    """As executed group by group: every row of the left side once, whatever group it falls in."""
    lhs = dot.operands[0].shape
    contracted = math.prod(lhs.dims[d] for d in dot.integers("lhs_contracting_dims"))
    return Flops(2 * dot.shape.elements * contracted, precision=precision(dot))


@rule("convolution")
def _convolution(convolution: Instruction) -> Flops:
    """2 x the multiply-adds that meet two elements: padding and the holes of a dilated operand cost nothing.

    TPU's compiler writes batched matmuls as convolutions whose window is dilated so that each output position meets
    exactly one pair; counting window positions without looking would be wrong by the batch squared.
    """
    lhs, rhs = (operand.shape for operand in convolution.operands[:2])
    labels = convolution.attribute("dim_labels") or ""
    lhs_labels, rhs_labels, out_labels = re.split(r"_|->", labels)
    out = convolution.shape.leaves[0]
    batch = out.dims[out_labels.index("b")]
    out_features = out.dims[out_labels.index("f")]
    in_features = rhs.dims[rhs_labels.index("i")]  # already per feature group
    window = _window(convolution.attribute("window"), len(out_labels) - 2)
    pairs = 1
    for d in range(len(out_labels) - 2):
        label = str(d)
        size, stride, low, lhs_dilate, rhs_dilate = (w[d] for w in window)
        lhs_size, out_size = lhs.dims[lhs_labels.index(label)], out.dims[out_labels.index(label)]
        pairs *= _valid_pairs(lhs_size, out_size, size, stride, low, lhs_dilate, rhs_dilate)
    return Flops(2 * batch * out_features * in_features * pairs, precision=precision(convolution))


def _window(text: str | None, rank: int) -> list[list[int]]:
    """Size, stride, low padding, lhs and rhs dilation, each a list over `rank` window dimensions.

    Reversal is left out: a reversed window meets the mirror image of the same number of pairs.
    """
    found = dict(re.findall(r"(\w+)=([\w\-]+)", text or ""))

    def numbers(key: str, default: int) -> list[int]:
        if key not in found:
            return [default] * rank
        return [int(part.split("_")[0]) for part in found[key].split("x")]

    keys = ("size", 1), ("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1)
    return [numbers(key, default) for key, default in keys]


@cache
def _valid_pairs(lhs: int, out: int, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """How many (output position, window position) pairs of one dimension fall on an element of the left operand.

    ValueError where the window is too large to be looked at position by position.
    """
    if stride == 1 and lhs_dilate == 1 and rhs_dilate == 1:
        return _pairs_below(low + lhs, out, size) - _pairs_below(low, out, size)
    if size > MAX_WINDOW:
        raise ValueError(f"a window of {size} positions, strided or dilated; at most {MAX_WINDOW} are looked at")
    pairs = 0
    span = (lhs - 1) * lhs_dilate
    for w in range(size):  # positions o with 0 <= o*stride + w*rhs_dilate - low <= span, and on the dilation grid
        offset = w * rhs_dilate - low
        first = max(0, -(offset // stride))
        last = min(out - 1, (span - offset) // stride)
        if last < first:
            continue
        if lhs_dilate == 1:
            pairs += last - first + 1
            continue
        common = math.gcd(stride, lhs_dilate)
        if offset % common:
            continue
        step = lhs_dilate // common
        on_grid = -offset // common * pow(stride // common, -1, step)  # o * stride + offset is a multiple of lhs_dilate
        start = first + (on_grid - first) % step
        if start <= last:
            pairs += (last - start) // step + 1
    return pairs


def _pairs_below(bound: int, out: int, size: int) -> int:
    """How many 0 <= o < out and 0 <= w < size have o + w < bound: a triangle, less what sticks out at two corners."""

    def triangle(side: int) -> int:
        return side * (side + 1) // 2 if side > 0 else 0

    return triangle(bound) - triangle(bound - out) - triangle(bound - size) + triangle(bound - out - size)


def _through(instruction: Instruction) -> Instruction:
    """The instruction whose values these are, seen through changes of type, shape and layout."""
    while instruction.opcode in ("convert", "bitcast", "reshape", "copy", "transpose") and instruction.operands:
        instruction = instruction.operands[0]
    return instruction


def _named_dot(instruction: Instruction) -> bool:
    return instruction.op_name.rsplit("/", 1)[-1].startswith("dot_general")


def _is_contraction(reduce: Instruction) -> bool:
    """Whether a sum is the second half of a matmul that the compiler wrote as multiply + reduce.

    jax names the multiply after the dot_general it came from. Where there is no name, the form decides: a sum over the
    product of two different things, at least one of them broadcast (a sum of squares is not a matmul).
    """
    source = _through(reduce.operands[0])
    if source.opcode != "multiply":
        return False  # a sum of partial products (split-k) is named like its matmul, but is only a sum
    if _named_dot(source) or _named_dot(reduce):
        return True
    if source.op_name:
        return False
    a, b = (_through(operand) for operand in source.operands)
    return a is not b and "broadcast" in (a.opcode, b.opcode) and "multiply" not in (a.opcode, b.opcode)


@rule("reduce")
def _reduce(reduce: Instruction) -> Flops:
    elements = reduce.operands[0].shape.elements
    if len(reduce.operands) == 2 and _is_contraction(reduce):
        return Flops(2 * elements, precision="f32")
    return Flops(elementwise=elements * _region_operations(reduce))


@rule("multiply")
def _multiply(multiply: Instruction) -> Flops:
    """One an element; a matmul whose contraction has length one, or the first half of one written as a reduce."""
    if any(_summed_as_contraction(user) for user in multiply.users):
        return NOTHING  # its reduce carries both halves
    if _named_dot(multiply) and multiply.shape.elements > 1:  # one: the arithmetic of a shard's index
        return Flops(2 * multiply.shape.elements, precision="f32")
    return Flops(elementwise=multiply.shape.elements)


def _summed_as_contraction(user: Instruction) -> bool:
    while user.opcode in ("convert", "bitcast", "reshape", "copy", "transpose") and len(user.users) == 1:
        user = user.users[0]
    return user.opcode == "reduce" and len(user.operands) == 2 and _is_contraction(user)


# --- elementwise, reductions and the rest ------------------------------------------------------------------------

_TRANSCENDENTAL = (
    "acos acosh asin asinh atan atan2 atanh cbrt cosh cosine erf exponential exponential-minus-one log log- "
    "plus-one logistic power rsqrt sine sinh sqrt tan tanh"
).split()
_ARITHMETIC = (
    "abs add and ceil clamp clz compare complex count-leading-zeros divide floor imag is-finite maximum "
    "minimum negate not or popcnt real remainder round-nearest-afz round-nearest-even select shift-left "
    "shift-right-arithmetic shift-right-logical sign stochastic-convert subtract xor reduce-precision"
).split()
# Nothing is computed: data is named, moved, regrouped or changes its type.
_MOVEMENT = (
    "add-dependency after-all all-gather all-to-all async-update bitcast bitcast-convert broadcast "
    "collective-broadcast collective-permute concatenate constant convert copy domain dynamic-reshape "
    "dynamic-slice dynamic-update-slice gather get-dimension-size get-tuple-element infeed iota opt-barrier "
    "optimization-barrier outfeed pad parameter partition-id ragged-all-to-all recv replica-id reshape "
    "reverse send set-dimension-size slice transpose tuple all-"
).split()


@rule(*_MOVEMENT)
def _nothing(instruction: Instruction) -> Flops:
    del instruction
    return NOTHING


@rule(*_ARITHMETIC)
def _elementwise(instruction: Instruction) -> Flops:
    return Flops(elementwise=instruction.shape.elements)


@rule(*_TRANSCENDENTAL)
def _transcendental(instruction: Instruction) -> Flops:
    return Flops(transcendental=instruction.shape.elements)


def _region_operations(instruction: Instruction) -> int:
    """Arithmetic operations of the scalar computation that a reduce, map or scatter applies: at least one."""
    scalar = sum(i.opcode not in _MOVEMENT for region in instruction.called for i in region)
    return max(1, scalar)


@rule("reduce-window")
def _reduce_window(window: Instruction) -> Flops:
    """Output elements x window positions that lie inside the operand.

    TPU's compiler writes "the maximum of the row, at each element of the row" as a window of 2n-1: it is executed as
    one reduction and a broadcast, so a window that covers the whole axis from everywhere counts as one pass over it.
    """
    operand = window.operands[0].shape
    out = window.shape.leaves[0]
    sizes, strides, lows, base, dilate = _window(window.attribute("window"), len(operand.dims))
    total = 1
    for d, size in enumerate(operand.dims):
        if sizes[d] >= 2 * size - 1:
            total *= size
        else:
            total *= _valid_pairs(size, out.dims[d], sizes[d], strides[d], lows[d], base[d], dilate[d])
    return Flops(elementwise=total * _region_operations(window))


@rule("map")
def _map(instruction: Instruction) -> Flops:
    return Flops(elementwise=instruction.shape.elements * _region_operations(instruction))


@rule("scatter")
def _scatter(scatter: Instruction) -> Flops:
    updates = scatter.operands[-1].shape.elements
    combine = sum(i.opcode not in _MOVEMENT for region in scatter.called for i in region)
    return Flops(elementwise=updates * combine)


@rule("select-and-scatter")
def _select_and_scatter(instruction: Instruction) -> Flops:
    return Flops(elementwise=instruction.operands[0].shape.elements + instruction.operands[1].shape.elements)


def in_flight(collective: Instruction) -> bool:
    """Whether this is a mention, and not the start, of a collective that TPU's compiler overlaps with other work.

    It writes one such collective into each of a chain of fusions, three to five times in all, with one chain_id: the
    first hands it to AsyncCollectiveStart, the last to AsyncCollectiveDone, those between compute something else.
    """
    if "chain_id=" not in collective.attributes:
        return False
    return not any("AsyncCollectiveStart" in user.attributes for user in collective.users)


@rule("all-reduce", "reduce-scatter")
def _reduction_collective(instruction: Instruction) -> Flops:
    if in_flight(instruction):
        return NOTHING
    return Flops(elementwise=sum(operand.shape.elements for operand in instruction.operands))


@rule("sort")
def _sort(sort: Instruction) -> Flops:
    """Comparisons of a merge sort along the sorted dimension."""
    keys = sort.operands[0].shape
    length = keys.dims[sort.integers("dimensions")[0]] if keys.dims and sort.integers("dimensions") else 1
    return Flops(elementwise=keys.elements * max(1, math.ceil(math.log2(max(length, 2)))))


@rule("topk")
def _topk(instruction: Instruction) -> Flops:
    return Flops(elementwise=instruction.operands[0].shape.elements)


@rule("rng", "rng-bit-generator", "rng-get-and-update-state")
def _rng(instruction: Instruction) -> Flops:
    return Flops(elementwise=sum(leaf.elements for leaf in instruction.shape.leaves))


@rule("fft")
def _fft(instruction: Instruction) -> Flops:
    """5 n log2 n a transform (the customary count, Cooley-Tukey radix 2)."""
    lengths = instruction.integers("fft_length")
    size = math.prod(lengths) or 1
    points = max(instruction.shape.elements, instruction.operands[0].shape.elements)
    return Flops(elementwise=5 * points * max(1, math.ceil(math.log2(max(size, 2)))))


@rule("cholesky")
def _cholesky(instruction: Instruction) -> Flops:
    n = instruction.shape.dims[-1]
    return Flops(elementwise=instruction.shape.elements * n // 3)


@rule("triangular-solve")
def _triangular_solve(instruction: Instruction) -> Flops:
    n = instruction.operands[0].shape.dims[-1]
    return Flops(elementwise=instruction.shape.elements * n)


# --- custom calls ------------------------------------------------------------------------------------------------

# Markers and allocations: no work. Source: read in compiled programs of the three backends.
FREE_CALLS = re.compile(
    r"ConcatBitcast|AsyncCollective\w+|AllocateBuffer|AssumeGatherIndicesInBound|Sharding|SPMD\w+|annotate_device_placement|PinToDevice"
    r"|PinToHost|MoveToHost|MoveToDevice|LayoutConstraint|X64\w+|BitcastConvert"
)


@register(FREE_CALLS.pattern)
def _free_call(call: Instruction) -> Flops:
    del call
    return NOTHING


@register("GatherScatterIndicesBitpacked")
def _pack_indices(call: Instruction) -> Flops:
    """The indices of a TPU's gather, several in one word."""
    del call
    return NOTHING


def _gemm_flops(call: Instruction, lhs: Shape, out: Shape, contracting: list[int]) -> Flops:
    contracted = math.prod(lhs.dims[d] for d in contracting)
    return Flops(2 * out.elements * contracted, precision=precision(call))


@register(r"__cublas\$gemm|__cublas\$lt\$matmul.*|__cublas\$lt\$.*|__triton_gemm")
def _cublas(call: Instruction) -> Flops:
    """The result's first leaf is the product, the rest workspace."""
    try:
        config = json.loads(call.backend_config)
        gemm = next(value for key, value in config.items() if key.endswith("gemm_backend_config"))
        contracting = [int(d) for d in gemm["dot_dimension_numbers"]["lhs_contracting_dimensions"]]
    except (ValueError, KeyError, StopIteration):
        contracting = [len(call.operands[0].shape.dims) - 1]
    return _gemm_flops(call, call.operands[0].shape, call.shape.leaves[0], contracting)


@register(r"__onednn\$matmul.*|__onednn\$.*dot.*")
def _onednn(call: Instruction) -> Flops:
    lhs, out = call.operands[0].shape, call.shape.leaves[0]
    transposed = '"transpose_a":true' in call.backend_config.replace(" ", "")
    return _gemm_flops(call, lhs, out, [len(lhs.dims) - (2 if transposed else 1)])


@register(r"__cudnn\$conv.*")
def _cudnn_convolution(call: Instruction) -> Flops:
    """cuDNN keeps window= and dim_labels= of the convolution it replaced. Only the forward form is read."""
    return _convolution(call)


@register(r"__cudnn\$fmha.*")
def _cudnn_attention(call: Instruction) -> Flops:
    """4 B N T S H forward, 2.5 times that backward, halved where the mask is causal (the kernel skips the rest).

    Q is [B,T,N,H] or [B,N,T,H]; T x S comes from the intermediate tensor that the config names.
    """
    config = call.backend_config
    query = call.operands[0].shape
    found = re.search(r'"intermediate_tensor_shape":\{[^{}]*"dimensions":\[([^\]]*)\]', config)
    heads_queries_keys = [int(n) for n in re.findall(r"\d+", found[1])] if found else []
    scores = math.prod(heads_queries_keys) if heads_queries_keys else query.elements // query.dims[-1] * query.dims[1]
    work = 4 * scores * query.dims[-1]
    if "Backward" in call.custom_call_target:
        work = work * 5 // 2
    if '"mask_type":"CAUSAL"' in config.replace(" ", ""):
        work //= 2
    return Flops(work, transcendental=scores)


# jax's flash attention for TPUs: how wide the products are together that a kernel makes of a query and a key, H and V
# wide; and what its metadata calls its blocks.
_SPLASH = {
    "fwd": (lambda H, V: H + V, "block_q", "block_kv"),
    "dq": (lambda H, V: 2 * H + V, "block_q_dq", "block_kv_dq"),
    "dkv": (lambda H, V: 2 * H + 2 * V, "block_q_dkv", "block_kv_dkv"),
}


@register("tpu_custom_call")
def _splash_attention(call: Instruction) -> Flops | None:
    """Of the blocks of queries and keys that it does not skip; it carries no estimate of its own.

    Which they are says a constant, of which HLO text has only the shape: [heads, blocks, the most that one of them
    meets]. Where some are masked in part, by the positions of queries or by blocks of a mask, they are taken to be
    those of a causal mask, over a window if one meets fewer than there are; else each is taken to meet as many.
    """
    name = re.search(r"splash_m[hq]a_(fwd|dq|dkv)_", call.op_name)
    said = json.loads(kernel_metadata(call).get("xprof_metadata", "{}"))
    shapes = [operand.shape for operand in call.operands]
    arrays = [shape for shape in shapes if shape.dtype in ("f32", "bf16", "f16")][:3]
    if name is None or len(arrays) < 3 or any(said.get(f"{letter}_layout") != 1 for letter in "qkv"):
        return None
    (*_, queries, H), (*_, keys, _), (*_, V) = (shape.dims for shape in arrays)
    products, *blocks = _SPLASH[name[1]]
    side_q, side_k = (said[block] for block in blocks)
    down, across = queries // side_q, keys // side_k
    if max(down, across) > MAX_BLOCKS:
        return None
    # Positions of queries are [T,128] or [8,T]; so are the two arrays of segments, if there are any.
    rest = shapes[next(n for n, shape in enumerate(shapes) if shape is arrays[2]) + 1 :]
    in_part = sum(shape.dtype == "s32" and len(shape.dims) == 2 for shape in rest) % 2
    in_part += any(shape.dtype[0] in "psu" and len(shape.dims) == 3 for shape in rest)
    most = shapes[0].dims[-2 if name[1] == "dkv" else -1] if shapes[0].dtype[0] == "s" else max(down, across)
    if name[1] == "dkv":
        met = sum(min(down - n * side_k // side_q if in_part else down, most) for n in range(across))
    else:
        met = sum(min(-(-(n + 1) * side_q // side_k) if in_part else across, most) for n in range(down))
    pairs = arrays[0].elements // (queries * H) * met * side_q * side_k
    precision = "f32" if arrays[0].dtype == "f32" else "bf16"
    return Flops(2 * pairs * products(H, V), transcendental=pairs, precision=precision)


@register(r"TopK|__gpu\$TopK")
def _topk_call(call: Instruction) -> Flops:
    return Flops(elementwise=call.operands[0].shape.elements)
