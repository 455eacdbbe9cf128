"""Self-attention with grouped queries: G query heads read each key/value head (Ainslie et al., 2023).

`Attention` makes queries, keys and values and hands them to `attend`; latent attention, which makes them otherwise, is
in `latent.py`.
"""

from dataclasses import dataclass, replace
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from . import flash_decode
from .axes import as_it_lies, gather, platform, shard
from .cache import Entry, KVCache, Place, Rounded
from .config import STREAM, Kind, ModelConfig
from .flash import by_cudnn, chosen, flash
from .layers import RMSNorm, Span, bias, einsum, matrix, norm, normal, param, project, projects, rope, weight
from .scopes import scope


class Attention(nnx.Module):
    """x + attention(norm(x)): [B,T,D] -> [B,T,D]."""

    def __init__(self, config: ModelConfig, kind: Kind, rngs: nnx.Rngs) -> None:
        self.config, self.kind = config, kind
        D, N, value_width = config.width, config.num_heads, self.make_inputs(rngs)
        init = normal(N * value_width * 2 * config.num_layers)
        self.norm = norm(config, rngs)
        self.wo = matrix(config, rngs, "NHD", (N, value_width, D), "NH", init)
        if config.output_bias:
            self.bo = param(rngs, "D", (D,), jax.nn.initializers.zeros, config.param_dtype)
        if config.sinks:
            self.sinks = param(rngs, "N", (N,), jax.nn.initializers.zeros, config.param_dtype)
        if config.post_norms:
            self.post_norm = norm(config, rngs)

    def make_inputs(self, rngs: nnx.Rngs) -> int:
        """Declares what queries, keys and values are made with; returns the width of a value."""
        config = self.config
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.wq = matrix(config, rngs, "DNH", (D, N, H), "D", normal(D))
        self.wk = matrix(config, rngs, "DKH", (D, K, H), "D", normal(D))
        self.wv = matrix(config, rngs, "DKH", (D, K, H), "D", normal(D))
        if config.qkv_bias:
            zeros = jax.nn.initializers.zeros
            self.bq = param(rngs, "NH", (N, H), zeros, config.param_dtype)
            if config.key_bias:
                self.bk = param(rngs, "KH", (K, H), zeros, config.param_dtype)
            self.bv = param(rngs, "KH", (K, H), zeros, config.param_dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, rngs, "H", H)
            self.k_norm = RMSNorm(config, rngs, "H", H)
        return H

    def __call__(
        self, x: jax.Array, span: Span, cache: KVCache | None, place: Place
    ) -> tuple[jax.Array, KVCache | None]:
        """The T positions of `span` attend to themselves or, where they continue a sequence, to all of the cache."""
        with scope("attention/norm"):
            normed = gather(self.norm(x), "BTD", before="BPD")
        heads, cache = self.heads(normed, span, cache, place)
        with scope("attention/out"):
            out = project("BNTH,NHD->BTD", heads, self.wo, activations=self.activations(x))
            if self.config.output_bias:
                out = out + bias(self.bo, out)
        if self.config.post_norms:
            with scope("attention/norm"):
                out = self.post_norm(out)
        with scope("attention/out"):
            return checkpoint_name(x + shard(out, "BPD"), STREAM), cache

    def activations(self, x: jax.Array) -> str:
        """How activations enter a product: rounding them pays where there are many, not for one token a sequence."""
        return self.config.activations if x.shape[1] > 1 else "full"

    def heads(
        self, normed: jax.Array, span: Span, cache: KVCache | None, place: Place
    ) -> tuple[jax.Array, KVCache | None]:
        """What each head has read: [B,T,D] -> [B,N,T,H], and the cache with the new keys and values."""
        config, turns = self.config, span.turns[self.kind.local]
        B, T, _ = normed.shape
        with scope("attention/qkv"):
            rounding = self.activations(normed)
            products = ["BTD,DNH->BNTH", "BTD,DKH->BKTH", "BTD,DKH->BKTH"]
            q, k, v = projects(products, normed, [self.wq, self.wk, self.wv], activations=rounding)
            if config.qkv_bias:
                q, k, v = (
                    x if b is None else x + jnp.broadcast_to(weight(b, x.dtype)[None, :, None], x.shape)
                    for x, b in ((q, self.bq), (k, self.bk if config.key_bias else None), (v, self.bv))
                )
            k, v = shard(k, "BKTH"), shard(v, "BKTH")
            grouped = (B, config.num_kv_heads, config.queries_per_kv_head, T, config.head_width)
            q = shard(q.reshape(grouped), "BKGTH")
            if config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
        with scope("attention/rope"):
            q, k = rope(q, turns), rope(k, turns)
        k, v, sight, cache = remember(k, v, self.window, span, cache, place)
        with scope("attention/core"):
            sinks = weight(self.sinks, q.dtype).reshape(grouped[1:3]) if config.sinks else None
            heads = attend_in_blocks((q,), (k,), v, sight, config, sinks)
            return shard(heads.reshape(B, config.num_heads, T, config.head_width), "BNTH"), cache

    @property
    def window(self) -> int:
        """How many positions this layer sees; 0: all."""
        return self.config.window if self.kind.local else 0


