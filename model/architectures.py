"""Published architectures by name, and two small ones of our own.

Sizes are those of the models' own `config.json`; the tests hold each to its exact published parameter total. A model
that is not here is read from such a file: `get("path/to/config.json")`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import Experts, Latent, ModelConfig, RopeScaling
from .encoder_config import ENCODERS


def _sized(*, context: int, **fields: Any) -> Any:
    """A family: a function of name, L, D, N, K, F, V (and fields of the one model) that gives a config."""

    def config(name: str, L: int, D: int, N: int, K: int, F: int, V: int, **own: Any) -> ModelConfig:
        all_fields: dict[str, Any] = {"max_context": context} | fields | own
        return ModelConfig(name, L, D, N, K, F, V, **all_fields)

    return config


_gpt2 = _sized(
    context=1024,
    activation="gelu",
    norm="layer",
    positions="learned",
    tied=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
)
_llama2 = _sized(context=4096)
_llama3 = _sized(context=8192, rope_theta=500_000.0)
_mistral = _sized(context=32_768, rope_theta=1_000_000.0)
_qwen = _sized(context=40_960, norm_epsilon=1e-6, rope_theta=1_000_000.0)
_gemma = _sized(
    context=8192,
    head_width=256,
    activation="geglu",
    tied=True,
    scale_embedding=True,
    norm_offset=True,
    norm_epsilon=1e-6,
)
_gemma2 = _sized(
    context=8192,
    head_width=256,
    activation="geglu",
    tied=True,
    scale_embedding=True,
    norm_offset=True,
    norm_epsilon=1e-6,
    post_norms=True,
    window=4096,
    global_every=2,
    attention_softcap=50.0,
    logits_softcap=30.0,
)
_gemma3 = _sized(
    context=131_072,
    activation="geglu",
    tied=True,
    scale_embedding=True,
    norm_offset=True,
    norm_epsilon=1e-6,
    post_norms=True,
    qk_norm=True,
    window=1024,
    global_every=6,
    rope_theta=1_000_000.0,
    rope_scaling=RopeScaling("linear", 8.0),
    local_rope_theta=10_000.0,
)


def _yarn(factor: float, truncate: bool = True, magnitude: float = 1.0) -> RopeScaling:
    return RopeScaling("yarn", factor, 4096, low=1.0, high=32.0, magnitude=magnitude, truncate=truncate)


def yarn_magnitude(factor: float) -> float:
    """What attention's temperature is corrected by where RoPE is slowed down (Peng et al., 2023, section 3.4)."""
    return 0.1 * math.log(factor) + 1.0


_gpt_oss = _sized(
    context=131_072,
    head_width=64,
    activation="swiglu_clamped",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    sinks=True,
    window=128,
    global_every=2,
    rope_theta=150_000.0,
    rope_scaling=_yarn(32.0, truncate=False, magnitude=yarn_magnitude(32.0)),
)


def _qwen3_moe(name: str, L: int, D: int, N: int, K: int, F: int, width: int) -> ModelConfig:
    experts = Experts(128, 8, width)
    return _qwen(name, L, D, N, K, F, 151_936, head_width=128, qk_norm=True, experts=experts)


def _deepseek_v3() -> ModelConfig:
    experts = Experts(
        256,
        8,
        2048,
        shared=2048,
        dense_layers=3,
        router="sigmoid",
        normalize=True,
        scale=2.5,
        groups=8,
        active_groups=4,
    )
    return ModelConfig(
        *("deepseek-v3", 61, 7168, 128, 128, 18_432, 129_280),
        head_width=128,
        norm_epsilon=1e-6,
        # The correction of YaRN is in the scores' scale here, and not in sine and cosine.
        attention_scale=(128 + 64) ** -0.5 * yarn_magnitude(40.0) ** 2,
        rope_scaling=_yarn(40.0),
        max_context=163_840,
        experts=experts,
        latent=Latent(kv_rank=512, rope_width=64, value_width=128, query_rank=1536),
    )


_LLAMA31 = RopeScaling("llama3", 8.0, 8192, low=1.0, high=4.0)
_LONG = {"max_context": 131_072, "rope_scaling": _LLAMA31}
_LLAMA32 = _LONG | {"rope_scaling": replace(_LLAMA31, factor=32.0), "tied": True}
_QK = {"head_width": 128, "qk_norm": True}

