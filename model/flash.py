"""Attention whose scores never reach memory (Dao et al., 2022; Dao, 2023): a block of queries meets one block of keys
after the other, and what it has read so far is rescaled whenever a larger score turns up. Blocks that the mask hides
whole are skipped. For GPUs the kernels are in `flash_gpu.py`; for TPUs they are jax's own, splash attention. Where
NVIDIA's cuDNN is installed, its kernels can be asked for instead: they are faster, for the models that they take.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from . import flash_gpu
from .axes import kernel_mesh, spec
from .config import ModelConfig
from .flash_gpu import Blocks, Setting, Task, Tasks

WIDTHS = {"cuda": 16}  # heads are filled up to a multiple of this
WIDEST = 2048  # bytes of a key and its value that a GPU's kernels find room for, in the smallest of its blocks
CUDNN_WIDEST = 128  # of a head, in both directions

Settings = tuple[Setting, Setting, Setting]  # forward; for the gradient of the queries; for that of keys and values

# How a GPU's kernels run: chosen on an H200 for heads of 128, and such that every line fits into the shared memory of
# every chip in profiling/chips.py. The first is for numbers of two bytes and heads of up to NARROW; of the others, that
# which is for so many bytes of a key and its value.
NARROW = 128
GPU_NARROW: Settings = (Setting(Blocks(128, 64), 8, 3), Setting(Blocks(64, 64), 4, 2), Setting(Blocks(64, 64), 4, 2))
GPU_SETTINGS: dict[int, Settings] = {
    640: (Setting(Blocks(128, 64), 8, 2), Setting(Blocks(64, 64), 4, 2), Setting(Blocks(64, 64), 4, 2)),
    1024: (Setting(Blocks(64, 32), 4, 2), Setting(Blocks(32, 32), 4, 2), Setting(Blocks(32, 32), 4, 2)),
    WIDEST: (Setting(Blocks(32, 16), 4, 2), Setting(Blocks(32, 16), 4, 2), Setting(Blocks(32, 16), 4, 2)),
}


def widths(config: ModelConfig) -> tuple[int, int]:
    """(H of a query and a key, V of a value), where no cache is read."""
    m = config.latent
    return (config.head_width + m.rope_width, m.value_width) if m else (config.head_width, config.head_width)


def why_not(config: ModelConfig, platform: str) -> str | None:
    """What keeps the kernels for a "cuda" or "tpu" from this model; None: nothing. A "cpu" interprets a GPU's."""
    types = ("bfloat16", "float32") if platform == "tpu" else ("bfloat16", "float16", "float32")
    if config.dtype not in types:
        return f"its kernels take {', '.join(types)}, not {config.dtype}"
    if platform == "tpu":
        return None
    row_bytes = _row_bytes(*widths(config), config.dtype)
    if row_bytes > WIDEST:
        return f"its kernels take keys with values of at most {WIDEST} bytes, not {row_bytes}"
    return None


def why_not_cudnn(config: ModelConfig, platform: str) -> str | None:
    """What keeps cuDNN's kernels from this model; None: nothing, if cuDNN is there."""
    if platform != "cuda":
        return "cuDNN is for NVIDIA's GPUs"
    if config.dtype not in ("bfloat16", "float16"):
        return f"cuDNN takes bfloat16 and float16, not {config.dtype}"
    key, value = widths(config)
    if key != value or key % 8 or key > CUDNN_WIDEST:
        return f"cuDNN takes keys and values of one width, a multiple of 8 and at most {CUDNN_WIDEST}"
    if config.attention_softcap or config.sinks or any(kind.local for kind in config.kinds):
        return "cuDNN is asked for no windows, sinks or soft-caps here"
    return None


def chosen(config: ModelConfig, length: int, platform: str) -> str:
    """How `length` positions attend to themselves: "flash", "cudnn" or "xla". ValueError where one is asked for in
    vain."""
    reason = (why_not_cudnn if config.attention == "cudnn" else why_not)(config, platform)
    if config.attention == "auto":
        return "flash" if platform != "cpu" and length > 1 and reason is None else "xla"
    if config.attention != "xla" and reason:
        raise ValueError(f"attention is {config.attention}; {reason}: it must be xla or auto")
    return config.attention


def blocks(config: ModelConfig, length: int, platform: str) -> tuple[Blocks, Blocks, Blocks]:
    """What the kernels work in: forward; for the gradient of the queries; for that of keys and values. A TPU's
    positions are padded to a whole number of them."""
    read, queries, keys = _settings(length, *widths(config), config.dtype, platform)
    return read.blocks, queries.blocks, keys.blocks


def _row_bytes(key_width: int, value_width: int, dtype: jax.typing.DTypeLike) -> int:
    """Of a key and its value, filled up for a GPU."""
    filled = sum(width + -width % WIDTHS["cuda"] for width in (key_width, value_width))
    return filled * jnp.dtype(dtype).itemsize


def flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    window: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: jax.Array | None = None,
    platform: str,
    interpret: bool = False,
) -> jax.Array:
    """`attention.attend` of T positions to themselves, and its first derivative: [B,K,G,T,V].

    q [B,K,G,T,H], k [B,K,T,H], v [B,K,T,V], sinks [K,G]. On the current mesh each chip does its part of the batch and
    of the heads.
    window: how many positions each sees, its own included; 0: all before it, too. causal=False: all, without a window.
    platform: whose kernels, "cuda" or "tpu". interpret: step by step, on any machine; slow, and for tests.
    """
    T = q.shape[3]
    settings = _settings(T, k.shape[-1], v.shape[-1], k.dtype, platform)
    tasks = Tasks(*(Task(scale, window, softcap, T, setting, interpret, causal) for setting in settings))
    return _on_mesh(partial(_on_tpu if platform == "tpu" else _on_gpu, tasks), q, k, v, sinks)