@dataclass(frozen=True)
class Sight:
    """Who sees whom: a query sees the keys at and before its own position, of its own sequence, inside the window."""

    queries: jax.Array  # [T], positions
    keys: jax.Array  # [S], positions; below zero: an empty slot of a ring
    window: int  # 0: unlimited
    start: jax.Array | None  # [B]: sequences start here; None: at 0
    fresh: bool  # keys and queries are the same positions, from the first on: no cache is read
    ring: bool = False  # slots may be empty
    causal: bool = True  # False: every query sees every key

    def mask(self) -> jax.Array:
        """[T,S], or [B,1,1,T,S] where rows differ."""
        queries, keys = self.queries[:, None], self.keys[None, :]
        if not self.causal:
            return jnp.ones((queries.size, keys.size), bool)
        seen = keys <= queries
        if self.window:
            seen &= keys > queries - self.window
        if self.ring:
            seen &= keys >= 0
        if self.start is None:
            return seen
        begun = self.keys[None, None, :] >= self.start[:, None, None]
        # What pads a row sees itself, for a softmax of nothing would be NaN and spread.
        return (seen[None] & (begun | (keys == queries)[None]))[:, None, None]


def remember(
    k: jax.Array, v: jax.Array, window: int, span: Span, cache: KVCache | None, place: Place
) -> tuple[Entry, Entry, Sight, KVCache | None]:
    """Writes new k, v [B,K,T,...] to the cache, if there is one: -> the keys and values to attend to, how, and it."""
    positions = span.positions
    fresh = Sight(positions, positions, window, span.start, fresh=True, causal=span.causal)
    if cache is None:
        return k, v, fresh, None
    with scope("attention/cache"):
        if not span.continues:
            return k, v, fresh, cache.update(place, k, v, 0)
        ring, T = cache.is_ring(place), k.shape[2]
        if ring and T > 1:
            # Writing them overwrites what the first of them still have to see.
            before = [as_array(entry, k.dtype) for entry in cache.read(place)]
            held = jnp.concatenate([cache.held(place, cache.position), positions])
            sight = Sight(positions, held, window, span.start, fresh=False, ring=True)
            keys, values = (jnp.concatenate(both, axis=2) for both in zip(before, (k, v), strict=True))
            return keys, values, sight, cache.update(place, k, v, cache.position)
        cache = cache.update(place, k, v, cache.position)
        sight = Sight(positions, cache.held(place, cache.position + T), window, span.start, fresh=False, ring=ring)
        k, v = (jax.tree.map(lambda x: as_it_lies(x, "BKSH"[: x.ndim]), entry) for entry in cache.read(place))
        return k, v, sight, cache


