"""Mixture of experts: a router sends each token to a few of many feed-forwards (Shazeer et al., 2017).

How tokens meet experts is the `dispatch`. "all": every token through every expert, and weights of zero; the oracle of
the others, and as fast where few tokens meet most of the experts anyway, for then reading the experts is what takes
the time. "blocks": assignments sorted by expert, each expert's rounded up to whole blocks of rows, so that every block
is one product with one expert; nothing is dropped (Gale et al., 2022). "capacity": each expert takes a fixed number of
rows, first come first served, and what is over is dropped (Fedus et al., 2021).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from . import kernels, quantized
from .axes import gather, kernel_mesh, shard, spec
from .config import Experts, ModelConfig
from .layers import Quantized, matrix, norm, normal, param, placed, project, weight
from .mlp import FeedForward, activate
from .scopes import scope

Params = dict[str, Any]  # nested names -> arrays
FEW_TOKENS = 128  # up to here, reading an expert takes a chip longer than multiplying so many rows with it


class Routing(NamedTuple):
    """Which experts each token goes to, [B,T,k], and how much each of them counts, [B,T,k], float32."""

    experts: jax.Array
    weights: jax.Array


class MoE(nnx.Module):
    """x + sum of experts(norm(x)): [B,T,D] -> [B,T,D], and the router's penalty for the loss."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config, e = config, experts_of(config)
        D, E, F, zeros = config.width, e.count, e.width, jax.nn.initializers.zeros
        self.norm = norm(config, rngs)
        self.router = param(rngs, "DR", (D, E), normal(D), config.param_dtype)
        if e.router_bias:
            self.router_bias = param(rngs, "R", (E,), zeros, config.param_dtype)
        if e.router == "sigmoid":
            self.selection_bias = param(rngs, "R", (E,), zeros, config.param_dtype)
        if config.gated:
            self.gate = matrix(config, rngs, "EDF", (E, D, F), "D", normal(D))
        self.up = matrix(config, rngs, "EDF", (E, D, F), "D", normal(D))
        self.down = matrix(config, rngs, "EFD", (E, F, D), "F", normal(F * 2 * config.num_layers))
        if config.mlp_bias:
            if config.gated:
                self.bgate = param(rngs, "EF", (E, F), zeros, config.param_dtype)
            self.bup = param(rngs, "EF", (E, F), zeros, config.param_dtype)
            self.bdown = param(rngs, "ED", (E, D), zeros, config.param_dtype)
        if e.shared:
            self.shared = FeedForward(config, e.shared, rngs)
            if e.shared_gate:
                self.shared_gate = param(rngs, "D", (D,), normal(D), config.param_dtype)
        if config.post_norms:
            self.post_norm = norm(config, rngs)

    def __call__(self, x: jax.Array, row: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """row: of the stack of all layers, where the experts' matrices are one (`set_apart`)."""
        config, e = self.config, experts_of(self.config)
        with scope("moe/norm"):
            normed = gather(self.norm(x), "BTD", before="BPD")
        with scope("moe/router"):
            routing, penalty = self.route(normed)
        out = self.mix(normed, routing, row)
        if config.mlp_bias:
            with scope("moe/combine"):  # once, and not by every chip that has a part of F
                out = out + weighted(weight(self.bdown, x.dtype)[routing.experts], routing.weights)
        if e.shared:
            shared = self.shared.feed(normed, "moe/shared", "moe/shared")
            with scope("moe/shared"):
                if e.shared_gate:
                    shared = shared * jax.nn.sigmoid(project("BTD,D->BT", normed, self.shared_gate))[..., None]
                out = out + shared
        if config.post_norms:
            with scope("moe/norm"):
                out = self.post_norm(out)
        with scope("moe/combine"):
            return x + shard(out, "BPD"), penalty

    def route(self, x: jax.Array) -> tuple[Routing, jax.Array]:
        """x [B,T,D] -> which experts, and the penalty: balance_loss E sum(f P) + z_loss mean(logsumexp^2).

        f: the share of assignments that an expert gets; P: its mean probability. With E experts and perfect balance the
        first is balance_loss itself.
        """
        e = experts_of(self.config)
        logits = project("BTD,DE->BTE", x, self.router, jnp.promote_types(x.dtype, jnp.float32))
        if e.router_bias:
            logits = logits + jnp.broadcast_to(weight(self.router_bias, logits.dtype), logits.shape)
        scores = jax.nn.sigmoid(logits) if e.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
        ranked = scores
        if e.router == "sigmoid":
            ranked = scores + jnp.broadcast_to(weight(self.selection_bias, scores.dtype), scores.shape)
        if e.groups > 1:
            ranked = best_groups(ranked, e)
        _, experts = jax.lax.top_k(ranked, e.active)
        if e.router == "topk":
            weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
        else:
            weights = jnp.take_along_axis(scores, experts, axis=-1)
        if e.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        shares = jnp.mean(jax.nn.one_hot(experts, e.count, dtype=jnp.float32), axis=(0, 1, 2))
        probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
        balance = e.count * jnp.sum(shares * jnp.mean(probabilities, axis=(0, 1)))
        z = jnp.mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)))
        return Routing(experts, weights * e.scale), e.balance_loss * balance + e.z_loss * z

    def mix(self, x: jax.Array, routing: Routing, row: jax.Array | None = None) -> jax.Array:
        """x [B,T,D] -> the weighted sum of what its experts say, [B,T,D], their last bias apart.

        On a mesh each chip does the tokens of its part of the batch, with its part of every expert's F. Chips along
        `expert` have experts of their own: each takes the tokens of all of these chips through its own, and gives back
        what they say of the tokens of others.
        """
        mesh = kernel_mesh()
        chips = 1 if mesh is None else mesh.shape.get("expert", 1)
        local = LocalExperts(self.config, chips)
        arrays = {name: self._array(name) for name in LETTERS if hasattr(self, name)}
        row = jnp.zeros((), jnp.int32) if row is None else row
        if mesh is None:
            return local(x, routing, arrays, row)
        places: dict[str, Any] = {}
        for name, array in arrays.items():
            values, *scale = array if isinstance(array, tuple) else (array,)
            letters = LETTERS[name] if values.ndim == len(LETTERS[name]) else "L" + LETTERS[name]
            places[name] = place = spec(letters, values.shape, mesh)
            if scale and scale[0].ndim == values.ndim:
                arrays[name], places[name] = (values, quantized.splittable(scale[0], place, mesh)), (place, place)
            elif scale:  # one for each output
                places[name] = place, spec(letters[:-2] + letters[-1], scale[0].shape, mesh)
        tokens = spec("BTD", x.shape, mesh)
        summed = jax.tree.leaves(places["up"], is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))[0][-1]

        def part(x: jax.Array, routing: Routing, arrays: Arrays, row: jax.Array) -> jax.Array:
            if chips > 1:
                with scope("moe/dispatch"):
                    x, routing = jax.lax.all_gather((x, routing), "expert", tiled=True)
            out = local(x, routing, arrays, row)
            with scope("moe/combine"):
                out = jax.lax.psum_scatter(out, "expert", tiled=True) if chips > 1 else out
                return jax.lax.psum(out, summed) if summed else out

        here = tokens, PartitionSpec(*tokens[:2], None), places, PartitionSpec()
        return jax.shard_map(part, mesh=mesh, in_specs=here, out_specs=tokens, check_vma=False)(x, routing, arrays, row)

    def _array(self, name: str) -> "Array":
        parameter = getattr(self, name)
        if isinstance(parameter, Quantized):
            return placed(parameter.values), placed(parameter.scale)
        return weight(parameter, self.config.dtype)


