"""The arithmetic oracle: what a dense decoder's step must cost, from its sizes alone.

Whole program, all chips; the bill is per chip. Conventions: one multiply-add is 2 FLOPs; attention as the XLA path
computes it is T x S in full, as an ideal program computes it the causal half; the backward pass costs two forwards
(Kaplan et al., 2020, section 2.1). Written against the published formulas and not against the model here, so that the
two can disagree.
"""

from fractions import Fraction
from typing import Protocol


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
    def tied(self) -> bool: ...
    @property
    def remat(self) -> str: ...


def _positions(step: str, batch: int, context: int) -> tuple[int, int, int]:
    """(tokens through the blocks, key positions each meets, tokens through the unembedding)."""
    if step == "decode":
        return batch, context, batch
    if step == "prefill":
        return batch * context, context, batch
    if step == "train":
        return batch * context, context, batch * context
    raise ValueError(f"step is {step!r}; it must be train, prefill or decode")


def _block_flops(config: Sizes, tokens: int) -> dict[str, int]:
    """Forward matmul FLOPs of one block's products with weights."""
    D, N, K, H, F = config.width, config.num_heads, config.num_kv_heads, config.head_width, config.mlp_width
    return {
        "attention/qkv": 2 * tokens * D * (N + 2 * K) * H,
        "attention/out": 2 * tokens * N * H * D,
        "mlp/up": 2 * tokens * D * 2 * F,
        "mlp/down": 2 * tokens * F * D,
    }


def matmul_flops(config: Sizes, step: str, batch: int, context: int) -> dict[str, int]:
    """Matmul FLOPs by component, as executed: attention in full, recompute included.

    Args:
      step: "train", "prefill" or "decode".
      batch, context: sequences, and positions in each (train, prefill) or in the cache (decode).
    """
    tokens, keys, logits = _positions(step, batch, context)
    forward = _block_flops(config, tokens)
    forward["attention/core"] = 4 * tokens * keys * config.num_heads * config.head_width
    total = {name: config.num_layers * flops for name, flops in forward.items()}
    total["logits"] = 2 * logits * config.width * config.vocabulary
    if step == "train":
        total = {name: 3 * flops for name, flops in total.items()}
        for name in RECOMPUTED[config.remat]:
            total[name] += config.num_layers * forward[name]
    return total


# What the backward pass computes a second time. mlp/down is not among it: nothing needs a block's output again.
RECOMPUTED = {
    "none": (),
    "full": ("attention/qkv", "attention/core", "attention/out", "mlp/up"),
    "dots": ("attention/core",),
}


def masked_fraction(step: str, context: int) -> Fraction:
    """The share of the T x S scores that the causal mask throws away; none in a decode step at the last position."""
    return Fraction(context - 1, 2 * context) if step in ("train", "prefill") else Fraction(0)


def ideal_flops(config: Sizes, step: str, batch: int, context: int) -> int:
    """Matmul FLOPs of the least program: the causal half only, nothing twice."""
    tokens, keys, logits = _positions(step, batch, context)
    attention = Fraction(4 * tokens * keys * config.num_heads * config.head_width)
    attention *= 1 - masked_fraction(step, context)
    blocks = config.num_layers * (sum(_block_flops(config, tokens).values()) + int(attention))
    forward = blocks + 2 * logits * config.width * config.vocabulary
    return 3 * forward if step == "train" else forward


def weights_bytes(config: Sizes, parameters: int, batch: int, element_bytes: int) -> int:
    """Bytes of every weight that an inference step must read: all, but the embedding rows that no token asks for."""
    table = config.vocabulary * config.width
    unread = 0 if config.tied else table - min(batch, config.vocabulary) * config.width
    return (parameters - unread) * element_bytes


def cache_bytes(config: Sizes, step: str, batch: int, context: int, element_bytes: int) -> tuple[int, int]:
    """(read, written) bytes of the KV cache: a decode step reads all of it once and writes one position; a prefill
    writes it once."""
    position = 2 * config.num_layers * batch * config.num_kv_heads * config.head_width * element_bytes
    return {"decode": (position * context, position), "prefill": (0, position * context), "train": (0, 0)}[step]
