"""One row times one or several weights, as one kernel of a GPU that reads every weight once, near the memory's speed.

A decode step of batch 1 is made of such products. A matrix unit does them, though it takes 16 rows at a time: what else
multiplies needs an instruction a weight, and registers for all that is under way, where this has copies straight into
shared memory, of weights and of the row alike. Weights in few bits are made numbers of 16 bits on their way from there,
two at a time:

- Four bits are put into the mantissa of 128 in bfloat16: value + 8 there is 128 + 8 + value. That is one instruction a
  value; 136 times the sum of x comes off at the end. The 16 rows are not all the same, either: each is of one group of
  inputs and zero elsewhere, so that what meets a scale is a sum over a group, once, at the end.
- Of eight bits there is room for seven. What is taken off again, at once, is 128 or, if the sign is set, 256.

What each choice is worth was measured on an H200: BUILD_NOTES.md, stops 9 to 11.
"""

import itertools
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

ROWS = 16  # that a matrix unit takes at a time
BIAS = 136.0  # what `_numbers` adds to a value of four bits


class Columns(NamedTuple):
    """A weight [D,F]: its values, and, for int4, a float32 scale for each group of inputs [G,F]."""

    values: jax.Array
    scale: jax.Array | None = None


class Tiles(NamedTuple):
    """How a product is shared out."""

    columns: int  # outputs of a program
    depth: int  # inputs that are multiplied at a time
    splits: int  # programs that share the inputs of the same columns
    warps: int  # of 32 threads, of a program
    stages: int  # so many times `depth` inputs are under way together


class Taste(NamedTuple):
    """What plans of a type of weight are like; `plan_for` fits one to a product."""

    columns: int  # as in a plan, at most
    depth: int  # likewise
    warps: int
    stages: int
    programs: float  # of each core of the chip, at least, where there is enough to do; but no more than it takes
    weights: int = 1  # for how many of them together it pays, at least


TASTES = {
    "int4": Taste(256, 128, 4, 3, programs=0.95),
    "int8": Taste(256, 64, 4, 4, programs=0.95),
    # XLA's own product of one weight is as fast.
    "bfloat16": Taste(256, 32, 8, 4, programs=0.95, weights=2),
}
CORES = 132  # of an H200
MOST = 32  # sums of parts that are written for each output, to be added
SMALLEST = 2**18  # values of all weights together, below which starting a kernel takes longer than what it does
LEAST_WORDS, LEAST_DEPTH = 8, 32  # that a warp takes of a row, and that a program multiplies at a time


def _packed(code: str, arrays: list[jax.Array], words: int) -> jax.Array:
    """Code that makes two bfloat16 in one register, $0, of two elements: in `words` registers, from $1 on."""
    (made,) = triton.elementwise_inline_asm(
        f"{{ .reg .b32 a, b, c; {code} }}",
        args=arrays,
        constraints=",".join(["=r", *["r"] * words]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(arrays[0].shape, jnp.bfloat16)],
    )
    return made