Array = jax.Array | tuple[jax.Array, jax.Array]  # whole, or (values, scale)
Arrays = dict[str, Array]  # by parameter
LETTERS = {"gate": "EDF", "up": "EDF", "down": "EFD", "bgate": "EF", "bup": "EF"}


def set_apart(block: Params, config: ModelConfig) -> tuple[Params, Params]:
    """Stacked parameters of a block: (what a loop over the stack slices, the experts' matrices, which it leaves whole).

    Kernels read a matrix where it lies in the stack. Matrices that are stored in another type than they are multiplied
    in are sliced and converted, all the same.
    """
    inside = block.get("moe", {})
    kept = {
        name: inside[name]
        for name in ("gate", "up", "down")
        if name in inside and (isinstance(inside[name], dict) or inside[name].dtype == config.dtype)
    }
    sliced = {name: value for name, value in inside.items() if name not in kept}
    return (block | {"moe": sliced}, kept) if kept else (block, {})


def join(block: Params, kept: Params) -> Params:
    """Undoes `set_apart`."""
    return block | {"moe": block["moe"] | kept} if kept else block


def experts_of(config: ModelConfig) -> Experts:
    """The config's experts, which a layer of them has."""
    assert config.experts is not None
    return config.experts


def best_groups(scores: jax.Array, e: Experts) -> jax.Array:
    """scores [B,T,E] with those outside of each token's best groups at -inf. A group is as good as its best two."""
    grouped = scores.reshape(*scores.shape[:-1], e.groups, e.count // e.groups)
    best, _ = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), e.active_groups)
    kept = jnp.any(jax.nn.one_hot(chosen, e.groups, dtype=bool), axis=-2)
    return jnp.where(jnp.broadcast_to(kept[..., None], grouped.shape), grouped, -jnp.inf).reshape(scores.shape)


