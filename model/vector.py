"""One row times one or several weights, as one kernel of a GPU that reads every weight once, near the memory's speed.

A decode step of batch 1 is made of such products. What bounds them besides the memory is, in few bits, arithmetic: an
H200 has time for 3.6 instructions an int4 value, and those that turn integers to floats go at a fraction of the rate.
So a thread takes 32-bit words of adjacent outputs, and puts the bits of a value straight into a float's mantissa: with
value + 8 there, the float is 1 + (value + 8) / 2^k, and the sum of x times that is set right once, at the end, with the
sum of x. That is 2.7 instructions a value, of int8 3.1. And a thread stays with `depth` inputs of one group, so that it
meets one scale only, also at the end.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .kernel_cost import cost


class Plan(NamedTuple):
    """How a product is shared out."""

    depth: int  # inputs that a thread sums over, one after the other
    width: int  # 32-bit words of a row that a program takes
    warps: int  # of 32 threads, of a program
    words: int = 4  # that a thread loads at a time: 4 are the 16 bytes that one instruction loads
    ahead: int = 4  # loads of a thread that are under way together


class Tiles(NamedTuple):
    """How a product is shared out among matrix units, which take 16 rows at a time, all but one of them for nothing."""

    columns: int  # of a program
    depth: int  # inputs that are multiplied at a time
    splits: int  # programs that share the inputs of the same columns
    warps: int
    stages: int  # so many times `depth` inputs are under way together


class Taste(NamedTuple):
    """What plans of a type of weight are like; `plan_for` fits one to a product. As an H200 had it fastest of some
    170 tried for the shapes of an 8B model (BUILD_NOTES.md, stop 9), within a twentieth where it is not the fastest.
    """

    width: int  # as in a plan, at most
    warps: int  # at least
    depths: tuple[int, ...]  # as in a plan
    threads: int  # of each core of the chip, about
    weights: int = 1  # for how many of them together it pays, at least


TASTES = {
    "int4": Taste(32, 4, (8, 16, 32), threads=900),
    "int8": Taste(32, 4, (16, 32, 64), threads=1300),
    # XLA's own product of one weight is as fast. Of queries, keys and values the small ones are too small to be alone.
    "bfloat16": Taste(64, 8, (32, 64), threads=900, weights=3),
}
# Of bfloat16, which a matrix unit takes as it lies, for weights together that keep every core busy: gate and up at 4.15
# TB/s on an H200, where XLA's two products come to 3.8; queries, keys and values at 3.5, where they come to 1.2.
TILES = Tiles(columns=128, depth=64, splits=2, warps=4, stages=4)
SPLITS, BUSY = (2, 4, 8), 2.5  # the least of them that gives each core so many programs
AHEAD = 4  # loads of a thread that are under way together
CORES = 132  # of an H200
MOST = 16  # sums of parts that are written for each output, to be added
SMALLEST = 2**18  # values of all weights together, below which starting a kernel takes longer than what it does


class Columns(NamedTuple):
    """A weight [D,F]: its values, and, for int4, a float32 scale for each group of inputs [G,F]."""

    values: jax.Array
    scale: jax.Array | None = None


def _exponent(bits: int) -> int:
    """2^bits as the bits of a float32."""
    return (127 + bits) << 23


class Part(NamedTuple):
    """Where in a word a value is: shifted (left, if above zero), its lowest bit is the `at`-th of the mantissa."""

    shift: int
    at: int


# The higher up in the mantissa, the less of the sum is lost to the 1 before it: 12 leaves int4 the bits that bfloat16
# has, and more. Two values are taken from a word as it lies, and two from each of three shifted ones.
_INT4 = (Part(16, 16), Part(8, 12), Part(8, 16), Part(0, 12), Part(0, 16), Part(-8, 12), Part(-8, 16), Part(-12, 16))
_INT8 = (Part(8, 8), Part(0, 8), Part(-8, 8), Part(-16, 8))
_PARTS = {"int4": _INT4, "int8": _INT8}


def _shifted(word: jax.Array, by: int) -> jax.Array:
    if by == 0:
        return word
    return word << by if by > 0 else jax.lax.shift_right_logical(word, jnp.full_like(word, -by))


def _signed(bits: int) -> int:
    """32 bits as what int32 calls them."""
    return bits - (1 << 32) if bits >> 31 else bits


def _floats(word: jax.Array, dtype: str, zero: jax.Array) -> list[jax.Array]:
    """The values of words in order: as they are, or for int4 and int8 as 1 + (value + half) / 2^(23 - at).

    zero: nothing, but unknown to the compiler. It keeps a number in a register only if it does not know it, and an
      instruction takes one such as part of itself, not the two that are needed here.
    """
    if dtype == "float32":
        return [jax.lax.bitcast_convert_type(word, jnp.float32)]
    if dtype == "bfloat16":
        both = word << 16, word & _signed(0xFFFF0000)
        return [jax.lax.bitcast_convert_type(half, jnp.float32) for half in both]
    bits, made, shifted = (4 if dtype == "int4" else 8), [], {}
    for part in _PARTS[dtype]:
        if part.shift not in shifted:
            shifted[part.shift] = _shifted(word, part.shift)
        mask, sign = ((1 << bits) - 1) << part.at, 1 << (part.at + bits - 1)
        made.append(
            jax.lax.bitcast_convert_type(
                (shifted[part.shift] & mask) ^ ((_exponent(0) | sign) + jnp.broadcast_to(zero, word.shape)), jnp.float32
            )
        )
    return made


def _righted(sums: list[jax.Array], of_x: jax.Array, dtype: str) -> list[jax.Array]:
    """Sums of x times `_floats`, as those of x times the values; of_x: the sum of x alone."""
    if dtype not in _PARTS:
        return sums
    half = 8.0 if dtype == "int4" else 128.0
    return [
        (total - of_x) * float(2 ** (23 - part.at)) - half * of_x
        for total, part in zip(sums, _PARTS[dtype], strict=True)
    ]


def _interleaved(parts: list[jax.Array]) -> jax.Array:
    """n arrays [R,C] as one [R,C n], the n-th columns of all beside each other."""
    if len(parts) == 1:
        return parts[0]
    rows, columns, n = *parts[0].shape, len(parts)
    while len(parts) > 1:  # in pairs that are furthest apart, so that the last axis comes out as the lowest bit
        half = len(parts) // 2
        parts = [jnp.stack(pair, axis=-1) for pair in zip(parts[:half], parts[half:], strict=True)]
    return parts[0].reshape(rows, columns * n)


def per_word(dtype: Any) -> int:
    """Values in a word of 32 bits; 0 where the kernel does not know the type."""
    return {"int4": 8, "int8": 4, "bfloat16": 2, "float32": 1}.get(str(jnp.dtype(dtype)), 0)


def fits(plan: Plan, D: int, columns: list[Columns]) -> bool:
    """Whether weights can be shared out so."""
    first = columns[0].values.dtype
    n = per_word(first)
    if not n or D % plan.depth or any(w.values.dtype != first or w.values.shape[1] % (n * plan.width) for w in columns):
        return False
    group = math.gcd(*(D // len(w.scale) for w in columns if w.scale is not None)) or D
    return group % plan.depth == 0 and plan.depth % plan.ahead == 0 and (D // plan.depth) % lanes(plan) == 0


def lanes(plan: Plan) -> int:
    """How many times `depth` inputs a program sums."""
    return 32 * plan.warps * plan.words // plan.width


def plan_for(D: int, columns: list[Columns], rows: int = 0) -> Plan | Tiles | None:
    """A plan for these weights; None where there is none, or no point. rows: of which each has a weight of its own, for
    which there is no other way."""
    dtype, F = columns[0].values.dtype, sum(w.values.shape[1] for w in columns)
    if len(columns) > 1 and all(str(w.values.dtype) == "bfloat16" for w in columns):
        whole = all(w.values.shape[1] % TILES.columns == 0 for w in columns)
        busy = (n for n in SPLITS if D % (n * TILES.depth) == 0 and n * F / TILES.columns >= BUSY * CORES)
        if whole and (splits := next(busy, 0)):
            return TILES._replace(splits=splits)
    taste = TASTES.get(str(dtype))
    if taste is None or D * F < SMALLEST or (not rows and len(columns) < taste.weights):
        return None
    words = max(rows, 1) * D * F // per_word(dtype)
    for width in (taste.width, taste.width // 2, taste.width // 4):
        plans = [
            Plan(depth, width, warps, ahead=AHEAD) for depth in taste.depths for warps in (taste.warps, 2 * taste.warps)
        ]
        plans = [one for one in plans if fits(one, D, columns) and D // one.depth // lanes(one) <= MOST]
        if plans:
            return min(
                plans,
                key=lambda one: (abs(math.log(words / (one.words * one.depth * CORES * taste.threads))), one.warps),
            )
    return None


def words_of(values: jax.Array, depth: int) -> jax.Array:
    """Weights [E,D,F] as words [E, D / depth, depth, F / n], as they lie."""
    E, D, F = values.shape
    n = per_word(values.dtype)
    split = values.reshape(E, D // depth, depth, F // n, n) if n > 1 else values.reshape(E, D // depth, depth, F)
    return jax.lax.bitcast_convert_type(split, jnp.int32)


def _of_column(column: Any, blocks: list[int], run: Callable[[int, Any], None]) -> None:
    """run(number of the weight, column of it) of the one weight that has this column, of so many blocks each."""
    first = 0
    for number, count in enumerate(blocks):
        here = partial(run, number, column - first)
        if len(blocks) == 1:
            here()
        else:
            pl.when((column >= first) & (column < first + count))(here)
        first += count


def partial_products(x: jax.Array, columns: list[Columns], plan: Plan, *, interpret: bool = False) -> list[jax.Array]:
    """x [D] times each weight, as float32 sums over parts of the inputs [S,F], still to be added."""
    stacks = [Columns(w.values[None], None if w.scale is None else w.scale[None]) for w in columns]
    return [parts[0] for parts in _partial_products(x[None], stacks, plan, interpret=interpret)]


# Traced once for all layers, which takes a tenth of a second.
@partial(jax.jit, static_argnames=("plan", "asked", "interpret"))
def _partial_products(
    x: jax.Array,
    columns: list[Columns],
    plan: Plan,
    experts: jax.Array | None = None,
    *,
    asked: int = 1,
    interpret: bool = False,
) -> list[jax.Array]:
    """Rows x [M,D], each times the one of each stack of E weights that `experts` [M] says, or the only one: [M,S,F].

    asked: how many different ones are asked for, at most.
    """
    (M, D), R, C = x.shape, lanes(plan), plan.width
    dtype = str(columns[0].values.dtype)
    n, scaled = per_word(dtype), columns[0].scale is not None
    blocks = [w.values.shape[2] // (n * C) for w in columns]
    S = D // plan.depth // R
    arrays = [x.reshape(M, -1, plan.depth), *(words_of(w.values, plan.depth) for w in columns)]
    arrays += [w.scale for w in columns if w.scale is not None]

    def fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        """a * b + c as one instruction, which the compiler makes of it only when told."""
        if interpret:
            return a * b + c
        out = [jax.ShapeDtypeStruct(c.shape, jnp.float32)]
        (made,) = triton.elementwise_inline_asm(
            "fma.rn.f32 $0, $1, $2, $3;", args=[a, b, c], constraints="=f,f,f,f", pack=1, result_shape_dtypes=out
        )
        return made

    def block(x: Any, w: Any, scale: Any, out: Any, at: tuple[Any, ...]) -> None:
        program, row, expert, part, column = at
        # The compiler knows that a program's number is below 2^31 only.
        zero = (program + jnp.arange(R, dtype=jnp.int32)[:, None]) >> 30
        own, here = pl.ds(part * R, R), pl.ds(column * C, C)

        def load(i: Any) -> jax.Array:
            return w[expert, own, i, here]

        def add(i: Any, word: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            inputs = jnp.broadcast_to(x[row, own, i].astype(jnp.float32)[:, None], (R, C))
            values = _floats(word, dtype, zero)
            return [fma(inputs, value, total) for total, value in zip(sums, values, strict=True)]

        def step(number: Any, carry: tuple[list[jax.Array], list[jax.Array]]) -> Any:
            (sums, words), begun = carry, []
            for k, word in enumerate(words):
                i = number * plan.ahead + k
                sums = add(i, word, sums)
                begun.append(load(i + plan.ahead))
            return sums, begun

        # A load is begun `ahead` inputs before its words are used. Left to itself, the compiler puts each off until
        # there is a register to spare; but it moves none into a loop, if it does not know the loop's length.
        last = plan.depth - plan.ahead
        carry = [jnp.zeros((R, C), jnp.float32)] * n, [load(k) for k in range(plan.ahead)]
        sums, words = jax.lax.fori_loop(0, last // plan.ahead + (program >> 30), step, carry)
        for k, word in enumerate(words):
            sums = add(last + k, word, sums)
        of_x = jnp.sum(x[row, own].astype(jnp.float32), axis=1)[:, None]
        wide, there = _interleaved(_righted(sums, of_x, dtype)), pl.ds(column * C * n, C * n)
        if scale is not None:
            each = D // scale.shape[1] // plan.depth  # of so many lanes is a group
            group = (part * R + jnp.arange(R, dtype=jnp.int32)) // each
            wide = wide * scale[expert, group[:, None], (column * C * n + jnp.arange(C * n, dtype=jnp.int32))[None]]
        out[row, part, there] = jnp.sum(wide, axis=0)

    def kernel(x: Any, *refs: Any) -> None:
        given, outs = refs[: -len(columns)], refs[-len(columns) :]
        values, scales = given[: len(columns)], given[len(columns) : 2 * len(columns)] if scaled else [None] * len(outs)
        program = pl.program_id(0)
        row, rest = (0, program) if M == 1 else (program // (sum(blocks) * S), program % (sum(blocks) * S))
        part, column = rest // sum(blocks), rest % sum(blocks)
        expert = 0 if experts is None else given[-1][row]

        def run(number: int, own: Any) -> None:
            block(x, values[number], scales[number], outs[number], (program, row, expert, part, own))

        _of_column(column, blocks, run)

    F, E = sum(w.values.shape[2] for w in columns), len(columns[0].values)
    reads: list[int | None] = [None] * len(arrays)
    if experts is not None:
        reads = [None, *(asked * array.size // E for array in arrays[1:]), None]
        arrays.append(experts)
    made = pl.pallas_call(
        kernel,
        grid=(M * S * sum(blocks),),
        out_shape=[jax.ShapeDtypeStruct((M, S, w.values.shape[2]), jnp.float32) for w in columns],
        compiler_params=triton.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=interpret,
        **cost(2 * M * D * F, reads, arrays, "vector_product"),
    )(*arrays)
    return list(made)


def of_experts(
    x: jax.Array, w: Columns, experts: jax.Array, asked: int, *, interpret: bool = False
) -> jax.Array | None:
    """Rows x [M,D], each times its own of E weights [E,D,F], by its number in `experts` [M]: [M,F], float32; None where
    there is no plan. asked: how many different ones there are, at most."""
    M, D = x.shape
    one = jax.eval_shape(lambda: Columns(w.values[0], None if w.scale is None else w.scale[0]))
    plan = plan_for(D, [one], M) if x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32) else None
    if not isinstance(plan, Plan):
        return None
    (parts,) = _partial_products(x, [w], plan, experts, asked=asked, interpret=interpret)
    return added(jnp.swapaxes(parts, 0, 1))


@partial(jax.jit, static_argnames=("tiles", "interpret"))
def tiled_products(x: jax.Array, columns: list[Columns], tiles: Tiles, *, interpret: bool = False) -> list[jax.Array]:
    """`partial_products` of x [D] in bfloat16, by matrix units: float32 sums over parts of the inputs [S,F]."""
    D, part_size = x.size, x.size // tiles.splits
    blocks = [w.values.shape[1] // tiles.columns for w in columns]

    def block(x: Any, w: Any, out: Any, column: Any, part: Any) -> None:
        here = pl.ds(column * tiles.columns, tiles.columns)

        def step(number: Any, sums: jax.Array) -> jax.Array:
            inputs = pl.ds(part * part_size + number * tiles.depth, tiles.depth)
            return sums + triton.dot(jnp.broadcast_to(x[inputs][None], (16, tiles.depth)), w[inputs, here])

        sums = jnp.zeros((16, tiles.columns), jnp.float32)
        sums = jax.lax.fori_loop(0, part_size // tiles.depth, step, sums)
        out[part, here] = jnp.max(sums, axis=0)  # they are all the same

    def kernel(x: Any, *refs: Any) -> None:
        program = pl.program_id(0)
        part, column = program // sum(blocks), program % sum(blocks)

        def run(number: int, own: Any) -> None:
            block(x, refs[number], refs[len(columns) + number], own, part)

        _of_column(column, blocks, run)

    arrays = [x, *(w.values for w in columns)]
    made = pl.pallas_call(
        kernel,
        grid=(sum(blocks) * tiles.splits,),
        out_shape=[jax.ShapeDtypeStruct((tiles.splits, w.values.shape[1]), jnp.float32) for w in columns],
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        **cost(2 * D * sum(w.values.shape[1] for w in columns), [None] * len(arrays), arrays, "vector_product"),
    )(*arrays)
    return list(made)


def added(parts: jax.Array) -> jax.Array:
    """[S,F] -> [F]: one by one, because XLA makes of a sum over an axis a kernel of its own."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class Shared(NamedTuple):
    """Products of one row with weights that lie as [inputs, outputs], and how they are shared out."""

    order: str  # of the row, as an einsum
    shapes: list[tuple[int, ...]]  # of results
    inputs: list[int]  # how many axes of each weight are summed over
    plan: Plan | Tiles


