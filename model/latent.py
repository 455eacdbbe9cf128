"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): a cache of one short vector a position.

Keys and values of all heads are made from that vector c. A prompt makes them, and attends as usual. To continue from
the cache they are never made: with k = W_k c, the score q'k is (W_k'q)'c, so that queries go to the space of c, heads
read c itself, and W_v turns what they have read into values (the absorbed form, section 2.1.2).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Attention, attend_in_blocks, remember
from .axes import as_it_lies, shard
from .cache import KVCache, Place
from .config import Latent
from .layers import RMSNorm, Span, matrix, normal, param, project, rope
from .scopes import scope


class LatentAttention(Attention):
    """x + attention(norm(x)): [B,T,D] -> [B,T,D]."""

    def make_inputs(self, rngs: nnx.Rngs) -> int:
        config, m = self.config, self.latent
        D, N, H = config.width, config.num_heads, config.head_width
        if m.query_rank:
            self.wq_down = matrix(config, rngs, "DQ", (D, m.query_rank), "D", normal(D))
            self.q_norm = RMSNorm(config, rngs, "Q", m.query_rank)
        letter, source = ("Q", m.query_rank) if m.query_rank else ("D", D)
        self.wq = matrix(config, rngs, letter + "NH", (source, N, H + m.rope_width), letter, normal(source))
        self.wk_down = matrix(config, rngs, "DC", (D, m.kv_rank + m.rope_width), "D", normal(D))
        self.kv_norm = RMSNorm(config, rngs, "C", m.kv_rank)
        # Never quantised: they are contracted over C here and over H there, and are 0.2 % of DeepSeek-V3.
        self.wk = param(rngs, "CNH", (m.kv_rank, N, H), normal(m.kv_rank), config.param_dtype)
        self.wv = param(rngs, "CNH", (m.kv_rank, N, m.value_width), normal(m.kv_rank), config.param_dtype)
        return m.value_width

    @property
    def latent(self) -> Latent:
        """The config's part that says how."""
        assert self.config.latent is not None
        return self.config.latent

    def heads(
        self, normed: jax.Array, span: Span, cache: KVCache | None, place: Place
    ) -> tuple[jax.Array, KVCache | None]:
        config, m, turns = self.config, self.latent, span.turns[self.kind.local]
        rounding = self.activations(normed)
        with scope("attention/qkv"):
            source, letter = normed, "D"
            if m.query_rank:
                source = self.q_norm(project("BTD,DQ->BTQ", normed, self.wq_down, activations=rounding))
                letter = "Q"
            q = project(f"BT{letter},{letter}NH->BNTH", source, self.wq, activations=rounding)
            q = shard(q, "BNTH")
            down = project("BTD,DC->BTC", normed, self.wk_down, activations=rounding)
            short = self.kv_norm(down[:, None, :, : m.kv_rank])  # [B,1,T,C]
            q, q_turned = q[..., : config.head_width], q[..., config.head_width :]
        with scope("attention/rope"):
            q_turned, k_turned = rope(q_turned, turns), rope(down[:, None, :, m.kv_rank :], turns)
        keys, keys_turned, sight, cache = remember(short, k_turned, 0, span, cache, place)
        if sight.fresh:
            with scope("attention/qkv"):
                k = project("BTC,CNH->BNTH", short[:, 0], self.wk, activations=rounding)
                v = project("BTC,CNH->BNTH", short[:, 0], self.wv, activations=rounding)
                keys_turned = jnp.broadcast_to(k_turned, (*k.shape[:-1], m.rope_width))
            with scope("attention/core"):  # K = N, G = 1
                read = attend_in_blocks((q[:, :, None], q_turned[:, :, None]), (k, keys_turned), v, sight, config)
                return shard(read[:, :, 0], "BNTH"), cache
        with scope("attention/qkv"):
            q = project("BNTH,CNH->BNTC", q, self.wk)
        with scope("attention/core"):  # K = 1, G = N
            read = attend_in_blocks((q[:, None], q_turned[:, None]), (keys, keys_turned), keys, sight, config)
        with scope("attention/qkv"):
            # Else a GPU's compiler multiplies head by head into [N,B,T,H], and transposes the next product's weights.
            return as_it_lies(shard(project("BNTC,CNH->BNTH", read[:, 0], self.wv), "BNTH"), "BNTH"), cache
