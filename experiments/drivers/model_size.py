"""Driver 1: what a larger model costs.

    python -m stepbill.experiments.drivers.model_size --target=h200
    python -m stepbill.experiments.drivers.model_size --models=llama3-8b,llama3-70b,llama3-405b
    python -m stepbill.experiments.drivers.model_size --models=gpt2-small,gpt2-medium,gpt2-large,gpt2-xl --context=1024

Published models from small to large, each on as few chips as hold it; and one model of which only the layers, only the
heads, or the whole width change.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, PowerLaw, Quantity, Table, Value, power_law
from .serving import fewest_chips
from .sweep import Point, Refusal

if TYPE_CHECKING:
    from ...model.config import ModelConfig

MODELS = "qwen3-0.6b,gemma-2b,llama3-8b,llama3-70b"
# Of the one dimension that changes; compiling takes as long as there are layers.
FEWER, FACTORS = (0.25, 0.5, 1.0), (0.5, 1.0, 2.0)
NEAR = 0.05  # of an exponent of 1: what still counts as in proportion
CLAIM = (
    "What a token costs is in proportion to the parameters of the model that makes it: two FLOPs for each, and dollars "
    "alike."
)


# --- the steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A model's two steps: reading a prompt, and a token each for several sequences."""

    prefill: Point
    decode: Point

    def __iter__(self) -> Iterator[Point]:
        yield from (self.prefill, self.decode)

    @classmethod
    def of(cls, config: "ModelConfig", values: FlagValues) -> "Pair":
        """On as few chips as hold the decode step; UsageError where it fits on none, or takes no such context."""
        if values.context > config.max_context and config.positions == "learned":
            raise UsageError(f"--context={values.context}: {config.name} takes 1 to {config.max_context} positions")
        config = replace(config, max_context=max(values.context, config.max_context))
        mesh = fewest_chips(config, values.target, values.batch, values.context)
        decode = Point(config, "decode", values.batch, values.context, values.target, mesh)
        return cls(replace(decode, step="prefill", batch=1), decode)


@dataclass(frozen=True)
class Costs:
    """What bills say of a token that is read and of one that is written, over all chips.

    input, output: dollars for a million; at chips without a price, chip-seconds for a million.
    """

    config: "ModelConfig"
    chips: int
    input_flops: float
    output_flops: float
    output_bytes: float
    weights_bytes: float
    link_bytes: float
    linked: float  # share of a decode step's time that links take
    cached: float  # share of its bytes that are the cache's
    input: float
    output: float

    @classmethod
    def of(cls, pair: Pair, bills: Bills) -> "Costs":
        prefill, decode = bill(bills, pair.prefill), bill(bills, pair.decode)
        chips, batch = decode.program["chips"], pair.decode.batch or 1
        per_second = targets.chip(pair.decode.target).link_bytes_per_second
        linking = decode.total.link_bytes / per_second if per_second else 0.0
        return cls(
            pair.decode.config,
            chips,
            prefill.total.matmul * chips / pair.prefill.context,
            decode.total.matmul * chips / batch,
            decode.total.hbm_bytes * chips / batch,
            decode.total.hbm_read.get("weights", 0) * chips / batch,
            decode.total.link_bytes * chips / batch,
            linking / decode.total.seconds,
            decode.group("cache").hbm_bytes / decode.total.hbm_bytes,
            per_million(prefill, pair.prefill.context),
            per_million(decode, batch),
        )

    @property
    def size(self) -> int:
        """Parameters that one token meets."""
        return self.config.active_parameters

    @property
    def per_parameter(self) -> float:
        """FLOPs of a token of a prompt for each of them: two, if each is multiplied once, and nothing else is."""
        return self.input_flops / self.size


def per_million(one: Bill, tokens: int) -> float:
    """Dollars for a million tokens of a step that handles `tokens`; at chips without a price, chip-seconds."""
    dollars = one.price.get("dollars_per_million_tokens")
    return one.total.seconds * one.program["chips"] / tokens * 1e6 if dollars is None else dollars


