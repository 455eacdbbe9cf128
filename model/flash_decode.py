"""One new position that reads a cache, in Pallas for Triton: flash attention with the keys of each head shared out
among programs, for one sequence alone has too few heads to keep a GPU busy (Dao et al., Flash-Decoding, 2023).

Scores are made, weighed and used up where the keys are; what each program has read goes to memory with its largest
score and the sum of its weights, and a second kernel, of next to no bytes, puts the parts of a head together. A key and
its value are read once, as they lie, int8 included.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from .axes import kernel_mesh, spec
from .cache import Entry, Rounded
from .config import ModelConfig
from .flash_gpu import HIDDEN, LOG2_E
from .kernel_cost import estimate, said

ROWS = 16  # of query heads that share a key, at least: what a matrix unit takes at a time
KEYS = 64  # that are met at one time
PROGRAMS = 512  # to share the keys out among, if there are as many: about four for each core of a large GPU


class Seen(NamedTuple):
    """Which keys a query sees: those at and before its position `query` (an int32 scalar), from start [B] on.

    window: how many; 0: all. ring: position p is in slot p mod S; else slot and position are the same.
    """

    query: jax.Array
    start: jax.Array | None
    window: int
    ring: bool


class Task(NamedTuple):
    """What the kernels have to know but for their arrays. heads: G. chunk: how many keys are a program's."""

    scale: float
    softcap: float
    window: int
    ring: bool
    length: int
    heads: int
    chunk: int
    interpret: bool


def chosen(config: ModelConfig, platform: str) -> str:
    """How one position attends to a cache: "flash" where there is a kernel for it, unless the config says xla."""
    ordinary = config.head_width & (config.head_width - 1) == 0 and 16 <= config.head_width <= 256
    typed = config.dtype in ("bfloat16", "float16", "float32")
    # What lies in one array for all layers would be copied out of it for a kernel, layer by layer.
    unrolled = config.layers == "unroll" and config.latent is None
    takes = ordinary and typed and unrolled and config.queries_per_kv_head <= 64
    return "flash" if platform == "cuda" and config.attention != "xla" and takes else "xla"


