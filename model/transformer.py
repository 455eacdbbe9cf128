"""A decoder-only transformer: tokens in, logits of the next token out. This file is the whole of it; the sublayers are
in `attention.py` (`latent.py`) and `mlp.py` (`moe.py`), what they are made of in `layers.py`, and what is done with it
in `decode.py` and `train.py`. Axis letters are those of `axes.py`: x is [B,T,D], batch by positions by width.
"""

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import Attention
from .axes import shard
from .cache import KVCache, Place
from .config import REMAT, Kind, ModelConfig
from .latent import LatentAttention
from .layers import Embed, Span, matrix, norm, normal, wide
from .mlp import MLP
from .moe import MoE, join, set_apart
from .scopes import scope

Params = dict[str, Any]  # nested names -> arrays, as `split` gives them
CacheOrNone = TypeVar("CacheOrNone", KVCache, None)
Carry = tuple[jax.Array, Any, Any]  # x, the cache if there is one, the routers' penalty if there are experts


class Block(nnx.Module):
    """One layer: each position reads from those before it (attention), then thinks for itself (mlp, or moe)."""

    def __init__(self, config: ModelConfig, kind: Kind, rngs: nnx.Rngs) -> None:
        self.attention = (LatentAttention if config.latent else Attention)(config, kind, rngs)
        if kind.sparse:
            self.moe = MoE(config, rngs)
        else:
            self.mlp = MLP(config, rngs)

    def __call__(
        self, x: jax.Array, span: Span, cache: KVCache | None, place: Place
    ) -> tuple[jax.Array, KVCache | None, jax.Array | float]:
        """x [B,T,D] -> x, the cache with this layer's keys and values, and the router's penalty if there is one."""
        x, cache = self.attention(x, span, cache, place)
        if hasattr(self, "moe"):
            x, penalty = self.moe(x, place.row)
            return x, cache, penalty
        return self.mlp(x), cache, 0.0


