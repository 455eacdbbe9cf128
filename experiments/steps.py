"""The only builder of steps: one program for compiling ahead of time, for running and for the tests."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..model import decode, flash, flash_decode, moe, train
from ..model.axes import platform, spec, use_mesh
from ..model.cache import KVCache, Rounded, entries
from ..model.config import ModelConfig
from ..model.encoder import Encoder
from ..model.encoder_config import EncoderConfig
from ..model.transformer import Params, Transformer, logical_axes, split
from ..profiling import closed_form
from .flags import batch_shards

STEPS = ("train", "prefill", "decode", "generate", "score", "encode")
WHOLE = ("train", "prefill", "encode", "score")  # take all of a sequence through the layers at once
# XLA would make multiply and reduce of a product with a single row.
ROWS_STAY_PRODUCTS = {"xla_disable_hlo_passes": "dot-strength-reduction"}
ROLES = {
    **{"params": "weights", "teacher": "weights", "opt_state": "optimizer", "cache": "cache"},
    **dict.fromkeys(("tokens", "pixels", "spectrum", "rated"), "inputs"),
}


@dataclass(frozen=True)
class Step:
    """One program: a function of named arguments, and what it is called with.

    names, arguments: pytrees of real arrays, or of jax.ShapeDtypeStruct, each with its sharding where there is a mesh.
    donate: positions of the arguments that the program overwrites, and returns updated in the same place.
    """

    name: str
    config: ModelConfig
    batch: int
    context: int
    function: Callable[..., Any]
    names: tuple[str, ...]
    arguments: tuple[Any, ...]
    donate: tuple[int, ...]
    out_shardings: Any
    mesh: Mesh | None
    recipe: train.Recipe = train.PLAIN

    @property
    def argument_roles(self) -> dict[str, str]:
        """Argument name -> what its bytes are: weights, optimizer, cache or inputs."""
        return {name: ROLES[name] for name in self.names}

    @property
    def tokens_on_a_chip(self) -> int:
        """How many tokens one chip takes through the layers."""
        shards = batch_shards(self._sizes)
        rows = self.batch // shards if self.batch % shards == 0 else self.batch
        return rows * (self.context if self.name in WHOLE else 1)

    @property
    def expert_chips(self) -> int:
        """How many chips share the experts out; each has some of them, and none of the others."""
        return self._sizes.get("expert", 1)

    @property
    def tokens_among_experts(self) -> int:
        """How many tokens, of as many chips, choose among all experts."""
        return self.tokens_on_a_chip * self.expert_chips

    @property
    def _sizes(self) -> Mapping[str, int]:
        """Of the mesh, by axis."""
        return {} if self.mesh is None else self.mesh.shape

    @property
    def dispatch(self) -> str | None:
        """How tokens meet experts in this step, if it has any: all, blocks or capacity."""
        experts = self.config.experts
        return None if experts is None else moe.chosen_dispatch(self.tokens_among_experts, experts)

    @property
    def expert_rows(self) -> Fraction:
        """Rows that the experts compute, over those that are routed to them: 1 without experts."""
        experts, tokens = self.config.experts, self.tokens_on_a_chip
        if experts is None:
            return Fraction(1)
        executed = moe.executed_rows(self.tokens_among_experts, experts, self.expert_chips)
        return Fraction(executed, tokens * experts.active)

    @property
    def score_blocks(self) -> closed_form.Blocks:
        """What attention works in where it is by a flash kernel."""
        if self.config.attention != "flash" or self.name not in WHOLE:
            return closed_form.SINGLE
        with use_mesh(self.mesh):
            target = platform()
        blocks = flash.blocks(self.config, self.context, target)
        return closed_form.Blocks(*blocks, padded=target == "tpu", heads=flash.WIDTHS.get(target, 1))

    @property
    def masked(self) -> dict[tuple[str, str], Fraction]:
        """(component, phase) -> the share of its FLOPs that is computed and thrown away: scores behind the mask, rows
        of experts that no token is in, what fills up a kernel's last block or its heads."""
        forward = backward = Fraction(0)
        encoder = f"{self.config.kind}/" if isinstance(self.config, EncoderConfig) else ""
        if self.name in WHOLE:
            forward, backward = closed_form.masked_fractions(self.config, self.context, self.score_blocks)
        rows = max(Fraction(0), 1 - 1 / self.expert_rows)
        shares = {
            (component, phase): share
            for component, *by_phase in (
                (f"{encoder}attention/core", forward, forward, backward),
                ("moe/experts", rows, rows, rows),
            )
            for phase, share in zip(("forward", "recompute", "backward"), by_phase, strict=True)
        }
        return {where: share for where, share in shares.items() if share}

    @cached_property
    def jitted(self) -> Any:
        """The function under `jax.jit`; what it donates comes back laid out over the mesh as it was."""
        placed = {} if self.mesh is None else {"out_shardings": self.out_shardings}
        return jax.jit(self.function, donate_argnums=self.donate, **placed)

    def compiler_options(self, platform: str) -> dict[str, Any]:
        """XLA options that this step is to be compiled with on a "cpu", "cuda" or "tpu", here or ahead of time.

        For training on a CPU, measured (`bench_peers`, 100 million parameters: a tenth faster, and 0.25 GB less):
        - YNNPACK takes products alone. It takes reductions as well, and what it reduces must then be written out first.

        The others are for decode on a GPU, chosen by the bill; whether each is faster too is to be measured on a GPU.
        - Products with one input are not merged into one: int4 weights would be written out in bf16 to be put together.
        - A product with a single row stays a product. As multiply and reduce, two of them that share an input write
          the products of all pairs out first.
        - A GPU fills its multiprocessors in a thin matmul by splitting the contraction (split-k), and writes float32
          partial sums that the next kernel reads back: 3 % of the weights' bytes at batch 64. From 32 rows on there is
          enough to do without.
        """
        if platform == "cpu" and self.name == "train":
            return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
        if platform != "cuda" or self.name not in ("decode", "generate"):
            return {}
        options: dict[str, Any] = {"xla_gpu_dot_merger_threshold_mb": 0, **ROWS_STAY_PRODUCTS}
        rows = self.batch // batch_shards(self._sizes)
        return options | ({"xla_gpu_experimental_force_split_k": 1} if rows >= 32 else {})

    def lower(self) -> jax.stages.Lowered:
        """The program for these arguments, not compiled yet."""
        return self.jitted.lower(*self.arguments)


