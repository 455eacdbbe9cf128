"""FLOPs of one instruction: what every opcode of XLA costs, one small rule each. One multiply-add is 2 FLOPs.

Three numbers, kept apart, for units of a chip that are not the same: `matmul` (the matrix units; the headline),
`elementwise` (the vector units) and `transcendental` (tanh, exp, ...: one a value, whatever polynomial a chip takes for
it). What is counted is what is executed, and not what was meant: padding that is multiplied, experts that nobody chose,
sums that a fusion makes twice.

| opcode | rule |
|---|---|
| dot, ragged-dot, convolution | 2 x the multiply-adds that meet two values |
| multiply + reduce, named after a dot_general | the same: a matmul that the compiler wrote so |
| add, compare, select, ... | elementwise, one a value of the result |
| tanh, exponential, rsqrt, ... | transcendental, one a value of the result |
| reduce, reduce-window, map, scatter | what is combined x the operations of the computation that combines |
| sort, topk, fft, cholesky, ... | the customary count of the textbook's algorithm |
| copy, slice, gather, all-gather, convert, ... | none: data moves |
| custom-call | see calls.py |
| fusion, while, call, conditional | no rule: who walks the program goes into them |

To add an opcode, write a function and mark it with `rule`. An opcode without a rule is None, and on the bill unknown.
"""

import math
import re
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from .hlo import Instruction


class Flops(NamedTuple):
    """FLOPs of one execution. `precision`, the peak that bounds the matmul: "bf16", "int8", "fp8", "fp4" or "f32"."""

    matmul: int = 0
    elementwise: int = 0
    transcendental: int = 0
    precision: str = "bf16"


class Product(NamedTuple):
    """[m, k] x [k, n] of a class of operands (see Flops.precision)."""

    precision: str
    m: int
    n: int
    k: int
    flops: int

    @property
    def bytes(self) -> int:
        """Of both operands and the result, all of this class."""
        elements = self.m * self.k + self.k * self.n + self.m * self.n
        return elements * {"f32": 8, "bf16": 4, "fp4": 1}.get(self.precision, 2) // 2


NOTHING = Flops()
MAX_WINDOW = 1 << 16  # positions of one dimension
Dims = tuple[int, ...]
Rule = Callable[[Instruction], Flops | None]
RULES: dict[str, Rule] = {}


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Registers a function as the FLOP rule of `opcodes`. It may give None for an instruction that it does not know."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(opcodes, function))
        return function

    return add


def flops(instruction: Instruction) -> Flops | None:
    """The FLOPs of `instruction` itself; None where there is no rule for it (then the bill lists it as unknown).

    Of an asynchronous pair the `-start` has those of its opcode, the `-done` none.
    """
    found = RULES.get(instruction.opcode)
    if found is None and instruction.opcode.endswith("-done"):
        return NOTHING
    found = found or RULES.get(instruction.opcode.removesuffix("-start"))
    return found(instruction) if found else None


def precision(instruction: Instruction) -> str:
    """Which of a chip's matmul peaks the operands use."""
    types = [operand.shape.dtype for operand in instruction.operands if operand.shape.dtype not in ("tuple", "s32")][:2]
    if types and all(t.startswith("f4") for t in types):
        return "fp4"
    if any(t.startswith(("f8", "f4")) for t in types):
        return "fp8"
    if types and all(t in ("s8", "u8", "s4", "u4") for t in types):
        return "int8"
    return "f32" if types and all(t in ("f32", "f64", "c64", "c128") for t in types) else "bf16"


