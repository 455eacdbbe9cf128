"""Flash attention for GPUs, in Pallas for Triton. Three kernels: what the queries read; the gradient of the queries;
that of keys and values, summed over the query heads that share them.

One program of the first two has a block of queries and goes over the keys that it sees; one of the third has a block of
keys and goes over the queries that see it. No two write to the same place, and so gradients are the same in every run;
the price is that the backward pass computes the scores twice. The softmax is in base 2, which is what hardware has.

Between the products stands what tensor cores do not do, a few instructions for each pair of a query and a key, which
take as long as they. So a loop is cut in spans: only in blocks that the mask cuts through is anything compared; and
what scores are multiplied with goes into the exponential, where it is half of a fused multiply-add.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .kernel_cost import estimate, said, waves

LOG2_E = 1.4426950408889634
# The score of what a query does not see: finite, for inf - inf is no number; a power of two, so that times a unit it is
# exact, and the difference to the greatest of a row in which nothing is seen yet is 0 or far from it, fused or not.
HIDDEN = -(2.0**100)
Pieces = list[jax.Array]  # [rows,H] cut along H
Span = tuple[Any, Any, bool]  # (the first block, the one after the last, whether the mask cuts through them)


class Blocks(NamedTuple):
    """How many queries meet how many keys at one time; powers of two."""

    queries: int
    keys: int

    def met(self, length: int, window: int, causal: bool = True) -> int:
        """Pairs of a query and a key in all blocks in which some query sees some key."""
        return self.queries * sum(self.keys_met(at, length, window, causal) for at in range(0, length, self.queries))

    def keys_met(self, first: int, length: int, window: int, causal: bool = True) -> int:
        """Keys in all blocks that the block of queries from `first` on goes over."""
        start = max(0, first - window + 1) // self.keys if window else 0
        return (-(-(min(first + self.queries, length) if causal else length) // self.keys) - start) * self.keys

    def queries_met(self, first: int, length: int, window: int, causal: bool = True) -> int:
        """Queries in all blocks that the block of keys from `first` on goes over."""
        stop = min(first + self.keys + window - 1, length) if window else length
        return (-(-stop // self.queries) - (first // self.queries if causal else 0)) * self.queries


class Setting(NamedTuple):
    """How a kernel runs: its blocks, the warps of a program, and how many of a loop's blocks are there or on their way
    from memory (Triton's `num_stages`)."""

    blocks: Blocks
    warps: int = 4
    stages: int = 2


class Task(NamedTuple):
    """What the kernels have to know but for their arrays."""

    scale: float
    window: int
    softcap: float
    length: int  # T, of queries and of keys
    setting: Setting
    interpret: bool
    causal: bool = True  # a query sees the keys at and before its position; else all

    @property
    def blocks(self) -> Blocks:
        """Of its setting."""
        return self.setting.blocks

    @property
    def unit(self) -> float:
        """What `scores` are multiplied with to be those of a softmax in base 2."""
        return (self.softcap or self.scale) * LOG2_E

    def keys_of(self, first: jax.Array) -> list[Span]:
        """The blocks of keys that queries from `first` on see."""
        queries, keys = self.blocks
        if not self.causal:
            return spans(0, 0, self.length // keys, pl.cdiv(self.length, keys))
        start = whole = 0
        stop = pl.cdiv(jnp.minimum(first + queries, self.length), keys)
        if self.window:
            start = jnp.maximum(0, first - self.window + 1) // keys
            whole = jnp.minimum(pl.cdiv(jnp.maximum(0, first + queries - self.window), keys), stop)
        return spans(start, whole, jnp.maximum(whole, (first + 1) // keys), stop)

    def queries_of(self, first: jax.Array) -> list[Span]:
        """The blocks of queries that see keys from `first` on. Keys after the last are as good as any: nobody asks for
        their gradients."""
        queries, keys = self.blocks
        end, stop = self.length // queries, pl.cdiv(self.length, queries)
        if not self.causal:
            return spans(0, 0, end, stop)
        is_whole = end == stop and not self.window
        if self.window:
            stop = pl.cdiv(jnp.minimum(first + keys + self.window - 1, self.length), queries)
            end = jnp.minimum((first + self.window) // queries, end)
        whole = jnp.minimum(pl.cdiv(first + keys - 1, queries), stop)
        return spans(first // queries, whole, stop if is_whole else jnp.maximum(whole, end), stop)

    def scores(
        self, rows: Pieces, columns: Pieces, first_q: Any, first_k: Any, cut: bool, by_keys: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """(scores over `unit` [q,k], or [k,q] if rows are keys; their slope, if they are soft-capped).

        cut: whether the mask cuts through the block; then scores are HIDDEN where a query does not see a key.
        """
        scores, slope = times_transposed(rows, columns), None
        if self.softcap:
            scores = jnp.tanh(scores * (self.scale / self.softcap))
            slope = 1 - scores * scores
        if not cut:
            return scores, slope
        queries = first_q + jax.lax.broadcasted_iota(jnp.int32, scores.shape, int(by_keys))
        keys = first_k + jax.lax.broadcasted_iota(jnp.int32, scores.shape, int(not by_keys))
        seen = keys <= queries if self.causal else keys < self.length
        if self.window:
            seen &= keys > queries - self.window
        return jnp.where(seen, scores, HIDDEN), slope

    def weights(self, scores: jax.Array, total: jax.Array) -> jax.Array:
        """2^(scores unit - total), total [q,1] or [1,q], in two instructions for each pair; 0 where that is no normal
        number. jnp's take six: Triton fuses nothing here by itself, and jnp.exp2 is right for other numbers, too."""
        if self.interpret:
            return jnp.exp2(scores * self.unit - total)
        unit = np.float32(self.unit).view(np.uint32)
        asm = f"{{.reg .f32 x; fma.rn.ftz.f32 x, $1, 0f{unit:08X}, $2; ex2.approx.ftz.f32 $0, x;}}"
        args = [scores, jnp.broadcast_to(-total, scores.shape)]
        return triton.elementwise_inline_asm(
            asm, args=args, constraints="=f,f,f", pack=1, result_shape_dtypes=[like(scores)]
        )[0]

    def rows(self, first: jax.Array, count: int, cut: bool = True) -> tuple[Any, jax.Array | None]:
        """(`count` rows from `first` on; which of them there are, where not all may be)."""
        there = first + jnp.arange(count) < self.length if cut and self.length % count else None
        return pl.ds(first, count), there

    def load(self, ref: Any, first: jax.Array, count: int, *head: jax.Array, cut: bool = True) -> jax.Array:
        """Rows [count] of `ref` [T], or of one head of it [G,T]; zeros after the end, if it may be in them (cut)."""
        rows, there = self.rows(first, count, cut)
        return triton.load(ref.at[*head, rows], mask=there, other=None if there is None else 0.0)

    def load_pieces(self, ref: Any, first: jax.Array, count: int, *head: jax.Array, cut: bool = True) -> Pieces:
        """Rows [count,H] of `ref` [T,H], or of one head of it [T,G,H], likewise."""
        rows, there = self.rows(first, count, cut)
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


class Tasks(NamedTuple):
    """One for each kernel: what the queries read; the gradient of the queries; that of keys and values."""

    read: Task
    queries: Task
    keys: Task


def spans(start: Any, whole: Any, end: Any, stop: Any) -> list[Span]:
    """Blocks from `start` to `stop`, of which the mask leaves those from `whole` to `end` whole."""
    found = [(start, whole, True), (whole, end, False), (end, stop, True)]
    return [span for span in found if span[0] is not span[1]]


def over(found: list[Span], step: Callable[..., Any], carry: Any) -> Any:
    """carry = step(block, carry, cut=...) for every block of the spans, in order."""
    for start, stop, cut in found:
        carry = jax.lax.fori_loop(start, stop, partial(step, cut=cut), carry)
    return carry


def last_first(size: int) -> jax.Array:
    """The first row of this program's block. Later queries have more keys to go over: they start first, so that the
    multiprocessors are done at one time."""
    return (pl.num_programs(1) - 1 - pl.program_id(1)) * size


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


def plus_product(sums: Pieces, a: jax.Array, b: Pieces) -> Pieces:
    """sums + a b."""
    return [total + triton.dot(a.astype(x.dtype), x) for total, x in zip(sums, b, strict=True)]


# ---- the kernels; each ref is of one head, [T,H] or [T], or of the query heads that share a key head, [T,G,H] or [G,T]


def read_kernel(task: Task, q_ref: Any, k_ref: Any, v_ref: Any, sink_ref: Any, out_ref: Any, *total_ref: Any) -> None:
    """out [T,V]; and, to keep for the backward pass, log2 of the sum that weights are divided by [T]."""
    count, size = task.blocks
    first = last_first(count)
    q = task.load_pieces(q_ref, first, count)

    def step(block: jax.Array, carry: tuple[jax.Array, jax.Array, Pieces], cut: bool) -> Any:
        top, total, out = carry
        k, v = (task.load_pieces(ref, block * size, size, cut=cut) for ref in (k_ref, v_ref))
        scores, _ = task.scores(q, k, first, block * size, cut)
        higher = jnp.maximum(top, jnp.max(scores, axis=1) * task.unit)
        fade = jnp.exp2(top - higher)
        weights = task.weights(scores, higher[:, None])
        out = plus_product([piece * fade[:, None] for piece in out], weights, v)
        return higher, total * fade + jnp.sum(weights, axis=1), out

    if sink_ref is None:
        top, total = jnp.full(count, HIDDEN, jnp.float32), jnp.zeros(count, jnp.float32)
    else:
        top, total = jnp.full(count, sink_ref[...] * LOG2_E, jnp.float32), jnp.ones(count, jnp.float32)
    top, total, out = over(task.keys_of(first), step, (top, total, zeros(count, v_ref.shape[-1])))
    share = 1 / total
    task.store_pieces(out_ref, first, [piece * share[:, None] for piece in out])
    if total_ref:
        task.store(total_ref[0], first, top + jnp.log2(total))


def slopes(
    task: Task, scores: jax.Array, slope: jax.Array | None, total: jax.Array, d_weights: jax.Array, own: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the weights, the gradient of the scores before their scale), from that of the weights. own: d_out times out,
    summed; it and the softmax's total lie along the queries of the rest."""
    weights = task.weights(scores, total)
    d_scores = weights * (d_weights - own)
    return weights, d_scores if slope is None else d_scores * slope


def queries_kernel(
    task: Task, q_ref: Any, k_ref: Any, v_ref: Any, total_ref: Any, d_out_ref: Any, own_ref: Any, dq_ref: Any
) -> None:
    """dq [T,H]."""
    count, size = task.blocks
    first = last_first(count)
    q, d_out = (task.load_pieces(ref, first, count) for ref in (q_ref, d_out_ref))
    total, own = (task.load(ref, first, count)[:, None] for ref in (total_ref, own_ref))

    def step(block: jax.Array, dq: Pieces, cut: bool) -> Pieces:
        k, v = (task.load_pieces(ref, block * size, size, cut=cut) for ref in (k_ref, v_ref))
        scores, slope = task.scores(q, k, first, block * size, cut)
        _, d_scores = slopes(task, scores, slope, total, times_transposed(d_out, v), own)
        return plus_product(dq, d_scores, k)

    dq = over(task.keys_of(first), step, zeros(count, q_ref.shape[-1]))
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
    """dk [T,H] and dv [T,V], of all G query heads. Scores and weights are [k,q] here, as the products take them."""
    count, size = task.blocks
    first = pl.program_id(1) * size
    k, v = (task.load_pieces(ref, first, size) for ref in (k_ref, v_ref))
    found = task.queries_of(first)

    def step(block: jax.Array, carry: tuple[Pieces, Pieces], cut: bool, head: jax.Array) -> tuple[Pieces, Pieces]:
        dk, dv = carry
        start = block * count
        q, d_out = (task.load_pieces(ref, start, count, head, cut=cut) for ref in (q_ref, d_out_ref))
        total, own = (task.load(ref, start, count, head, cut=cut)[None, :] for ref in (total_ref, own_ref))
        scores, slope = task.scores(k, q, start, first, cut, by_keys=True)
        weights, d_scores = slopes(task, scores, slope, total, times_transposed(v, d_out), own)
        return plus_product(dk, d_scores, q), plus_product(dv, weights, d_out)

    def all_queries(head: jax.Array, carry: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
        return over(found, partial(step, head=head), carry)

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
    Heads come before blocks in the grid: what runs at one time has as much to go over, and shares keys in the L2.
    """
    B, T, K, G, _ = inputs[0][1].shape
    by_keys = kernel is keys_kernel
    single = "BK" if by_keys else "BKG"

    def place(axes: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(head: jax.Array, block: jax.Array, row: jax.Array) -> tuple[Any, ...]:
            at = {"B": row, "K": head if by_keys else head // G, "G": head % G}
            return tuple(at[axis] if axis in single else 0 for axis in axes)

        return pl.BlockSpec(tuple(None if a in single else n for a, n in zip(axes, shape, strict=True)), index)

    def gone_over() -> dict[str, str]:
        """Keys with all that belongs to them, or queries, by the programs of one row of the grid after the other."""
        over = [x for axes, x in inputs if x is not None and axes.count("T") and ("G" in axes) == by_keys]
        whole = sum(x.size * x.dtype.itemsize for x in over) // B
        if by_keys:
            rows = [task.blocks.queries_met(at, T, task.window, task.causal) for at in range(0, T, task.blocks.keys)]
        else:
            rows = [task.blocks.keys_met(at, T, task.window, task.causal) for at in range(0, T, task.blocks.queries)]
            rows.reverse()  # `last_first`
        return waves(K if by_keys else K * G, [whole * min(row, T) // T for row in rows], whole, B)

    met = B * K * G * task.blocks.met(T, task.window, task.causal)
    exponentials = met * (2 if task.softcap else 1)
    moved = [x for _, x in (*inputs, *outputs) if x is not None]
    return pl.pallas_call(
        partial(kernel, task),
        grid=(K if by_keys else K * G, pl.cdiv(T, task.blocks.keys if by_keys else task.blocks.queries), B),
        in_specs=[None if x is None else place(axes, x.shape) for axes, x in inputs],
        out_specs=[place(axes, x.shape) for axes, x in outputs],
        out_shape=[x for _, x in outputs],
        compiler_params=triton.CompilerParams(num_warps=task.setting.warps, num_stages=task.setting.stages),
        interpret=task.interpret,
        metadata=said(estimate(2 * products * met, exponentials, moved)) | gone_over(),
    )(*(x for _, x in inputs))


def read(task: Task, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, keep: bool) -> list[jax.Array]:
    """What the queries read [B,T,K,G,V] and, to keep for the backward pass, the softmax's totals [B,K,G,T]."""
    B, T, K, G, H = q.shape
    V = v.shape[-1]
    out = jax.ShapeDtypeStruct((B, T, K, G, V), q.dtype)
    total = jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)
    inputs = [("BTKGH", q), ("BKTH", k), ("BKTV", v), ("KG", sinks)]
    return call(read_kernel, task, inputs, [("BTKGV", out), ("BKGT", total)][: 1 + keep], H + V)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(tasks: Tasks, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """q [B,T,K,G,H], k [B,K,T,H], v [B,K,T,V], sinks [K,G] in float32 -> [B,T,K,G,V].

    Queries in the order in which they come of their projection and, read, go into the next one; keys and values in that
    of a cache. So nobody has to transpose any.
    """
    return read(tasks.read, q, k, v, sinks, keep=False)[0]


def _forward(tasks: Tasks, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> tuple[jax.Array, Any]:
    out, total = read(tasks.read, q, k, v, sinks, keep=True)
    return out, (q, k, v, sinks, out, total)


def _backward(tasks: Tasks, saved: Any, d_out: jax.Array) -> Any:
    q, k, v, sinks, out, total = saved
    own = jnp.einsum("BTKGV,BTKGV->BKGT", out.astype(jnp.float32), d_out.astype(jnp.float32))
    inputs = [("BTKGH", q), ("BKTH", k), ("BKTV", v), ("BKGT", total), ("BTKGV", d_out), ("BKGT", own)]
    H, V = q.shape[-1], v.shape[-1]
    (dq,) = call(queries_kernel, tasks.queries, inputs, [("BTKGH", like(q))], 2 * H + V)
    dk, dv = call(keys_kernel, tasks.keys, inputs, [("BKTH", like(k)), ("BKTV", like(v))], 2 * H + 2 * V)
    if sinks is None:
        return dq, dk, dv, None
    weights = jnp.exp2(jnp.broadcast_to((sinks * LOG2_E)[None, :, :, None], total.shape) - total)
    return dq, dk, dv, -jnp.sum(weights * own, axis=(0, 3))


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape and type of x."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


attention.defvjp(_forward, _backward)