def build(
    config: ModelConfig,
    step: str,
    *,
    batch: int,
    context: int,
    mesh: Mesh | None = None,
    real: bool = False,
    seed: int = 0,
    count: int = 64,
    recipe: train.Recipe = train.PLAIN,
    teacher: tuple[Any, Params] | None = None,
) -> Step:
    """The step called `step`, one of STEPS.

    context: positions of the sequence (train, score), of the prompt (prefill), of an encoder (encode) or of the cache
      (decode, generate), which is then full but for what the step writes (one position; generate: `count`).
    real: arguments are arrays, initialised from `seed`; otherwise abstract, and take no memory.
    recipe, teacher: how to train, and the graph and parameters of a model to learn from.
    Raises ValueError naming the argument, its value and what is right.
    """
    _check(config, step, batch, context, count)
    _check_experts(config, batch, mesh)
    training = step == "train"
    if recipe.objective == "preference" and batch % (2 * recipe.accumulate):
        raise ValueError(f"batch is {batch}; pairs of answers must be a multiple of {2 * recipe.accumulate}")
    if recipe.objective != "tokens" and (teacher is not None or not training):
        raise ValueError(f"objective is {recipe.objective}; it must be tokens with a teacher, and in all but training")
    if config.layers == "auto" and step in ("prefill", "encode", "score") and _is_tpu(mesh):
        # TPU's compiler takes 10 to 20 s for each unrolled block of a prefill; and it reads a slice where it lies.
        config = replace(config, layers="scan")
    config = config.resolve(training)
    config = replace(config, attention=_attention(config, step, context, mesh))

    graph, abstract_params, axes = outline(config)
    init_params = first_params(config, seed)
    # Of which the shapes are known. To trace the making of all parameters takes longer than to trace many a step.
    known: dict[str, Any] = {"params": abstract_params}

    def init_tokens(*shape: int) -> jax.Array:
        return jax.random.randint(jax.random.key(seed), shape, 0, config.vocabulary, dtype=jnp.int32)

    def init_cache(position: int) -> KVCache:
        return KVCache.init(config, batch, context).at(position)

    if step == "train":
        optimizer = train.make_optimizer(axes, recipe)

        def update(params: Params, opt_state: optax.OptState, tokens: jax.Array, *more: Any) -> Any:
            by = (teacher[0], more[0]) if teacher else None
            rated = None if recipe.objective == "tokens" else more[0]
            return train.train_step(graph, optimizer, params, opt_state, tokens, recipe, by, rated)

        function = update
        names, donate = ("params", "opt_state", "tokens"), (0, 1)
        inits = (init_params, lambda: optimizer.init(init_params()), lambda: init_tokens(batch, context + 1))
        opt_state = known["opt_state"] = jax.eval_shape(optimizer.init, abstract_params)
        letters = (axes, _state_axes(optimizer, opt_state, axes), "BT")
        if teacher is not None:
            names, inits = (*names, "teacher"), (*inits, lambda: teacher[1])
            letters = (*letters, jax.tree.map(lambda leaf: " " * leaf.ndim, teacher[1]))
        if recipe.objective != "tokens":
            asked = 4 if recipe.objective == "policy" else 2
            names, inits = (*names, "rated"), (*inits, lambda: train.Rated(*[jnp.zeros((batch, context))] * asked))
            letters = (*letters, train.Rated(*["BT"] * asked))
    elif step == "score":

        def judge(params: Params, tokens: jax.Array) -> jax.Array:
            return train.score(nnx.merge(graph, params), tokens)

        function, names, donate = judge, ("params", "tokens"), ()
        inits, letters = (init_params, lambda: init_tokens(batch, context + 1)), (axes, "BT")
    elif isinstance(config, EncoderConfig):
        kind, shape = config.kind, config.input_shape(batch, context)

        def encode(params: Params, inputs: jax.Array) -> jax.Array:
            return nnx.merge(graph, params[kind])(inputs)

        function, donate = encode, ()
        names = ("params", "pixels" if kind == "vision" else "spectrum")
        inits = (
            lambda: {kind: init_params()},  # by this name products are told from those of a decoder
            lambda: jax.random.normal(jax.random.key(seed), shape, config.dtype),
        )
        known = {"params": {kind: abstract_params}}
        letters = ({kind: axes}, "B" + " " * (len(shape) - 1))
    else:
        run, position = {
            "prefill": (decode.prefill, 0),
            "decode": (decode.decode_step, context - 1),
            "generate": (partial(decode.decode, count=count), context - count),
        }[step]

        def infer(params: Params, tokens: jax.Array, cache: KVCache) -> Any:
            return run(nnx.merge(graph, params), tokens, cache)

        function = infer
        names, donate = ("params", "tokens", "cache"), (2,)
        shape = (batch, context) if step == "prefill" else (batch,)
        inits = (init_params, lambda: init_tokens(*shape), lambda: init_cache(position))
        letters = (axes, "BT"[: len(shape)], _cache_axes(config, context))

    abstract = tuple(known.get(name) or jax.eval_shape(init) for name, init in zip(names, inits, strict=True))
    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(
            lambda letters, leaf: NamedSharding(mesh, spec(letters, leaf.shape, mesh, training)), letters, abstract
        )
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
    placed = shardings or (None,) * len(inits)
    arguments = abstract
    if real:
        arguments = tuple(jax.jit(init, out_shardings=place)() for init, place in zip(inits, placed, strict=True))
    out_shardings = None if not donate else (*placed[:2], None) if training else (None, placed[2])
    function.__name__ = step
    placed_function = use_mesh(mesh)(function)
    return Step(step, config, batch, context, placed_function, names, arguments, donate, out_shardings, mesh, recipe)


