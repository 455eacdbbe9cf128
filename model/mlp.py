"""The gated feed-forward sublayer (Shazeer, 2020)."""

import jax
from flax import nnx

from .axes import shard
from .config import ModelConfig
from .layers import RMSNorm, normal, param, project
from .scopes import scope

GATES = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


class MLP(nnx.Module):
    """x + down(act(gate(norm(x))) * up(norm(x))): [B,T,D] -> [B,T,D]."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        D, F = config.width, config.mlp_width
        self.norm = RMSNorm(config, rngs)
        self.gate = param(rngs, "DF", (D, F), normal(D), config.param_dtype)
        self.up = param(rngs, "DF", (D, F), normal(D), config.param_dtype)
        self.down = param(rngs, "FD", (F, D), normal(F * 2 * config.num_layers), config.param_dtype)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        with scope("mlp/norm"):
            normed = shard(self.norm(x), "BTD")
        with scope("mlp/up"):
            gate = GATES[self.config.activation](project("BTD,DF->BTF", normed, self.gate))
            hidden = shard(gate * project("BTD,DF->BTF", normed, self.up), "BTF")
        with scope("mlp/down"):
            return x + shard(project("BTF,FD->BTD", hidden, self.down), "BPD")