ARCHITECTURES: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        # Ours: `nano` reads bytes and trains on a laptop; `small` has 100 million parameters.
        ModelConfig("nano", 6, 384, 6, 2, 1024, 256, head_width=64, tied=True, max_context=4096),
        ModelConfig("small", 12, 768, 12, 4, 2048, 32_000, head_width=64, tied=True),
        #                     L     D    N   K      F       V
        _gpt2("gpt2-small", 12, 768, 12, 12, 3072, 50_257),
        _gpt2("gpt2-medium", 24, 1024, 16, 16, 4096, 50_257),
        _gpt2("gpt2-large", 36, 1280, 20, 20, 5120, 50_257),
        _gpt2("gpt2-xl", 48, 1600, 25, 25, 6400, 50_257),
        _llama2("llama2-7b", 32, 4096, 32, 32, 11_008, 32_000),
        _llama2("llama2-13b", 40, 5120, 40, 40, 13_824, 32_000),
        _llama2("llama2-70b", 80, 8192, 64, 8, 28_672, 32_000),
        _llama3("llama3-8b", 32, 4096, 32, 8, 14_336, 128_256),
        _llama3("llama3-70b", 80, 8192, 64, 8, 28_672, 128_256),
        _llama3("llama3-405b", 126, 16_384, 128, 8, 53_248, 128_256, **_LONG),  # Llama 3.1
        _llama3("llama3.2-1b", 16, 2048, 32, 8, 8192, 128_256, head_width=64, **_LLAMA32),
        _llama3("llama3.2-3b", 28, 3072, 24, 8, 8192, 128_256, **_LLAMA32),
        _mistral("mistral-7b", 32, 4096, 32, 8, 14_336, 32_000),  # v0.2, which dropped the sliding window of v0.1
        _mistral("mixtral-8x7b", 32, 4096, 32, 8, 14_336, 32_000, experts=Experts(8, 2, 14_336)),
        _mistral(
            *("mixtral-8x22b", 56, 6144, 48, 8, 16_384, 32_768),
            max_context=65_536,
            experts=Experts(8, 2, 16_384),
        ),
        _gemma("gemma-2b", 18, 2048, 8, 1, 16_384, 256_000),
        _gemma("gemma-7b", 28, 3072, 16, 16, 24_576, 256_000),
        _gemma2("gemma2-9b", 42, 3584, 16, 8, 14_336, 256_000),
        _gemma3("gemma3-4b", 34, 2560, 8, 4, 10_240, 262_144, head_width=256),
        _gemma3("gemma3-27b", 62, 5376, 32, 16, 21_504, 262_144, head_width=128, attention_scale=168**-0.5),
        _qwen("qwen2.5-7b", 28, 3584, 28, 4, 18_944, 152_064, qkv_bias=True, max_context=32_768),
        _qwen("qwen3-0.6b", 28, 1024, 16, 8, 3072, 151_936, tied=True, **_QK),
        _qwen("qwen3-8b", 36, 4096, 32, 8, 12_288, 151_936, **_QK),
        _qwen("qwen3-32b", 64, 5120, 64, 8, 25_600, 151_936, **_QK),
        _qwen3_moe("qwen3-30b-a3b", 48, 2048, 32, 4, 6144, 768),
        _qwen3_moe("qwen3-235b-a22b", 94, 4096, 64, 4, 12_288, 1536),
        _deepseek_v3(),
        _gpt_oss("gpt-oss-20b", 24, 2880, 64, 8, 2880, 201_088, experts=Experts(32, 4, 2880, router_bias=True)),
        _gpt_oss("gpt-oss-120b", 36, 2880, 64, 8, 2880, 201_088, experts=Experts(128, 4, 2880, router_bias=True)),
    )
}


def get(name: str) -> ModelConfig:
    """The architecture called `name`, or that of a Hugging Face `config.json` or of a folder with one.

    ValueError where there is neither, with all names, or where the file says what is not known here.
    """
    if found := ARCHITECTURES.get(name) or ENCODERS.get(name):
        return found
    path = Path(name)
    if path.suffix == ".json" or "/" in name or path.is_dir():
        from . import hugging_face

        return hugging_face.read_config(path)
    raise ValueError(
        f"model is {name!r}; it must be one of {', '.join([*ARCHITECTURES, *ENCODERS])}, or a path of a config.json"
    )
