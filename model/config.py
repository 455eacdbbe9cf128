"""What a transformer is (its sizes and variants) and how it runs (types, kernels, layer loop), in frozen dataclasses.

`ModelConfig` is a plain dense decoder until one of its three optional parts is given: `Experts` (mixture of experts),
`Latent` (multi-head latent attention), `RopeScaling` (a context longer than RoPE was trained for).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import jax

DTYPES = ("bfloat16", "float16", "float32", "float64")
# What costs more than to read its operands and write its results, or sends over links. A custom_vjp_call is a kernel
# with a derivative of its own.
DEAR = {
    *("dot_general", "ragged_dot_general", "pallas_call", "custom_vjp_call", "sort", "top_k", "cumsum", "scatter"),
    "dot_product_attention_fwd_wrapper",  # of jax: cuDNN's kernel
    *("all_gather", "all_to_all", "ppermute", "psum", "psum_invariant", "reduce_scatter"),
}
STREAM, MOVED = "stream", "moved"  # names of x between attention and feed-forward, and of what came over links


def dear(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Whether to do this operation again would cost more than to keep its result."""
    return primitive.name in DEAR or (primitive.name == "name" and parameters["name"] in (STREAM, MOVED))


# What the backward pass keeps from the forward one. "none" keeps what is dear and recomputes what is elementwise, for
# to keep that, much of it in float32, takes more bytes. "full" keeps each block's input; "dots" also keeps the results
# of products with weights (not those of attention).
REMAT: dict[str, Callable[..., Any]] = {
    "none": dear,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(STREAM),
    ),
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward: a router sends each token through `active` of `count` MLPs."""

    count: int  # E
    active: int  # experts that each token goes through
    width: int  # F of one expert
    shared: int = 0  # F of the expert that every token goes through as well; 0: none
    shared_gate: bool = False  # whose output is multiplied by a learned gate, a sigmoid (Qwen2-MoE)
    dense_layers: int = 0  # the first so many layers have a plain MLP instead
    # How an expert's weight comes of its logit. "softmax": over all experts, then the top ones are chosen; "topk": the
    # top ones are chosen, then softmax over these; "sigmoid": of each alone, chosen by sigmoid + a selection bias that
    # does not enter the weight (DeepSeek-V3, 2024, section 2.1.2).
    router: str = "topk"
    normalize: bool = False  # the weights of the chosen sum to one
    scale: float = 1.0  # and are multiplied by this
    groups: int = 1  # experts are chosen from the best `active_groups` of so many groups
    active_groups: int = 1
    router_bias: bool = False
    balance_loss: float = 0.0  # weight of the load-balance loss (Fedus et al., 2021, section 2.2)
    z_loss: float = 0.0  # weight of the mean squared logsumexp of the router's logits (Zoph et al., 2022)
    # How tokens meet experts: "all" (every token through every expert), "blocks" (dropless: sorted by expert, in blocks
    # of one expert each), "capacity" (each expert takes at most its share times `capacity`, the rest is dropped), or
    # "auto": "all" where few tokens meet most experts, else "blocks".
    dispatch: str = "auto"
    # Where chips share experts out, each takes at most its share of a batch's assignments times `capacity`, too, unless
    # every token goes through every expert: the rows that it computes must be known when the program is compiled.
    capacity: float = 1.25

    def __post_init__(self) -> None:
        positive(self, "experts.", "count", "active", "width", "groups", "active_groups", "capacity")
        choice(self, "experts.", router=("softmax", "topk", "sigmoid"), dispatch=("auto", "all", "blocks", "capacity"))
        if self.active > self.count:
            raise ValueError(f"experts.active is {self.active}; it must be at most experts.count, {self.count}")
        if self.count % self.groups or self.active_groups > self.groups:
            raise ValueError(
                f"experts.groups is {self.groups}; it must divide experts.count, {self.count}, and be at least "
                f"experts.active_groups, {self.active_groups}"
            )


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1): keys and values are made from one short vector a
    position, which is all that the cache keeps, beside one rotated key that all heads share."""

    kv_rank: int  # width of that vector
    rope_width: int  # width of the part of queries and keys that is rotated; head_width is that of the rest
    value_width: int  # of one head's value
    query_rank: int = 0  # queries are made from a short vector, too; 0: from the residual stream

    def __post_init__(self) -> None:
        positive(self, "latent.", "kv_rank", "rope_width", "value_width")


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequencies slowed down by `factor`, for contexts longer than the model was first trained on.

    "linear": all of them (Chen et al., 2023). "llama3": those of wavelengths over original_context / low, and between
    it and original_context / high in part. "yarn" (Peng et al., 2023): those that turn fewer than `low` times in
    original_context, and up to `high` times in part.
    """

    kind: str
    factor: float
    original_context: int = 8192
    low: float = 1.0
    high: float = 4.0
    magnitude: float = 1.0  # sine and cosine are multiplied by this (yarn)
    truncate: bool = True  # yarn: the bounds are rounded to whole frequencies

    def __post_init__(self) -> None:
        choice(self, "rope_scaling.", kind=("linear", "llama3", "yarn"))
        positive(self, "rope_scaling.", "factor", "original_context", "low", "high", "magnitude")


class Kind(NamedTuple):
    """What tells one layer from another: attention over a window or over everything; an MLP or experts."""

    local: bool
    sparse: bool


class Run(NamedTuple):
    """`times` repetitions of the same few layers: what a scan loops over."""

    times: int
    kinds: tuple[Kind, ...]


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
    # swiglu, geglu: gated; swiglu_clamped: gpt-oss's; not gated: gelu (by tanh), gelu_exact, gelu_quick (by sigmoid)
    activation: str = "swiglu"
    tied: bool = False  # the unembedding is the embedding, transposed
    norm: str = "rms"  # or layer: LayerNorm, with a bias
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    norm_epsilon: float = 1e-5
    post_norms: bool = False  # a norm after each sublayer, too, before it is added (Gemma 2)
    qk_norm: bool = False  # RMSNorm over each head's query and key (Qwen3)
    qkv_bias: bool = False
    key_bias: bool = True  # of keys too, where queries and values have one; no softmax changes by it
    output_bias: bool = False  # of attention
    mlp_bias: bool = False
    scale_embedding: bool = False  # embedding times sqrt(D) (Gemma)
    positions: str = "rope"  # or learned: a vector for each of max_context positions (GPT-2)
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    window: int = 0  # local layers see this many positions, their own included; 0: no layer is local
    global_every: int = 0  # with a window, every so many-th layer is global; 0: none is
    local_rope_theta: float = 0.0  # of local layers, unscaled; 0: as all
    attention_scale: float = 0.0  # scores are multiplied by this; 0: H ** -0.5
    attention_softcap: float = 0.0  # scores s become c * tanh(s / c); 0: they do not
    logits_softcap: float = 0.0
    sinks: bool = False  # each head's softmax has one more logit, learned, of a key without a value (gpt-oss)
    max_context: int = 8192
    experts: Experts | None = None
    latent: Latent | None = None

    dtype: str = "bfloat16"  # of activations, of the cache, and of weights at their use
    param_dtype: str = "auto"  # of stored weights; auto: float32 in training, else dtype
    weights: str = "full"  # matrices stored in param_dtype; int8: a scale a channel; int4:128: one for each 128 of it
    activations: str = "full"  # int8: rounded, a scale a row, for products with int8 weights of more than one position
    cache_dtype: str = "full"  # dtype; or int8: a scale for each head and position
    layers: str = "auto"  # one scanned block with stacked weights, or L blocks in a row; auto: scan in training
    remat: str = "none"
    attention: str = "auto"  # how prefill and training attend: xla, flash; auto: flash where the chip has a kernel
    query_block: int = 1024  # xla: queries whose scores against all keys exist at one time; 0: all of them

    def __post_init__(self) -> None:
        if self.head_width == 0 and self.num_heads > 0:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width is {self.width}; without head_width it must be divisible by num_heads, {self.num_heads}"
                )
            object.__setattr__(self, "head_width", self.width // self.num_heads)
        sizes = ("num_layers", "width", "num_heads", "num_kv_heads", "head_width", "mlp_width", "vocabulary")
        positive(self, "", *sizes, "rope_theta", "norm_epsilon", "max_context")
        for field in ("query_block", "window", "global_every", "local_rope_theta", "attention_scale"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be positive, or 0 for none")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads}; it must be divisible by num_kv_heads, {self.num_kv_heads}"
            )
        if self.rope_width % 2:
            field = "latent.rope_width" if self.latent else "head_width"
            raise ValueError(f"{field} is {self.rope_width}; it must be even, for RoPE turns pairs")
        if self.latent and (self.window or self.qk_norm or self.qkv_bias or self.sinks):
            raise ValueError("latent is given; it goes without window, qk_norm, qkv_bias and sinks")
        if self.experts and self.experts.dense_layers >= self.num_layers:
            raise ValueError(f"experts.dense_layers is {self.experts.dense_layers}; it must be below num_layers")
        choice(
            self,
            "",
            activation=("swiglu", "geglu", "swiglu_clamped", "gelu", "gelu_exact", "gelu_quick"),
            norm=("rms", "layer"),
            positions=("rope", "learned"),
            dtype=DTYPES,
            param_dtype=("auto", *DTYPES),
            activations=("full", "int8"),
            cache_dtype=("full", "int8"),
            layers=("auto", "scan", "unroll"),
            remat=tuple(REMAT),
            attention=("auto", "xla", "flash", "cudnn"),
        )
        from .quantized import Scheme  # here, for it needs nothing of this file

        Scheme.parse(self.weights)

    @property
    def causal(self) -> bool:
        """Whether a position sees only those before it."""
        return True

    @property
    def queries_per_kv_head(self) -> int:
        """G."""
        return self.num_heads // self.num_kv_heads

    @property
    def rope_width(self) -> int:
        """How much of each query and key is rotated."""
        return self.latent.rope_width if self.latent else self.head_width

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        whole = self.head_width + (self.latent.rope_width if self.latent else 0)
        return self.attention_scale or whole**-0.5

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate beside its up projection."""
        return not self.activation.startswith("gelu")

    @property
    def variant(self) -> str:
        """What is not as in a plain dense decoder, in a few words."""
        e, kinds = self.experts, set(self.kinds)
        local = any(kind.local for kind in kinds)
        words = {
            f"{e.active} of {e.count} experts" if e else "": e,
            "latent attention": self.latent,
            f"window {self.window}" + (f" but in 1 layer of {self.global_every}" if self.global_every else ""): local,
            "qk norm": self.qk_norm,
            "biases": self.mlp_bias,
            "qkv bias": self.qkv_bias and not self.mlp_bias,
            "sinks": self.sinks,
            "learned positions": self.positions == "learned",
            "soft-cap": self.attention_softcap or self.logits_softcap,
            "tied": self.tied,
        }
        return ", ".join(word for word, there in words.items() if there)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each of the L layers is."""
        every = self.global_every
        return tuple(
            Kind(
                local=bool(self.window) and not (every and (layer + 1) % every == 0),
                sparse=self.experts is not None and layer >= self.experts.dense_layers,
            )
            for layer in range(self.num_layers)
        )

    @property
    def runs(self) -> tuple[Run, ...]:
        """The layers as repetitions of a pattern: first the dense ones, then whole periods, then what is left."""
        kinds = self.kinds
        dense = self.experts.dense_layers if self.experts else 0
        period = self.global_every if self.window and self.global_every > 1 else 1
        runs = []
        for part in (kinds[:dense], kinds[dense:]):
            times = len(part) // period
            runs += [Run(times, part[:period])] if times else []
            runs += [Run(1, part[times * period :])] if len(part) % period else []
        return tuple(runs)

    @property
    def parameters(self) -> int:
        """The number of trained numbers, in closed form."""
        return self._count(lambda experts: experts.count)

    @property
    def active_parameters(self) -> int:
        """Those that one token meets: of the experts, only the chosen. The whole embedding is counted."""
        return self._count(lambda experts: experts.active)

    def _count(self, experts_counted: Callable[[Experts], int]) -> int:
        D, N, K, H = self.width, self.num_heads, self.num_kv_heads, self.head_width
        norm = D * (2 if self.norm == "layer" else 1)
        if self.latent:
            m, queries = self.latent, N * (H + self.latent.rope_width)
            attention = D * queries if not m.query_rank else m.query_rank * (D + 1 + queries)
            attention += D * (m.kv_rank + m.rope_width) + m.kv_rank * (1 + N * (H + m.value_width))
            attention += N * m.value_width * D
        else:
            attention = (
                2 * D * (N + K) * H
                + (N + (1 + self.key_bias) * K) * H * self.qkv_bias
                + N * self.sinks
                + 2 * H * self.qk_norm
            )
        attention += D * self.output_bias
        matrices = 3 if self.gated else 2

        def mlp(width: int) -> int:
            return matrices * D * width + self.mlp_bias * ((matrices - 1) * width + D)

        total = self.num_layers * (attention + 2 * norm * (1 + self.post_norms))
        sparse = sum(kind.sparse for kind in self.kinds)
        total += (self.num_layers - sparse) * mlp(self.mlp_width)
        if self.experts:
            e = self.experts
            router = D * e.count + e.count * (e.router_bias + (e.router == "sigmoid"))
            total += sparse * (
                router + experts_counted(e) * mlp(e.width) + (mlp(e.shared) + D * e.shared_gate) * bool(e.shared)
            )
        tables = (1 if self.tied else 2) * self.vocabulary + self.max_context * (self.positions == "learned")
        return total + norm + tables * D

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ModelConfig":
        """What `to_json` wrote; ValueError for a field that there is not."""
        fields = dict(fields)
        for name, part in (("experts", Experts), ("latent", Latent), ("rope_scaling", RopeScaling)):
            if fields.get(name) is not None:
                fields[name] = part(**fields[name])
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a config of this version: {error}") from None

    def resolve(self, training: bool = False) -> Self:
        """The same with every "auto" decided but that of `attention`, which goes by the chip (`flash.chosen`).

        Decode reads each weight once, and slicing them out of a stack would copy them first: unrolled, in the compute
        type. Training compiles one block instead of L, and keeps float32 master weights.
        """
        layers, param_dtype = ("scan", "float32") if training else ("unroll", self.dtype)
        return replace(
            self,
            layers=layers if self.layers == "auto" else self.layers,
            param_dtype=param_dtype if self.param_dtype == "auto" else self.param_dtype,
        )


def positive(config: Any, prefix: str, *fields: str) -> None:
    """ValueError where one of these fields is not."""
    for field in fields:
        if getattr(config, field) <= 0:
            raise ValueError(f"{prefix}{field} is {getattr(config, field)}; it must be positive")


def choice(config: Any, prefix: str, **choices: tuple[str, ...]) -> None:
    """ValueError where a field is none of its choices."""
    for field, right in choices.items():
        if getattr(config, field) not in right:
            raise ValueError(f"{prefix}{field} is {getattr(config, field)!r}; it must be one of {', '.join(right)}")