def as_array(entry: Entry, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Keys or values of a cache as numbers of `dtype`."""
    if isinstance(entry, Rounded):
        return (entry.values.astype(jnp.float32) * entry.scale[..., None]).astype(dtype)
    return entry


def arrays(entries: tuple[Entry, ...]) -> tuple[jax.Array, ...]:
    """Keys and values that no cache was read for, which are not rounded."""
    assert all(isinstance(entry, jax.Array) for entry in entries)
    return cast(tuple[jax.Array, ...], entries)


def attend(
    q: tuple[jax.Array, ...],
    k: tuple[Entry, ...],
    v: Entry,
    sight: Sight,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k' * scale) v, over the keys that each query sees: [B,K,G,T,H].

    q [B,K,G,T,H] and k [B,K,S,H], in parts where scores are a sum of products; v [B,K,S,H]; sinks [K,G]. Scores and
    softmax are float32. All T x S scores are computed and then masked; the bill says so, as the `masked` tax.
    """
    parts = [_scores(one_q, one_k) for one_q, one_k in zip(q, k, strict=True)]
    scores = sum(parts[1:], start=parts[0]) * scale
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = sight.mask()
    scores = jnp.where(jnp.broadcast_to(mask, scores.shape), scores, -jnp.inf)
    if sinks is None:
        probabilities = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(scores.dtype)[None, :, :, None, None], (*scores.shape[:-1], 1))
        top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sink))
        weights = jnp.exp(scores - top)
        probabilities = weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sink - top))
    if isinstance(v, Rounded):
        probabilities = probabilities * v.scale[:, :, None, None, :]
        v = v.values.astype(q[0].dtype)
    return einsum("BKGTS,BKSH->BKGTH", probabilities.astype(v.dtype), v, v.dtype)


def _scores(q: jax.Array, k: Entry) -> jax.Array:
    values = k.values.astype(q.dtype) if isinstance(k, Rounded) else k
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = einsum("BKGTH,BKSH->BKGTS", q, values, wide)
    return scores * k.scale[:, :, None, None, :] if isinstance(k, Rounded) else scores


def attend_in_blocks(
    q: tuple[jax.Array, ...],
    k: tuple[Entry, ...],
    v: Entry,
    sight: Sight,
    config: ModelConfig,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """`attend`, some queries at a time, so that not all T x S scores exist at once; with a window, over no more keys
    than a block of queries sees. Or by flash attention, where the config says so and no cache is read."""
    scale, softcap, T, target = config.score_scale, config.attention_softcap, q[0].shape[3], platform()
    how = chosen(config, T, target) if sight.fresh and sight.start is None else "xla"
    if how != "xla":
        queries, keys = (jnp.concatenate(x, axis=-1) for x in (q, arrays(k)))
        (values,) = arrays((v,))
        if how == "cudnn":
            return by_cudnn(queries, keys, values, scale=scale, causal=sight.causal)
        return flash(
            *(queries, keys, values),
            scale=scale,
            window=sight.window,
            causal=sight.causal,
            softcap=softcap,
            sinks=sinks,
            platform=target,
            interpret=target == "cpu",
        )
    if T == 1 and not sight.fresh and flash_decode.chosen(config, target) == "flash":
        seen = flash_decode.Seen(sight.queries[0], sight.start, sight.window, sight.ring)
        return flash_decode.attend(q[0], k[0], v, seen, scale=scale, softcap=softcap, sinks=sinks)
    size = config.query_block
    if sight.fresh and sight.window and size:
        size = min(size, max(sight.window, 128))  # else most keys of a block are masked away
    reach = size + sight.window - 1  # how many keys a block sees: the first query of it window - 1 before itself
    near = bool(sight.fresh and sight.window and size and reach < T)

    def some(queries: tuple[jax.Array, ...], positions: jax.Array, first: int | jax.Array) -> jax.Array:
        keys, values, at = k, v, sight.keys
        if near:
            start = jnp.clip(first - (sight.window - 1), 0, T - reach)
            *keys, values = (jax.lax.dynamic_slice_in_dim(x, start, reach, axis=2) for x in arrays((*k, v)))
            at = jax.lax.dynamic_slice_in_dim(at, start, reach)
        seen = replace(sight, queries=positions, keys=at)
        return attend(queries, tuple(keys), values, seen, scale, softcap, sinks)

    if size == 0 or size >= T:
        return attend(q, k, v, sight, scale, softcap, sinks)
    count = T // size

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x[:, :, :, : count * size].reshape(*x.shape[:3], count, size, x.shape[4]), 3, 0)

    positions = sight.queries[: count * size].reshape(count, size)
    firsts = jnp.arange(count, dtype=jnp.int32) * size
    done = jax.lax.map(lambda block: some(*block), (tuple(map(blocks, q)), positions, firsts))
    done = jnp.moveaxis(done, 0, 3).reshape(*q[0].shape[:3], count * size, done.shape[-1])
    if count * size == T:
        return done
    rest = some(tuple(one[:, :, :, count * size :] for one in q), sight.queries[count * size :], count * size)
    return jnp.concatenate([done, rest], axis=3)