def _on_mesh(kernel: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
    """kernel(q, k, v, sinks), as `flash` has them; on the current mesh each chip's part."""
    mesh = kernel_mesh()
    if mesh is None:
        return kernel(q, k, v, sinks)
    split_q, split_k, split_v = (spec(axes, x.shape, mesh) for axes, x in (("BKGTH", q), ("BKSH", k), ("BKSH", v)))
    split_sinks = PartitionSpec() if sinks is None else spec("KG", sinks.shape, mesh)
    return jax.shard_map(
        kernel, mesh=mesh, in_specs=(split_q, split_k, split_v, split_sinks), out_specs=split_q, check_vma=False
    )(q, k, v, sinks)


def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, causal: bool = True) -> jax.Array:
    """`flash` by cuDNN's kernels, through jax: [B,K,G,T,H].

    Raises ValueError where cuDNN is not installed; compiling needs it, too.
    """

    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, sinks: None) -> jax.Array:
        B, K, G, T, H = q.shape
        # As products of [T,D] and [D,N,H] come out anyhow: XLA transposes nothing.
        queries = jnp.transpose(q, (0, 3, 1, 2, 4)).reshape(B, T, K * G, H)
        keys, values = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k, v))
        try:
            out = jax.nn.dot_product_attention(
                queries, keys, values, scale=scale, is_causal=causal, implementation="cudnn"
            )
        except RuntimeError as error:
            raise ValueError(f"attention is cudnn; {error} It is in pip's nvidia-cudnn-cu13") from None
        return jnp.transpose(out.reshape(B, T, K, G, H), (0, 2, 3, 1, 4))

    return _on_mesh(kernel, q, k, v, None)


def _settings(length: int, key_width: int, value_width: int, dtype: jax.typing.DTypeLike, platform: str) -> Settings:
    """How the kernels run."""
    if platform == "tpu":
        one = Setting(_tpu_blocks(length))
        return one, one, one
    if jnp.dtype(dtype).itemsize == 2 and max(key_width, value_width) <= NARROW:
        read, queries, keys = GPU_NARROW
    else:
        row_bytes = _row_bytes(key_width, value_width, dtype)
        if jnp.dtype(dtype).itemsize > 2:  # in larger blocks their products run out of registers
            row_bytes = max(row_bytes, 1024)
        read, queries, keys = next(settings for most, settings in GPU_SETTINGS.items() if row_bytes <= most)
    most = max(16, 1 << (length - 1).bit_length())
    return _no_larger(read, most), _no_larger(queries, most), _no_larger(keys, most)


def _no_larger(setting: Setting, most: int) -> Setting:
    """With sides of at most so many positions."""
    queries, keys = setting.blocks
    if max(queries, keys) <= most:
        return setting
    return Setting(Blocks(min(queries, most), min(keys, most)), 4, setting.stages)


def _on_gpu(tasks: Tasks, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
    V = v.shape[-1]
    wide = None if sinks is None else sinks.astype(jnp.float32)
    q, k, v = (jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % WIDTHS["cuda"])]) for x in (q, k, v))
    return jnp.moveaxis(flash_gpu.attention(tasks, jnp.moveaxis(q, 3, 1), k, v, wide), 1, 3)[..., :V]


def _tpu_blocks(length: int) -> Blocks:
    """Up to 512, and such that no more is padded than up to the next 128, the width of a TPU's vectors."""
    lines = -(-length // 128)
    side = 128 * max(n for n in (1, 2, 3, 4) if lines % n == 0)
    return Blocks(side, side)


def _on_tpu(tasks: Tasks, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any) -> jax.Array:
    forward = tasks.read
    B, K, G, T, H = q.shape
    queries = (q * jnp.asarray(forward.scale, q.dtype)).reshape(B, K * G, T, H)
    more = -T % forward.blocks.queries
    queries, keys, values = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (queries, k, v))
    kernel = _splash(forward, K * G)
    heads = None if sinks is None else sinks.reshape(K * G)
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, sinks=heads))(queries, keys, values)
    return out[:, :, :T].reshape(B, K, G, T, -1)


@cache
def _splash(task: Task, heads: int) -> Any:
    """The kernel for so many heads; made once, for it looks at every place of its mask."""
    length, window = task.length, task.window
    filled = length + -length % task.blocks.queries
    shape = filled, filled
    if task.causal:  # which hides what fills up the last block, too
        mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    elif filled == length:
        mask = masks.FullMask(shape)
    else:
        mask = masks.NumpyMask(np.broadcast_to(np.arange(filled) < length, shape))
    queries, keys = task.blocks
    blocks = splash.BlockSizes(
        queries, keys, block_q_dkv=queries, block_kv_dkv=keys, block_q_dq=queries, block_kv_dq=keys
    )
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha_single_device(
            masks.MultiHeadMask([mask] * heads),
            block_sizes=blocks,
            attn_logits_soft_cap=task.softcap or None,
            interpret=task.interpret,
        )
