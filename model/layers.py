"""The parts every sublayer uses: parameters, the einsum that takes one, RMSNorm, RoPE and the embedding table."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import axes as mesh_axes
from .config import ModelConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]


def normal(fan_in: int) -> Initializer:
    """Normal with variance 1 / fan_in, which keeps the variance of what passes through a product."""
    return jax.nn.initializers.normal(fan_in**-0.5)


def param(rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], init: Initializer, dtype: str) -> nnx.Param[jax.Array]:
    """The one place where a parameter is declared: logical axes, shape, initialiser and stored type."""
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


def weight(parameter: nnx.Param[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
    """A stored parameter as a product wants it: in the compute type, then gathered along D if training split it.

    In this order, because half the bytes cross the link.
    """
    value = parameter[...].astype(dtype)
    return mesh_axes.shard(value, parameter.get_metadata("axes")[-value.ndim :])  # a scanned block's has lost its L


def project(
    expression: str, x: jax.Array, parameter: nnx.Param[jax.Array], out_dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """The einsum of activations with a weight, in the activations' type; accumulated in float32 by the hardware."""
    return jnp.einsum(expression, x, weight(parameter, x.dtype), preferred_element_type=out_dtype or x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich, 2019); in and out: [..., width]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, axes: str = "D") -> None:
        width = {"D": config.width, "H": config.head_width}[axes]
        init = jax.nn.initializers.zeros if config.norm_offset else jax.nn.initializers.ones
        self.scale = param(rngs, axes, (width,), init, config.param_dtype)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = weight(self.scale, wide.dtype) + (1.0 if self.config.norm_offset else 0.0)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.config.norm_epsilon)
        return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


@dataclass(frozen=True)
class Span:
    """The T positions of a sequence that one step computes."""

    positions: jax.Array  # [T], int32
    turns: tuple[jax.Array, jax.Array]  # sine and cosine of the angles of RoPE, [T,H/2], float32
    continues: bool  # they follow those in a cache, and attend to it; otherwise the sequence starts with them

    @classmethod
    def of(cls, config: ModelConfig, start: int | jax.Array, length: int, continues: bool) -> "Span":
        """`length` positions from `start` on. The pair (i, i + H/2) turns by position * theta^(-2i/H)."""
        positions = start + jnp.arange(length, dtype=jnp.int32)
        frequencies = np.power(config.rope_theta, -np.arange(0, config.head_width, 2) / config.head_width)
        angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(frequencies, jnp.float32))
        return cls(positions, (jnp.sin(angles), jnp.cos(angles)), continues)


def rope(x: jax.Array, span: Span) -> jax.Array:
    """Turns the pairs (x[i], x[i + H/2]) of x [...,T,H] as far as each position asks (Su et al., 2021), in float32."""
    sin, cos = (jnp.broadcast_to(turn, (*x.shape[:-1], turn.shape[-1])) for turn in span.turns)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Embed(nnx.Module):
    """The table of token vectors: looked up on the way in; multiplied by, if tied, on the way out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        shape = (config.vocabulary, config.width)
        self.table = param(rngs, "VD", shape, normal(config.width), config.param_dtype)
        self.config = config

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B,T] -> [B,T,D]. A token outside of the vocabulary makes its row NaN, instead of passing for another."""
        x = jnp.take(self.table[...], tokens, axis=0, mode="fill").astype(self.config.dtype)
        if self.config.scale_embedding:
            x = x * jnp.asarray(self.config.width**0.5, x.dtype)
        return mesh_axes.shard(x, "BPD")