def weighted(said: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum over k of said [...,k,D] times weights [...,k]: [...,D]."""
    return jnp.sum(said * weights.astype(said.dtype)[..., None], axis=-2, dtype=said.dtype)


def dense_weights(routing: Routing, experts: int) -> jax.Array:
    """How much each expert counts for each token, mostly zero: [B,T,E]."""
    return weighted(jax.nn.one_hot(routing.experts, experts, dtype=routing.weights.dtype), routing.weights)


def block_rows(tokens: int, e: Experts) -> int:
    """How many rows a block has: the largest power of two that wastes at most an eighth of all rows on rounding up.

    Always as many as a matrix unit needs; but one, where there are fewer assignments than experts: then nothing is read
    of the experts that nobody chose.
    """
    assignments = tokens * e.active
    if assignments < e.count:
        return 1
    rows = 16
    while rows < kernels.ROWS and 2 * rows * e.count * 8 <= assignments:
        rows *= 2
    return rows


def chosen_dispatch(tokens: int, e: Experts) -> str:
    """What "auto" means for so many tokens."""
    if e.dispatch != "auto":
        return e.dispatch
    return "all" if e.count <= tokens * e.active and tokens <= FEW_TOKENS else "blocks"


def executed_rows(tokens: int, e: Experts, chips: int = 1) -> int:
    """How many rows go through some expert of a chip for so many tokens on all the `chips` that share experts out;
    tokens * active of them are asked for on all of these."""
    dispatch, own = chosen_dispatch(tokens, e), e.count // chips
    if dispatch == "all":
        return tokens * own
    if dispatch == "capacity":
        return capacity_rows(tokens, e) * own
    rows = block_rows(tokens, e)
    return most_blocks(room(tokens, e, chips), own, rows) * rows


def room(tokens: int, e: Experts, chips: int) -> int:
    """How many assignments, of those of so many tokens, a chip takes that has the experts of one of `chips`. One chip
    has all, and takes all."""
    assignments = tokens * e.active
    return assignments if chips == 1 else min(assignments, math.ceil(assignments * e.capacity / chips))


def most_blocks(assignments: int, experts: int, rows: int) -> int:
    """How many blocks there can be need for: every expert's last may hold one row only."""
    most = min(assignments, experts)
    return most + (assignments - most) // rows


def capacity_rows(tokens: int, e: Experts) -> int:
    """How many rows each expert takes with dispatch "capacity"."""
    return -(-int(tokens * e.active * e.capacity) // e.count)


class Rows(NamedTuple):
    """Assignments in an order by expert, in M blocks of b rows; every block is of one expert."""

    source: jax.Array  # [M*b], which token is in each row; the number of tokens: none is
    place: jax.Array  # [n,k], the row of each assignment; M*b: it was dropped
    experts: jax.Array  # [M], ascending


def in_blocks(experts: jax.Array, count: int, rows: int, most: int) -> Rows:
    """experts [n,k] of `count` -> blocks of `rows` rows, as many as there can be need for with `most` assignments.

    Assignments to an expert `count` are for other chips. Those beyond the last block are dropped.
    """
    n, k = experts.shape
    M = most_blocks(most, count, rows)
    order, sizes, rank = by_expert(experts, count)
    blocks = -(-sizes // rows)
    first_row = (jnp.cumsum(blocks) - blocks) * rows
    sorted_experts = experts.reshape(-1)[order]
    row = jnp.where(sorted_experts < count, first_row[sorted_experts] + rank, M * rows)
    last = jnp.max(jnp.where(experts < count, experts, 0))
    # Blocks past the last one in use compute zeros; they go with the last expert, to read nothing more.
    owner = jnp.searchsorted(jnp.cumsum(blocks), jnp.arange(M), side="right", method="compare_all")
    return _rows(row, order, n, k, M * rows, jnp.minimum(owner, last).astype(jnp.int32))


def up_to_capacity(experts: jax.Array, count: int, rows: int) -> Rows:
    """experts [n,k] of `count` -> one block of `rows` rows for each; what comes late is dropped."""
    n, k = experts.shape
    order, _, rank = by_expert(experts, count)
    row = experts.reshape(-1)[order] * rows + rank
    return _rows(jnp.where(rank < rows, row, count * rows), order, n, k, count * rows, jnp.arange(count))


def by_expert(experts: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(assignments in the order of their experts [n*k], how many each has [E], each one's number in its own [n*k]).

    An expert `count` stands for those of other chips; its assignments come last, and their numbers mean nothing.
    """
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.sum(jax.nn.one_hot(flat, count, dtype=jnp.int32), axis=0)
    rank = jnp.arange(len(flat)) - (jnp.cumsum(sizes) - sizes)[flat[order]]
    return order, sizes, rank


def _rows(row: jax.Array, order: jax.Array, n: int, k: int, total: int, experts: jax.Array) -> Rows:
    source = jnp.full(total, n, jnp.int32).at[row].set((order // k).astype(jnp.int32), mode="drop")
    place = jnp.zeros(n * k, jnp.int32).at[order].set(row.astype(jnp.int32), unique_indices=True)
    return Rows(source, place.reshape(n, k), experts)


class LocalExperts(NamedTuple):
    """What one chip does: tokens through its part of every expert, or of the experts that it has of one of `chips`."""

    config: ModelConfig
    chips: int = 1

    @property
    def own(self) -> int:
        """How many experts it has."""
        return experts_of(self.config).count // self.chips

    def __call__(self, x: jax.Array, routing: Routing, arrays: Arrays, row: jax.Array) -> jax.Array:
        """x [B,T,D] -> [B,T,D], summed over the F that this chip has. row: of matrices that are a stack of layers'."""
        e, (B, T, D) = experts_of(self.config), x.shape
        dispatch = chosen_dispatch(B * T, e)
        if self.chips > 1:
            with scope("moe/dispatch"):  # numbers among its own; `own` is none of them
                number = routing.experts - jax.lax.axis_index("expert") * self.own
                is_own = (number >= 0) & (number < self.own)
                routing = routing._replace(experts=jnp.where(is_own, number, self.own))
        if dispatch == "all":
            return self.all(x, routing, arrays, row)
        with scope("moe/dispatch"):
            tokens = x.reshape(B * T, D)
            experts = routing.experts.reshape(B * T, e.active)
            if dispatch == "blocks":
                rows = in_blocks(experts, self.own, block_rows(B * T, e), room(B * T, e, self.chips))
            else:
                rows = up_to_capacity(experts, self.own, capacity_rows(B * T, e))
            taken = jnp.take(tokens, rows.source, axis=0, mode="fill", fill_value=0)
            taken = taken.reshape(len(rows.experts), -1, D)
        with scope("moe/experts"):
            said = self.feed(taken, arrays, row, rows.experts, one_each=dispatch == "capacity")
        with scope("moe/combine"):
            said = jnp.take(said.reshape(-1, D), rows.place, axis=0, mode="fill", fill_value=0)
            return weighted(said, routing.weights.reshape(B * T, e.active)).reshape(x.shape)

    def all(self, x: jax.Array, routing: Routing, arrays: Arrays, row: jax.Array) -> jax.Array:
        """Every token through every expert."""
        E, (B, T, D) = self.own, x.shape
        with scope("moe/dispatch"):
            every = jnp.broadcast_to(x.reshape(1, B * T, D), (E, B * T, D))
            weights = dense_weights(routing, E).reshape(B * T, E)
        with scope("moe/experts"):
            said = self.feed(every, arrays, row, jnp.arange(E), one_each=True)
        with scope("moe/combine"):
            return weighted(jnp.moveaxis(said, 0, 1), weights).reshape(x.shape)

    def feed(self, x: jax.Array, arrays: Arrays, row: jax.Array, experts: jax.Array, one_each: bool) -> jax.Array:
        """Rows x [M,b,D], each block through its expert; one_each: M = E, and block number e is of expert e."""
        activations = self.config.activations if x.shape[1] > 1 else "full"
        E = self.own

        def product(x: jax.Array, name: str) -> jax.Array:
            w, numbers = arrays[name], experts
            if (w[0] if isinstance(w, tuple) else w).ndim > 3:
                if one_each:
                    w = jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, row, keepdims=False), w)
                else:
                    w = jax.tree.map(lambda stack: stack.reshape(-1, *stack.shape[2:]), w)
                    numbers = experts + row * E
            if isinstance(w, tuple) and one_each:
                y = quantized.einsum("EbD,EDF->EbF", x, w[0], w[1], activations=activations)
            elif isinstance(w, tuple):
                y = quantized.grouped_matmul(x, w[0], w[1], numbers, activations, asked=E)
            elif one_each:
                y = jnp.einsum("EbD,EDF->EbF", x, w)
            else:
                y = kernels.grouped_matmul(x, kernels.Matrices(w), numbers, asked=E)
            if "b" + name in arrays:
                bias = arrays["b" + name]
                assert isinstance(bias, jax.Array)
                y = y + jnp.broadcast_to((bias if one_each else bias[experts])[:, None], y.shape)
            return y

        gate = product(x, "gate") if self.config.gated else None
        return product(activate(self.config, gate, product(x, "up")), "down")
