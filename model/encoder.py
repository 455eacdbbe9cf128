"""An encoder of images (Dosovitskiy et al., 2021) or sounds (Radford et al., 2022): what a decoder sees and hears with.

Pixels or a spectrum become positions, these go through the blocks of `transformer.py`, each seeing all others, and come
out as features, or as tokens of a decoder where the encoder merges them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .axes import shard
from .cache import Place
from .encoder_config import STRIDE, WINDOW, EncoderConfig
from .layers import Span, bias, frequencies, norm, normal, param, project, turns
from .scopes import scope
from .transformer import in_a_row, split, stacked

zeros = jax.nn.initializers.zeros


class PatchEmbed(nnx.Module):
    """Cuts an image into squares, and makes a position of each."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        D, (inputs,) = config.width, config.inputs
        self.config = config
        self.patch = param(rngs, "ID", (inputs, D), normal(inputs), config.param_dtype)
        if config.patch_bias:
            self.bias = param(rngs, "D", (D,), zeros, config.param_dtype)
        if config.class_token:
            self.first = param(rngs, "D", (D,), normal(D), config.param_dtype)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, frames, height, width, channels] -> [B,T,D], row by row."""
        config, p = self.config, self.config.patch
        B, frames, height, width, channels = pixels.shape
        squares = pixels.reshape(B, frames, height // p, p, width // p, p, channels).transpose(0, 2, 4, 1, 3, 5, 6)
        x = project("BTI,ID->BTD", squares.reshape(B, -1, frames * p * p * channels), self.patch)
        if config.patch_bias:
            x = x + bias(self.bias, x)
        if config.class_token:
            x = jnp.concatenate([bias(self.first, x[:, :1]), x], axis=1)
        return x


class SoundEmbed(nnx.Module):
    """Makes a position of each two frames of a spectrum, by two convolutions, written as products with windows."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        D = config.width
        self.near, self.far = (param(rngs, "ID", (n, D), normal(n), config.param_dtype) for n in config.inputs)
        self.bnear, self.bfar = (param(rngs, "D", (D,), zeros, config.param_dtype) for _ in range(2))

    def __call__(self, spectrum: jax.Array) -> jax.Array:
        """[B, frames, bands] -> [B,T,D]."""
        x = spectrum
        for matrix, offset, stride in ((self.near, self.bnear, 1), (self.far, self.bfar, STRIDE)):
            x = project("BTI,ID->BTD", windows(x, stride), matrix)
            x = shard(jax.nn.gelu(x + bias(offset, x), approximate=False), "BPD")
        return x


def windows(x: jax.Array, stride: int) -> jax.Array:
    """Each `stride`-th position of x [B,T,C] with the one before and the one after it: [B, T/stride, 3 C]."""
    around = jnp.pad(x, ((0, 0), (WINDOW // 2, WINDOW // 2), (0, 0)))
    return jnp.concatenate([around[:, n : n + x.shape[1] : stride] for n in range(WINDOW)], axis=-1)


class Merger(nnx.Module):
    """Neighbouring positions, as one vector, through an MLP: a token of a decoder."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        self.config, m = config, config.merge
        assert m is not None
        inputs = m.count * config.width
        self.up = param(rngs, "IM", (inputs, m.hidden), normal(inputs), config.param_dtype)
        self.down = param(rngs, "MO", (m.hidden, m.width), normal(m.hidden), config.param_dtype)
        if m.bias:
            self.bup = param(rngs, "M", (m.hidden,), zeros, config.param_dtype)
            self.bdown = param(rngs, "O", (m.width,), zeros, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B,T,D] -> [B, T/count, width]."""
        config, (B, T, D) = self.config, x.shape
        if config.kind == "vision":  # squares of patches, for these lie row by row
            (rows, columns), side = config.grid(T), config.side
            x = x.reshape(B, rows // side, side, columns // side, side, D).transpose(0, 1, 3, 2, 4, 5)
        x = shard(x.reshape(B, config.tokens(T), -1), "BPI")
        for expression, matrix in (("BTI,IM->BTM", "up"), ("BTM,MO->BTO", "down")):
            x = project(expression, x, getattr(self, matrix))
            if hasattr(self, "b" + matrix):
                x = x + bias(getattr(self, "b" + matrix), x)
            x = jax.nn.gelu(x, approximate=False) if matrix == "up" else x
        return x


class Encoder(nnx.Module):
    """Positions of patches or of windows, L blocks, a norm; and a merger where the config has one."""

    layers: nnx.List[Any]  # as in a Transformer

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config = config.resolve()
        self.embed = (PatchEmbed if config.kind == "vision" else SoundEmbed)(config, rngs)
        if config.positions == "learned":
            shape = (config.max_context, config.width)
            self.positions = param(rngs, "XD", shape, normal(config.width), config.param_dtype)
        if config.first_norm:
            self.first_norm = norm(config, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stacked(config, keys) if config.layers == "scan" else in_a_row(config, keys)
        self.final_norm = norm(config, rngs)
        if config.merge:
            self.merge = Merger(config, rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Pixels [B, frames, height, width, channels] or a spectrum [B, frames, bands] -> features [B,T,D], or the
        tokens [B, T/count, width] that they are merged into."""
        config = self.config
        with scope(f"{config.kind}/embed"):
            x = self.embed(inputs.astype(config.dtype))
            if config.positions == "learned":
                x = x + bias(self.positions, x)
            x = shard(self.first_norm(x) if config.first_norm else x, "BPD")
        with scope(f"{config.kind}/attention/rope"):
            span = self.span(x.shape[1])

        def through(block: Any, x: jax.Array) -> jax.Array:
            with scope(config.kind):
                return block(x, span, None, Place(0, None))[0]

        if config.layers == "scan":
            ((stack,),) = self.layers
            graph, params = split(stack)
            x, _ = jax.lax.scan(lambda x, params: (through(nnx.merge(graph, params), x), None), x, params)
        else:
            for block in self.layers:
                x = through(block, x)
        with scope(f"{config.kind}/final_norm"):
            x = self.final_norm(x)
        if config.merge:
            with scope(f"{config.kind}/merge"):
                x = self.merge(x)
        return x

    def span(self, length: int) -> Span:
        """All positions at once. A patch's pairs of numbers turn by its row, and as many by its column."""
        config, positions = self.config, jnp.arange(length, dtype=jnp.int32)
        if config.positions == "learned":
            nothing = jnp.zeros((length, 0))
            turned = nothing, nothing
        else:
            columns = config.grid(length)[1]
            radians = frequencies(config.rope_theta, config.head_width // 2, None)
            by_row, by_column = (turns(place, radians) for place in (positions // columns, positions % columns))
            turned = tuple(jnp.concatenate(both, axis=-1) for both in zip(by_row, by_column, strict=True))
        return Span(positions, (turned, turned), continues=False, start=None, causal=False)  # pyright: ignore[reportArgumentType]
