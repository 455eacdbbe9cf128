"""The feed-forward sublayer, gated (Shazeer, 2020) or not."""

import jax
import jax.numpy as jnp
from flax import nnx

from .axes import gather, shard
from .config import ModelConfig
from .layers import bias, matrix, norm, normal, param, projects
from .scopes import scope


def activate(config: ModelConfig, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """The nonlinearity between the two products; `gate` where there is one."""
    if gate is None:
        if config.activation == "gelu_quick":
            return up * jax.nn.sigmoid(1.702 * up)
        return jax.nn.gelu(up, approximate=config.activation == "gelu")
    if config.activation == "swiglu_clamped":  # gpt-oss: no value may run away, and up counts from one
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)
    return {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}[config.activation](gate) * up


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)), of any width F; without gate down(act(up(x)))."""

    def __init__(self, config: ModelConfig, F: int, rngs: nnx.Rngs) -> None:
        D, zeros = config.width, jax.nn.initializers.zeros
        self.config = config
        if config.gated:
            self.gate = matrix(config, rngs, "DF", (D, F), "D", normal(D))
        self.up = matrix(config, rngs, "DF", (D, F), "D", normal(D))
        self.down = matrix(config, rngs, "FD", (F, D), "F", normal(F * 2 * config.num_layers))
        if config.mlp_bias:
            if config.gated:
                self.bgate = param(rngs, "F", (F,), zeros, config.param_dtype)
            self.bup = param(rngs, "F", (F,), zeros, config.param_dtype)
            self.bdown = param(rngs, "D", (D,), zeros, config.param_dtype)

    def feed(self, x: jax.Array, up_scope: str, down_scope: str) -> jax.Array:
        """[B,T,D] -> [B,T,D]."""
        config = self.config
        rounding = config.activations if x.shape[1] > 1 else "full"

        def products(expression: str, x: jax.Array, *names: str) -> list[jax.Array]:
            ys = projects([expression] * len(names), x, [getattr(self, n) for n in names], activations=rounding)
            if not config.mlp_bias:
                return ys
            return [y + bias(getattr(self, "b" + name), y) for name, y in zip(names, ys, strict=True)]

        with scope(up_scope):
            *gate, up = products("BTD,DF->BTF", x, *(["gate"] if config.gated else []), "up")
            hidden = shard(activate(config, gate[0] if gate else None, up), "BTF")
        with scope(down_scope):
            return products("BTF,FD->BTD", hidden, "down")[0]


class MLP(FeedForward):
    """x + feed_forward(norm(x)): [B,T,D] -> [B,T,D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm = norm(config, rngs)
        super().__init__(config, config.mlp_width, rngs)
        if config.post_norms:
            self.post_norm = norm(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        with scope("mlp/norm"):
            normed = gather(self.norm(x), "BTD", before="BPD")
        out = self.feed(normed, "mlp/up", "mlp/down")
        if self.config.post_norms:
            with scope("mlp/norm"):
                out = self.post_norm(out)
        with scope("mlp/down"):
            return x + shard(out, "BPD")
