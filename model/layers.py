"""The parts every sublayer uses: parameters, the einsum that takes one, norms, RoPE and the embedding table."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from . import axes as mesh_axes
from . import quantized, row_norm, vector
from .config import ModelConfig, RopeScaling

Initializer = Callable[[jax.Array, tuple[int, ...], jax.typing.DTypeLike], jax.Array]
Param = nnx.Param[jax.Array]


def normal(fan_in: int) -> Initializer:
    """Normal with variance 1 / fan_in, which keeps the variance of what passes through a product."""
    return jax.nn.initializers.normal(fan_in**-0.5)


def param(rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], init: Initializer, dtype: str) -> Param:
    """The one place where a parameter is declared: logical axes, shape, initialiser and stored type."""
    return nnx.Param(init(rngs.params(), shape, dtype), axes=axes)


class Quantized(nnx.Module):
    """A weight in few bits: `values`, of the weight's own shape, and the `scale` that multiplies them."""

    def __init__(self, weight: jax.Array, axes: str, contracted: tuple[int, ...], scheme: quantized.Scheme) -> None:
        values, scale = quantized.quantize(weight, contracted, scheme)
        self.values = nnx.Param(values, axes=axes)
        # With groups, an axis of the scale is one of the weight, coarser; without, the contracted ones are gone.
        kept = axes if scheme.group else "".join(a for n, a in enumerate(axes) if n not in contracted)
        self.scale = nnx.Param(scale, axes=kept)


Weight = Param | Quantized


def matrix(
    config: ModelConfig, rngs: nnx.Rngs, axes: str, shape: tuple[int, ...], inputs: str, init: Initializer
) -> Weight:
    """A parameter that activations are multiplied with along its axes `inputs`; stored as config.weights says."""
    whole = param(rngs, axes, shape, init, config.param_dtype)
    whole.set_metadata(inputs=inputs)
    scheme = quantized.Scheme.parse(config.weights)
    return whole if scheme is None else Quantized(whole[...], axes, tuple(axes.index(a) for a in inputs), scheme)


def placed(parameter: Param) -> jax.Array:
    """A stored parameter where a product wants it on the mesh: gathered along D, if training split it."""
    value = parameter[...]
    return mesh_axes.gather(value, parameter.get_metadata("axes")[-value.ndim :])  # a scanned block's has lost its L


