"""What could be changed of a deployment to make given traffic cheaper; each change with its risk to quality, and how
that is known: by construction, measured here of small models (quality.py), published, or not at all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..profiling.assumptions import Assumptions, Scenario
from .drivers import sweep
from .drivers.deployment import Deployment, Served
from .drivers.model_size import renamed, scaled
from .drivers.serving import AUTO
from .flags import UsageError
from .perplexity import Way
from .quality import VARIANTS, Quality

if TYPE_CHECKING:
    from ..model.config import ModelConfig

SAFE = 0.001  # of the bits a byte that were measured: what counts as no loss
DRAFT = 1 / 8  # of the parameters: what a model of the same family may have to guess for it
MLA = "attention: MLA"
WINDOW, GLOBAL_EVERY = 1024, 6  # as Gemma 3 has it
NONE, MEASURED, PUBLISHED, UNKNOWN = "none", "measured here", "published", "unknown"


@dataclass(frozen=True)
class Request:
    """What is to be made cheaper.

    name: of the traffic. now: what is deployed, not yet placed. chips: others to try. trained: what fewer bits and
    smaller models cost in quality here. command: that makes the advice again. jobs: see sweep.
    """

    name: str
    now: Deployment
    chips: tuple[str, ...]
    trained: Quality
    known: Assumptions
    command: str
    jobs: int | None = None


@dataclass(frozen=True)
class Risk:
    """To quality. known: how it is. text: what is known. loss: share of the bits a byte that were lost, measured."""

    known: str
    text: str
    loss: float | None = None

    @property
    def is_exact(self) -> bool:
        return self.known == NONE

    @property
    def is_safe(self) -> bool:
        """Whether nothing was lost, by construction or as far as was measured."""
        return self.is_exact or (self.loss is not None and self.loss <= SAFE)


SAME = Risk(NONE, "the same model does the same, but for rounding")


@dataclass(frozen=True)
class Wanted:
    """A deployment before it is placed, and how many times as many chips a replica of it shall have."""

    deployment: Deployment
    times: float = 1.0

    def placed(self) -> Deployment:
        """UsageError where no mesh will do."""
        found = self.deployment.placed()
        tensor = sweep.mesh_of(found.mesh).get("tensor", 1) * self.times
        if self.times == 1:
            return found
        if tensor < 1 or found.config.num_heads % tensor or found.config.mlp_width % tensor:
            raise UsageError(f"{found.config.name} cannot be split over {tensor:g} chips")
        return replace(found, mesh=f"tensor={tensor:.0f}" if tensor > 1 else "")


@dataclass(frozen=True)
class Change:
    """One way to make it cheaper.

    Attributes:
      part: what of a deployment it changes; a combination has at most one change of each. "": it is in none.
      needs: what must be so besides; "": nothing that is not in our hands today.
    """

    name: str
    part: str
    apply: Callable[[Wanted], Wanted]
    risk: Risk
    needs: str = ""


def _deployed(**changes: Any) -> Callable[[Wanted], Wanted]:
    """Changes how it runs."""
    return lambda one: replace(one, deployment=replace(one.deployment, **changes))


def _config(**changes: Any) -> Callable[[Wanted], Wanted]:
    """Changes the model, or how it is stored."""
    return lambda one: _deployed(config=replace(one.deployment.config, **changes))(one)


def _traffic(**changes: Any) -> Callable[[Wanted], Wanted]:
    """Changes what is asked of it."""
    return lambda one: _deployed(traffic=replace(one.deployment.traffic, **changes))(one)


def _on(chip: str) -> Callable[[Wanted], Wanted]:
    """With a mesh of its own: how many chips hold a model depends on their memory."""
    return lambda one: Wanted(replace(one.deployment, target=chip, mesh=AUTO))


def changes(asked: Request) -> Iterator[Change]:
    """Those that do not depend on what it comes to today."""
    config, known = asked.now.config, asked.known
    yield from _storage(config, asked.trained, known)
    yield from _architectures(config, asked.trained)
    yield from _smaller(config, asked.trained, known)
    for chip in asked.chips:
        yield Change(f"chip: {chip}", "chip", _on(chip), SAME)
    yield from _prefix(asked.now.traffic)
    if (draft := _draft(config)) is not None:
        accepted, drafted = known.number("speculation.accepted"), known.whole("speculation.drafted")
        model, needs = draft
        text = "guesses are checked, so that the distribution stays (Leviathan et al., 2023)"
        exact = Risk(NONE, f"{text}; {accepted:.0%} of them are assumed to be right")
        name = f"speculation: {drafted} guesses of {model.name}"
        yield Change(name, "draft", _deployed(draft=model, drafted=drafted), exact, needs)
    if (hidden := asked.now.traffic.reasoning_tokens) > 0:
        risk = Risk(UNKNOWN, "models that think less solve fewer hard tasks; how many of these is not known")
        yield Change("half of the reasoning tokens", "", _traffic(reasoning_tokens=hidden // 2), risk)
        yield Change("no reasoning tokens", "", _traffic(reasoning_tokens=0), risk)


def _storage(config: "ModelConfig", trained: Quality, known: Assumptions) -> Iterator[Change]:
    """Weights, cache and activations in fewer bits."""
    if config.weights != "full" or config.cache_dtype != "full":
        return  # what was measured is against all of them in bfloat16

    def measured(*ways: Way) -> Risk:
        largest = trained.ladder[0]
        rows = [largest.in_way(way) for way in ways]
        if any(row is None for row in rows):
            return Risk(UNKNOWN, "not among the ways that were measured")
        plain = largest.plain.bits_per_byte.value
        more = [row.more_than(largest.plain) for row in rows if row is not None]
        lost = sum(one.value for one in more)
        size = f"{largest.parameters / 1e6:.2g} M parameters"
        apart = " (apart)" if len(more) > 1 else ""
        said = " and ".join(f"{one.value:+.5f} ± {one.standard_error:.5f}" for one in more)
        return Risk(MEASURED, f"{said} of {plain:.2f} bits a byte{apart}, on {largest.name}, {size}", lost / plain)

    int8, int4, cache, all8 = Way("int8"), Way("int4:128"), Way(cache_dtype="int8"), Way("int8", "int8", "int8")
    four = measured(int4)
    f16, q4 = known.number("quality.open_llama_3b.f16"), known.number("quality.open_llama_3b.q4_0")
    four = replace(four, text=f"{four.text}; published: perplexity {q4 / f16 - 1:+.1%} (OpenLLaMA 3B, q4_0)")
    for name, way, risk in (
        ("weights in int8", int8, measured(int8)),
        ("weights in int4:128", int4, four),
        ("cache in int8", cache, measured(cache)),
        ("weights and cache in int8", Way("int8", "int8"), measured(int8, cache)),
        ("weights, cache, activations in int8", all8, measured(all8)),
    ):
        yield Change(name, "storage", _config(**way.changes), risk)


def _architectures(config: "ModelConfig", trained: Quality) -> Iterator[Change]:
    """Attention with a smaller cache, where the model has not got it already."""
    from ..model.config import Latent

    if config.latent is not None:
        return
    N, K, H = config.num_heads, config.num_kv_heads, config.head_width
    needs = "training it so"

    def change(name: str, text: str, variant: str = "", **sizes: Any) -> Change:
        sizes["name"] = f"{config.name} ({name})"
        risk = _of_variant(trained, variant, text) or Risk(PUBLISHED, text)
        return Change(f"attention: {name}", "", _config(**sizes), risk, needs)

    if K == N and N % 4 == 0:
        text = "close to a head for each (Ainslie et al., 2023)"
        yield change(f"GQA, {N // 4} heads", text, num_kv_heads=N // 4)
    if K > 1:
        yield change("MQA", "some loss, and GQA is the compromise (Ainslie et al., 2023)", "mqa", num_kv_heads=1)
    if not (config.window or config.qk_norm or config.qkv_bias or config.sinks):
        text = "no loss or a gain at 16 and 250 billion parameters (DeepSeek-V2, 2024; from memory)"
        # In the proportions of DeepSeek-V2 and V3.
        latent = Latent(kv_rank=4 * H, rope_width=H // 2, value_width=H)
        yield change(MLA.removeprefix("attention: "), text, num_kv_heads=N, latent=latent)
    if not config.window:
        text = "next to no loss of perplexity; long inputs less sure (Gemma 3, 2025; from memory)"
        name = f"window {WINDOW}, 1 in {GLOBAL_EVERY} global"
        yield change(name, text, "window", window=WINDOW, global_every=GLOBAL_EVERY)


def _of_variant(trained: Quality, name: str, published: str) -> Risk | None:
    """What a small model lost that was trained so."""
    found = trained.variant(name)
    if found is None:
        return None
    one, base = found
    more, plain = one.plain.more_than(base.plain), base.plain.bits_per_byte.value
    so = ", ".join(f"{key} {size}" for key, size in VARIANTS[name].items())
    text = (
        f"{more.value:+.3f} ± {more.standard_error:.3f} of {plain:.2f} bits a byte, on {base.name} with {so} "
        f"({base.parameters / 1e6:.2g} M parameters, {trained.made['tokens'] / 1e6:.2g} M bytes){trained.luck}"
    )
    return Risk(MEASURED, f"{text}; published: {published}", more.value / plain)


def family(config: "ModelConfig") -> "list[ModelConfig]":
    """Those of its family that read the same tokens and are smaller in every way, from the largest on."""
    from ..model.architectures import ARCHITECTURES

    def stem(name: str) -> str:
        return name.partition("-")[0]

    found = [
        replace(one, weights=config.weights, cache_dtype=config.cache_dtype)
        for one in ARCHITECTURES.values()
        if (stem(one.name), one.vocabulary) == (stem(config.name), config.vocabulary)
        and one.parameters < config.parameters
        and one.active_parameters < config.active_parameters
    ]
    return sorted(found, key=lambda one: -one.active_parameters)


def _smaller(config: "ModelConfig", trained: Quality, known: Assumptions) -> Iterator[Change]:
    """The next of its family; without one, a model of half the width, as one of those that were trained here."""
    for small in family(config)[:1]:
        factor, exponent = known.number("quality.law.factor"), known.number("quality.law.exponent")
        more = factor * (small.active_parameters**-exponent - config.active_parameters**-exponent)
        text = f"{more:+.3f} nats a token by the law of Hoffmann et al. (2022), for as many tokens of training"
        yield Change(f"smaller model: {small.name}", "", _deployed(config=small), Risk(PUBLISHED, text))
        return
    if config.experts is not None or config.latent is not None:
        return
    half, (largest, *others) = scaled(config, 0.5), trained.ladder
    if half.parameters >= config.parameters:
        return
    near = next((one for one in others if one.width * 2 == largest.width), None)
    risk = Risk(UNKNOWN, "no model of half the width was measured")
    if near is not None:
        more = near.plain.more_than(largest.plain)
        plain = largest.plain.bits_per_byte.value
        sizes = f"{largest.parameters / 1e6:.2g} and {near.parameters / 1e6:.2g} M parameters"
        text = f"{more.value:+.3f} ± {more.standard_error:.3f} of {plain:.2f} bits a byte, {sizes}{trained.luck}"
        risk = Risk(MEASURED, text, more.value / plain)
    yield Change("smaller model: half the width", "", _deployed(config=half), risk, "training it")


def _draft(config: "ModelConfig") -> "tuple[ModelConfig, str] | None":
    """A model that guesses for it, and what it takes to have one: the largest of its family of an eighth or less, or
    one of half its width and half its layers; None where there is none."""
    small = [one for one in family(config) if one.active_parameters <= DRAFT * config.active_parameters]
    if small:
        return small[0], ""
    if config.experts is not None or config.latent is not None or config.num_layers < 2:
        return None
    half = scaled(config, 0.5)
    draft = renamed(replace(half, name=config.name), "half width, layers", num_layers=config.num_layers // 2)
    return (draft, "training the draft") if draft.parameters < config.parameters / 2 else None


def _prefix(traffic: Scenario) -> Iterator[Change]:
    """More of the prompt found in a cache of prompts, and none."""
    new = traffic.input_tokens - traffic.cached_tokens
    if new > 1:
        found = traffic.cached_tokens + new // 2
        name = f"prefix cache: {found / traffic.input_tokens:.0%} of each prompt"
        needs = f"prompts of which the first {found:,} tokens came before"
        yield Change(name, "", _traffic(cached_tokens=found), SAME, needs)
    if traffic.cached_tokens:
        name = f"no prefix cache (now {traffic.cached_tokens / traffic.input_tokens:.0%})"
        yield Change(name, "", _traffic(cached_tokens=0), SAME)


def batches(asked: Request, now: Served) -> Iterator[Change]:
    """Of the same steps: fewer requests in flight, as many as are in time, and as many as memory holds."""
    if asked.now.batch is not None:
        yield Change("batch: as large as is in time", "batch", _deployed(batch=None), SAME)
    if now.batch > 2:
        yield Change(f"batch: half, {now.batch / 2:.3g}", "", _deployed(batch=now.batch / 2), SAME)
    if not now.missed:
        yield Change("batch: all that memory holds", "", _deployed(batch=None, in_time=False), SAME)


def meshes(now: Wanted, chips: int) -> Iterator[Change]:
    """Twice and half as many chips a replica."""
    yield Change("twice the chips a replica", "mesh", lambda one: replace(one, times=now.times * 2), SAME)
    if chips > 1:
        yield Change("half the chips a replica", "mesh", lambda one: replace(one, times=now.times / 2), SAME)
