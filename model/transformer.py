"""A decoder-only transformer: tokens in, logits of the next token out. This file is the whole of it; the sublayers are
in `attention.py` and `mlp.py`, what they are made of in `layers.py`, and what is done with it in `decode.py` and
`train.py`. Axis letters are those of `axes.py`: x is [B,T,D], batch by positions by width.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Attention
from .axes import shard
from .cache import KVCache
from .config import REMAT, ModelConfig
from .layers import Embed, RMSNorm, Span, normal, param, project
from .mlp import MLP
from .scopes import scope

Params = dict[str, Any]  # nested names -> arrays, as `split` gives them
CacheOrNone = TypeVar("CacheOrNone", KVCache, None)


class Block(nnx.Module):
    """One layer: each position reads from those before it (attention), then thinks for itself (mlp)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, rngs)
        self.mlp = MLP(config, rngs)

    def __call__(
        self, x: jax.Array, span: Span, cache: KVCache | None, layer: int | jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        x, cache = self.attention(x, span, cache, layer)
        return self.mlp(x), cache


class Transformer(nnx.Module):
    """Embedding, L blocks, a norm, and the product with the unembedding."""

    layers: Block | nnx.List[Block]  # all L stacked in one, or in a row

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config = config.resolve()
        self.embed = Embed(config, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stacked(config, keys) if config.layers == "scan" else in_a_row(config, keys)
        self.final_norm = RMSNorm(config, rngs)
        if not config.tied:
            shape = (config.width, config.vocabulary)
            self.unembed = param(rngs, "DV", shape, normal(config.width), config.param_dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B,T] -> float32 logits [B,T,V] of the token that follows each."""
        return self.logits(self.hidden(tokens)[0])

    def hidden(
        self, tokens: jax.Array, cache: CacheOrNone = None, continues: bool = False
    ) -> tuple[jax.Array, CacheOrNone]:
        """Tokens [B,T] -> x [B,T,D] after the last block, and the cache with their keys and values written.

        `continues`: the tokens follow those in the cache. Otherwise a sequence starts with them, at position 0.
        """
        config = self.config
        with scope("embed"):
            x = self.embed(tokens)
        with scope("attention/rope"):
            start = cache.position if cache is not None and continues else 0
            span = Span.of(config, start, tokens.shape[1], continues)

        def run(layer: int | jax.Array, params: Params, x: jax.Array, cache: KVCache | None):
            return nnx.merge(graph, params)(x, span, cache, layer)

        if config.remat != "none" and cache is None:
            # The loop of a scan already keeps the compiler from merging the recomputation with the forward pass.
            unrolled = config.layers == "unroll"
            static = (0,) if unrolled else ()
            run = jax.checkpoint(run, policy=REMAT[config.remat], prevent_cse=unrolled, static_argnums=static)
        if isinstance(self.layers, Block):
            graph, stack = split(self.layers)
            layers = (jnp.arange(config.num_layers), stack)
            # The cache is carried, not scanned over: as xs -> ys all of it would be written anew.
            (x, cache), _ = jax.lax.scan(lambda carry, layer: (run(*layer, *carry), None), (x, cache), layers)
        else:
            for layer, block in enumerate(self.layers):
                graph, params = split(block)
                x, cache = run(layer, params, x, cache)
        return x, cache

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B,T,D] -> float32 logits [B,T,V]."""
        with scope("final_norm"):
            x = self.final_norm(x)
        with scope("logits"):
            table, expression = (self.embed.table, "BTD,VD->BTV") if self.config.tied else (self.unembed, "BTD,DV->BTV")
            wide = jnp.promote_types(x.dtype, jnp.float32)
            return shard(project(expression, x, table, wide), "BTV")


def in_a_row(config: ModelConfig, keys: jax.Array) -> nnx.List[Block]:
    """L blocks, each with its own parameters."""
    create = nnx.jit(lambda key: Block(config, nnx.Rngs(params=key)))  # traced once, and not L times
    return nnx.List([create(key) for key in keys])


def stacked(config: ModelConfig, keys: jax.Array) -> Block:
    """One block whose parameters are the same L blocks', stacked along a leading axis L, for `jax.lax.scan`."""
    block = nnx.vmap(lambda key: Block(config, nnx.Rngs(params=key)))(keys)
    for _, parameter in nnx.iter_graph(block):
        if isinstance(parameter, nnx.Param):
            parameter.set_metadata(axes="L" + parameter.get_metadata("axes"))
    return block


def split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], Params]:
    """A module as its static structure and its parameters, a plain nested dict; `nnx.merge` joins them again."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def logical_axes(module: nnx.Module) -> Params:
    """The axis letters of every parameter, such as "DNH", in the same nested dict as `split` gives the arrays in."""

    def letters(variable: nnx.Variable[Any]) -> str:
        return variable.get_metadata("axes")

    variables = nnx.state(module)
    return nnx.to_pure_dict(jax.tree.map(letters, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
