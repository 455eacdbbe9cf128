"""Blocks of rows, each times one of E matrices, as one kernel that reads of the matrices only what some block asks for.

XLA has no such product for a GPU: it copies each block's matrix out of the stack before it multiplies (3 times the
bytes), or multiplies every row by every matrix (`ragged_dot`, E times the FLOPs). The kernels are written in Pallas,
for Triton on a GPU and for Mosaic on a TPU; elsewhere it is a loop over the blocks. int4 values become numbers and meet
their scales inside, so that no wide copy of them is ever written.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton

from . import vector
from .axes import device_kind, platform
from .kernel_cost import cost

ROWS = 128  # of a block, at most: what a matrix unit takes at a time
MIB = 2**20


class Matrices(NamedTuple):
    """E matrices [E,D,F] for rows [D]; `across`: [E,F,D]. With groups of inputs a scale [E,G,F], or [E,F,G]."""

    values: jax.Array
    scale: jax.Array | None = None
    across: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, D, F."""
        E, D, F = self.values.shape
        return (E, F, D) if self.across else (E, D, F)

    @property
    def groups(self) -> int:
        """G; 1 without scales."""
        return 1 if self.scale is None else self.scale.shape[2 if self.across else 1]

    @property
    def differentiable(self) -> bool:
        """Whether they are plain numbers."""
        return self.scale is None and jnp.issubdtype(self.values.dtype, jnp.floating)


class Machine(NamedTuple):
    """What a kernel is compiled for, or interpreted as."""

    platform: str  # "cuda" or "tpu"; for all else there is the loop
    memory: int = 40 * MIB  # of a TPU's VMEM, for a kernel
    interpret: bool = False


def machine() -> Machine:
    """What is compiled for."""
    small = device_kind() in ("TPU v2", "TPU v3", "TPU v4")  # 16 MiB a core; from v5 on at least 64
    return Machine(platform(), (12 if small else 40) * MIB)


class Task(NamedTuple):
    """A product, but for its arrays.

    rows: how many there are; what is left of the M b is padding. asked: how many of the matrices there can be need for.
    """

    rows: int
    asked: int
    out_dtype: np.dtype
    on: Machine


def grouped_matmul(
    x: jax.Array,
    w: Matrices,
    experts: jax.Array,
    *,
    rows: int = 0,
    asked: int = 0,
    out_dtype: jax.typing.DTypeLike | None = None,
    on: Machine | None = None,
) -> jax.Array:
    """Blocks of rows x [M,b,D], each times a matrix: their numbers, ascending, are experts [M] -> [M,b,F].

    Sums are float32, or int32 where both sides are int8. Differentiable, by x and by matrices that are plain numbers.
    rows: where the last of the M b are padding, how many are not. asked: of how many different matrices there are
      blocks, at most, where it is known to be fewer than all.
    """
    M, b, _ = x.shape
    task = Task(rows or M * b, min(asked or M, M, len(w.values)), jnp.dtype(out_dtype or x.dtype), on or machine())
    if w.differentiable:
        return _differentiable(task, w.across, x, w.values, experts)
    return _product(task, x, w, experts)


def matmul(x: jax.Array, w: Matrices, *, on: Machine | None = None) -> jax.Array | None:
    """Rows x [E,R,D], each times its own of the E matrices, [E,R,F]; None where there is no kernel for such sizes."""
    E, R, D = x.shape
    b = 1 if R == 1 else min(ROWS, max(16, 1 << (R - 1).bit_length()))
    blocks = jnp.pad(x, ((0, 0), (0, -R % b), (0, 0))).reshape(-1, b, D)
    each = len(blocks) // E
    task = Task(E * R, E, jnp.dtype(x.dtype), on or machine())
    y = _kernel_product(task, blocks, w, jnp.repeat(jnp.arange(E, dtype=jnp.int32), each))
    return None if y is None else y.reshape(E, each * b, -1)[:, :R]


def _has_kernels(on: Machine, x: jax.Array) -> bool:
    """Whether the machine has kernels for rows of this type."""
    types = {"cuda": ("bfloat16", "float16", "float32", "int8"), "tpu": ("bfloat16", "float32", "int8")}
    return str(x.dtype) in types.get(on.platform, ())