def attend(
    q: jax.Array,
    k: Entry,
    v: Entry,
    seen: Seen,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` of one query to a cache: q [B,K,G,1,H], k [B,K,S,H], v [B,K,S,V], sinks [K,G] -> [B,K,G,1,V].

    On the current mesh each chip does its part of the batch and of the heads.
    """
    mesh = kernel_mesh()
    kernel = partial(_attend, window=seen.window, ring=seen.ring, scale=scale, softcap=softcap, interpret=interpret)
    arrays = q, k, v, sinks, seen.query, seen.start
    if mesh is None:
        return kernel(*arrays)

    def place(letters: str, array: Any) -> Any:
        return jax.tree.map(lambda x: spec(letters[: x.ndim], x.shape, mesh), array)

    letters = "BKGTH", "BKSH", "BKSH", "KG", "", "B"
    places = tuple(map(place, letters, arrays))
    out = spec("BKGTH", (*q.shape[:4], v.values.shape[3] if isinstance(v, Rounded) else v.shape[3]), mesh)
    return jax.shard_map(kernel, mesh=mesh, in_specs=places, out_specs=out, check_vma=False)(*arrays)


# Traced once for all layers, which takes a tenth of a second.
@partial(jax.jit, static_argnames=("window", "ring", "scale", "softcap", "interpret"))
def _attend(
    q: jax.Array,
    k: Entry,
    v: Entry,
    sinks: jax.Array | None,
    query: jax.Array,
    start: jax.Array | None,
    *,
    window: int,
    ring: bool,
    scale: float,
    softcap: float,
    interpret: bool,
) -> jax.Array:
    B, K, G, _, H = q.shape
    (k, k_scale), (v, v_scale) = (tuple(x) if isinstance(x, Rounded) else (x, None) for x in (k, v))
    S, V = v.shape[2:]
    parts = _parts(B * K, S)
    task = Task(scale, softcap, window, ring, S, G, -(-S // parts // KEYS) * KEYS, interpret)
    parts = -(-S // task.chunk)
    wide = None if sinks is None else sinks.astype(jnp.float32)
    head = pl.BlockSpec((None, None, G, H), lambda part, head, row: (row, head, 0, 0))
    lines = [pl.BlockSpec((None, None, S, n), lambda part, head, row: (row, head, 0, 0)) for n in (H, V)]
    line = pl.BlockSpec((None, None, S), lambda part, head, row: (row, head, 0))
    of_part = pl.BlockSpec((None, None, None, G, V), lambda part, head, row: (row, head, part, 0, 0))
    of_rows = pl.BlockSpec((None, None, None, G), lambda part, head, row: (row, head, part, 0))
    inputs: list[tuple[Any, Any]] = [
        (q[:, :, :, 0], head),
        (k, lines[0]),
        (v, lines[1]),
        (k_scale, None if k_scale is None else line),
        (v_scale, None if v_scale is None else line),
        (wide, None if wide is None else pl.BlockSpec((None, G), lambda part, head, row: (head, 0))),
        (query.reshape(1), pl.BlockSpec((1,), lambda part, head, row: (0,))),
        (start, None if start is None else pl.BlockSpec((1,), lambda part, head, row: (row,))),
    ]
    out = jax.ShapeDtypeStruct((B, K, parts, G, V), q.dtype if parts == 1 else jnp.float32)
    of_softmax = [jax.ShapeDtypeStruct((B, K, parts, G), jnp.float32)] * 2 * (parts > 1)
    results = [out, *of_softmax]
    moved = [x for x, _ in (*inputs, *((x, None) for x in results)) if x is not None]
    found = pl.pallas_call(
        partial(_part_kernel, task),
        grid=(parts, K, B),
        in_specs=[place for _, place in inputs],
        out_specs=[of_part, of_rows, of_rows][: len(results)],
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
        metadata=said(estimate(2 * (H + V) * B * K * G * S, B * K * G * S, moved)),
    )(*(x for x, _ in inputs))
    if parts == 1:
        return found[0].reshape(B, K, G, 1, V)
    return _together(found, jnp.dtype(q.dtype), interpret)[:, :, :, None]


def _parts(heads: int, length: int) -> int:
    """Among how many programs the keys of each of so many heads are shared out."""
    return max(1, min(PROGRAMS // heads, -(-length // KEYS)))


def _all(count: int, filled: int) -> tuple[Any, jax.Array]:
    """(a whole axis of `count` and, as Triton's arrays are of powers of two, what is beyond it; which of it there is).

    Its start is computed, for jax refuses a slice that it knows to end beyond the axis.
    """
    return pl.ds(jnp.minimum(pl.program_id(0), 0), filled), jnp.arange(filled) < count


def _part_kernel(
    task: Task,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    sink_ref: Any,
    query_ref: Any,
    start_ref: Any,
    out_ref: Any,
    *softmax_refs: Any,
) -> None:
    """A chunk of keys: out [G,V]; and, of several chunks, the largest score in base 2 [G] and the weights' sum [G]."""
    part, query = pl.program_id(0), query_ref[0]
    first = part * task.chunk
    heads, of_heads = _all(task.heads, max(ROWS, pl.next_power_of_2(task.heads)))
    rows = of_heads.size
    q = triton.load(q_ref.at[heads, :], mask=of_heads[:, None], other=0.0)

    def step(block: Any, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, out = carry
        here = pl.ds(first + block * KEYS, KEYS)
        at = first + block * KEYS + jnp.arange(KEYS)
        there = at < task.length
        k = triton.load(k_ref.at[here, :], mask=there[:, None], other=0).astype(q.dtype)
        v = triton.load(v_ref.at[here, :], mask=there[:, None], other=0).astype(q.dtype)
        scores = triton.dot(q, k, trans_b=True) * task.scale
        if k_scale_ref is not None:
            scores = scores * triton.load(k_scale_ref.at[here], mask=there, other=0.0)[None]
        if task.softcap:
            scores = jnp.tanh(scores / task.softcap) * task.softcap
        if task.ring:  # the latest position that this slot can hold; below 0 it is empty
            at = query - jax.lax.rem(query + task.length - at, task.length)
        seen = there & (at <= query)
        if task.window:
            seen &= at > query - task.window
        if task.ring:
            seen &= at >= 0
        if start_ref is not None:
            seen &= (at >= start_ref[0]) | (at == query)
        scores = jnp.where(jnp.broadcast_to(seen[None], scores.shape), scores * LOG2_E, HIDDEN)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        fade = jnp.exp2(top - higher)
        weights = jnp.exp2(scores - higher[:, None])
        total = total * fade + jnp.sum(weights, axis=1)
        if v_scale_ref is not None:
            weights = weights * triton.load(v_scale_ref.at[here], mask=there, other=0.0)[None]
        return higher, total, out * fade[:, None] + triton.dot(weights.astype(v.dtype), v)

    top, total = jnp.full(rows, HIDDEN, jnp.float32), jnp.zeros(rows, jnp.float32)
    if sink_ref is not None:
        sinks = triton.load(sink_ref.at[heads], mask=of_heads, other=0.0) * LOG2_E
        top, total = jnp.where(part == 0, sinks, top), jnp.where(part == 0, jnp.ones_like(total), total)
    out = jnp.zeros((rows, v_ref.shape[-1]), jnp.float32)
    top, total, out = jax.lax.fori_loop(0, task.chunk // KEYS, step, (top, total, out))
    if not softmax_refs:
        out = out / total[:, None]
    triton.store(out_ref.at[heads, :], out.astype(out_ref.dtype), mask=of_heads[:, None])
    for ref, value in zip(softmax_refs, (top, total), strict=False):
        triton.store(ref.at[heads], value, mask=of_heads)


def _together(found: list[jax.Array], dtype: Any, interpret: bool) -> jax.Array:
    """The parts of each head [B,K,P,G,V], their largest scores and sums of weights [B,K,P,G] -> [B,K,G,V]."""
    B, K, P, G, V = found[0].shape

    def kernel(out_ref: Any, top_ref: Any, total_ref: Any, whole_ref: Any) -> None:
        parts, there = _all(P, pl.next_power_of_2(P))
        top = triton.load(top_ref.at[parts], mask=there, other=HIDDEN)
        weight = jnp.exp2(top - jnp.max(top))
        total = triton.load(total_ref.at[parts], mask=there, other=0.0)
        out = triton.load(out_ref.at[parts, :], mask=there[:, None], other=0.0)
        whole_ref[...] = (jnp.sum(out * weight[:, None], axis=0) / jnp.sum(total * weight)).astype(whole_ref.dtype)

    of_rows = pl.BlockSpec((None, None, P, None), lambda group, head, row: (row, head, 0, group))
    whole = jax.ShapeDtypeStruct((B, K, G, V), dtype)
    return pl.pallas_call(
        kernel,
        grid=(G, K, B),
        in_specs=[
            pl.BlockSpec((None, None, P, None, V), lambda group, head, row: (row, head, 0, group, 0)),
            of_rows,
            of_rows,
        ],
        out_specs=pl.BlockSpec((None, None, None, V), lambda group, head, row: (row, head, group, 0)),
        out_shape=whole,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_attention_parts",
        metadata=said(estimate(0, B * K * G * P, [*found, whole])),
    )(*found)
