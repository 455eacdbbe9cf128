"""Flash attention for GPUs, in Pallas for Triton. Three kernels: what the queries read; the gradient of the queries;
that of keys and values, summed over the query heads that share them.

One program of the first two has a block of queries and goes over the keys that it sees; one of the third has a block of
keys and goes over the queries that see it. No two write to the same place, and so gradients are the same in every run;
the price is that the backward pass computes the scores twice. The softmax is in base 2, which is what hardware has.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

LOG2_E = 1.4426950408889634
HIDDEN = -1e30  # the score of what a query does not see; finite, for inf - inf is no number
Pieces = list[jax.Array]  # [rows,H] cut along H


class Blocks(NamedTuple):
    """How many queries meet how many keys at one time; powers of two."""

    queries: int
    keys: int

    def met(self, length: int, window: int, causal: bool = True) -> int:
        """Pairs of a query and a key in all blocks in which some query sees some key."""
        if not causal:
            return -(-length // self.queries) * -(-length // self.keys) * self.queries * self.keys
        count = 0
        for first in range(0, length, self.queries):
            start = max(0, first - window + 1) // self.keys if window else 0
            count += -(-min(first + self.queries, length) // self.keys) - start
        return count * self.queries * self.keys


class Task(NamedTuple):
    """What the kernels have to know but for their arrays."""

    scale: float
    window: int
    softcap: float
    length: int  # T, of queries and of keys
    blocks: Blocks
    interpret: bool
    causal: bool = True  # a query sees the keys at and before its position; else all

    def keys_of(self, first: jax.Array) -> tuple[Any, Any]:
        """The blocks of keys that queries from `first` on see: (the first of them, the one after the last)."""
        if not self.causal:
            return 0, pl.cdiv(self.length, self.blocks.keys)
        start = jnp.maximum(0, first - self.window + 1) // self.blocks.keys if self.window else 0
        return start, pl.cdiv(jnp.minimum(first + self.blocks.queries, self.length), self.blocks.keys)

    def queries_of(self, first: jax.Array) -> tuple[Any, Any]:
        """The blocks of queries that see keys from `first` on, likewise."""
        stop = self.length
        if not self.causal:
            return 0, pl.cdiv(stop, self.blocks.queries)
        if self.window:
            stop = jnp.minimum(first + self.blocks.keys + self.window - 1, stop)
        return first // self.blocks.queries, pl.cdiv(stop, self.blocks.queries)

    def scores(self, q: Pieces, k: Pieces, first_q: jax.Array, first_k: jax.Array) -> tuple[jax.Array, Any]:
        """(scores [q,k] in base 2, HIDDEN where a query does not see a key; their slope, if they are soft-capped)."""
        scores, slope = times_transposed(q, k) * self.scale, None
        if self.softcap:
            bent = jnp.tanh(scores / self.softcap)
            scores, slope = bent * self.softcap, 1 - bent * bent
        queries = first_q + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        keys = first_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = keys <= queries if self.causal else keys < self.length
        if self.window:
            seen &= keys > queries - self.window
        return jnp.where(seen, scores * LOG2_E, HIDDEN), slope

    def rows(self, first: jax.Array, count: int) -> tuple[Any, jax.Array | None]:
        """(`count` rows from `first` on; which of them there are, where not all may be)."""
        there = first + jnp.arange(count) < self.length if self.length % count else None
        return pl.ds(first, count), there

    def load(self, ref: Any, first: jax.Array, count: int, *head: jax.Array) -> jax.Array:
        """Rows [count] of `ref` [T], or of one head of it [G,T]; zeros after the end."""
        rows, there = self.rows(first, count)
        return triton.load(ref.at[*head, rows], mask=there, other=None if there is None else 0.0)

    def load_pieces(self, ref: Any, first: jax.Array, count: int, *head: jax.Array) -> Pieces:
        """Rows [count,H] of `ref` [T,H], or of one head of it [T,G,H]; zeros after the end."""
        rows, there = self.rows(first, count)
        mask, other = (None, None) if there is None else (there[:, None], 0.0)
        columns = pieces_of(ref.shape[-1])
        return [triton.load(ref.at[rows, *head, piece], mask=mask, other=other) for piece in columns]

    def store(self, ref: Any, first: jax.Array, value: jax.Array) -> None:
        """What `load` loads."""
        rows, there = self.rows(first, value.shape[0])
        triton.store(ref.at[rows], value, mask=there)

    def store_pieces(self, ref: Any, first: jax.Array, values: Pieces) -> None:
        """What `load_pieces` loads."""
        rows, there = self.rows(first, values[0].shape[0])
        mask = None if there is None else there[:, None]
        for columns, piece in zip(pieces_of(ref.shape[-1]), values, strict=True):
            triton.store(ref.at[rows, columns], piece.astype(ref.dtype), mask=mask)


def pieces_of(width: int) -> list[slice]:
    """A multiple of 16 as powers of two, which is what Triton's arrays come in; the largest first."""
    found: list[slice] = []
    start = 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        found.append(slice(start, start + size))
        start += size
    return found


