"""Inference: read a prompt in one pass (`prefill`), then write one token after another (`decode_step`, `generate`)."""

import jax
import jax.numpy as jnp

from .cache import KVCache
from .scopes import scope
from .transformer import Transformer


def prefill(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Starts a sequence with a prompt: tokens [B,T] -> logits [B,V] of the token after it, and the cache that holds it.

    Whatever the cache held is forgotten. ValueError if the prompt is longer than the cache.
    """
    T = tokens.shape[1]
    if T > cache.length:
        raise ValueError(f"the prompt has {T} tokens; the cache has room for {cache.length}")
    x, cache = model.hidden(tokens, cache)
    return model.logits(x[:, -1:])[:, 0], cache.at(T)


def decode_step(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Continues by one token: tokens [B] -> logits [B,V] of the one after it, and the cache one position fuller.

    A full cache is a ValueError; where the position is only known at run time, the logits are NaN (and `checkify` raises).
    """
    fits = cache.room_for(1)
    x, cache = model.hidden(tokens[:, None], cache, continues=True)
    logits = model.logits(x)[:, 0]
    with scope("logits"):
        logits = jnp.where(fits, logits, jnp.nan)
    return logits, cache.at(cache.position + 1)


def sample(logits: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    """Logits [B,V] -> tokens [B]: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    with scope("sampling"):
        if temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def decode(
    model: Transformer,
    tokens: jax.Array,
    cache: KVCache,
    count: int,
    temperature: float = 0.0,
    key: jax.Array | None = None,
) -> tuple[jax.Array, KVCache]:
    """Writes `count` tokens after tokens [B], one feeding the next, in one compiled loop: -> [B,count], cache."""
    cache.room_for(count)
    keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def step(carry: tuple[jax.Array, KVCache], key: jax.Array) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        logits, cache = decode_step(model, *carry)
        tokens = sample(logits, temperature, key)
        return (tokens, cache), tokens

    (_, cache), written = jax.lax.scan(step, (tokens, cache), keys)
    return written.T, cache
