"""Inference: read a prompt (`prefill`), then write one token after another (`decode_step`, `decode`, `generate`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from .cache import KVCache
from .scopes import scope
from .transformer import Transformer

NO_TOKEN = -1  # what a row is given after a stop token, and where there is no room for a token


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: drawn from softmax(logits / temperature), restricted by `top_k`, `top_p` and `min_p`.

    The restrictions are applied in this order, each to what the one before has left, made to sum to one again. This is
    the order of Hugging Face's `generate`. Raises ValueError naming the field, its value and what would be right.
    """

    temperature: float = 0.0  # 0: the likeliest token, always
    top_k: int = 0  # the k likeliest tokens, of equal ones those of lower number; 0: all
    top_p: float = 1.0  # the likeliest tokens that together reach this probability (Holtzman et al., 2019); 1: all
    min_p: float = 0.0  # tokens of at least this share of the likeliest one's (Nguyen et al., 2024); 0: all

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be positive, or 0 for the likeliest token")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be positive, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be between 0 and 1")

    def choose(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Logits [B,V] -> tokens [B]."""
        if self.temperature == 0:
            return jnp.argmax(logits, -1)
        logits, tokens = self.candidates(logits)
        drawn = jax.random.categorical(key, logits)
        return drawn if tokens is None else jnp.take_along_axis(tokens, drawn[:, None], 1)[:, 0]

    def candidates(self, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Logits [B,V] -> those to draw from [B,C], and the tokens they are of; None: of 0 to V - 1."""
        logits, tokens = logits / self.temperature, None
        if self.top_k or self.top_p < 1:  # sorted, the likeliest first
            logits, tokens = jax.lax.top_k(logits, min(self.top_k or logits.shape[-1], logits.shape[-1]))
        if self.top_p < 1:
            probabilities = jax.nn.softmax(logits, -1)
            before = jnp.cumsum(probabilities, -1) - probabilities
            # The likeliest stays, also where rounding makes what is before it more than nothing.
            kept = (before < self.top_p).at[:, 0].set(True)
            logits = jnp.where(kept, logits, -jnp.inf)
        if self.min_p:
            least = jnp.max(logits, -1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits >= jnp.broadcast_to(least, logits.shape), logits, -jnp.inf)
        return logits, tokens


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """B prompts of different lengths -> tokens [B,T], all ending together, and where each begins, start [B]; int32.

    ValueError if there is no prompt, or an empty one.
    """
    if not prompts:
        raise ValueError("prompts is []; there must be at least one")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{row}] is empty; a prompt needs at least one token")
    T = max(map(len, prompts))
    tokens = np.zeros((len(prompts), T), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[T - len(prompt) :] = prompt
    return jnp.asarray(tokens), jnp.asarray([T - len(prompt) for prompt in prompts], jnp.int32)


def prefill(
    model: Transformer, tokens: jax.Array, cache: KVCache, start: jax.Array | None = None, chunk: int = 0
) -> tuple[jax.Array, KVCache]:
    """Starts a sequence with a prompt: tokens [B,T] -> logits [B,V] of the token after it, and the cache that holds it.

    start: [B], int32, where each row begins if prompts were padded (`pad_left`).
    chunk: so many positions at a time, so that activations need memory for them and not for all T; 0: all at once.
      What a chunk reads of those before it, it reads from the cache, in int8 if that is the cache's type. It is one
      scan: compiled once however long the prompt, one dispatch, and the cache stays where it is.
    Whatever the cache held is forgotten. ValueError if the prompt is longer than the cache, or chunk is negative.
    """
    T = tokens.shape[1]
    if cache.length < T:
        raise ValueError(f"the prompt has {T} tokens; the cache has room for {cache.length}")
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}; it must be positive, or 0 for the whole prompt at once")
    # The first piece takes what does not fill a chunk: the last one, whose logits are wanted, is the scan's.
    first = (T - 1) % chunk + 1 if chunk else T
    x, cache, _ = model.hidden(tokens[:, :first], replace(cache, start=start))
    with scope("final_norm"):
        last = x[:, -1:]
    cache = cache.at(first)
    if first < T:

        def read(carry: tuple[jax.Array, KVCache], piece: jax.Array) -> tuple[tuple[jax.Array, KVCache], None]:
            x, cache, _ = model.hidden(piece, carry[1], continues=True)
            with scope("attention/cache"):
                cache = cache.at(cache.position + chunk)
            with scope("final_norm"):
                return (x[:, -1:], cache), None

        with scope("embed"):
            pieces = jnp.moveaxis(tokens[:, first:].reshape(len(tokens), -1, chunk), 1, 0)
        (last, cache), _ = jax.lax.scan(read, (last, cache), pieces)
    return jnp.squeeze(model.logits(last), 1), cache


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