def _kernel_product(task: Task, x: jax.Array, w: Matrices, experts: jax.Array) -> jax.Array | None:
    if not _has_kernels(task.on, x):
        return None
    return {"cuda": _triton_product, "tpu": _mosaic_product}[task.on.platform](task, x, w, experts)


def _product(task: Task, x: jax.Array, w: Matrices, experts: jax.Array) -> jax.Array:
    made = _kernel_product(task, x, w, experts)
    return _loop_product(task, x, w, experts) if made is None else made


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable(task: Task, across: bool, x: jax.Array, values: jax.Array, experts: jax.Array) -> jax.Array:
    return _product(task, x, Matrices(values, across=across), experts)


def _forward(task: Task, across: bool, x: jax.Array, values: jax.Array, experts: jax.Array) -> Any:
    return _differentiable(task, across, x, values, experts), (x, values, experts)


def _backward(task: Task, across: bool, saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array) -> Any:
    """Autodiff of the loop would add an array of the size of all E matrices for each block."""
    x, values, experts = saved
    dx = _product(task._replace(out_dtype=x.dtype), dy, Matrices(values, across=not across), experts)
    both, shape = (dy, x) if across else (x, dy), jax.ShapeDtypeStruct(values.shape, values.dtype)
    dw = None
    if _has_kernels(task.on, x):
        dw = {"cuda": _triton_gradient, "tpu": _mosaic_gradient}[task.on.platform](task, *both, experts, shape)
    if dw is None:
        dw = _loop_gradient(*both, experts, shape)
    return dx, dw, np.zeros(experts.shape, jax.dtypes.float0)


_differentiable.defvjp(_forward, _backward)


# ---- the loop