class Transformer(nnx.Module):
    """Embedding, L blocks, a norm, and the product with the unembedding."""

    # L blocks in a row; or, for each of config.runs, the blocks of its pattern, each a stack of all repetitions.
    layers: nnx.List[Any]

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config = config.resolve()
        self.embed = Embed(config, rngs)
        keys = jax.random.split(rngs.params(), config.num_layers)
        self.layers = stacked(config, keys) if config.layers == "scan" else in_a_row(config, keys)
        self.final_norm = norm(config, rngs)
        if not config.tied:
            shape = (config.width, config.vocabulary)
            self.unembed = matrix(config, rngs, "DV", shape, "D", normal(config.width))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens [B,T] -> float32 logits [B,T,V] of the token that follows each."""
        return self.logits(self.hidden(tokens)[0])

    def hidden(
        self, tokens: jax.Array, cache: CacheOrNone = None, continues: bool = False
    ) -> tuple[jax.Array, CacheOrNone, jax.Array | float]:
        """Tokens [B,T] -> x [B,T,D] after the last block, the cache with their keys and values written, and the mean
        penalty of the routers.

        `continues`: the tokens follow those in the cache. Otherwise a sequence starts with them, at position 0.
        """
        config = self.config
        with scope("attention/rope"):
            first = cache.position if cache is not None and continues else 0
            start = None if cache is None else cache.start
            span = Span.of(config, first, tokens.shape[1], continues, start)
        with scope("embed"):
            x = self.embed(tokens, span)

        def block(graph: nnx.GraphDef[Block], entry: int, unrolled: bool) -> Any:
            def run(params: Params, carry: Carry, row: jax.Array | None) -> Carry:
                x, cache, penalty = carry
                here = span
                if cache is None and row is not None:
                    # Else jax makes the turns as large as the queries before the loop, and each layer reads that.
                    with scope("attention/rope"):
                        turns, row = jax.lax.optimization_barrier((span.turns, row))
                    here = replace(span, turns=turns)
                x, cache, more = nnx.merge(graph, params)(x, here, cache, Place(entry, row))
                return x, cache, penalty + more if config.experts else penalty

            if cache is not None:
                return run
            # The loop of a scan already keeps the compiler from merging the recomputation with the forward pass; and
            # where memory is not what is short, it may keep what it would do again.
            return jax.checkpoint(run, policy=REMAT[config.remat], prevent_cse=unrolled and config.remat != "none")

        carry = (x, cache, jnp.zeros((), jnp.float32) if config.experts else None)
        if config.layers == "unroll":
            for layer, one in enumerate(self.layers):
                graph, params = split(one)
                carry = block(graph, layer, unrolled=True)(params, carry, None)
        else:
            entry = 0
            for run, pattern in zip(config.runs, self.layers, strict=True):
                parts = [split(one) for one in pattern]
                # XLA takes a loop of one repetition away.
                blocks = [block(graph, entry + n, unrolled=run.times == 1) for n, (graph, _) in enumerate(parts)]
                # Where nothing is differentiated, experts are read where they lie; a slice of them would be a copy.
                whole = [set_apart(params, config) if cache is not None else (params, {}) for _, params in parts]
                kept = [stack for _, stack in whole]

                def repetition(
                    carry: Carry, xs: Any, blocks: list[Any] = blocks, kept: list[Params] = kept
                ) -> tuple[Carry, None]:
                    row, stacks = xs
                    for one, params, stack in zip(blocks, stacks, kept, strict=True):
                        carry = one(join(params, stack), carry, row)
                    return carry, None

                # The cache is carried, not scanned over: as xs -> ys all of it would be written anew.
                stacks = [params for params, _ in whole]
                with scope("attention/rope"):
                    rows = jnp.arange(run.times)
                carry, _ = jax.lax.scan(repetition, carry, (rows, stacks))
                entry += len(pattern)
        x, filled, penalty = carry
        with scope("loss"):
            return (
                x,
                cast(CacheOrNone, filled),
                0.0 if penalty is None else penalty / sum(kind.sparse for kind in config.kinds),
            )

    def logits(self, x: jax.Array) -> jax.Array:
        """x [B,T,D] -> float32 logits [B,T,V]."""
        config = self.config
        with scope("final_norm"):
            x = self.final_norm(x)
        with scope("logits"):
            table, expression = (self.embed.table, "BTD,VD->BTV") if config.tied else (self.unembed, "BTD,DV->BTV")
            logits = wide(expression, x, table)
            if config.logits_softcap:
                logits = config.logits_softcap * jnp.tanh(logits / config.logits_softcap)
            return shard(logits, "BTV")


def one_block(config: ModelConfig, kind: Kind, key: jax.Array) -> Block:
    """A block with parameters drawn from `key`."""
    return Block(config, kind, nnx.Rngs(params=key))


def in_a_row(config: ModelConfig, keys: jax.Array) -> nnx.List[Block]:
    """L blocks, each with its own parameters."""
    create = {kind: nnx.jit(partial(one_block, config, kind)) for kind in config.kinds}  # traced once a kind
    return nnx.List([create[kind](key) for kind, key in zip(config.kinds, keys, strict=True)])


def stacked(config: ModelConfig, keys: jax.Array) -> nnx.List[nnx.List[Block]]:
    """The same blocks, those at one place of a run's pattern stacked along a leading axis L, for `jax.lax.scan`."""
    runs: list[nnx.List[Block]] = []
    done = 0
    for run in config.runs:
        period = len(run.kinds)
        pattern = []
        for n, kind in enumerate(run.kinds):
            block = nnx.vmap(partial(one_block, config, kind))(keys[done + n : done + run.times * period : period])
            for _, parameter in nnx.iter_graph(block):
                if isinstance(parameter, nnx.Param):
                    parameter.set_metadata(axes="L" + parameter.get_metadata("axes"))
            pattern.append(block)
        runs.append(nnx.List(pattern))
        done += run.times * period
    return nnx.List(runs)


def split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], Params]:
    """A module as its static structure and its parameters, a plain nested dict; `nnx.merge` joins them again."""
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def unstack(config: ModelConfig, params: Params) -> Params:
    """The parameters of a scanned model as those of the same model with its layers in a row."""
    row = iter(range(config.num_layers))
    layers = {
        next(row): jax.tree.map(lambda stack, n=n: stack[n], params["layers"][number][place])
        for number, run in enumerate(config.runs)
        for n in range(run.times)
        for place in range(len(run.kinds))
    }
    return params | {"layers": layers}


def graph_of(config: ModelConfig) -> nnx.GraphDef[Transformer]:
    """The static structure of a model; its parameters are nowhere."""
    return split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]


def logical_axes(module: nnx.Module) -> Params:
    """The axis letters of every parameter, such as "DNH", in the same nested dict as `split` gives the arrays in."""
    return _metadata(module, "axes")


def contracted_axes(module: nnx.Module) -> Params:
    """Of every parameter the letters that a product with it sums over, such as "D"; "" if it is never quantised."""
    return _metadata(module, "inputs")


def _metadata(module: nnx.Module, name: str) -> Params:
    def of(variable: nnx.Variable[Any]) -> str:
        return variable.get_metadata(name, "")

    variables = nnx.state(module)
    return nnx.to_pure_dict(jax.tree.map(of, variables, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)))
