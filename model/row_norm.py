"""RMSNorm of a single row as one kernel of a GPU, where XLA makes two: a reduction, and what waits for it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec

from .axes import current_mesh, kernel_mesh, platform
from .kernel_cost import estimate, said

WIDTHS = range(384, 16384 + 1)  # narrower are heads, of which there are several; wider is too much for one core


def plain(x: jax.Array, scale: jax.Array, epsilon: float, offset: float) -> jax.Array:
    """x / rms(x) * (scale + offset) over the last axis, in float32 at least: x [..., D], scale [D]."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = scale.astype(wide.dtype) + offset
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + epsilon)
    return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def takes(x: jax.Array) -> bool:
    """Whether there is a kernel for it, and a point: a single row, on one GPU. On several, XLA's reduction also adds
    what has come over links, which then would be the second kernel."""
    typed = str(x.dtype) in ("bfloat16", "float16", "float32")
    alone = platform() == "cuda" and current_mesh() is None
    return alone and typed and x.size == x.shape[-1] and x.size in WIDTHS


def normed(x: jax.Array, scale: jax.Array, epsilon: float, offset: float, *, interpret: bool = False) -> jax.Array:
    """`plain` of a single row, by the kernel."""
    kernel, mesh = partial(_normed, epsilon=epsilon, offset=offset, interpret=interpret), kernel_mesh()
    if mesh is None:
        return kernel(x, scale)
    whole = PartitionSpec()
    return jax.shard_map(kernel, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)(x, scale)


# Traced once for all layers.
@partial(jax.jit, static_argnames=("epsilon", "offset", "interpret"))
def _normed(x: jax.Array, scale: jax.Array, *, epsilon: float, offset: float, interpret: bool) -> jax.Array:
    return _differentiable(epsilon, offset, interpret, x, scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(epsilon: float, offset: float, interpret: bool, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x [1,..,D], scale [D] -> [1,..,D]."""
    D, filled = x.size, pl.next_power_of_2(x.size)  # Triton's arrays are of powers of two

    def kernel(x_ref: Any, scale_ref: Any, out_ref: Any) -> None:
        there = jnp.arange(filled) < D
        # Both are on their way before the sum waits for one.
        wide, scale = (triton.load(ref, mask=there, other=0.0).astype(jnp.float32) for ref in (x_ref, scale_ref))
        normed = wide * jax.lax.rsqrt(jnp.sum(wide * wide) / D + epsilon)
        scale = scale + offset if offset else scale
        triton.store(out_ref, (normed * scale).astype(out_ref.dtype), mask=there)

    # In its own shape: XLA takes no notice of who reads a bitcast, and would make what x is the sum of, which its
    # next sum needs too, again there, and in the next.
    row = pl.BlockSpec((*[None] * (x.ndim - 1), filled), lambda one: (0,) * x.ndim)
    warps = max(1, min(16, filled // 256))  # a thread loads 16 bytes of bfloat16 at once
    return pl.pallas_call(
        kernel,
        grid=(1,),
        in_specs=[row, pl.BlockSpec((filled,), lambda one: (0,))],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="row_norm",
        metadata=said(estimate(0, 1, [x, scale, x]), elementwise=(5 if offset else 4) * D + 2),
    )(x, scale)


def _forward(epsilon: float, offset: float, interpret: bool, x: jax.Array, scale: jax.Array) -> Any:
    return _differentiable(epsilon, offset, interpret, x, scale), (x, scale)


def _backward(epsilon: float, offset: float, interpret: bool, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> Any:
    del interpret
    return jax.vjp(lambda x, scale: plain(x, scale, epsilon, offset), *saved)[1](dy)


_differentiable.defvjp(_forward, _backward)
