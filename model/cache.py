"""The keys and values of all positions so far, so that a new token costs one position and not all of them."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from .config import ModelConfig
from .scopes import scope


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What attention remembers of `position` tokens, with room for S.

    k, v: a tuple of L arrays [B,K,S,H], or one [L,B,K,S,H] where the layers are scanned. In this order of axes both
      products of attention read the cache as it lies; with S before K a GPU transposes it whole, in every step.
    position: int32 scalar, how many positions are filled, the same in all rows.
    Donate it to a jitted step: then `update` writes the new position where it is, and the rest does not move.
    """

    k: tuple[jax.Array, ...] | jax.Array
    v: tuple[jax.Array, ...] | jax.Array
    position: jax.Array

    @classmethod
    def init(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
        """An empty cache of zeros; ValueError where `batch` or `length` cannot be."""
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        if not 1 <= length <= config.max_context:
            raise ValueError(f"context is {length}; {config.name} takes 1 to {config.max_context} positions")
        config = config.resolve()
        shape = (batch, config.num_kv_heads, length, config.head_width)

        def empty() -> tuple[jax.Array, ...] | jax.Array:
            if config.layers == "scan":
                return jnp.zeros((config.num_layers, *shape), config.dtype)
            return tuple(jnp.zeros(shape, config.dtype) for _ in range(config.num_layers))

        return cls(empty(), empty(), jnp.zeros((), jnp.int32))

    @property
    def length(self) -> int:
        """S."""
        return self.k[0].shape[-2]

    def update(self, layer: int | jax.Array, k: jax.Array, v: jax.Array, position: int | jax.Array) -> "KVCache":
        """With one layer's k and v [B,K,T,H] written at `position` and on; `position` itself is not advanced."""
        return replace(self, k=_write(self.k, layer, k, position), v=_write(self.v, layer, v, position))

    def read(self, layer: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        """One layer's k and v, all of [B,K,S,H]."""
        if isinstance(self.k, tuple):
            return self.k[layer], self.v[layer]
        return tuple(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (self.k, self.v))

    def at(self, position: int | jax.Array) -> "KVCache":
        """The same arrays, `position` of them filled."""
        return replace(self, position=jnp.asarray(position, jnp.int32))

    def room_for(self, count: int) -> jax.Array | bool:
        """Whether `count` more positions fit. ValueError if it is known that they do not; else a traced truth value.

        XLA clamps a write past the end to the last slots, without a word. What depends on a position known only at
        run time must therefore be poisoned where this is false; `checkify.checkify` turns it into an error.
        """
        if count > self.length:
            raise ValueError(f"{count} tokens do not fit a cache of {self.length} positions")
        with scope("attention/cache"):
            fits = self.position + count <= self.length
            problem = f"; {count} more do not fit a cache of {self.length} positions"
            if isinstance(fits, Tracer):
                checkify.debug_check(fits, "position is {}" + problem, self.position)
            elif not fits:
                raise ValueError(f"position is {self.position}{problem}")
        return fits


def _write(
    cache: tuple[jax.Array, ...] | jax.Array, layer: int | jax.Array, new: jax.Array, position: int | jax.Array
) -> tuple[jax.Array, ...] | jax.Array:
    put = partial(jax.lax.dynamic_update_slice, allow_negative_indices=False)
    if isinstance(cache, tuple):
        return (*cache[:layer], put(cache[layer], new, (0, 0, position, 0)), *cache[layer + 1 :])
    return put(cache, new[None], (layer, 0, 0, position, 0))