def _created(config: ModelConfig | EncoderConfig, seed: int) -> Transformer | Encoder:
    return Encoder(config, nnx.Rngs(seed)) if isinstance(config, EncoderConfig) else Transformer(config, nnx.Rngs(seed))


@lru_cache(maxsize=16)
def outline(config: ModelConfig) -> tuple[nnx.GraphDef[Any], Params, Params]:
    """A model's static structure, and the shapes and the axis letters of its parameters."""
    model = nnx.eval_shape(lambda: _created(config, 0))
    return *split(model), logical_axes(model)


@lru_cache(maxsize=16)
def first_params(config: ModelConfig, seed: int) -> Callable[[], Params]:
    """What draws a model's first parameters: the same function each time, so that jax traces and compiles it once."""
    return lambda: split(_created(config, seed))[1]


def _attention(config: ModelConfig, step: str, context: int, mesh: Mesh | None) -> str:
    """How the step attends: "xla" or "flash"."""
    with use_mesh(mesh):
        target = platform()
    if step not in WHOLE:
        return flash_decode.chosen(config, target)
    found = flash.chosen(config, context, target)
    if found == "flash" and target == "cpu":
        raise ValueError("attention is flash; a CPU has no kernel for it: it must be xla or auto")
    return found


def _is_tpu(mesh: Mesh | None) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "tpu"