def sample(logits: jax.Array, sampling: Sampling | float, key: jax.Array) -> jax.Array:
    """Logits [B,V] -> tokens [B]. A number is the temperature.

    Where the logits are NaN, as after a write past the end of the cache, it is NO_TOKEN.
    """
    with scope("sampling"):
        token = as_sampling(sampling).choose(logits, key)
        return jnp.where(jnp.isnan(logits[:, 0]), NO_TOKEN, token).astype(jnp.int32)


def as_sampling(sampling: Sampling | float) -> Sampling:
    """A number is the temperature."""
    return sampling if isinstance(sampling, Sampling) else Sampling(sampling)


def decode(
    model: Transformer,
    tokens: jax.Array,
    cache: KVCache,
    count: int,
    sampling: Sampling | float = 0.0,
    key: jax.Array | None = None,
    stop: tuple[int, ...] = (),
) -> tuple[jax.Array, KVCache]:
    """Writes `count` tokens after tokens [B], one feeding the next, in one compiled loop: -> [B,count], cache.

    key: one for all, or [count], one a token: a loop in pieces draws what it draws in one.
    stop: a row that has written one of these, or was handed one, is given NO_TOKEN from there on; the loop ends when
      there is no other row. Without, it takes `count` steps, and the compiler knows it.
    """
    cache.room_for(count)
    with scope("sampling"):
        key = jax.random.key(0) if key is None else key
        keys = key if key.ndim else jax.random.split(key, count)
    if keys.shape != (count,):
        raise ValueError(f"key is of shape {keys.shape}; it must be one key, or {count}")
    if stop:
        return _decode_until(model, tokens, cache, keys, sampling, stop)

    def step(carry: tuple[jax.Array, KVCache], key: jax.Array) -> tuple[tuple[jax.Array, KVCache], jax.Array]:
        logits, cache = decode_step(model, *carry)
        tokens = sample(logits, sampling, key)
        return (tokens, cache), tokens

    (_, cache), written = jax.lax.scan(step, (tokens, cache), keys)
    with scope("sampling"):
        return written.T, cache


def finished(tokens: jax.Array, stop: tuple[int, ...]) -> jax.Array:
    """Which rows [B], whose last tokens these are, write no more."""
    return (tokens < 0) | jnp.isin(tokens, jnp.asarray(stop, tokens.dtype))


_Carry = tuple[jax.Array, jax.Array, KVCache, jax.Array]  # steps done, the last tokens, the cache, what is written


def _decode_until(
    model: Transformer,
    tokens: jax.Array,
    cache: KVCache,
    keys: jax.Array,
    sampling: Sampling | float,
    stop: tuple[int, ...],
) -> tuple[jax.Array, KVCache]:
    def goes_on(carry: _Carry) -> jax.Array:
        step, tokens, _, _ = carry
        with scope("sampling"):
            return (step < len(keys)) & ~jnp.all(finished(tokens, stop))

    def one(carry: _Carry) -> _Carry:
        step, tokens, cache, written = carry
        with scope("sampling"):
            done = finished(tokens, stop)
            fed = jnp.where(done, 0, tokens)  # any token there is: what comes of it is thrown away
        logits, cache = decode_step(model, fed, cache)
        new = sample(logits, sampling, keys[step])
        with scope("sampling"):
            new = jnp.where(done, NO_TOKEN, new)
            return step + 1, new, cache, jax.lax.dynamic_update_index_in_dim(written, new, step, 1)

    with scope("sampling"):
        nothing = jnp.full((len(tokens), len(keys)), NO_TOKEN, jnp.int32)
        begin = jnp.zeros((), jnp.int32)
    _, _, cache, written = jax.lax.while_loop(goes_on, one, (begin, tokens, cache, nothing))
    return written, cache


def generate(
    model: Transformer,
    prompt: jax.Array,
    count: int,
    sampling: Sampling | float = 0.0,
    key: jax.Array | None = None,
    *,
    start: jax.Array | None = None,
    chunk: int = 0,
    stop: tuple[int, ...] = (),
) -> jax.Array:
    """Prompt [B,T] -> the `count` tokens after it, [B,count]. Jit it: then prefill and decode are one dispatch.

    start, chunk: as `prefill` takes them; stop: as `decode` does.
    ValueError if T + count - 1 positions are more than the model takes.
    """
    first_key, key = jax.random.split(jax.random.key(0) if key is None else key)
    B, T = prompt.shape
    logits, cache = prefill(model, prompt, KVCache.init(model.config, B, T + count - 1), start, chunk)
    first = sample(logits, sampling, first_key)
    rest, _ = decode(model, first, cache, count - 1, sampling, key, stop)
    return jnp.concatenate([first[:, None], rest], axis=1)