def product(instruction: Instruction, work: Flops, rows: int | None = None) -> Product:
    """The sizes of a matmul, told by how much it does to how many elements: whatever it is called, and in whatever
    order its dimensions are written. Products of a batch, each of its own two matrices, stand side by side: the larger
    of m and n is that of all of them together. What is no product of two arrays (a multiply and a sum) has m = 1.

    rows: that each weight of the second operand meets, where the kernel says so, whose weights may lie packed.
    """
    pairs = work.matmul // 2  # batch x m x n x k
    sizes = [operand.shape.elements for operand in instruction.operands[:2]]
    result = instruction.shape.leaves[0].elements if instruction.shape.leaves else 1
    two = len(sizes) == 2 and instruction.opcode != "reduce"  # of which the second is what the sum begins with
    if not two or min(*sizes, result, pairs) < 1 or max(*sizes, result) > pairs:
        return Product(work.precision, 1, max(1, result), max(1, pairs // max(1, result)), work.matmul)
    lhs, rhs = sizes
    if rows:
        return Product(work.precision, rows, max(1, pairs // lhs), max(1, lhs // rows), work.matmul)
    m, n, k = pairs // rhs, pairs // lhs, pairs // result
    batch = max(1, lhs // (m * k))
    m, n = (m, n * batch) if m < n else (m * batch, n)
    return Product(work.precision, m, n, k, work.matmul)


# --- matmuls -----------------------------------------------------------------------------------------------------


def _contracted(dot: Instruction) -> int:
    lhs = dot.operands[0].shape
    return math.prod(lhs.dims[d] for d in dot.integers("lhs_contracting_dims"))


@rule("dot")
def _dot(dot: Instruction) -> Flops:
    """2 x result elements x contracted sizes."""
    return Flops(2 * dot.shape.elements * _contracted(dot), precision=precision(dot))


@rule("ragged-dot")
def _ragged_dot(dot: Instruction) -> Flops:
    """As routed: every row meets the matrix of its own group alone. 2 x result elements x contracted sizes, or, where
    the rows are what is summed, a group's result is summed over its own rows: a Gth of it, of G groups.

    No backend of today runs it as it stands. GPU and CPU mask the rows of each group and multiply all of them with all
    groups, G times this, in a `dot`; TPU calls a kernel (see calls.py).
    """
    summed = set(dot.integers("lhs_ragged_dims")) & set(dot.integers("lhs_contracting_dims"))
    groups = dot.operands[2].shape.dims[-1] if summed else 1
    return Flops(2 * dot.shape.elements * _contracted(dot) // groups, precision=precision(dot))


@rule("convolution")
def _convolution(convolution: Instruction) -> Flops:
    """2 x the multiply-adds that meet two values: padding and the holes of a dilated operand cost nothing.

    TPU's compiler writes batched matmuls as convolutions whose window is dilated so that each output position meets
    exactly one pair; counting window positions without looking would be wrong by the batch squared.
    """
    image, kernel = (operand.shape.dims for operand in convolution.operands[:2])
    return convolved(convolution, image, kernel, convolution.shape.leaves[0].dims)


def convolved(call: Instruction, image: Dims, kernel: Dims, out: Dims) -> Flops:
    """The FLOPs of the convolution of an image with a kernel that `call` says by its dim_labels and window.

    Its gradients are the same pairs, each summed into something else; so they cost the same.
    """
    image_labels, kernel_labels, out_labels = re.split(r"_|->", call.attribute("dim_labels") or "")
    features = kernel[kernel_labels.index("i")] * out[out_labels.index("f")]  # of the image, those of one group
    window = zip(*_window(call.attribute("window"), len(out_labels) - 2), strict=True)
    pairs = 1
    for d, (size, stride, low, image_dilate, kernel_dilate) in enumerate(window):
        sizes = image[image_labels.index(str(d))], out[out_labels.index(str(d))]
        pairs *= _valid_pairs(*sizes, size, stride, low, image_dilate, kernel_dilate)
    return Flops(2 * out[out_labels.index("b")] * features * pairs, precision=precision(call))


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


# A small contraction is written as a multiply and a reduce on a GPU, and so is a product of vectors on all.


_RESHAPING = frozenset(["convert", "bitcast", "reshape", "copy", "transpose"])
MAX_STEPS = 16  # from a product to its sum; compilers take a few


def _through(instruction: Instruction) -> Instruction:
    """The instruction whose values these are, seen through changes of type, shape and layout."""
    while instruction.opcode in _RESHAPING and instruction.operands:
        instruction = instruction.operands[0]
    return instruction


def _named_dot(instruction: Instruction) -> bool:
    """Whether it is a part of a dot_general or a ragged_dot_general."""
    return "dot_general" in instruction.op_name.rsplit("/", 1)[-1]


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
    """Operand elements x operations of what combines two of them; 2 x operand elements where it is half a matmul."""
    elements = reduce.operands[0].shape.elements
    if len(reduce.operands) == 2 and _is_contraction(reduce):
        return Flops(2 * elements, precision="f32")
    if _named_dot(reduce) and _sums_what_is_multiplied_elsewhere(reduce):
        return NOTHING
    return _applied(reduce, elements)


@rule("multiply")
def _multiply(multiply: Instruction) -> Flops:
    """One an element; a matmul whose contraction has length one, or the first half of one written as a reduce."""
    if any(_summed_as_contraction(user) for user in multiply.users):
        return NOTHING  # its reduce carries both halves
    if _named_dot(multiply) and multiply.shape.elements > 1:  # one: the arithmetic of a shard's index
        return Flops(2 * multiply.shape.elements, precision="f32")
    if not multiply.op_name and _is_summed_elsewhere(multiply):
        return Flops(2 * multiply.shape.elements, precision="f32")
    return Flops(elementwise=multiply.shape.elements)


def _summed_as_contraction(user: Instruction) -> bool:
    while user.opcode in _RESHAPING and len(user.users) == 1:
        user = user.users[0]
    return user.opcode == "reduce" and len(user.operands) == 2 and _is_contraction(user)


def _is_summed_elsewhere(multiply: Instruction) -> bool:
    """Whether other kernels sum this product, the last of them under the name of a dot_general. So a CPU multiplies two
    long vectors: a nameless kernel multiplies, one sums each 32 (a reduce-window), one the rest."""
    value = multiply
    for _ in range(MAX_STEPS):
        fusion = value.computation.fusion
        if value is value.computation.root and fusion is not None:
            value = fusion
        if len(value.users) != 1:
            return False
        user = value.users[0]
        if user.is_fusion:
            value = user.called[0].parameters[user.operands.index(value)]
        elif user.opcode in _RESHAPING or user.opcode == "reduce-window":
            value = user
        else:
            return user.opcode == "reduce" and _named_dot(user)
    return False


def _sums_what_is_multiplied_elsewhere(reduce: Instruction) -> bool:
    """The same from the other end; then the product carries both halves."""
    value = reduce.operands[0]
    for _ in range(MAX_STEPS):
        fusion = value.computation.fusion
        if value.opcode == "parameter" and fusion is not None:
            value = fusion.operands[value.number]
        elif value.is_fusion and value.shape.dtype != "tuple":
            value = value.called[0].root
        elif value.opcode in _RESHAPING or value.opcode == "reduce-window":
            value = value.operands[0]
        else:
            return value.opcode == "multiply" and _is_summed_elsewhere(value)
    return False


# --- one a value -------------------------------------------------------------------------------------------------

_TRANSCENDENTAL = frozenset(
    (
        "acos acosh asin asinh atan atan2 atanh cbrt cosh cosine erf exponential exponential-minus-one log "
        "log-plus-one logistic power rsqrt sine sinh sqrt tan tanh"
    ).split()
)
_ARITHMETIC = frozenset(
    (
        "abs add and ceil clamp clz compare complex count-leading-zeros divide floor imag is-finite maximum "
        "minimum negate not or popcnt real remainder round-nearest-afz round-nearest-even select shift-left "
        "shift-right-arithmetic shift-right-logical sign stochastic-convert subtract xor reduce-precision"
    ).split()
)


def is_elementwise(instruction: Instruction) -> bool:
    """Whether each element of its result is computed of the same element of each operand, and of nothing else."""
    opcode = instruction.opcode
    return opcode in _ARITHMETIC or opcode in _TRANSCENDENTAL or opcode == "multiply"


# Nothing is computed: data is named, moved, regrouped or changes its type.
_MOVEMENT = frozenset(
    (
        "add-dependency after-all all-gather all-to-all async-update call-update bitcast bitcast-convert broadcast "
        "collective-broadcast collective-permute concatenate constant convert copy domain dynamic-reshape "
        "dynamic-slice dynamic-update-slice gather get-dimension-size get-tuple-element infeed iota opt-barrier "
        "optimization-barrier outfeed pad parameter partition-id ragged-all-to-all recv replica-id reshape "
        "reverse send set-dimension-size slice transpose tuple"
    ).split()
)


@rule(*_MOVEMENT)
def _nothing(instruction: Instruction) -> Flops:
    """Nothing is computed."""
    del instruction
    return NOTHING


@rule(*_ARITHMETIC)
def _elementwise(instruction: Instruction) -> Flops:
    """One a value of the result."""
    return Flops(elementwise=instruction.shape.elements)


@rule(*_TRANSCENDENTAL)
def _transcendental(instruction: Instruction) -> Flops:
    """One a value of the result."""
    return Flops(transcendental=instruction.shape.elements)


@rule("rng", "rng-bit-generator", "rng-get-and-update-state")
def _rng(instruction: Instruction) -> Flops:
    """One a number: a TPU's generator is hardware. Elsewhere compilers write its arithmetic out (Philox, Threefry)."""
    return Flops(elementwise=sum(leaf.elements for leaf in instruction.shape.leaves))


# --- what combines many values -----------------------------------------------------------------------------------


def _applied(instruction: Instruction, times: int, least: int = 1) -> Flops:
    """The FLOPs of the scalar computation of a reduce, map or scatter, applied so often."""
    opcodes = [i.opcode for region in instruction.called for i in region]
    transcendental = sum(opcode in _TRANSCENDENTAL for opcode in opcodes)
    elementwise = sum(opcode not in _MOVEMENT for opcode in opcodes) - transcendental
    return Flops(0, times * max(elementwise, least), times * transcendental)


@rule("reduce-window")
def _reduce_window(window: Instruction) -> Flops:
    """Pairs of an output and a window position inside the operand x operations of what combines two values.

    So are cumulative sums written, in blocks: a window of b positions over rows of b (CPU and GPU 16, TPU 128), the
    blocks' sums likewise, and both added. That is some b/2 an element, which is executed, and never n/2. A window of
    all n from everywhere, 2n-1 wide, is TPU's "maximum of the row, at each element of the row": one reduction and a
    broadcast, and counted as one pass.
    """
    if not window.op_name and _sums_what_is_multiplied_elsewhere(window):
        return NOTHING
    operand, out = window.operands[0].shape.dims, window.shape.leaves[0].dims
    sides = zip(operand, out, *_window(window.attribute("window"), len(operand)), strict=True)
    pairs = math.prod(
        size if side[0] >= 2 * size - 1 else _valid_pairs(size, out_size, *side) for size, out_size, *side in sides
    )
    return _applied(window, pairs)


@rule("select-and-scatter")
def _select_and_scatter(pool: Instruction) -> Flops:
    """The gradient of pooling: a comparison for each window position inside the operand, an addition a source."""
    operand, source = (value.shape for value in pool.operands[:2])
    sides = zip(operand.dims, source.dims, *_window(pool.attribute("window"), len(operand.dims)), strict=True)
    return Flops(elementwise=math.prod(_valid_pairs(*side) for side in sides) + source.elements)


@rule("map")
def _map(instruction: Instruction) -> Flops:
    """Result elements x operations of the computation."""
    return _applied(instruction, instruction.shape.elements, least=0)


@rule("scatter")
def _scatter(scatter: Instruction) -> Flops:
    """Updates x operations of what combines each with the old value: none where it replaces it."""
    return _applied(scatter, scatter.operands[-1].shape.elements, least=0)


@rule("all-reduce", "reduce-scatter")
def _reduction_collective(instruction: Instruction) -> Flops:
    """One addition for each element that is sent."""
    if in_flight(instruction):
        return NOTHING
    return Flops(elementwise=sum(operand.shape.elements for operand in instruction.operands))


def in_flight(collective: Instruction) -> bool:
    """Whether this is a mention, and not the start, of a collective that TPU's compiler overlaps with other work.

    It writes one such collective into each of a chain of fusions, three to five times in all, with one chain_id: the
    first hands it to AsyncCollectiveStart, the last to AsyncCollectiveDone, those between compute something else.
    """
    if "chain_id=" not in collective.attributes:
        return False
    return not any("AsyncCollectiveStart" in user.attributes for user in collective.users)


# --- algorithms of textbooks ----------------------------------------------------------------------------------------


@rule("sort")
def _sort(sort: Instruction) -> Flops:
    """n log2 n comparisons for each n keys: of a merge sort (Knuth, The Art of Computer Programming 3, 5.2.4)."""
    keys = sort.operands[0].shape
    length = keys.dims[sort.integers("dimensions")[0]] if keys.dims and sort.integers("dimensions") else 1
    return Flops(elementwise=keys.elements * max(1, math.ceil(math.log2(max(length, 2)))))


@rule("topk")
def _topk(instruction: Instruction) -> Flops:
    """One comparison a value: with the least of the k best so far, which it mostly does not reach."""
    return Flops(elementwise=instruction.operands[0].shape.elements)


@rule("fft")
def _fft(instruction: Instruction) -> Flops:
    """5 n log2 n a transform of n points, half of that where one side is real.

    Source: the convention of benchFFT (Frigo and Johnson, fftw.org/speed), after Cooley and Tukey's radix 2. TPU's
    compiler writes a short transform as a product with its matrix instead.
    """
    size = math.prod(instruction.integers("fft_length")) or 1
    points = max(instruction.shape.elements, instruction.operands[0].shape.elements)
    whole = round(5 * points * math.log2(max(size, 2)))
    return Flops(elementwise=whole // 2 if "RFFT" in (instruction.attribute("fft_type") or "") else whole)


@rule("cholesky")
def _cholesky(instruction: Instruction) -> Flops:
    """n^3 / 3 a matrix (Golub and Van Loan, Matrix Computations, 4.2)."""
    return Flops(elementwise=instruction.shape.elements * instruction.shape.dims[-1] // 3)


@rule("triangular-solve")
def _triangular_solve(instruction: Instruction) -> Flops:
    """n^2 a right-hand side (Golub and Van Loan, 3.1)."""
    return Flops(elementwise=instruction.shape.elements * instruction.operands[0].shape.dims[-1])
