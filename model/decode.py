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
    if cache.length < T:
        raise ValueError(f"the prompt has {T} tokens; the cache has room for {cache.length}")
    x, cache, _ = model.hidden(tokens, cache)
    with scope("final_norm"):
        last = x[:, -1:]
    return jnp.squeeze(model.logits(last), 1), cache.at(T)


def decode_step(model: Transformer, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    """Continues by one token: tokens [B] -> logits [B,V] of the one after it, and the cache one position fuller.

    A full cache is a ValueError; where the position is known at run time only, logits are NaN and `checkify` raises.
    """
    fits = cache.room_for(1)
    x, cache, _ = model.hidden(tokens[:, None], cache, continues=True)
    logits = model.logits(x)
    with scope("logits"):
        logits = jnp.where(fits, jnp.squeeze(logits, 1), jnp.nan)
    with scope("attention/cache"):
        return logits, cache.at(cache.position + 1)


def sample(logits: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
    """Logits [B,V] -> tokens [B]: the likeliest at temperature 0, else drawn from softmax(logits / temperature).

    Where the logits are NaN, as after a write past the end of the cache, the token is -1.
    """
    with scope("sampling"):
        token = jnp.argmax(logits, -1) if temperature == 0 else jax.random.categorical(key, logits / temperature)
        return jnp.where(jnp.isnan(logits[:, 0]), -1, token).astype(jnp.int32)


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
    with scope("sampling"):
        keys = jax.random.split(jax.random.key(0) if key is None else key, count)

    def step(carry: tuple[jax.Array, KVCache], key: jax.Array) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        logits, cache = decode_step(model, *carry)
        tokens = sample(logits, temperature, key)
        return (tokens, cache), tokens

    (_, cache), written = jax.lax.scan(step, (tokens, cache), keys)
    with scope("sampling"):
        return written.T, cache


def generate(
    model: Transformer, prompt: jax.Array, count: int, temperature: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Prompt [B,T] -> the `count` tokens after it, [B,count]. Jit it: then prefill and decode are one dispatch.

    ValueError if T + count - 1 positions are more than the model takes.
    """
    first_key, key = jax.random.split(jax.random.key(0) if key is None else key)
    B, T = prompt.shape
    logits, cache = prefill(model, prompt, KVCache.init(model.config, B, T + count - 1))
    first = sample(logits, temperature, first_key)
    rest, _ = decode(model, first, cache, count - 1, temperature, key)
    return jnp.concatenate([first[:, None], rest], axis=1)
