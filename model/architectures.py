"""Published dense architectures by name, and two small ones of our own.

Sizes are those of the models' own `config.json`; the tests hold each to its exact published parameter total.
"""

from .config import ModelConfig


def _llama(name: str, *sizes: int, theta: float = 10_000.0, context: int = 4096) -> ModelConfig:
    num_layers, width, num_heads, num_kv_heads, mlp_width, vocabulary = sizes
    return ModelConfig(
        name, num_layers, width, num_heads, num_kv_heads, mlp_width, vocabulary, rope_theta=theta, max_context=context
    )


def _qwen3(name: str, *sizes: int, tied: bool = False) -> ModelConfig:
    num_layers, width, num_heads, num_kv_heads, mlp_width = sizes
    return ModelConfig(
        name,
        num_layers,
        width,
        num_heads,
        num_kv_heads,
        mlp_width,
        vocabulary=151_936,
        head_width=128,
        tied=tied,
        qk_norm=True,
        rope_theta=1_000_000.0,
        norm_epsilon=1e-6,
        max_context=40_960,
    )


def _gemma(name: str, *sizes: int) -> ModelConfig:
    num_layers, width, num_heads, num_kv_heads, mlp_width = sizes
    return ModelConfig(
        name,
        num_layers,
        width,
        num_heads,
        num_kv_heads,
        mlp_width,
        vocabulary=256_000,
        head_width=256,
        activation="geglu",
        tied=True,
        scale_embedding=True,
        norm_offset=True,
        norm_epsilon=1e-6,
    )


ARCHITECTURES: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        # Ours: `nano` reads bytes and trains on a laptop; `small` has 100 million parameters.
        ModelConfig("nano", 6, 384, 6, 2, 1024, 256, head_width=64, tied=True, max_context=4096),
        ModelConfig("small", 12, 768, 12, 4, 2048, 32_000, head_width=64, tied=True),
        #                   L     D    N   K      F       V
        _llama("llama2-7b", 32, 4096, 32, 32, 11_008, 32_000),
        _llama("llama2-13b", 40, 5120, 40, 40, 13_824, 32_000),
        _llama("llama2-70b", 80, 8192, 64, 8, 28_672, 32_000),
        _llama("llama3-8b", 32, 4096, 32, 8, 14_336, 128_256, theta=500_000.0, context=8192),
        _llama("llama3-70b", 80, 8192, 64, 8, 28_672, 128_256, theta=500_000.0, context=8192),
        # Llama 3.1 also stretches the low RoPE frequencies, which costs nothing and is left out here.
        _llama("llama3-405b", 126, 16_384, 128, 8, 53_248, 128_256, theta=500_000.0, context=131_072),
        # v0.2, which dropped the sliding window of v0.1.
        _llama("mistral-7b", 32, 4096, 32, 8, 14_336, 32_000, theta=1_000_000.0, context=32_768),
        _qwen3("qwen3-0.6b", 28, 1024, 16, 8, 3072, tied=True),
        _qwen3("qwen3-8b", 36, 4096, 32, 8, 12_288),
        _qwen3("qwen3-32b", 64, 5120, 64, 8, 25_600),
        _gemma("gemma-2b", 18, 2048, 8, 1, 16_384),
        _gemma("gemma-7b", 28, 3072, 16, 16, 24_576),
    )
}


def get(name: str) -> ModelConfig:
    """The architecture called `name`; ValueError with all names if there is none."""
    if name not in ARCHITECTURES:
        raise ValueError(f"model is {name!r}; it must be one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]
