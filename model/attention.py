"""Causal self-attention with grouped queries: G query heads read each key/value head (Ainslie et al., 2023)."""

import jax
import jax.numpy as jnp
from flax import nnx

from .axes import shard
from .cache import KVCache
from .config import ModelConfig
from .layers import RMSNorm, Span, normal, param, project, rope
from .scopes import scope


class Attention(nnx.Module):
    """x + attention(norm(x)): [B,T,D] -> [B,T,D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_width
        self.norm = RMSNorm(config, rngs)
        self.wq = param(rngs, "DNH", (D, N, H), normal(D), config.param_dtype)
        self.wk = param(rngs, "DKH", (D, K, H), normal(D), config.param_dtype)
        self.wv = param(rngs, "DKH", (D, K, H), normal(D), config.param_dtype)
        self.wo = param(rngs, "NHD", (N, H, D), normal(N * H * 2 * config.num_layers), config.param_dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config, rngs, "H")
            self.k_norm = RMSNorm(config, rngs, "H")
        self.config = config

    def __call__(
        self, x: jax.Array, span: Span, cache: KVCache | None, layer: int | jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """The T positions of `span` attend to themselves or, where they continue a sequence, to all of the cache."""
        config = self.config
        B, T, _ = x.shape
        with scope("attention/norm"):
            normed = shard(self.norm(x), "BTD")
        with scope("attention/qkv"):
            q = project("BTD,DNH->BNTH", normed, self.wq)
            k = shard(project("BTD,DKH->BKTH", normed, self.wk), "BKTH")
            v = shard(project("BTD,DKH->BKTH", normed, self.wv), "BKTH")
            q = shard(q.reshape(B, config.num_kv_heads, config.queries_per_kv_head, T, config.head_width), "BKGTH")
            if config.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
        with scope("attention/rope"):
            q, k = rope(q, span), rope(k, span)
        if cache is not None:
            with scope("attention/cache"):
                cache = cache.update(layer, k, v, cache.position if span.continues else 0)
                if span.continues:
                    k, v = cache.read(layer)
        with scope("attention/core"):
            heads = attend_in_blocks(q, k, v, span.positions, config.query_block)
        with scope("attention/out"):
            heads = shard(heads.reshape(B, config.num_heads, T, config.head_width), "BNTH")
            return x + shard(project("BNTH,NHD->BTD", heads, self.wo), "BPD"), cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(H)) v, over the keys at and before each query's position.

    q [B,K,G,T,H] at positions [T]; k, v [B,K,S,H] at positions 0..S-1; returns [B,K,G,T,H]. Scores and softmax are
    float32. All T x S scores are computed and then masked; the bill says so, as the `masked` tax.
    """
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    seen = jnp.arange(k.shape[2])[None, :] <= positions[:, None]
    seen = jnp.broadcast_to(seen, scores.shape)
    probabilities = jax.nn.softmax(jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BKSH->BKGTH", probabilities.astype(v.dtype), v)


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, block: int) -> jax.Array:
    """`attend`, some `block` queries at a time, so that not all T x S scores exist at once; the FLOPs are the same."""
    T = q.shape[3]
    if block == 0 or block >= T:
        return attend(q, k, v, positions)
    whole = T - T % block
    blocks = jnp.moveaxis(q[:, :, :, :whole].reshape(*q.shape[:3], whole // block, block, q.shape[4]), 3, 0)
    done = jax.lax.map(lambda xs: attend(xs[0], k, v, xs[1]), (blocks, positions[:whole].reshape(-1, block)))
    done = jnp.moveaxis(done, 0, 3).reshape(*q.shape[:3], whole, q.shape[4])
    if whole == T:
        return done
    return jnp.concatenate([done, attend(q[:, :, :, whole:], k, v, positions[whole:])], axis=3)
