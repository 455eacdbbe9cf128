"""The arithmetic oracle: what a decoder's step must cost, from its sizes alone.

Whole program, all chips; the bill is per chip. Conventions: one multiply-add is 2 FLOPs; attention as the XLA path
computes it is T x S in full (over a window: a block of queries by the keys that it sees), as an ideal program computes
it the causal half, and as a flash kernel does those blocks that are not masked whole; the backward pass costs two
forwards (Kaplan et al., 2020, section 2.1), and a flash kernel's more; experts cost what is routed to them. Written
against the published formulas and not against the model here, so that the two can disagree.
"""

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple, Protocol


class Sizes(Protocol):
    """What is needed of a config; axis letters as everywhere: L, D, N, K, H, F, V."""

    @property
    def num_layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_width(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def tied(self) -> bool: ...
    @property
    def post_norms(self) -> bool: ...
    @property
    def window(self) -> int: ...
    @property
    def query_block(self) -> int: ...
    @property
    def attention(self) -> str: ...
    @property
    def remat(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def cache_dtype(self) -> str: ...
    @property
    def experts(self) -> Any: ...  # count, active, width, shared, shared_gate; or None
    @property
    def latent(self) -> Any: ...  # kv_rank, rope_width, value_width, query_rank; or None
    @property
    def kinds(self) -> tuple[Any, ...]: ...  # of each layer: local, sparse
    @property
    def causal(self) -> bool: ...


class EncoderSizes(Sizes, Protocol):
    """What is needed of an encoder's config beyond that."""

    @property
    def kind(self) -> str: ...  # "vision" or "audio"
    @property
    def inputs(
        self,
    ) -> tuple[int, ...]: ...  # numbers that a position is made of, or those of a first window, of a second
    @property
    def class_token(self) -> bool: ...
    @property
    def merge(self) -> Any: ...  # count, hidden, width; or None


class Blocks(NamedTuple):
    """(queries, keys) that meet at one time in a flash kernel: forward, and for the gradients of the queries and of the
    keys; padded: all are, to a whole number of blocks; heads are filled up to a multiple of so many."""

    forward: tuple[int, int] = (1, 1)
    queries: tuple[int, int] = (1, 1)
    keys: tuple[int, int] = (1, 1)
    padded: bool = False
    heads: int = 1


SINGLE = Blocks()  # nothing is computed that is masked


class Matrix(NamedTuple):
    """A weight that activations [inputs] are multiplied with to give [outputs]."""

    component: str
    inputs: int
    outputs: int
    axis: int = 0  # the last of the contracted axes, along which int4 has its groups; 0: never quantised
    copies: int = 1  # experts
    every: int = 1  # how many of them one token goes through
    split: tuple[int, ...] = ()  # sizes of the axes that chips can share it by; by none of them: each has it whole

    def times(self, tensor: int) -> int:
        """On how many of `tensor` chips each of its parts is: 1, or all."""
        return _times(self.split, tensor)


def _times(split: tuple[int, ...], tensor: int) -> int:
    return 1 if any(size % tensor == 0 for size in split) else tensor


def _heads(config: Sizes) -> tuple[int, ...]:
    """By what query heads are shared: the key/value heads K that they belong to, else the G of each."""
    return (config.num_heads,) if config.latent else (config.num_kv_heads, config.num_heads // config.num_kv_heads)


def _attention(config: Sizes) -> Iterator[Matrix]:
    D, N, K, H, m = config.width, config.num_heads, config.num_kv_heads, config.head_width, config.latent
    heads = _heads(config)
    if m is None:
        yield Matrix("attention/qkv", D, N * H, D, split=heads)
        yield Matrix("attention/qkv", D, 2 * K * H, D, split=(K,))
        yield Matrix("attention/out", N * H, D, H, split=heads)
        return
    source = m.query_rank or D
    if m.query_rank:
        yield Matrix("attention/qkv", D, source, D)
    yield Matrix("attention/qkv", source, N * (H + m.rope_width), source, split=heads)
    yield Matrix("attention/qkv", D, m.kv_rank + m.rope_width, D)
    # Keys and values made of the short vector, or queries taken to it and what was read taken back: the same products.
    yield Matrix("attention/qkv", m.kv_rank, N * (H + m.value_width), split=heads)
    yield Matrix("attention/out", N * m.value_width, D, m.value_width, split=heads)


def _feed_forward(config: Sizes, sparse: bool) -> Iterator[Matrix]:
    D, F, e, ups = config.width, config.mlp_width, config.experts, 2 if config.gated else 1
    if not sparse:
        yield Matrix("mlp/up", D, ups * F, D, split=(F,))
        yield Matrix("mlp/down", F, D, F, split=(F,))
        return
    yield Matrix("moe/router", D, e.count)
    yield Matrix("moe/experts", D, ups * e.width, D, e.count, e.active, (e.width,))
    yield Matrix("moe/experts", e.width, D, e.width, e.count, e.active, (e.width,))
    if e.shared:
        yield Matrix("moe/shared", D, ups * e.shared, D, split=(e.shared,))
        yield Matrix("moe/shared", e.shared, D, e.shared, split=(e.shared,))
        if e.shared_gate:
            yield Matrix("moe/shared", D, 1)


def _positions(step: str, batch: int, context: int) -> tuple[int, int]:
    """(tokens through the blocks, tokens through the unembedding)."""
    if step == "decode":
        return batch, batch
    if step == "prefill":
        return batch * context, batch
    if step in ("train", "score"):
        return batch * context, batch * context
    raise ValueError(f"step is {step!r}; it must be train, prefill, decode or score")


@cache
def _pairs(length: int, window: int, block: tuple[int, int]) -> int:
    """Pairs of a query and a key in those blocks of a causal mask of length x length in which one sees the other."""
    queries, keys = block
    met = 0
    for first in range(0, length, queries):
        start = max(0, first - window + 1) // keys
        met += -(-min(first + queries, length) // keys) - start
    return met * queries * keys


def _scores(config: Sizes, step: str, context: int, local: bool, ideal: bool, block: tuple[int, int] = (1, 1)) -> int:
    """Pairs of a query and a key that one sequence meets in one layer and head."""
    if not config.causal:
        whole = not ideal and config.attention == "flash"
        queries, keys = (-(-context // size) * size for size in block) if whole else (context, context)
        return queries * keys
    window = min(config.window, context) if local else context
    if step == "decode":
        return window
    if config.attention == "cudnn" and not ideal:
        return context * context // 2  # as papers count it: its blocks on the diagonal are its own affair
    if ideal or config.attention == "flash":
        return _pairs(context, window, (1, 1) if ideal else block)
    if not local or not config.query_block:
        return context * context
    size = min(config.query_block, max(window, 128))
    return context * min(context, size + window - 1)


def _core(config: Sizes, step: str, batch: int, context: int, ideal: bool, blocks: Blocks = SINGLE) -> int:
    """FLOPs of attention's two products, all layers."""
    H, V = head_widths(config, 1 if ideal else blocks.heads)
    pair = 2 * (H + V)
    if step == "decode" and config.latent is not None:
        pair = 2 * (2 * config.latent.kv_rank + config.latent.rope_width)
    scores = sum(_scores(config, step, context, kind.local, ideal, blocks.forward) for kind in config.kinds)
    return pair * batch * config.num_heads * scores


def head_widths(config: Sizes, multiple: int = 1) -> tuple[int, int]:
    """(of a query and a key, of a value), where no latent cache is read; each filled up to such a multiple."""
    m, H = config.latent, config.head_width
    key, value = (H, H) if m is None else (H + m.rope_width, m.value_width)
    return key + -key % multiple, value + -value % multiple


def _flash_backward(config: Sizes, batch: int, context: int, blocks: Blocks) -> tuple[int, int]:
    """FLOPs of a flash kernel's backward pass, all layers: (for pairs of a query and a key, for queries).

    Seven products for each pair where a plain backward pass has four: the scores and the gradient of the weights are
    computed both for the gradient of the queries and for that of keys and values. (Five would do, in one kernel that
    adds to each query's gradient from many places; Dao, 2023.) For each query, what it read times the gradient of that.
    """
    H, V = head_widths(config, blocks.heads)
    heads, (queries, _) = batch * config.num_heads, blocks.queries
    by_queries, by_keys = (
        sum(_scores(config, "train", context, kind.local, False, block) for kind in config.kinds)
        for block in (blocks.queries, blocks.keys)
    )
    rows = -(-context // queries) * queries if blocks.padded else context
    pairs = (2 * H + V) * by_queries + (2 * H + 2 * V) * by_keys
    return 2 * heads * pairs, 2 * V * heads * rows * config.num_layers


def _forward(
    config: Sizes,
    step: str,
    batch: int,
    context: int,
    expert_rows: Fraction,
    blocks: Blocks = SINGLE,
    tensor: int = 1,
) -> dict[str, int]:
    """Matmul FLOPs of one forward pass through all layers, by component."""
    tokens, logits = _positions(step, batch, context)
    forward: dict[str, int] = {}
    for kind in config.kinds:
        for matrix in (*_attention(config), *_feed_forward(config, kind.sparse)):
            flops = 2 * tokens * matrix.inputs * matrix.outputs * matrix.every * matrix.times(tensor)
            if matrix.copies > 1:
                flops = int(flops * expert_rows)
            forward[matrix.component] = forward.get(matrix.component, 0) + flops
    forward["attention/core"] = _core(config, step, batch, context, False, blocks) * _times(_heads(config), tensor)
    forward["logits"] = 2 * logits * config.width * config.vocabulary * _times((config.vocabulary,), tensor)
    return forward


def matmul_flops(
    config: Sizes,
    step: str,
    batch: int,
    context: int,
    expert_rows: Fraction = Fraction(1),
    blocks: Blocks = SINGLE,
    tensor: int = 1,
) -> dict[str, int]:
    """Matmul FLOPs by component, as executed: attention in full, recompute included.

    Args:
      step: "train", "prefill", "decode", or "score": a forward pass with the logits of every position.
      batch, context: sequences, and positions in each (train, prefill, score) or in the cache (decode).
      expert_rows: rows that experts compute, over those that are routed to them.
      blocks: what a flash kernel works in.
      tensor: chips that share each layer (Shoeybi et al., 2019). What has no axis that so many divide, such as fewer
        key/value heads than chips, each of them computes for itself, and it counts so often.
    """
    forward = _forward(config, step, batch, context, expert_rows, blocks, tensor)
    if step != "train":
        return forward
    again = recomputed(config)
    total = {name: int(flops * (3 + again.get(name, 0))) for name, flops in forward.items()}
    if config.attention in ("flash", "cudnn"):
        core = "attention/core"
        if config.attention == "cudnn":  # in one kernel: five products for each pair, where forward has two
            backward = forward[core] * 5 // 2
        else:
            backward = sum(_flash_backward(config, batch, context, blocks)) * _times(_heads(config), tensor)
        total[core] = int(forward[core] * (1 + again.get(core, 0))) + backward
    return total


def training_flops(parameters: int, tokens: float, attention: float = 0) -> float:
    """FLOPs of training as papers count it: 6 for each parameter and token, and 3 times a forward's `attention` FLOPs.

    Without attention it is 6ND (Kaplan et al., 2020); with it, and `attention` = 4 L N H T for each token, what model
    FLOPs utilisation is counted by (Chowdhery et al., 2022, appendix B). Embeddings count as if they were products.
    """
    return 6 * parameters * tokens + 3 * attention


def recomputed(config: Sizes) -> Mapping[str, Fraction]:
    """The share of each component's forward that the backward pass computes a second time.

    Without remat nothing. Of the last product of a sublayer the result is not needed again, unless a norm, a gate or a
    router's weight comes after it.
    """
    whole = Fraction(1)
    if config.remat == "none":
        return {}
    if config.remat == "dots":
        return {"attention/core": whole}
    names = ("attention/qkv", "attention/core", "attention/out", "mlp/up", "moe/router", "moe/experts")
    again: dict[str, Fraction] = dict.fromkeys(names, whole)
    again["mlp/down"] = whole if config.post_norms else Fraction(0)
    if config.experts is not None and config.experts.shared:
        ups = 2 if config.gated else 1
        kept = config.post_norms or config.experts.shared_gate
        again["moe/shared"] = whole if kept else Fraction(ups, ups + 1)
    return again


def masked_fractions(config: Sizes, context: int, blocks: Blocks = SINGLE) -> tuple[Fraction, Fraction]:
    """The share of attention core's FLOPs that the mask throws away, in the forward and in the backward pass, of a
    prefill or a training step. (In a decode step at the last position it is none.)"""
    if config.attention == "cudnn":
        return Fraction(0), Fraction(0)
    ideal, executed = (_core(config, "train", 1, context, which, blocks) for which in (True, False))
    forward = backward = 1 - Fraction(ideal, executed)
    if config.attention == "flash":
        by_pairs, by_queries = _flash_backward(config, 1, context, blocks)
        ideal, _ = _flash_backward(config, 1, context, SINGLE)
        backward = Fraction(by_pairs - ideal, by_pairs + by_queries)
    return forward, backward


def ideal_flops(config: Sizes, step: str, batch: int, context: int, tensor: int = 1) -> int:
    """Matmul FLOPs of the least program: the causal half only, what is routed only, nothing twice but what `tensor`
    chips cannot share (see `matmul_flops`)."""
    forward = _forward(config, step, batch, context, Fraction(1), tensor=tensor)
    forward["attention/core"] = _core(config, step, batch, context, ideal=True) * _times(_heads(config), tensor)
    return (3 if step == "train" else 1) * sum(forward.values())


def encoder_flops(
    config: EncoderSizes, batch: int, context: int, blocks: Blocks = SINGLE, tensor: int = 1, ideal: bool = False
) -> dict[str, int]:
    """Matmul FLOPs of an encoder by component, as executed or as the least program would: `context` positions for each
    of `batch` images or sounds. `tensor` chips share what goes in and what comes out by position, if that divides.

    A vision transformer is counted as Dosovitskiy et al. (2021, section 3.1) have it; of Whisper (Radford et al., 2022,
    section 2.2) each convolution is a product with windows: one for every frame, and one for every second.
    """
    D, m = config.width, config.merge
    flops = _forward(config, "prefill", batch, context, Fraction(1), blocks, tensor)
    del flops["logits"]
    if ideal:
        flops["attention/core"] = _core(config, "prefill", batch, context, True) * _times(_heads(config), tensor)
    made = (context - config.class_token,) if config.kind == "vision" else (2 * context, context)
    flops["embed"] = sum(
        2 * batch * n * inputs * D * _times((context,), tensor) for n, inputs in zip(made, config.inputs, strict=True)
    )
    if m is not None:
        tokens = context // m.count
        flops["merge"] = 2 * batch * tokens * m.hidden * (m.count * D + m.width) * _times((tokens,), tensor)
    return {f"{config.kind}/{component}": amount for component, amount in flops.items()}


def weights_bytes(
    config: Sizes, parameters: int, batch: int, element_bytes: int, tensor: int = 1, expert: int = 1
) -> int:
    """Bytes of every weight that an inference step must read: all, but the embedding rows that no token asks for and
    the experts that no token can have chosen.

    Args:
      parameters: how many the model has. batch: how many tokens go through it.
      element_bytes: of a weight that is not quantised, and of what is computed with.
      tensor: chips that share each layer; what they cannot share (norms, biases; see `matmul_flops`) each reads.
      expert: chips that share the experts out; each reads its own, and they count for so many times less.
    """
    V, D = config.vocabulary, config.width
    matrices = [
        matrix for kind in config.kinds for matrix in (*_attention(config), *_feed_forward(config, kind.sparse))
    ]
    matrices.append(Matrix("logits", D, V, D, split=(V,)))
    rest = parameters  # norms, biases
    total = Fraction(0)
    for matrix in matrices:
        copies, elements = _copies_asked(matrix, batch), matrix.inputs * matrix.outputs
        rest -= matrix.copies * elements
        is_packed = matrix.axis and config.weights != "full"
        each = _packed_bytes(config.weights, matrix) if is_packed else Fraction(elements * element_bytes)
        total += copies * each * matrix.times(tensor) / (expert if matrix.copies > 1 else 1)
    if not config.tied:
        rest -= V * D
        total += min(batch, V) * D * element_bytes * _times((V,), tensor)
    return rest * element_bytes * tensor + int(total)


def _packed_bytes(weights: str, matrix: Matrix) -> Fraction:
    """Of int8 with a float32 scale for each output, or int4 with one for each output and group of inputs."""
    elements = matrix.inputs * matrix.outputs
    if weights == "int8":
        return Fraction(elements + 4 * matrix.outputs)
    most = int(weights.partition(":")[2] or 128)
    group = math.gcd(matrix.axis, most)
    if 4 * group < most:
        group = next(n for n in range(min(most, matrix.axis), 0, -1) if matrix.axis % n == 0)
    return Fraction(elements, 2) + Fraction(4 * elements, group)


def _copies_asked(matrix: Matrix, tokens: int) -> int:
    """How many of a matrix's copies so many tokens can have chosen."""
    return min(matrix.copies, tokens * matrix.every) if matrix.copies > 1 else 1


def experts_bytes(config: Sizes, tokens: int, element_bytes: int) -> int:
    """Bytes of the experts' matrices, all layers, that so many tokens ask for, each once, if they choose differently.

    element_bytes: of a weight that is not quantised.
    """
    total = Fraction(0)
    for kind in config.kinds:
        for matrix in _feed_forward(config, kind.sparse):
            if matrix.copies > 1:
                plain = Fraction(matrix.inputs * matrix.outputs * element_bytes)
                each = plain if config.weights == "full" else _packed_bytes(config.weights, matrix)
                total += _copies_asked(matrix, tokens) * each
    return int(total)


def cache_bytes(
    config: Sizes, step: str, batch: int, context: int, element_bytes: int, tensor: int = 1
) -> tuple[int, int]:
    """(read, written) bytes of the KV cache: a decode step reads all of it once and writes one position; a prefill
    writes it once. A local layer's holds `window` positions. Of `tensor` chips that its heads cannot be shared by, each
    has it whole."""
    m = config.latent
    heads, width = (1, m.kv_rank + m.rope_width) if m else (config.num_kv_heads, 2 * config.head_width)
    one = heads * (width + 8 if config.cache_dtype == "int8" else width * element_bytes)  # two float32 scales
    one *= tensor if m else _times((heads,), tensor)
    held = [min(context, config.window) if kind.local else context for kind in config.kinds]
    if step == "decode":
        return batch * one * sum(held), batch * one * len(held)
    return 0, batch * one * sum(held) if step == "prefill" else 0
