"""Weights and caches in few bits.

A decode step multiplies every weight with a handful of vectors, so reading the weights is what takes the time: half the
bytes are half the time, as long as the packed values are what crosses from HBM and nothing writes them out in a wide
type first. Symmetric and linear: w is about values * scale, and no value is clipped. int8 has a scale for each output
channel, which multiplies the product's result; int4 one for each `group` of inputs of each output channel too, which
has to multiply the values.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from . import kernels
from .axes import current_mesh, kernel_mesh, platform, spec


@dataclass(frozen=True)
class Scheme:
    """How a weight is rounded: `bits` a value, a scale for each `group` inputs of an output (0: for all of them)."""

    bits: int
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> "Scheme | None":
        """ "full" -> None, "int8", "int4" (groups of 128) or "int4:64"; ValueError for anything else."""
        found = re.fullmatch(r"full|int8|int4(?::([1-9]\d*))?", text)
        if not found:
            raise ValueError(f"weights is {text!r}; it must be full, int8, int4 or int4:GROUP")
        if text == "full":
            return None
        return cls(8) if text == "int8" else cls(4, int(found[1] or 128))

    def __str__(self) -> str:
        return f"int4:{self.group}" if self.group else "int8"

    @property
    def largest(self) -> int:
        """The largest value: symmetric, so that the most negative one is not used."""
        return 2 ** (self.bits - 1) - 1

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """The type of values."""
        return jnp.int8 if self.bits == 8 else jnp.int4

    def group_of(self, inputs: int) -> int:
        """How many of an axis of `inputs` share a scale: what divides both it and `group`, for kernels like powers of
        two; where that is below a quarter of `group`, the largest divisor of the axis that is at most `group`."""
        common = math.gcd(inputs, self.group)
        if 4 * common >= self.group:
            return common
        return next(n for n in range(min(self.group, inputs), 0, -1) if inputs % n == 0)


def quantize(w: jax.Array, contracted: tuple[int, ...], scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """w -> (values of its shape, float32 scale).

    Args:
      contracted: the axes that a product sums over. The scale has none of them, or, with groups, the number of groups
        in place of the last of them and all others as they are.
    The error is at most half a scale. A scale is 1 where all is zero, and NaN where anything is NaN or infinite.
    """
    wide = w.astype(jnp.float32)
    grouped, axes = wide, contracted
    if scheme.group:
        grouped, axes = _split(wide, contracted[-1], scheme.group_of(w.shape[contracted[-1]])), (contracted[-1] + 1,)
    scale = jnp.max(jnp.abs(grouped), axis=axes, keepdims=True) / scheme.largest
    scale = jnp.where(scale == 0, 1.0, jnp.where(jnp.isinf(scale), jnp.nan, scale))
    values = jnp.round(grouped / scale).astype(scheme.dtype).reshape(w.shape)
    return values, jnp.squeeze(scale, axes)


def dequantize(
    values: jax.Array, scale: jax.Array, contracted: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    """What `quantize` was given, but for rounding."""
    if scale.ndim != values.ndim:
        return (values.astype(jnp.float32) * jnp.expand_dims(scale, contracted)).astype(dtype)
    axis = contracted[-1]
    grouped = _split(values, axis, values.shape[axis] // scale.shape[axis])
    return (grouped.astype(jnp.float32) * jnp.expand_dims(scale, axis + 1)).astype(dtype).reshape(values.shape)


def _split(w: jax.Array, axis: int, group: int) -> jax.Array:
    """An axis of n as two, [n / group, group]."""
    return w.reshape(*w.shape[:axis], w.shape[axis] // group, group, *w.shape[axis + 1 :])


def einsum(
    expression: str,
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike | None = None,
    activations: str = "full",
) -> jax.Array:
    """The product of activations x with a quantised weight, as `jnp.einsum(expression, x, weight)`.

    Args:
      activations: "int8" rounds x too, a scale a row, and multiplies integers; for int8 weights only.
    """
    inputs, weights, out = re.split(r",|->", expression)
    out_dtype = out_dtype or x.dtype
    summed = [a for a in weights if a in inputs and a not in out]
    if scale.ndim == values.ndim:
        made = _by_kernel(inputs, weights, out, x, values, scale, summed) if takes_kernel(expression, scale) else None
        made = _grouped(inputs, weights, out, x, values, scale, summed) if made is None else made
        return made.astype(out_dtype)
    kept = "".join(a for a in weights if a not in summed)
    over = aligned(scale, kept, out)
    if activations == "int8":
        rows, row_scale = quantize_rows(x, tuple(inputs.index(a) for a in summed))
        product = jnp.einsum(expression, rows, values, preferred_element_type=jnp.int32).astype(jnp.float32)
        across = aligned(row_scale, "".join(a for a in inputs if a not in summed), out)
        return (product * (over * across)).astype(out_dtype)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    product = jnp.einsum(expression, x, values.astype(x.dtype), preferred_element_type=wide)
    return (product * over).astype(out_dtype)


def takes_kernel(expression: str, scale: jax.Array) -> bool:
    """Whether a product is a kernel of our own, which compilers cannot split over a mesh: see `einsum_on_mesh`.

    With a scale for each group, on a GPU always: XLA writes the product of each group out. On a TPU where inputs are
    the weight's last axis, along which a TPU cannot cut it in groups where it lies.
    """
    inputs, weights, out = re.split(r",|->", expression)
    if scale.ndim < len(weights):
        return False
    return platform() == "cuda" or (platform() == "tpu" and weights[-1] in inputs and weights[-1] not in out)


def einsum_on_mesh(expression: str, x: jax.Array, values: jax.Array, scale: jax.Array, **options: Any) -> jax.Array:
    """`einsum` of arrays that lie on the current mesh by the letters of the expression, chip by chip."""
    mesh = kernel_mesh()
    if mesh is None:
        return einsum(expression, x, values, scale, **options)
    inputs, weights, out = re.split(r",|->", expression)
    place = spec(weights, values.shape, mesh)
    sizes = dict(zip(inputs + weights, x.shape + values.shape, strict=True))
    places = spec(inputs, x.shape, mesh), place, place
    summed = [name for letter, name in zip(weights, place, strict=True) if name and letter not in out]

    def part(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
        y = einsum(expression, x, values, scale, **options)
        return jax.lax.psum(y, *summed) if summed else y

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=places,
        out_specs=spec(out, tuple(sizes[letter] for letter in out), mesh),
        check_vma=False,
    )(x, values, splittable(scale, place, mesh))


def splittable(scale: jax.Array, place: PartitionSpec, mesh: Mesh) -> jax.Array:
    """A scale for each group, repeated for parts of groups where a group would be on two chips."""
    for axis, name in enumerate(place):
        chips = 1 if name is None else mesh.shape[name]
        scale = jnp.repeat(scale, chips // math.gcd(scale.shape[axis], chips), axis)
    return scale


def grouped_matmul(
    x: jax.Array, values: jax.Array, scale: jax.Array, experts: jax.Array, activations: str = "full", asked: int = 0
) -> jax.Array:
    """`kernels.grouped_matmul` of blocks x [M,b,D] with E quantised matrices [E,D,F]: [M,b,F]."""
    if scale.ndim == values.ndim:
        return kernels.grouped_matmul(x, kernels.Matrices(values, scale), experts, asked=asked)
    out_dtype = jnp.promote_types(x.dtype, jnp.bfloat16)  # not float16, which is too small for sums of 127s
    of_block, rows = scale[experts][:, None], x
    if activations == "int8":
        rows, row_scale = quantize_rows(x, (2,))
        of_block = of_block * row_scale[..., None]
    y = kernels.grouped_matmul(rows, kernels.Matrices(values), experts, asked=asked, out_dtype=out_dtype)
    return (y * of_block).astype(x.dtype)


def _by_kernel(
    inputs: str, weights: str, out: str, x: jax.Array, values: jax.Array, scale: jax.Array, summed: list[str]
) -> jax.Array | None:
    """One product, whose values become numbers in the kernel; None where there is no kernel for such sizes."""
    shared, rows, columns = _roles(inputs, weights, out)
    within = "".join(summed)
    sizes = dict(zip(inputs + weights, x.shape + values.shape, strict=True))
    across = weights == shared + columns + within
    if not across and weights != shared + within + columns:
        return None

    def flat(array: jax.Array, *parts: str) -> jax.Array:
        """With all axes of a part as one; those of `within` may be in groups."""
        known = [math.prod(sizes[a] for a in part) if part != within else -1 for part in parts]
        return array.reshape(known)

    ordered = jnp.einsum(f"{inputs}->{shared}{rows}{within}", x)
    parts = (columns, within) if across else (within, columns)
    matrices = kernels.Matrices(flat(values, shared, *parts), flat(scale, shared, *parts), across)
    product = kernels.matmul(flat(ordered, shared, rows, within), matrices)
    if product is None:
        return None
    letters = shared + rows + columns
    return jnp.einsum(f"{letters}->{out}", product.reshape([sizes[a] for a in letters]))


def _roles(inputs: str, weights: str, out: str) -> tuple[str, str, str]:
    """Letters of all three (experts), of activations and result (rows), of weight and result (columns)."""
    shared = "".join(a for a in weights if a in inputs and a in out)
    rows = "".join(a for a in inputs if a in out and a not in shared)
    return shared, rows, "".join(a for a in weights if a in out and a not in shared)


def _grouped(
    inputs: str, weights: str, out: str, x: jax.Array, values: jax.Array, scale: jax.Array, summed: list[str]
) -> jax.Array:
    """A product for each group of inputs, then their sum, each times its scale.

    Multiplying the values by their scales first would be one product only; but compilers write such weights out in a
    wide type before they multiply with them (6 times the bytes of all in a decode step on an H200), while a change of
    type alone is read through.
    """
    *others, last = summed  # of several summed axes all but the last have a scale for each index
    n, m = inputs.index(last), weights.index(last)
    groups = scale.shape[m]
    x, values = _split(x, n, x.shape[n] // groups), _split(values, m, values.shape[m] // groups)
    if platform() == "tpu":
        # Else a TPU makes numbers of them first, writes these out, and then cuts them in groups.
        values = jax.lax.optimization_barrier(values)
    # "g" stands for the groups. In this order of axes a GPU reads int4 weights as they lie.
    batch = "".join(others) + "g"
    shared, rows, columns = _roles(inputs, weights, out)
    parts = jnp.einsum(
        f"{inputs.replace(last, 'g' + last)},{weights.replace(last, 'g' + last)}->{shared}{batch}{rows}{columns}",
        *(x, values.astype(x.dtype)),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    scaled = parts * aligned(scale, weights.replace(last, "g"), shared + batch + rows + columns)
    first = len(shared)
    total = jnp.sum(scaled, axis=tuple(range(first, first + len(batch))))
    return jnp.einsum(f"{shared}{rows}{columns}->{out}", total)


def aligned(scale: jax.Array, axes: str, out: str) -> jax.Array:
    """scale, of these axes, so that it multiplies an array of the axes `out`."""
    ordered = jnp.einsum(f"{axes}->{''.join(a for a in out if a in axes)}", scale)
    sizes = dict(zip(axes, scale.shape, strict=True))
    return ordered.reshape([sizes.get(a, 1) for a in out])


def rows_of(values: jax.Array, scale: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Some rows of a quantised table: values [V,D] and scale [V] or [V,G], at tokens [...]."""
    V, few = len(scale), tokens.size <= 128
    if platform() != "tpu" or current_mesh() is not None or scale.ndim == 1 or not few or V < 128:
        return jnp.take(values, tokens, axis=0), jnp.take(scale, tokens, axis=0)
    # A TPU has so narrow a table as the scales lie on its side; to take rows of it, it would copy it all, 128 wide. And
    # taking one row of int4 it makes slicing it out, for which it copies them all: it is given another to take, too.
    flat, lying = tokens.reshape(-1), jax.lax.optimization_barrier(scale.T)

    def scales(token: jax.Array) -> jax.Array:
        first = jnp.minimum(token // 128 * 128, V - 128)
        near = jax.lax.dynamic_slice_in_dim(lying, first, 128, 1)
        its = jax.lax.broadcasted_iota(jnp.int32, near.shape, 1) == token - first
        return jnp.sum(jnp.where(its, near, 0.0), axis=1)

    rows = jnp.take(values, jnp.append(flat, (flat[-1] + 1) % V), axis=0)[: len(flat)]
    return rows.reshape(*tokens.shape, -1), jax.lax.map(scales, flat).reshape(*tokens.shape, -1)


def quantize_rows(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Activations in int8 with a scale for each row, over `axes`: (values of x's shape, scale without them)."""
    return quantize(x, axes, Scheme(8))


def cache_quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values [...,H] in int8, and their float32 scale [...]."""
    return quantize(x, (x.ndim - 1,), Scheme(8))
