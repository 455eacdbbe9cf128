"""The keys and values of all positions so far, so that a new token costs one position and not all of them."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.experimental import checkify

from .config import Kind, ModelConfig
from .quantized import cache_quantize
from .scopes import scope


class Rounded(NamedTuple):
    """Keys or values in int8 [...,S,H], and a float32 scale for each head and position [...,S]."""

    values: jax.Array
    scale: jax.Array


Entry = jax.Array | Rounded


class Place(NamedTuple):
    """Where a layer's keys and values are: which entry of the cache, and which row of it if layers are stacked."""

    entry: int
    row: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What attention remembers of `position` tokens, with room for S = `length`.

    k, v: an entry [B,K,S,H] for each layer; where layers are scanned, an entry [R,B,K,S,H] for each layer of a pattern
      that is repeated R times. In this order of axes both products of attention read the cache as it lies; with S
      before K a GPU transposes it whole, in every step. With int8, each entry is `Rounded`. Latent attention keeps its
      short vector [B,1,S,C] as k and the shared rotated key [B,1,S,R] as v. Local layers keep a ring of `window`
      positions: position p is in slot p mod window.
    position: int32 scalar, how many positions are filled, the same in all rows.
    start: [B], int32, the first position of each row's sequence where prompts were padded on the left; None: 0.
    Donate it to a jitted step: then `update` writes the new position where it is, and the rest does not move.
    """

    k: tuple[Entry, ...]
    v: tuple[Entry, ...]
    position: jax.Array
    start: jax.Array | None = None
    length: int = field(default=0, metadata={"static": True})

    @classmethod
    def init(cls, config: ModelConfig, batch: int, length: int) -> "KVCache":
        """An empty cache of zeros; ValueError where `batch` or `length` cannot be."""
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be at least 1")
        if not 1 <= length <= config.max_context:
            raise ValueError(f"context is {length}; {config.name} takes 1 to {config.max_context} positions")
        widths = (config.latent.kv_rank, config.latent.rope_width) if config.latent else (config.head_width,) * 2
        heads = 1 if config.latent else config.num_kv_heads

        def empty(width: int) -> tuple[Entry, ...]:
            return tuple(
                _zeros(config, (*times, batch, heads, min(length, config.window) if kind.local else length, width))
                for times, kind in entries(config)
            )

        return cls(empty(widths[0]), empty(widths[1]), jnp.zeros((), jnp.int32), length=length)

    def update(self, place: Place, k: jax.Array, v: jax.Array, position: int | jax.Array) -> "KVCache":
        """With one layer's k and v [B,K,T,H] written at `position` and on; `position` itself is not advanced."""
        return replace(self, k=self._write(self.k, place, k, position), v=self._write(self.v, place, v, position))

    def read(self, place: Place) -> tuple[Entry, Entry]:
        """One layer's k and v, all of [B,K,S,H]."""
        k, v = self.k[place.entry], self.v[place.entry]
        if place.row is None:
            return k, v
        row = partial(jax.lax.dynamic_index_in_dim, index=place.row, keepdims=False)
        return jax.tree.map(row, k), jax.tree.map(row, v)

    def is_ring(self, place: Place) -> bool:
        """Whether this layer keeps fewer positions than there may be."""
        return self._slots(place) < self.length

    def held(self, place: Place, filled: jax.Array) -> jax.Array:
        """The position in each slot [S] of this layer once `filled` are written; below zero: none yet."""
        slots = self._slots(place)
        slot = jnp.arange(slots, dtype=jnp.int32)
        return filled - 1 - (filled - 1 - slot) % slots if self.is_ring(place) else slot

    def at(self, position: int | jax.Array) -> "KVCache":
        """The same arrays, `position` of them filled."""
        return replace(self, position=jnp.asarray(position, jnp.int32))

    def grown(self, config: ModelConfig, length: int) -> "KVCache":
        """The same in new arrays that have room for `length` positions, at least as many as before."""
        old = (self.k, self.v)
        batch = jax.tree.leaves(old)[0].shape[-4]
        new = KVCache.init(config, batch, length)

        def put(new: jax.Array, old: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim)

        k, v = jax.tree.map(put, (new.k, new.v), old)
        return replace(self, k=k, v=v, length=length)

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

    def _slots(self, place: Place) -> int:
        return jax.tree.leaves(self.k[place.entry])[0].shape[-2]

    def _write(
        self, cache: tuple[Entry, ...], place: Place, new: jax.Array, position: int | jax.Array
    ) -> tuple[Entry, ...]:
        old = cache[place.entry]
        pieces = Rounded(*cache_quantize(new)) if isinstance(old, Rounded) else new
        put = partial(self._put, place, position)
        return (*cache[: place.entry], jax.tree.map(put, old, pieces), *cache[place.entry + 1 :])

    def _put(self, place: Place, position: int | jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        """new [B,K,T,...] into old [R?,B,K,S,...]."""
        count, slots, ring = new.shape[2], self._slots(place), self.is_ring(place)
        if ring and count > slots:
            new, position, count = new[:, :, count - slots :], position + (count - slots), slots
        if ring and count > 1:
            if isinstance(position, int):
                if count == slots:  # a prompt that fills the ring: turned so that each position is in its slot
                    new, position = jnp.roll(new, position % slots, axis=2), 0
            else:  # may run over the end of the ring
                index = (position + jnp.arange(count, dtype=jnp.int32)) % slots
                if place.row is None:
                    return old.at[:, :, index].set(new, unique_indices=True)
                # With a slice between row and index, what they select comes first.
                return old.at[place.row, :, :, index].set(jnp.moveaxis(new, 2, 0), unique_indices=True)
        at = (0, 0, position % slots if ring else position, *(0,) * (new.ndim - 3))
        put = partial(jax.lax.dynamic_update_slice, allow_negative_indices=False)
        if place.row is None:
            return put(old, new.astype(old.dtype), at)
        return put(old, new[None].astype(old.dtype), (place.row, *at))


def entries(config: ModelConfig) -> list[tuple[tuple[int, ...], Kind]]:
    """For each entry of a cache: (R,) if R layers are stacked in it, else (); and what kind of layer it serves."""
    if config.resolve().layers == "scan":
        return [((run.times,), kind) for run in config.runs for kind in run.kinds]
    return [((), kind) for kind in config.kinds]


def _zeros(config: ModelConfig, shape: tuple[int, ...]) -> Entry:
    if config.cache_dtype == "int8":
        return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:-1], jnp.float32))
    return jnp.zeros(shape, config.dtype)