def _row(stack: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


def _loop_product(task: Task, x: jax.Array, w: Matrices, experts: jax.Array) -> jax.Array:
    letters, G = "FGD" if w.across else "GDF", w.groups

    def product(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, expert = block
        values = _row(w.values, expert)
        if w.scale is None:
            plain = f"bD,{letters.replace('G', '')}->bF"
            y = jnp.einsum(plain, rows, values.astype(rows.dtype), preferred_element_type=_wide(rows.dtype))
            return y.astype(task.out_dtype)
        split = values.reshape(len(values), G, -1) if w.across else values.reshape(G, -1, values.shape[1])
        rows = rows.reshape(len(rows), G, -1)
        parts = jnp.einsum(
            f"bGD,{letters}->GbF", rows, split.astype(rows.dtype), preferred_element_type=_wide(rows.dtype)
        )
        scale = _row(w.scale, expert)
        return jnp.sum(parts * (scale.T if w.across else scale)[:, None], axis=0).astype(task.out_dtype)

    return jax.lax.map(product, (x, experts))


def _loop_gradient(x: jax.Array, dy: jax.Array, experts: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    def add(dw: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, slopes, expert = block
        more = jnp.einsum("bD,bF->DF", rows, slopes, preferred_element_type=dw.dtype)
        return jax.lax.dynamic_update_index_in_dim(dw, _row(dw, expert) + more, expert, 0), None

    dw, _ = jax.lax.scan(add, jnp.zeros(shape.shape, _wide(x.dtype)), (x, dy, experts))
    return dw.astype(shape.dtype)


def _wide(dtype: jax.typing.DTypeLike) -> jax.typing.DTypeLike:
    """What products of numbers of this type are summed in."""
    return jnp.int32 if dtype == jnp.int8 else jnp.promote_types(dtype, jnp.float32)


# ---- the kernels


def _multiply(a: Any, b: Any, contracted: tuple[int, int]) -> jax.Array:
    """The product of two blocks of two axes, along one axis of each."""
    numbers = (contracted[:1], contracted[1:]), ((), ())
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=_wide(a.dtype))


def _power(n: int, most: int) -> int:
    """The largest power of two that divides n, but at most `most`."""
    return math.gcd(n, most)


TOGETHER = 16  # blocks of one matrix that run beside each other, and share its columns


def _turn(program: Any, first: Any, last: Any, columns: int) -> tuple[Any, Any]:
    """The block and the columns of a program, where the blocks from `first` to before `last` share a matrix."""
    program = program - first * columns
    part = program // (TOGETHER * columns)
    size = jnp.minimum(last - first - part * TOGETHER, TOGETHER)
    program = program - part * (TOGETHER * columns)
    return first + part * TOGETHER + program % size, program // size


def _triton_product(task: Task, x: jax.Array, w: Matrices, experts: jax.Array) -> jax.Array | None:
    (M, b, D), (_, _, F), values = x.shape, w.sizes, w.values
    if b == 1 and not w.across:
        columns = vector.Columns(values, w.scale)
        found = vector.of_experts(x[:, 0], columns, experts, task.asked, interpret=task.on.interpret)
        if found is not None:
            return found.astype(task.out_dtype)[:, None]
    packed = values.dtype == jnp.int4
    width = _power(F, 128 if M * F >= 256 * 128 else 64)
    depth = _power(D // w.groups, 128 if packed else 32 if x.dtype == jnp.float32 else 64)
    if min(width, depth) < 16 or b not in (1, 16, 32, 64, 128):
        return None
    if values.dtype.itemsize == 1 and 2**31 < values.size // (2 if packed else 1) <= 2**32:
        return None  # Pallas counts the bytes of an array in 32 bits up to here, and Triton takes them to be signed
    if packed:  # Pallas reads int4 by the byte only along a whole last axis
        size = depth if w.across else width
        values = values.reshape(*values.shape[:2], -1, size)
    columns, contracted = F // width, (1, 1 if w.across else 0)
    first, last = _spans(experts, experts)

    def kernel(experts: Any, first: Any, last: Any, x: Any, w_ref: Any, *rest: Any) -> None:
        *scale, out = rest
        program = pl.program_id(0)
        block, column = _turn(program, first[program // columns], last[program // columns], columns)
        expert, here = experts[block], pl.ds(column * width, width)

        def step(number: Any, sums: jax.Array) -> jax.Array:
            inputs = pl.ds(number * depth, depth)
            if packed:
                values = w_ref[expert, here, number] if w.across else w_ref[expert, inputs, column]
            else:
                values = w_ref[expert, here, inputs] if w.across else w_ref[expert, inputs, here]
            if b == 1:
                row = x[block, 0, inputs].astype(jnp.float32)
                more = values.astype(jnp.float32) * (row[None] if w.across else row[:, None])
            else:
                more = _multiply(x[block, :, inputs], values.astype(x.dtype), contracted)
            if scale:
                group = number * depth * w.groups // D
                of_group = scale[0][expert, here, group] if w.across else scale[0][expert, group, here]
                more = more * (of_group[:, None] if w.across and b == 1 else of_group[None])
            return sums + more

        shape = (b, width) if b > 1 else (width, depth) if w.across else (depth, width)
        sums = jnp.zeros(shape, jnp.float32 if b == 1 else _wide(x.dtype))
        sums = jax.lax.fori_loop(0, D // depth, step, sums)
        if b == 1:
            out[block, 0, here] = jnp.sum(sums, axis=contracted[1]).astype(out.dtype)
        else:
            out[block, :, here] = sums.astype(out.dtype)

    arrays = [experts, first, last, x, values, *([] if w.scale is None else [w.scale])]
    share = [task.asked * array.size // array.shape[0] for array in arrays[4:]]
    return pl.pallas_call(
        kernel,
        grid=(M * columns,),
        out_shape=jax.ShapeDtypeStruct((M, b, F), task.out_dtype),
        compiler_params=triton.CompilerParams(num_warps=8 if b * width >= 128 * 128 else 4, num_stages=3),
        interpret=task.on.interpret,
        **cost(2 * task.rows * D * F, [*[None] * 4, *share], arrays),
    )(*arrays)


def _spans(experts: jax.Array, of: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each number in `of`: the first block of that expert, and the one after the last."""
    first, last = (jnp.searchsorted(experts, of, side=side, method="compare_all") for side in ("left", "right"))
    return first.astype(jnp.int32), last.astype(jnp.int32)


def _triton_gradient(
    task: Task, x: jax.Array, dy: jax.Array, experts: jax.Array, shape: jax.ShapeDtypeStruct
) -> jax.Array | None:
    (_, b, D), F, E = x.shape, dy.shape[2], shape.shape[0]
    rows, height, width = min(b, 32), _power(D, 128), _power(F, 128)
    if min(height, width) < 16 or b not in (1, 16, 32, 64, 128):
        return None
    first, last = _spans(experts, jnp.arange(E, dtype=experts.dtype))

    def kernel(first: Any, last: Any, x: Any, dy: Any, out: Any) -> None:
        expert = pl.program_id(2)
        down, across = pl.ds(pl.program_id(0) * height, height), pl.ds(pl.program_id(1) * width, width)

        def step(number: Any, sums: jax.Array) -> jax.Array:
            block, some = number // (b // rows), pl.ds(number % (b // rows) * rows, rows)
            if b == 1:
                return sums + x[block, 0, down].astype(jnp.float32)[:, None] * dy[block, 0, across][None]
            return sums + _multiply(x[block, some, down], dy[block, some, across], (0, 0))

        steps = first[expert] * (b // rows), last[expert] * (b // rows)
        out[expert, down, across] = jax.lax.fori_loop(*steps, step, jnp.zeros((height, width), jnp.float32)).astype(
            out.dtype
        )

    arrays = [first, last, x, dy]
    return pl.pallas_call(
        kernel,
        grid=(D // height, F // width, E),
        out_shape=shape,
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=task.on.interpret,
        **cost(2 * task.rows * D * F, [None] * 4, arrays),
    )(*arrays)


def _mosaic_product(task: Task, x: jax.Array, w: Matrices, experts: jax.Array) -> jax.Array | None:
    (M, b, D), (_, _, F), G = x.shape, w.sizes, w.groups
    depth = D // G if w.scale is not None else next((n for n in (1024, 512, 256, 128) if D % n == 0), D)
    if w.across and depth < D and depth % 128:
        return None

    def room(width: int) -> int:
        """Bytes of two blocks of each array, for while one is computed with the next comes in; and of a wide one."""
        wide = b * width * 4 + depth * width * x.dtype.itemsize
        matrix = D * width * jax.dtypes.itemsize_bits(w.values.dtype) // 8 + 4 * G * width
        return 2 * (b * D * x.dtype.itemsize + matrix + b * width * task.out_dtype.itemsize) + wide

    width = _widest(F, room, task.on.memory)
    if not width:
        return None
    columns, contracted = pl.cdiv(F, width), (1, 1 if w.across else 0)

    def columns_of(column: Any, block: Any, experts: Any) -> tuple[Any, Any, Any]:
        return experts[block], 0, column

    def kernel(experts: Any, x: Any, w_ref: Any, *rest: Any) -> None:
        del experts
        *scale, out = rest

        def step(number: Any, sums: jax.Array) -> jax.Array:
            inputs = pl.ds(pl.multiple_of(number * depth, depth), depth)
            rows = x[0, number] if scale else x[0, :, inputs]
            values = (w_ref[0, :, inputs] if w.across else w_ref[0, inputs]).astype(rows.dtype)
            more = _multiply(rows, values, contracted)
            return sums + (more * scale[0][0, pl.ds(number, 1)] if scale else more)

        sums = jax.lax.fori_loop(0, D // depth, step, jnp.zeros((b, width), _wide(x.dtype)))
        out[0] = sums.astype(out.dtype)

    turned = pl.BlockSpec((1, width, D), lambda column, block, experts: (experts[block], column, 0))
    of_values = turned if w.across else pl.BlockSpec((1, D, width), columns_of)
    arrays, specs = [x, w.values], [pl.BlockSpec((1, b, D), lambda column, block, experts: (block, 0, 0)), of_values]
    if w.scale is not None:  # a group's inputs side by side, for lanes cannot be cut in the middle
        scale, of_scale = jnp.swapaxes(w.scale, 1, 2) if w.across else w.scale, columns_of
        if G % 8 and min(32, len(w.values)) >= M:
            # XLA lays groups out with experts after them, to pad less, and would have it all copied for a kernel.
            scale, of_scale = _rows_of(scale, experts), lambda column, block, experts: (block, 0, column)
        arrays = [jnp.moveaxis(x.reshape(M, b, G, D // G), 2, 1), w.values, scale]
        of_x = pl.BlockSpec((1, G, b, D // G), lambda column, block, experts: (block, 0, 0, 0))
        specs = [of_x, of_values, pl.BlockSpec((1, G, width), of_scale)]
    share = [min(task.asked, len(array)) * array.size // len(array) for array in arrays[1:]]
    if not task.on.interpret:  # else XLA takes what is small into VMEM beforehand, and all of it
        arrays[1:] = [mosaic.with_memory_space_constraint(array, mosaic.HBM) for array in arrays[1:]]
    return pl.pallas_call(
        kernel,
        grid_spec=mosaic.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns, M),
            in_specs=specs,
            out_specs=pl.BlockSpec((1, b, width), lambda column, block, experts: (block, 0, column)),
        ),
        out_shape=jax.ShapeDtypeStruct((M, b, F), task.out_dtype),
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=task.on.memory + 4 * MIB
        ),
        interpret=task.on.interpret,
        **cost(2 * task.rows * D * F, [None, x.size * (columns if M > 1 else 1), *share], [experts, *arrays]),
    )(experts, *arrays)


def _rows_of(stack: jax.Array, numbers: jax.Array) -> jax.Array:
    """stack [E,G,F] at numbers [M]: [M,G,F], of a stack that lies as [G,E,F]."""
    lying = jax.lax.optimization_barrier(jnp.swapaxes(stack, 0, 1))
    rows = [jax.lax.dynamic_index_in_dim(lying, number, axis=1, keepdims=False) for number in numbers]
    return jnp.stack(rows)


def _mosaic_gradient(
    task: Task, x: jax.Array, dy: jax.Array, experts: jax.Array, shape: jax.ShapeDtypeStruct
) -> jax.Array | None:
    (M, b, D), F, E = x.shape, dy.shape[2], shape.shape[0]
    size = x.dtype.itemsize

    def room(height: int, width: int) -> int:
        return 2 * (b * (height + width) * size + height * width * shape.dtype.itemsize) + 8 * height * width

    height = _widest(D, lambda n: room(n, 128), task.on.memory, most=1024)
    width = _widest(F, lambda n: room(height, n), task.on.memory, most=1024)
    if not height or not width:
        return None

    def kernel(experts: Any, x: Any, dy: Any, out: Any, sums: Any) -> None:
        block = pl.program_id(2)
        expert = experts[block]

        @pl.when((block == 0) | (experts[jnp.maximum(block - 1, 0)] != expert))
        def _() -> None:
            sums[...] = jnp.zeros_like(sums)

        sums[...] += _multiply(x[0], dy[0], (0, 0))

        @pl.when((block == M - 1) | (experts[jnp.minimum(block + 1, M - 1)] != expert))
        def _() -> None:
            out[0] = sums[...].astype(out.dtype)

    high, wide = pl.cdiv(D, height), pl.cdiv(F, width)
    dw = pl.pallas_call(
        kernel,
        grid_spec=mosaic.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(high, wide, M),
            in_specs=[
                pl.BlockSpec((1, b, height), lambda down, across, block, experts: (block, 0, down)),
                pl.BlockSpec((1, b, width), lambda down, across, block, experts: (block, 0, across)),
            ],
            out_specs=pl.BlockSpec(
                (1, height, width), lambda down, across, block, experts: (experts[block], down, across)
            ),
            scratch_shapes=[mosaic.VMEM((height, width), jnp.float32)],
        ),
        out_shape=shape,
        compiler_params=mosaic.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=task.on.memory + 4 * MIB
        ),
        interpret=task.on.interpret,
        **cost(2 * task.rows * D * F, [None, x.size * wide, dy.size * high], [experts, x, dy]),
    )(experts, x, dy)
    # What no block was for was not written, and holds whatever was there.
    chosen = jnp.zeros(E, bool).at[experts].set(True)
    return jnp.where(jnp.broadcast_to(chosen[:, None, None], dw.shape), dw, 0)


def _widest(size: int, room: Any, memory: int, most: int = 0) -> int:
    """How wide blocks of an axis are: all of it, or a multiple of 128, of which the fewest do for which there is room;
    0 if there is none."""
    widths = [size, *range(size // 128 * 128, 0, -128)]
    widest = next((n for n in widths if n <= (most or n) and room(n) <= memory), 0)
    if widest in (0, size):
        return widest
    # The last one is multiplied whole, so as many are no wider than they must be.
    return -(-size // pl.cdiv(size, widest) // 128) * 128