def _check(config: ModelConfig, step: str, batch: int, context: int, count: int) -> None:
    if step not in STEPS:
        raise ValueError(f"step is {step!r}; it must be one of {', '.join(STEPS)}")
    if (step == "encode") != isinstance(config, EncoderConfig):
        own = "encode" if isinstance(config, EncoderConfig) else f"{', '.join(STEPS[:-1])}, for it is no encoder"
        raise ValueError(f"step is {step!r}; of {config.name} it must be {own}")
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if not 1 <= context <= config.max_context:
        raise ValueError(f"context is {context}; {config.name} takes 1 to {config.max_context} positions")
    if isinstance(config, EncoderConfig):
        config.check(context)
    if step == "generate" and not 1 <= count <= context:
        raise ValueError(f"count is {count}; a cache of {context} positions takes 1 to {context} tokens")


def _check_experts(config: ModelConfig, batch: int, mesh: Mesh | None) -> None:
    """Chips that share experts out have as many each, and as many sequences."""
    chips = 1 if mesh is None else mesh.shape.get("expert", 1)
    if mesh is None or chips == 1:
        return
    if config.experts is None:
        raise ValueError(f"mesh has expert={chips}; {config.name} has no experts")
    if config.experts.count % chips:
        raise ValueError(f"mesh has expert={chips}; it must divide the {config.experts.count} experts")
    shards = batch_shards(mesh.shape)
    if batch % shards:
        raise ValueError(f"batch is {batch}; data x expert={shards} chips of the mesh must divide it")


def _cache_axes(config: ModelConfig, length: int) -> Any:
    """The axis letters of a cache. Latent attention's has one head; a ring's positions are not split either."""

    def letters(times: tuple[int, ...]) -> Any:
        values = "LBKSH"[not times :]
        return Rounded(values, values[:-1]) if config.cache_dtype == "int8" else values  # pyright: ignore[reportArgumentType]

    layers = tuple(letters(times) for times, _ in entries(config))
    return KVCache(k=layers, v=layers, position="", length=length)  # pyright: ignore[reportArgumentType]


def _state_axes(optimizer: optax.GradientTransformation, opt_state: optax.OptState, axes: Params) -> Any:
    """The axis letters of optimizer state: those of the parameter that it belongs to, none for a counter."""
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, letters: letters, opt_state, axes, transform_non_params=lambda _: ""
    )