def weight(parameter: Param, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A stored parameter as a product wants it: in the compute type, then gathered along D if training split it.

    In this order, because half the bytes cross the link.
    """
    value = parameter[...].astype(dtype)
    return mesh_axes.gather(value, parameter.get_metadata("axes")[-value.ndim :])


def project(
    expression: str,
    x: jax.Array,
    parameter: Weight,
    out_dtype: jax.typing.DTypeLike | None = None,
    activations: str = "full",
) -> jax.Array:
    """The einsum of activations with a weight, in the activations' type; accumulated in float32 by the hardware.

    activations: "int8" rounds them as well, where the weight is int8.
    """
    (product,) = projects([expression], x, [parameter], out_dtype, activations)
    return product


def projects(
    expressions: list[str],
    x: jax.Array,
    parameters: list[Weight],
    out_dtype: jax.typing.DTypeLike | None = None,
    activations: str = "full",
) -> list[jax.Array]:
    """`project` of the same activations with several weights; of a single row on a GPU, all in one kernel."""
    out_dtype = out_dtype or x.dtype
    if activations == "full" and mesh_axes.platform() == "cuda":
        products = _of_row(expressions, x, parameters, out_dtype)
        if products is not None:
            return products
    products = []
    for expression, parameter in zip(expressions, parameters, strict=True):
        if isinstance(parameter, Quantized):
            values, scale = placed(parameter.values), placed(parameter.scale)
            of_kernel = quantized.takes_kernel(expression, scale)
            product = quantized.einsum_on_mesh if of_kernel else quantized.einsum
            made = product(expression, x, values, scale, out_dtype=out_dtype, activations=activations)
        else:
            made = einsum(expression, x, weight(parameter, x.dtype), out_dtype)
        products.append(made)
    return products


def _of_row(
    expressions: list[str], x: jax.Array, parameters: list[Weight], out_dtype: jax.typing.DTypeLike
) -> list[jax.Array] | None:
    """`projects` by `vector.einsums`, chip by chip where there is a mesh; None where that does not take them."""
    mesh, letters = mesh_axes.kernel_mesh(), [re.split(r",|->", expression) for expression in expressions]
    arrays: list[tuple[jax.Array, jax.Array | None]] = []
    places: list[tuple[PartitionSpec, PartitionSpec | None]] = []
    for parameter, (_, axes, out) in zip(parameters, letters, strict=True):
        if not isinstance(parameter, Quantized) and parameter[...].dtype != x.dtype:
            return None  # it is rounded as it is read
        whole = not isinstance(parameter, Quantized)
        values, scale = (placed(parameter), None) if whole else (placed(parameter.values), placed(parameter.scale))
        place = PartitionSpec(*axes) if mesh is None else mesh_axes.spec(axes, values.shape, mesh)
        of_scale = None if scale is None else place
        if scale is not None and scale.ndim < values.ndim:
            of_scale = PartitionSpec(*(name for a, name in zip(axes, place, strict=True) if a in out))
        elif scale is not None and mesh is not None:
            scale = quantized.splittable(scale, place, mesh)
        arrays.append((values, scale))
        places.append((place, of_scale))

    def columns(arrays: Any) -> list[vector.Columns]:
        """Without the scales of outputs."""
        grouped = [scale if scale is not None and scale.ndim == values.ndim else None for values, scale in arrays]
        return [vector.Columns(values, scale) for (values, _), scale in zip(arrays, grouped, strict=True)]

    def here(array: jax.Array, place: PartitionSpec) -> jax.ShapeDtypeStruct:
        """What a chip has of an array."""
        shape = array.shape if mesh is None else NamedSharding(mesh, place).shard_shape(array.shape)
        return jax.ShapeDtypeStruct(shape, array.dtype)

    of_x = PartitionSpec() if mesh is None else mesh_axes.spec(letters[0][0], x.shape, mesh)
    how = vector.shared(expressions, here(x, of_x), columns(jax.tree.map(here, arrays, places)))
    if how is None:
        return None

    def part(x: jax.Array, arrays: list[tuple[jax.Array, jax.Array | None]]) -> list[jax.Array]:
        products = []
        made = vector.einsums(how, x, columns(arrays))
        for y, (values, scale), (_, axes, out), (place, _) in zip(made, arrays, letters, places, strict=True):
            if scale is not None and scale.ndim < values.ndim:
                y = y * quantized.aligned(scale, "".join(a for a in axes if a in out), out)
            split = [name for a, name in zip(axes, place, strict=True) if name and a not in out]
            y = y.astype(out_dtype)
            products.append(jax.lax.psum(y, *split) if split and mesh is not None else y)
        return products

    if mesh is None:
        return part(x, arrays)
    outs = []
    for (inputs, axes, out), (values, _) in zip(letters, arrays, strict=True):
        sizes = dict(zip(inputs + axes, x.shape + values.shape, strict=True))
        outs.append(mesh_axes.spec(out, tuple(sizes[a] for a in out), mesh))
    return jax.shard_map(part, mesh=mesh, in_specs=(of_x, places), out_specs=outs, check_vma=False)(x, arrays)


def wide(expression: str, x: jax.Array, parameter: Weight) -> jax.Array:
    """`project` to float32 at least. What comes back is rounded to bfloat16 where the factors are that: products with a
    float32 cotangent would take twice as long or more."""
    out_dtype = jnp.promote_types(x.dtype, jnp.float32)
    if isinstance(parameter, Quantized) or x.dtype != jnp.bfloat16:  # float16 cannot hold so small a cotangent
        return project(expression, x, parameter, out_dtype)

    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return einsum(expression, x, w, out_dtype)

    def backward(factors: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, back = jax.vjp(lambda x, w: einsum(expression, x, w, x.dtype), *factors)
        return back(cotangent.astype(x.dtype))

    product.defvjp(lambda x, w: (product(x, w), (x, w)), backward)
    return product(x, weight(parameter, x.dtype))


PARTS = 4  # of a sum, for the cores of a CPU


def einsum(expression: str, x: jax.Array, w: jax.Array, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """`jnp.einsum` of two arrays; where the second is the largest, the result included, as a CPU takes it.

    A CPU's product takes [rows, summed] times [summed, columns], and XLA transposes what lies otherwise: the
    attention's weights and the keys, anew for every token, because `jnp.einsum` makes the second operand the first
    factor. And a product of a single row runs on one core; parts of its sum run on several.
    """
    of_x, of_w, out = re.split(r",|->", expression)
    sizes = dict(zip(of_x + of_w, x.shape + w.shape, strict=True))
    largest = w.size > max(x.size, math.prod(sizes[a] for a in out))
    if mesh_axes.platform() != "cpu" or mesh_axes.current_mesh() is not None or not largest:
        return jnp.einsum(expression, x, w, preferred_element_type=out_dtype)
    shared = [a for a in of_x if a in of_w and a in out]
    summed = [a for a in of_w if a in of_x and a not in out]
    if summed == [*of_w[: len(summed)]] and x.size == math.prod(w.shape[: len(summed)]) and x.size % PARTS == 0:
        x_parts, w_parts = x.reshape(PARTS, -1), w.reshape(PARTS, x.size // PARTS, -1)
        parts = jnp.einsum("pc,pcd->pd", x_parts, w_parts, preferred_element_type=out_dtype)
        return jnp.sum(parts, 0).reshape([sizes[a] for a in out])
    if of_w[-1] in summed:
        of_x, of_w, x, w = of_w, of_x, w, x

    def places(axes: list[str]) -> tuple[list[int], list[int]]:
        return [of_x.index(a) for a in axes], [of_w.index(a) for a in axes]

    product = jax.lax.dot_general(x, w, (places(summed), places(shared)), preferred_element_type=out_dtype)
    made = [*shared, *(a for axes in (of_x, of_w) for a in axes if a not in shared and a not in summed)]
    return product.transpose([made.index(a) for a in out])


def bias(parameter: Param, like: jax.Array) -> jax.Array:
    """A bias [..] as an array that can be added to `like` [..., ..]."""
    value = weight(parameter, like.dtype)
    return jnp.broadcast_to(value, like.shape)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang and Sennrich, 2019); in and out: [..., width]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, axes: str = "D", width: int = 0) -> None:
        init = jax.nn.initializers.zeros if config.norm_offset else jax.nn.initializers.ones
        self.scale = param(rngs, axes, (width or config.width,), init, config.param_dtype)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        # What lies in one array for all layers would be copied out of it for a kernel.
        if self.config.layers == "unroll" and row_norm.takes(x):
            return row_norm.normed(x, placed(self.scale), *self.constants)
        return self.by_xla(x)

    @property
    def constants(self) -> tuple[float, float]:
        """Epsilon, and what is added to the scale."""
        return self.config.norm_epsilon, 1.0 if self.config.norm_offset else 0.0

    def by_xla(self, x: jax.Array) -> jax.Array:
        """The same, without a kernel of our own."""
        scale = weight(self.scale, jnp.promote_types(x.dtype, jnp.float32))
        return row_norm.plain(x, scale, *self.constants)


class LayerNorm(RMSNorm):
    """(x - mean(x)) / std(x) * scale + bias over the last axis, in float32 (Ba et al., 2016)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        super().__init__(config, rngs)
        self.bias = param(rngs, "D", (config.width,), jax.nn.initializers.zeros, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = self.by_xla(wide - jnp.mean(wide, axis=-1, keepdims=True))
        return (normed + bias(self.bias, normed)).astype(x.dtype)


def norm(config: ModelConfig, rngs: nnx.Rngs) -> RMSNorm:
    """A norm of the residual stream, of the kind that the model has."""
    return {"rms": RMSNorm, "layer": LayerNorm}[config.norm](config, rngs)


Turns = tuple[jax.Array, jax.Array]  # sine and cosine of the angles of RoPE, [T,R/2], float32


@dataclass(frozen=True)
class Span:
    """The T positions of a sequence that one step computes."""

    positions: jax.Array  # [T], int32
    turns: tuple[Turns, Turns]  # of global layers, of local layers
    continues: bool  # they follow those in a cache, and attend to it; otherwise the sequence starts with them
    start: jax.Array | None  # [B], int32: where each row's sequence starts, for prompts padded on the left
    causal: bool = True  # each attends to those at and before it; else to all of them

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        first: int | jax.Array,
        length: int,
        continues: bool,
        start: jax.Array | None = None,
    ) -> "Span":
        """`length` positions from `first` on."""
        positions = first + jnp.arange(length, dtype=jnp.int32)
        if config.positions == "learned":
            nothing = jnp.zeros((length, 0)), jnp.zeros((length, 0))
            return cls(positions, (nothing, nothing), continues, start)
        everywhere = turns(positions, frequencies(config.rope_theta, config.rope_width, config.rope_scaling))
        if not config.local_rope_theta:
            local = everywhere
        else:
            local = turns(positions, frequencies(config.local_rope_theta, config.rope_width, None))
        magnitude = config.rope_scaling.magnitude if config.rope_scaling else 1.0
        if magnitude != 1.0:
            everywhere = everywhere[0] * magnitude, everywhere[1] * magnitude
            local = local if config.local_rope_theta else everywhere
        return cls(positions, (everywhere, local), continues, start)


def frequencies(theta: float, width: int, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position of each pair (i, i + width/2): theta^(-2i/width), slowed down as `scaling` says. [width/2]."""
    plain = np.power(theta, -np.arange(0, width, 2) / width)
    if scaling is None:
        return plain
    slow = plain / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns_made = scaling.original_context * plain / (2 * math.pi)  # in the context of training
    if scaling.kind == "llama3":
        kept = np.clip((turns_made - scaling.low) / (scaling.high - scaling.low), 0, 1)
    else:
        # Which pair turns so many times; between the two bounds the share kept falls linearly with the pair's number.
        def pair(times: float) -> float:
            return width * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(scaling.high), pair(scaling.low)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = last if last != first else last + 0.001
        kept = 1 - np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    return kept * plain + (1 - kept) * slow


def turns(positions: jax.Array, radians: np.ndarray) -> Turns:
    """Sine and cosine [T,R/2] of the angles at positions [T]."""
    angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(radians, jnp.float32))
    return jnp.sin(angles), jnp.cos(angles)


def rope(x: jax.Array, turns: Turns) -> jax.Array:
    """Turns the pairs (x[i], x[i + R/2]) of x [...,T,R] as far as each position asks (Su et al., 2021), in float32."""
    if not turns[0].shape[-1]:
        return x  # learned positions
    sin, cos = (jnp.broadcast_to(turn, (*x.shape[:-1], turn.shape[-1])) for turn in turns)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Embed(nnx.Module):
    """The table of token vectors: looked up on the way in; multiplied by, if tied, on the way out."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        D, shape = config.width, (config.vocabulary, config.width)
        if config.tied:
            self.table = matrix(config, rngs, "VD", shape, "D", normal(D))
        else:
            self.table = param(rngs, "VD", shape, normal(D), config.param_dtype)
        if config.positions == "learned":
            self.positions = param(rngs, "XD", (config.max_context, D), normal(D), config.param_dtype)
        self.config = config

    def __call__(self, tokens: jax.Array, span: Span) -> jax.Array:
        """[B,T] -> [B,T,D]. A token outside of the vocabulary makes its row NaN, instead of passing for another."""
        config = self.config

        def rows(table: Param, indices: jax.Array) -> jax.Array:
            return jnp.take(table[...], indices, axis=0, mode="fill")

        if isinstance(self.table, Quantized):
            known = ((tokens >= 0) & (tokens < config.vocabulary))[..., None]
            safe = jnp.where(known[..., 0], tokens, 0)
            values, scale = quantized.rows_of(self.table.values[...], self.table.scale[...], safe)
            x = quantized.dequantize(values, scale, (values.ndim - 1,), config.dtype)
            x = jnp.where(known, x, jnp.nan)
        else:
            x = rows(self.table, tokens).astype(config.dtype)
        if config.scale_embedding:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        if config.positions == "learned":
            if span.start is None:
                x = x + jnp.broadcast_to(rows(self.positions, span.positions).astype(x.dtype), x.shape)
            else:
                own = jnp.maximum(span.positions[None, :] - span.start[:, None], 0)
                x = x + rows(self.positions, own).astype(x.dtype)
        return mesh_axes.shard(x, "BPD")
