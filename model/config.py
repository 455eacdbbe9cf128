"""What a transformer is (its sizes) and how it runs (types, layer loop, rematerialisation), in one frozen dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

DTYPES = ("bfloat16", "float16", "float32", "float64")
# What the backward pass may keep from the forward one. "none" keeps what it needs and recomputes nothing; "full" keeps
# each block's input; "dots" also keeps the results of products with weights (not those of attention).
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
CHOICES = {
    "activation": ("swiglu", "geglu"),
    "dtype": DTYPES,
    "param_dtype": ("auto", *DTYPES),
    "layers": ("auto", "scan", "unroll"),
    "remat": tuple(REMAT),
    "attention": ("xla",),
}


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Raises ValueError naming the field, its value and what would be right."""

    name: str
    num_layers: int  # L
    width: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    mlp_width: int  # F
    vocabulary: int  # V
    head_width: int = 0  # H; 0: D / N
    activation: str = "swiglu"
    tied: bool = False  # the unembedding is the embedding, transposed
    qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3)
    scale_embedding: bool = False  # embedding times sqrt(D) (Gemma)
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    max_context: int = 8192

    dtype: str = "bfloat16"  # of activations, of the cache, and of weights at their use
    param_dtype: str = "auto"  # of stored weights; auto: float32 in training, else dtype
    layers: str = "auto"  # one scanned block with stacked weights, or L blocks in a row; auto: scan in training
    remat: str = "none"
    attention: str = "xla"
    query_block: int = 1024  # queries whose scores against all keys exist at one time; 0: all of them

    def __post_init__(self) -> None:
        if self.head_width == 0 and self.num_heads > 0:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width is {self.width}; without head_width it must be divisible by num_heads, {self.num_heads}"
                )
            object.__setattr__(self, "head_width", self.width // self.num_heads)
        for field in (
            *("num_layers", "width", "num_heads", "num_kv_heads", "head_width", "mlp_width", "vocabulary"),
            *("rope_theta", "norm_epsilon", "max_context"),
        ):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be divisible by num_kv_heads, {self.num_kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width is {self.head_width}; it must be even, for RoPE turns pairs")
        if self.query_block < 0:
            raise ValueError(f"query_block is {self.query_block}; it must be positive, or 0 for all queries at once")
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(choices)}")

    @property
    def queries_per_kv_head(self) -> int:
        """G."""
        return self.num_heads // self.num_kv_heads

    @property
    def parameters(self) -> int:
        """The number of trained numbers, in closed form."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads  # query and output; key and value
        norms = 2 * self.width + 2 * self.head_width * self.qk_norm
        block = heads * self.head_width * self.width + 3 * self.width * self.mlp_width + norms
        tables = 1 if self.tied else 2
        return self.num_layers * block + self.width + tables * self.vocabulary * self.width

    def resolve(self, training: bool = False) -> "ModelConfig":
        """The same with every "auto" decided.

        Decode reads each weight once, and slicing them out of a stack would copy them first: unrolled, in the compute
        type. Training compiles one block instead of L, and keeps float32 master weights.
        """
        layers, param_dtype = ("scan", "float32") if training else ("unroll", self.dtype)
        return replace(
            self,
            layers=layers if self.layers == "auto" else self.layers,
            param_dtype=param_dtype if self.param_dtype == "auto" else self.param_dtype,
        )