def unit(known: Sequence[Bill]) -> str:
    """Of `per_million`."""
    return "$" if all(one.price.get("dollars_per_million_tokens") is not None for one in known) else "chip s"


def scaled(config: "ModelConfig", factor: float) -> "ModelConfig":
    """The same with its width, heads and feed-forward width times `factor`; layers, vocabulary, the width of a head and
    the query heads to a key/value head stay. Rounded to whole heads and, of the widths, to multiples of a head's."""
    H, G = config.head_width, config.queries_per_kv_head

    def nearest(size: int, multiple: int) -> int:
        return max(1, round(size * factor / multiple)) * multiple

    if factor == 1:
        return config
    N = nearest(config.num_heads, G)
    sizes = {"width": nearest(config.width, H), "num_heads": N, "num_kv_heads": N // G}
    sizes["mlp_width"] = nearest(config.mlp_width, H)
    return renamed(config, f"width x {factor:.3g}", **sizes)


def renamed(config: "ModelConfig", said: str, **sizes: int) -> "ModelConfig":
    """With other sizes, which its name says after that of the architecture."""
    return replace(config, **sizes, name=f"{config.name} ({said})")  # pyright: ignore[reportArgumentType]


def dense(values: FlagValues) -> "ModelConfig":
    """The model of --model; UsageError where it is none that one factor makes larger or smaller."""
    config = flags.model_config(values, "decode")
    if config.experts is not None or config.latent is not None:
        raise UsageError(f"--model={config.name}: it must be a dense model whose heads have keys of their own")
    return config


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.string("models", MODELS, "architectures, with commas: a ladder of sizes")
    to.count("batch", 32, "sequences that are decoded together")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")


def _models(values: FlagValues) -> "list[ModelConfig]":
    """From small to large; UsageError where --models has not two."""
    require_times(values.target)
    base = flags.model_config(values, "decode")
    found = []
    for name in dict.fromkeys(filter(None, values.models.split(","))):
        own = flags.parse([f"--model={name}"], lambda one: flags.define_model(flags.Definer(one)))
        try:
            config = flags.model_config(own, "decode")
        except UsageError as error:
            raise UsageError(f"--models={values.models}: {error}") from None
        found.append(replace(config, weights=base.weights, cache_dtype=base.cache_dtype))
    if len({config.active_parameters for config in found}) < 2:
        raise UsageError(f"--models={values.models}: it must be at least two models of different sizes")
    return sorted(found, key=lambda config: config.active_parameters)


def _ladder(values: FlagValues) -> tuple[list[Pair], list[str]]:
    """Those of --models that fit, and of the others why not."""
    pairs, misfits = [], []
    for config in _models(values):
        try:
            pairs.append(Pair.of(config, values))
        except UsageError as error:
            if "mesh" not in str(error):
                raise
            misfits.append(str(error))
    return pairs, misfits


def _changed(values: FlagValues) -> dict[str, dict[float, Pair]]:
    """What is changed of --model -> by which factor -> its steps."""
    base = dense(values)

    def layers(factor: float) -> "ModelConfig":
        count = max(1, round(base.num_layers * factor))
        return base if factor == 1 else renamed(base, f"layers x {factor:g}", num_layers=count)

    def heads(factor: float) -> "ModelConfig":
        K = max(1, round(base.num_kv_heads * factor))
        sizes = {"num_heads": K * base.queries_per_kv_head, "num_kv_heads": K, "head_width": base.head_width}
        return base if factor == 1 else renamed(base, f"heads x {factor:g}", **sizes)

    ways = {
        "layers": (layers, FEWER),
        "width, heads and all": (lambda factor: scaled(base, factor), FACTORS),
        "heads alone": (heads, FACTORS),
    }
    return {
        what: {factor: Pair.of(make(factor), values) for factor in factors} for what, (make, factors) in ways.items()
    }


def _points(values: FlagValues) -> list[Point]:
    pairs = [*_ladder(values)[0], *(pair for changed in _changed(values).values() for pair in changed.values())]
    return [point for pair in pairs for point in pair]


# --- the finding ---------------------------------------------------------------------------------------------------


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    del known
    (asked, misfits), changed = _ladder(values), _changed(values)
    for pair in asked:
        misfits += [refused.text for one in pair if isinstance(refused := bills[one], Refusal)]
    pairs = [pair for pair in asked if all(isinstance(bills[one], Bill) for one in pair)]
    ladder = [Costs.of(pair, bills) for pair in pairs]
    if len({one.size for one in ladder}) < 2:
        raise UsageError(f"--models={values.models}: it must be two that fit at least: {'; '.join(misfits)}")
    money = unit([bill(bills, pair.decode) for pair in pairs])
    lines = {
        "FLOPs of an input token": [(one.size, one.input_flops) for one in ladder],
        "HBM bytes of an output token": [(one.size, one.output_bytes) for one in ladder],
        f"{money} of an input token": [(one.size, one.input) for one in ladder],
        f"{money} of an output token": [(one.size, one.output) for one in ladder],
    }
    fits = {f"{name} over the models": power_law(line) for name, line in lines.items()}
    of_flops, _, of_input, of_output = fits.values()
    small, large = ladder[0], ladder[-1]
    widest = max(ladder, key=lambda one: abs(one.per_parameter - 2))
    holds = all(_is_near(law) for law in (of_flops, of_input, of_output))
    evidence = (
        f"From {small.size / 1e9:.3g} to {large.size / 1e9:.4g} billion parameters, {large.size / small.size:,.0f} "
        f"times, an input token's FLOPs grow {large.input_flops / small.input_flops:,.0f} times (exponent "
        f"{of_flops.exponent:.3f}) and its price {large.input / small.input:,.0f} times ({of_input.exponent:.3f}); an "
        f"output token's price grows {large.output / small.output:,.0f} times ({of_output.exponent:.3f}) at batch "
        f"{values.batch}, where caches are {small.cached:.0%} of the bytes of {small.config.name} and "
        f"{large.cached:.0%} of {large.config.name}'s. Furthest from two FLOPs a parameter is "
        f"{widest.config.name} with {widest.per_parameter:.2f}{_links(large)}."
    )
    sweeps = {
        what: {factor: Costs.of(pair, bills) for factor, pair in by_factor.items()}
        for what, by_factor in changed.items()
    }
    for what, by_factor in sweeps.items():
        fits[f"{money} of an output token over {what}"] = power_law([(f, one.output) for f, one in by_factor.items()])
    return Finding(
        "model_size",
        MODEL_SIZE.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        MODEL_SIZE.command(values),
        tables=(
            _priced(pairs, ladder, values.batch, money),
            _parts(pairs, ladder, bills),
            _sweeps(changed, sweeps, money),
        ),
        plots=_plots(lines, sweeps, money),
        fits=fits,
        notes=(
            f"a decode step has {values.batch} sequences with {values.context:,} positions each; the prompt as many",
            f"in proportion: an exponent within {NEAR:.0%} of 1, of FLOPs and of both prices",
            "seconds and dollars are at the roofline: a lower bound; chips are a power of two, as many as hold weights "
            "and caches by estimate",
            *(f"left out: {why}" for why in misfits),
            "parameters are those that a token meets, the embedding table included, of which it reads one row",
        ),
        headline=f"{large.size / small.size:,.0f} times the parameters, {large.output / small.output:,.0f} times the "
        "price of an output token",
        factor=large.output / small.output,
    )


def _links(one: Costs) -> str:
    if one.chips == 1:
        return ""
    return f"; {one.config.name} takes {one.chips} chips, and links {one.linked:.0%} of a decode step's time"


def _is_near(law: PowerLaw) -> bool:
    return abs(law.exponent - 1) <= NEAR


def _priced(pairs: Sequence[Pair], ladder: Sequence[Costs], batch: int, money: str) -> Table:
    columns = (
        *(Quantity("model"), Quantity("size", "params"), Quantity("chips")),
        *(Quantity("input token", "FLOP"), Quantity("a param", "FLOP")),
        *(Quantity("output token", "B"), Quantity("weights", "B")),
        *(Quantity("1M in", money), Quantity("1M out", money), Quantity("1M out a G params", money)),
    )
    rows = [
        (
            *(one.config.name, one.size, one.chips, one.input_flops, one.per_parameter),
            *(one.output_bytes, one.weights_bytes, one.input, one.output, one.output / one.size * 1e9),
        )
        for one in ladder
    ]
    commands = tuple(pair.decode.command for pair in pairs)
    return Table(f"A token by the size of the model, decoded {batch} at a time", columns, tuple(rows), commands)


def _parts(pairs: Sequence[Pair], ladder: Sequence[Costs], bills: Bills) -> Table:
    """Why a model is off the line."""
    columns = (
        *(Quantity("model"), Quantity("layers"), Quantity("width"), Quantity("heads")),
        *(Quantity("prompt: attention of FLOPs", "%"), Quantity("decode: logits of FLOPs", "%")),
        *(Quantity("cache of bytes", "%"), Quantity("links of time", "%"), Quantity("over links", "B")),
    )
    rows: list[tuple[Value, ...]] = []
    for pair, one in zip(pairs, ladder, strict=True):
        prefill, decode = bill(bills, pair.prefill), bill(bills, pair.decode)
        config = one.config
        rows.append(
            (
                *(config.name, config.num_layers, config.width, config.num_heads),
                prefill.component("attention/core").matmul / prefill.total.matmul,
                decode.component("logits").matmul / decode.total.matmul,
                *(one.cached, one.linked, one.link_bytes),
            )
        )
    commands = tuple(pair.prefill.command for pair in pairs)
    return Table("What is not in proportion", columns, tuple(rows), commands)


def _sweeps(
    changed: Mapping[str, Mapping[float, Pair]], sweeps: Mapping[str, Mapping[float, Costs]], money: str
) -> Table:
    columns = (
        *(Quantity("what changes"), Quantity("times", "x"), Quantity("size", "params"), Quantity("chips")),
        *(Quantity("input token", "FLOP"), Quantity("output token", "B")),
        *(Quantity("1M in", money), Quantity("1M out", money)),
    )
    rows, commands = [], []
    for what, by_factor in sweeps.items():
        for factor, one in by_factor.items():
            costs = (one.input_flops, one.output_bytes, one.input, one.output)
            rows.append((what, factor, one.size, one.chips, *costs))
            commands.append(changed[what][factor].decode.command)
    base = next(iter(sweeps.values()))[1.0].config.name
    return Table(f"One dimension of {base} at a time", columns, tuple(rows), tuple(commands))


def _plots(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    sweeps: Mapping[str, Mapping[float, Costs]],
    money: str,
) -> tuple[Plot, ...]:
    x = Quantity("parameters")
    drawn = {name: tuple(line) for name, line in lines.items()}
    work = dict(islice(drawn.items(), 2))
    prices = dict(islice(drawn.items(), 2, None))
    by_factor = {what: tuple((factor, one.output) for factor, one in found.items()) for what, found in sweeps.items()}
    return (
        Plot("Work of a token", x, Quantity("FLOPs, bytes"), work),
        Plot("A million tokens", x, Quantity("price", money), prices),
        Plot("One dimension at a time", Quantity("times", "x"), Quantity("1M output tokens", money), by_factor),
    )


MODEL_SIZE = Driver("model_size", "What does a larger model cost?", _define, _points, _find, "llama3-8b")
main = MODEL_SIZE.main

if __name__ == "__main__":
    sys.exit(main())