def times_transposed(a: Pieces, b: Pieces) -> jax.Array:
    """a b', float32."""
    parts = [triton.dot(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
    return sum(parts[1:], start=parts[0])


def zeros(count: int, width: int) -> Pieces:
    """[count,width], float32."""
    return [jnp.zeros((count, piece.stop - piece.start), jnp.float32) for piece in pieces_of(width)]


def plus_product(sums: Pieces, a: jax.Array, b: Pieces, transposed: bool = False) -> Pieces:
    """sums + a b, or + a' b."""
    return [total + triton.dot(a.astype(x.dtype), x, trans_a=transposed) for total, x in zip(sums, b, strict=True)]


# ---- the kernels; each ref is of one head, [T,H] or [T], or of the query heads that share a key head, [T,G,H] or [G,T]


def read_kernel(task: Task, q_ref: Any, k_ref: Any, v_ref: Any, sink_ref: Any, out_ref: Any, *total_ref: Any) -> None:
    """out [T,V]; and, to keep for the backward pass, log2 of the sum that weights are divided by [T]."""
    count, size = task.blocks
    first = pl.program_id(0) * count
    q = task.load_pieces(q_ref, first, count)

    def step(block: jax.Array, carry: tuple[jax.Array, jax.Array, Pieces]) -> tuple[jax.Array, jax.Array, Pieces]:
        top, total, out = carry
        k, v = (task.load_pieces(ref, block * size, size) for ref in (k_ref, v_ref))
        scores, _ = task.scores(q, k, first, block * size)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        fade = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - higher[:, None])
        out = plus_product([piece * fade[:, None] for piece in out], weights, v)
        return higher, total * fade + jnp.sum(weights, axis=1), out

    if sink_ref is None:
        top, total = jnp.full(count, HIDDEN, jnp.float32), jnp.zeros(count, jnp.float32)
    else:
        top, total = jnp.full(count, sink_ref[...] * LOG2_E, jnp.float32), jnp.ones(count, jnp.float32)
    top, total, out = jax.lax.fori_loop(*task.keys_of(first), step, (top, total, zeros(count, v_ref.shape[-1])))
    task.store_pieces(out_ref, first, [piece / total[:, None] for piece in out])
    if total_ref:
        task.store(total_ref[0], first, top + jnp.log2(total))


def slopes(
    task: Task,
    q: Pieces,
    k: Pieces,
    v: Pieces,
    total: jax.Array,
    d_out: Pieces,
    own: jax.Array,
    first_q: Any,
    first_k: Any,
) -> tuple[jax.Array, jax.Array]:
    """(the weights [q,k], the gradient of the scores before their scale). own [q]: d_out times out, summed."""
    scores, slope = task.scores(q, k, first_q, first_k)
    weights = jnp.exp2(scores - total[:, None])
    d_scores = weights * (times_transposed(d_out, v) - own[:, None])
    return weights, d_scores if slope is None else d_scores * slope


def queries_kernel(
    task: Task, q_ref: Any, k_ref: Any, v_ref: Any, total_ref: Any, d_out_ref: Any, own_ref: Any, dq_ref: Any
) -> None:
    """dq [T,H]."""
    count, size = task.blocks
    first = pl.program_id(0) * count
    q, d_out = (task.load_pieces(ref, first, count) for ref in (q_ref, d_out_ref))
    total, own = (task.load(ref, first, count) for ref in (total_ref, own_ref))

    def step(block: jax.Array, dq: Pieces) -> Pieces:
        k, v = (task.load_pieces(ref, block * size, size) for ref in (k_ref, v_ref))
        _, d_scores = slopes(task, q, k, v, total, d_out, own, first, block * size)
        return plus_product(dq, d_scores, k)

    dq = jax.lax.fori_loop(*task.keys_of(first), step, zeros(count, q_ref.shape[-1]))
    task.store_pieces(dq_ref, first, [piece * task.scale for piece in dq])


def keys_kernel(
    task: Task,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    total_ref: Any,
    d_out_ref: Any,
    own_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """dk [T,H] and dv [T,V], of all G query heads."""
    count, size = task.blocks
    first = pl.program_id(0) * size
    k, v = (task.load_pieces(ref, first, size) for ref in (k_ref, v_ref))
    start, stop = task.queries_of(first)

    def step(block: jax.Array, carry: tuple[Pieces, Pieces], head: jax.Array) -> tuple[Pieces, Pieces]:
        dk, dv = carry
        q, d_out = (task.load_pieces(ref, block * count, count, head) for ref in (q_ref, d_out_ref))
        total, own = (task.load(ref, block * count, count, head) for ref in (total_ref, own_ref))
        weights, d_scores = slopes(task, q, k, v, total, d_out, own, block * count, first)
        return plus_product(dk, d_scores, q, transposed=True), plus_product(dv, weights, d_out, transposed=True)

    def all_queries(head: jax.Array, carry: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
        return jax.lax.fori_loop(start, stop, partial(step, head=head), carry)

    none = zeros(size, k_ref.shape[-1]), zeros(size, v_ref.shape[-1])
    dk, dv = jax.lax.fori_loop(0, q_ref.shape[1], all_queries, none)
    task.store_pieces(dk_ref, first, [piece * task.scale for piece in dk])
    task.store_pieces(dv_ref, first, dv)


# ---- calling them


def call(
    kernel: Callable[..., None],
    task: Task,
    inputs: list[tuple[str, Any]],
    outputs: list[tuple[str, jax.ShapeDtypeStruct]],
    products: int,
) -> list[jax.Array]:
    """Runs a kernel for every B, every head and every block. Arrays come with their axes; of each, a program is given
    what belongs to its head, which is a key head for `keys_kernel` and else a query head.

    products: how wide all products together are that are made for a query head and a pair of a query and a key.
    """
    B, T, K, G, _ = inputs[0][1].shape
    by_keys = kernel is keys_kernel
    single = "BK" if by_keys else "BKG"

    def place(axes: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(block: jax.Array, head: jax.Array, row: jax.Array) -> tuple[Any, ...]:
            at = {"B": row, "K": head if by_keys else head // G, "G": head % G}
            return tuple(at[axis] if axis in single else 0 for axis in axes)

        return pl.BlockSpec(tuple(None if a in single else n for a, n in zip(axes, shape, strict=True)), index)

    met = B * K * G * task.blocks.met(T, task.window, task.causal)
    exponentials = met * (2 if task.softcap else 1)
    moved = [x for _, x in (*inputs, *outputs) if x is not None]
    costs = {
        "flops": 2 * products * met,
        "transcendentals": exponentials,
        "bytes_accessed": sum(x.size * x.dtype.itemsize for x in moved),
    }
    return pl.pallas_call(
        partial(kernel, task),
        grid=(pl.cdiv(T, task.blocks.keys if by_keys else task.blocks.queries), K if by_keys else K * G, B),
        in_specs=[None if x is None else place(axes, x.shape) for axes, x in inputs],
        out_specs=[place(axes, x.shape) for axes, x in outputs],
        out_shape=[x for _, x in outputs],
        compiler_params=triton.CompilerParams(num_warps=4 * max(1, task.blocks.queries // 64), num_stages=2),
        interpret=task.interpret,
        # Pallas has an argument for it, which a GPU's kernel loses on its way.
        metadata={"cost_estimate": json.dumps(costs)},
    )(*(x for _, x in inputs))


def read(task: Task, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, keep: bool) -> list[jax.Array]:
    """What the queries read [B,T,K,G,V] and, to keep for the backward pass, the softmax's totals [B,K,G,T]."""
    B, T, K, G, H = q.shape
    V = v.shape[-1]
    out = jax.ShapeDtypeStruct((B, T, K, G, V), q.dtype)
    total = jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)
    inputs = [("BTKGH", q), ("BKTH", k), ("BKTV", v), ("KG", sinks)]
    return call(read_kernel, task, inputs, [("BTKGV", out), ("BKGT", total)][: 1 + keep], H + V)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(
    forward: Task, backward: Task, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None
) -> jax.Array:
    """q [B,T,K,G,H], k [B,K,T,H], v [B,K,T,V], sinks [K,G] in float32 -> [B,T,K,G,V].

    Queries in the order in which they come of their projection and, read, go into the next one; keys and values in that
    of a cache. So nobody has to transpose any.
    """
    del backward
    return read(forward, q, k, v, sinks, keep=False)[0]


def _forward(
    forward: Task, backward: Task, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None
) -> tuple[jax.Array, Any]:
    del backward
    out, total = read(forward, q, k, v, sinks, keep=True)
    return out, (q, k, v, sinks, out, total)


def _backward(forward: Task, backward: Task, saved: Any, d_out: jax.Array) -> Any:
    del forward
    q, k, v, sinks, out, total = saved
    own = jnp.einsum("BTKGV,BTKGV->BKGT", out.astype(jnp.float32), d_out.astype(jnp.float32))
    inputs = [("BTKGH", q), ("BKTH", k), ("BKTV", v), ("BKGT", total), ("BTKGV", d_out), ("BKGT", own)]
    H, V = q.shape[-1], v.shape[-1]
    (dq,) = call(queries_kernel, backward, inputs, [("BTKGH", like(q))], 2 * H + V)
    dk, dv = call(keys_kernel, backward, inputs, [("BKTH", like(k)), ("BKTV", like(v))], 2 * H + 2 * V)
    if sinks is None:
        return dq, dk, dv, None
    weights = jnp.exp2(jnp.broadcast_to((sinks * LOG2_E)[None, :, :, None], total.shape) - total)
    return dq, dk, dv, -jnp.sum(weights * own, axis=(0, 3))


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and type of x."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


attention.defvjp(_forward, _backward)