def shared(expressions: list[str], x: Any, weights: list[Columns]) -> Shared | None:
    """How to make `einsums`, of arrays or only their shapes; None where it is no single row, or there is no way."""
    orders, shapes, flat, counts = set(), [], [], []
    for expression, w in zip(expressions, weights, strict=True):
        inputs, axes, out = re.split(r",|->", expression)
        sizes = dict(zip(inputs + axes, (*x.shape, *w.values.shape), strict=True))
        within = "".join(a for a in axes if a in inputs and a not in out)
        columns = "".join(a for a in out if a in axes)
        if not within or axes != within + columns or x.size != math.prod(sizes[a] for a in within):
            return None
        ones = "".join(a for a in inputs if a not in within)
        orders.add(f"{inputs}->{ones}{within}")
        shapes.append(tuple(sizes[a] for a in out))
        counts.append(len(within))
        flat.append(jax.eval_shape(partial(_flat, summed=len(within)), w))
    chosen = plan_for(x.size, flat) if len(orders) == 1 else None
    return None if chosen is None else Shared(orders.pop(), shapes, counts, chosen)


def _flat(w: Columns, summed: int) -> Columns:
    """A weight of several axes, of which the first `summed` are inputs, as one of two."""

    def of_two(array: jax.Array) -> jax.Array:
        return array.reshape(math.prod(array.shape[:summed]), -1)

    return Columns(of_two(w.values), None if w.scale is None else of_two(w.scale))


def einsums(how: Shared, x: jax.Array, weights: list[Columns], *, interpret: bool = False) -> list[jax.Array]:
    """`jnp.einsum(expression, x, weight)` of each weight, float32, as one kernel."""
    flat = [_flat(w, summed) for w, summed in zip(weights, how.inputs, strict=True)]
    row = jnp.einsum(how.order, x).reshape(-1)
    if isinstance(how.plan, Tiles):
        parts = tiled_products(row, flat, how.plan, interpret=interpret)
    else:
        parts = partial_products(row, flat, how.plan, interpret=interpret)
    return [added(part).reshape(shape) for part, shape in zip(parts, how.shapes, strict=True)]