def _numbers(word: jax.Array, dtype: str, interpret: bool) -> list[jax.Array]:
    """The values in words, in order, as bfloat16; those of int4 with BIAS added."""
    n = per_word(dtype)
    if n == 1:
        return [word]
    bits = 32 // n
    if interpret:
        bias = BIAS if dtype == "int4" else 0.0
        signed = [(word << (32 - bits * (at + 1))) >> (32 - bits) for at in range(n)]
        return [(value.astype(jnp.float32) + bias).astype(jnp.bfloat16) for value in signed]
    if dtype == "int8":
        # Seven bits are put into the mantissa of 128, and the sign's makes -256 of the -128 that is added then.
        code = (
            "prmt.b32 a, $1, $2, 0x{0}{0}{1}{1}; lop3.b32 b, a, 0x007F007F, 0x43004300, 0xEA; "
            "lop3.b32 a, a, 0x00800080, 0xC300C300, 0xEA; mov.b32 c, 0x3F803F80; fma.rn.bf16x2 $0, b, c, a;"
        )
        return [_packed(code.format(4 + at, at), [word], 2) for at in range(n)]
    halves = word.astype(jnp.int16), jax.lax.shift_right_logical(word, jnp.full_like(word, 16)).astype(jnp.int16)
    # What a shift brings over from the other half is masked away. 0x6A: (a & b) ^ c, of 128 and the sign's bit.
    code = "shr.b32 a, $1, {}; lop3.b32 $0, a, 0x000F000F, 0x43084308, 0x6A;"
    return [_packed(code.format(bits * (at % 4)), [halves[at // 4]], 1) for at in range(n)]


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
    """Values that are loaded as one: of a 32-bit word, or a bfloat16 as it lies; 0 where the kernel does not know the
    type."""
    return {"int4": 8, "int8": 4, "bfloat16": 1}.get(str(jnp.dtype(dtype)), 0)


def groups_of(D: int, columns: list[Columns], splits: int) -> int:
    """How many groups with a scale each part of the inputs has; 1 where scales are not of groups."""
    scales = [w.scale for w in columns if w.scale is not None]
    return len(scales[0]) // splits if scales else 1


def _group(D: int, columns: list[Columns]) -> int:
    """Inputs that share a scale; all, where scales are not of groups."""
    return min((D // len(w.scale) for w in columns if w.scale is not None), default=D)


def fits(tiles: Tiles, D: int, columns: list[Columns]) -> bool:
    """Whether weights can be shared out so."""
    first, groups = columns[0], groups_of(D, columns, tiles.splits)
    if any(w.values.dtype != first.values.dtype or w.values.shape[-1] % tiles.columns for w in columns):
        return False
    if first.scale is not None:
        whole = len(first.scale) == groups * tiles.splits and all(w.scale is not None for w in columns)
        if not whole or groups not in (1, 2, 4, 8, 16) or D // len(first.scale) % tiles.depth:
            return False
    return D % (tiles.splits * tiles.depth) == 0


def plan_for(D: int, columns: list[Columns], rows: int = 0) -> Tiles | None:
    """A plan for these weights; None where there is none, or no point. rows: of which each has a weight of its own, for
    which there is no other way."""
    dtype, F = str(columns[0].values.dtype), sum(w.values.shape[-1] for w in columns)
    taste = TASTES.get(dtype)
    if taste is None or D * F < SMALLEST or (not rows and len(columns) < taste.weights):
        return None
    most: tuple[float, Tiles] | None = None
    for narrower, splits in itertools.product((1, 2, 4), range(1, MOST + 1)):
        wide = taste.columns // narrower
        warps = min(taste.warps, wide // per_word(dtype) // LEAST_WORDS)
        depth = max(LEAST_DEPTH, min(taste.depth, _group(D, columns)))
        tiles, programs = Tiles(wide, depth, splits, warps, taste.stages), max(rows, 1) * splits * F / wide / CORES
        if fits(tiles, D, columns):
            most = max(most or (programs, tiles), (programs, tiles))
            if programs >= taste.programs:
                return tiles
    return most and most[1]


def _words(values: jax.Array) -> jax.Array:
    """Weights [E,D,F] as the kernel loads them, [E,D,F / n], as they lie."""
    n = per_word(values.dtype)
    return values if n == 1 else jax.lax.bitcast_convert_type(values.reshape(*values.shape[:-1], -1, n), jnp.int32)


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


def partial_products(x: jax.Array, columns: list[Columns], tiles: Tiles, *, interpret: bool = False) -> list[jax.Array]:
    """x [D] times each weight, as float32 sums over parts of the inputs [S,F], still to be added."""
    stacks = [Columns(w.values[None], None if w.scale is None else w.scale[None]) for w in columns]
    return [parts[0] for parts in _partial_products(x[None], stacks, tiles, interpret=interpret)]


# Traced once for all layers, which takes a tenth of a second.
@partial(jax.jit, static_argnames=("tiles", "asked", "interpret"))
def _partial_products(
    x: jax.Array,
    columns: list[Columns],
    tiles: Tiles,
    experts: jax.Array | None = None,
    *,
    asked: int = 1,
    interpret: bool = False,
) -> list[jax.Array]:
    """Rows x [M,D], each times the one of each stack of E weights that `experts` [M] says, or the only one: [M,S,F].

    asked: how many different ones are asked for, at most.
    """
    (M, D), S, dtype = x.shape, tiles.splits, str(columns[0].values.dtype)
    n, scaled, size = per_word(dtype), columns[0].scale is not None, D // S
    groups = groups_of(D, [Columns(w.values[0], None if w.scale is None else w.scale[0]) for w in columns], S)
    blocks = [w.values.shape[2] // tiles.columns for w in columns]
    arrays = [x, *(_words(w.values) for w in columns), *(w.scale for w in columns if w.scale is not None)]

    def block(x: Any, w: Any, scale: Any, out: Any, at: tuple[Any, ...]) -> None:
        row, expert, part, column = at
        words, each = tiles.columns // n, size // groups
        here, there = pl.ds(column * words, words), pl.ds(column * tiles.columns, tiles.columns)
        group = jnp.arange(ROWS, dtype=jnp.int32) % groups  # of this part: what a row of the matrix unit's is of

        def step(number: Any, sums: list[jax.Array]) -> list[jax.Array]:
            first = number * tiles.depth
            # ROWS times the same addresses: as one row that is repeated it would not be copied ahead with the weights,
            # and each step would wait for it, which took an H200 longer than all else.
            inputs = jnp.broadcast_to(part * size + first + jnp.arange(tiles.depth)[None], (ROWS, tiles.depth))
            own = None if groups == 1 else jnp.broadcast_to(group[:, None] == first // each, inputs.shape)
            rows = triton.load(x.at[row, inputs], mask=own, other=None if own is None else 0.0)
            values = _numbers(w[expert, pl.ds(part * size + first, tiles.depth), here], dtype, interpret)
            return [total + triton.dot(rows, value) for total, value in zip(sums, values, strict=True)]

        scales: list[jax.Array] = []
        of_x = jnp.zeros((ROWS, 1), jnp.float32)
        if scaled:  # on their way before the first of the weights
            inputs = part * size + group[:, None] * each + jnp.arange(each, dtype=jnp.int32)[None]
            of_x = jnp.sum(x[row, inputs].astype(jnp.float32), axis=1)[:, None]
            own_group = (part * groups + group)[:, None]
            lines = column * tiles.columns + n * jnp.arange(words, dtype=jnp.int32)[None]
            scales = [scale[expert, own_group, lines + k] for k in range(n)]
        sums = [jnp.zeros((ROWS, words), jnp.float32)] * n
        sums = jax.lax.fori_loop(0, size // tiles.depth, step, sums)
        if scaled:
            sums = [(total - BIAS * of_x) * by for total, by in zip(sums, scales, strict=True)]
        # Each group is in as many rows as the next.
        wide = [jnp.sum(total, axis=0)[None] * (groups / ROWS) for total in sums]
        out[row, part, there] = _interleaved(wide)[0]

    def kernel(x: Any, *refs: Any) -> None:
        given, outs = refs[: -len(columns)], refs[-len(columns) :]
        values, scales = given[: len(columns)], given[len(columns) : 2 * len(columns)] if scaled else [None] * len(outs)
        program = pl.program_id(0)
        row, rest = (0, program) if M == 1 else (program // (sum(blocks) * S), program % (sum(blocks) * S))
        part, column = rest // sum(blocks), rest % sum(blocks)
        expert = 0 if experts is None else given[-1][row]

        def run(number: int, own: Any) -> None:
            block(x, values[number], scales[number], outs[number], (row, expert, part, own))

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
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        **cost(2 * M * D * F, reads, arrays, "vector_product", rows=1),
    )(*arrays)
    return list(made)


def of_experts(
    x: jax.Array, w: Columns, experts: jax.Array, asked: int, *, interpret: bool = False
) -> jax.Array | None:
    """Rows x [M,D], each times its own of E weights [E,D,F], by its number in `experts` [M]: [M,F], float32; None where
    there is no plan. asked: how many different ones there are, at most."""
    M, D = x.shape
    one = jax.eval_shape(lambda: Columns(w.values[0], None if w.scale is None else w.scale[0]))
    plan = plan_for(D, [one], M) if x.dtype == jnp.bfloat16 else None
    if plan is None:
        return None
    (parts,) = _partial_products(x, [w], plan, experts, asked=asked, interpret=interpret)
    return added(jnp.swapaxes(parts, 0, 1))


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
    plan: Tiles


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
    chosen = plan_for(x.size, flat) if len(orders) == 1 and x.dtype == jnp.bfloat16 else None
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
    parts = partial_products(row, flat, how.plan, interpret=interpret)
    return [added(part).reshape(shape) for part, shape in zip(parts, how.shapes, strict=True)]
