"""Driver 7: what fewer bits and a taught, smaller model save, and what they cost in quality.

    python -m stepbill.experiments.drivers.quantization --target=h200

The bill is of the real model with its weights, its cache and its activations in few bits (round to nearest, see
model/quantized.py); the quality beside it is that of the small models of experiments/quality.py, kept in the same ways.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling.assumptions import Assumptions
from .. import flags, quality
from ..flags import UsageError
from ..perplexity import Way
from ..quality import Measured, Model, Quality, Uncertain
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value
from .model_size import Pair, dense, per_million, scaled, unit
from .smaller import SEEDS, TRANSFER
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

BF16, INT8, INT4 = quality.WAYS[:3]
MOST = {INT8: 0.55, INT4: 0.30}  # of the price of bf16 that counts as half and as a quarter
LOSS = 0.01  # of the bits a byte: what still counts as no loss
CLAIM = (
    "Fewer bits are nearly free: int8 weights halve the price of an output token and int4 weights quarter it, at next "
    "to no loss of quality."
)


def _define(to: flags.Definer) -> None:
    quality.define_quality(to)
    to.count("batch", 32, "sequences that are decoded together, beside one alone")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")


# --- the choices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One way to make the model cheaper: its steps, and the small model that was measured in the same way."""

    name: str
    pair: Pair
    measured: Measured

    @property
    def alone(self) -> Point:
        """The decode step of one sequence, on the same chips."""
        return replace(self.pair.decode, batch=1)

    @property
    def points(self) -> tuple[Point, ...]:
        return (*self.pair, self.alone)


def _said(way: Way) -> str:
    """`int8 weights, int8 cache`."""
    parts = {"weights": way.weights, "cache": way.cache_dtype, "activations": way.activations}
    few = [f"{value} {what}" for what, value in parts.items() if value not in (flags.BF16, "full")]
    return ", ".join(few) or flags.BF16


def _choices(values: FlagValues, trained: Quality) -> tuple[list[Choice], list[Choice]]:
    """The model in each way that was measured, the first as it is; and smaller models, alone and taught."""
    require_times(values.target)
    base, largest = dense(values), trained.ladder[0]

    def choice(name: str, config: "ModelConfig", measured: Measured) -> Choice:
        return Choice(name, Pair.of(config, values), measured)

    ways = [
        choice(_said(row.way), replace(base, **row.way.changes), row)  # pyright: ignore[reportArgumentType]
        for row in largest.rows
    ]
    smaller = []
    for taught, alone, teacher in trained.taught:
        config = scaled(base, taught.width / largest.width)
        if config.parameters >= base.parameters:
            raise UsageError(f"--model={base.name}: it must be wide enough to be made {taught.width}/{largest.width}")
        share = f"{taught.width}/{largest.width} of the width"
        smaller.append(choice(f"{share}, alone", config, alone.plain))
        smaller.append(choice(f"{share}, taught by {teacher.name}", config, taught.plain))
    return ways, smaller


def _points(values: FlagValues) -> list[Point]:
    ways, smaller = _choices(values, quality.read(values.quality))
    return [point for choice in (*ways, *smaller) for point in choice.points]


# --- the finding ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A choice with its prices, as of `per_million`, and how many bits a byte more it takes than the model as it is."""

    choice: Choice
    chips: int
    weights_bytes: int
    input: float
    output: float
    output_alone: float
    more: Uncertain

    def beats(self, other: "Judged") -> bool:
        """No dearer and no worse, and one of both better."""
        mine, theirs = ((one.output, one.more.value) for one in (self, other))
        return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def _judged(choice: Choice, bills: Bills, first: Measured) -> Judged:
    prefill, decode, alone = (bill(bills, point) for point in choice.points)
    return Judged(
        choice,
        decode.program["chips"],
        alone.total.hbm_read.get("weights", 0) * alone.program["chips"],
        per_million(prefill, choice.pair.prefill.context),
        per_million(decode, choice.pair.decode.batch or 1),
        per_million(alone, 1),
        choice.measured.more_than(first),
    )


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    trained = quality.read(values.quality)
    ways, smaller = _choices(values, trained)
    plain = trained.ladder[0].plain
    judged = [_judged(choice, bills, plain) for choice in (*ways, *smaller)]
    money = unit([bill(bills, choice.pair.decode) for choice in ways])
    first = judged[0]
    holds, evidence = _verdict(judged, plain, values.batch)
    same = _same_bytes(trained)
    evidence += "".join(f" {sentence}" for sentence in (same, *map(_lesson, trained.taught)) if sentence)
    cheapest = min(judged[: len(ways)], key=lambda one: one.output)
    return Finding(
        "quantization",
        QUANTIZATION.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        QUANTIZATION.command(values),
        tables=(
            _saved(judged, values.batch, money),
            _frontier(judged),
            _taught(trained),
            _kept(trained),
            _published(known),
        ),
        plots=_plots(judged, len(ways), trained),
        notes=(
            f"{TRANSFER} ({trained})",
            "few bits are rounded to nearest after training, with a scale for each channel (int8) or group (int4); "
            "methods that correct for it lose less",
            f"half and a quarter: at most {MOST[INT8]:.0%} and {MOST[INT4]:.0%} of the price, alone and at batch "
            f"{values.batch}; next to no loss: at most {LOSS:.0%} more bits a byte",
            "int8 activations change prompts alone; an int8 cache has a scale for each head and position",
            "seconds and dollars are at the roofline: a lower bound",
            SEEDS,
        ),
        headline=f"{cheapest.choice.name}: {cheapest.output / first.output:.0%} of the price of an output token",
        factor=first.output / cheapest.output,
    )


def _verdict(judged: Sequence[Judged], plain: Measured, batch: int) -> tuple[bool | None, str]:
    """By int8 and int4 weights alone."""
    first, texts, holds = judged[0], [], []
    for way, most in MOST.items():
        one = next((one for one in judged if one.choice.measured.way == way), None)
        if one is None:
            return None, f"{_said(way)} were not measured"
        alone, together = one.output_alone / first.output_alone, one.output / first.output
        holds += [alone <= most, together <= most, one.more.value <= LOSS * plain.bits_per_byte.value]
        texts.append(
            f"{_said(way)}: {alone:.0%} of the price of an output token for one sequence, {together:.0%} at batch "
            f"{batch}, {one.input / first.input:.0%} of an input token's, and {one.more} bits a byte"
        )
    return all(holds), f"{'; '.join(texts)} (of {plain.bits_per_byte.value:.3f})."


def _same_bytes(trained: Quality) -> str:
    """The largest in int4 against the smaller one whose bf16 takes about as many bytes."""
    largest = trained.ladder[0]
    few = largest.in_way(INT4)
    if few is None:
        return ""
    rival = min(trained.ladder[1:], key=lambda one: abs(math.log(one.plain.weights_bytes / few.weights_bytes)))
    return (
        f"In {few.weights_bytes / 1e6:.2f} MB the largest trained model with {_said(INT4)} takes "
        f"{few.more_than(rival.plain)} bits a byte against {rival.name} in bf16 with "
        f"{rival.plain.weights_bytes / 1e6:.2f} MB."
    )


def _lesson(three: tuple[Model, Model, Model]) -> str:
    taught, alone, teacher = three
    return (
        f"Taught by {teacher.name}, {alone.name} takes {taught.plain.more_than(alone.plain)} bits a byte against the "
        f"same alone, and {taught.plain.more_than(teacher.plain)} against its teacher."
    )


def _saved(judged: Sequence[Judged], batch: int, money: str) -> Table:
    first = judged[0]
    columns = (
        *(Quantity("choice"), Quantity("chips"), Quantity("weights", "B"), Quantity("1M in", money)),
        *(Quantity("1M out, alone", money), Quantity(f"1M out, batch {batch}", money)),
        *(Quantity("in, of bf16", "%"), Quantity("out alone, of bf16", "%"), Quantity("out, of bf16", "%")),
    )
    rows = tuple(
        (
            *(one.choice.name, one.chips, one.weights_bytes, one.input, one.output_alone, one.output),
            *(one.input / first.input, one.output_alone / first.output_alone, one.output / first.output),
        )
        for one in judged
    )
    commands = tuple(one.choice.pair.decode.command for one in judged)
    return Table(f"What it saves of {first.choice.pair.decode.config.name}", columns, rows, commands)


def _frontier(judged: Sequence[Judged]) -> Table:
    """Cost against quality: which no other one beats in both."""
    columns = (
        *(Quantity("choice"), Quantity("output token, of bf16", "%"), Quantity("held-out text", "bits/B")),
        *(Quantity("standard error", "bits/B"), Quantity("more", "bits/B"), Quantity("± of that", "bits/B")),
        Quantity("beaten by"),
    )
    rows: list[tuple[Value, ...]] = []
    for one in sorted(judged, key=lambda one: one.output):
        better = min((other for other in judged if other.beats(one)), key=lambda other: other.output, default=None)
        rows.append(
            (
                *(one.choice.name, one.output / judged[0].output, *one.choice.measured.bits_per_byte, *one.more),
                better.choice.name if better else "nothing",
            )
        )
    return Table("Price of the model against quality of the small one", columns, tuple(rows))


def _taught(trained: Quality) -> Table:
    columns = (
        *(Quantity("trained here"), Quantity("parameters"), Quantity("FLOPs of training", "x")),
        *(Quantity("held-out text", "bits/B"), Quantity("standard error", "bits/B")),
        *(Quantity("more than alone", "bits/B"), Quantity("± of that", "bits/B")),
    )
    rows: list[tuple[Value, ...]] = []
    for taught, alone, teacher in trained.taught:
        # Six FLOPs a parameter and token to learn, two to be asked.
        dearer = 1 + 2 * teacher.parameters / (6 * taught.parameters)
        for one, times in ((teacher, teacher.parameters / alone.parameters), (alone, 1.0), (taught, dearer)):
            more = (None, None) if one is alone else one.plain.more_than(alone.plain)
            rows.append((one.name, one.parameters, times, *one.plain.bits_per_byte, *more))
    return Table("A student beside its teacher, and alone", columns, tuple(rows))


def _kept(trained: Quality) -> Table:
    """Every model that was trained in every way."""
    columns = (
        *(Quantity("trained here"), Quantity("kept as"), Quantity("weights", "B"), Quantity("held-out text", "bits/B")),
        *(Quantity("standard error", "bits/B"), Quantity("more than bf16", "bits/B"), Quantity("± of that", "bits/B")),
    )
    rows: list[tuple[Value, ...]] = []
    for model in trained.models:
        for row in model.rows:
            more = (None, None) if row is model.plain else row.more_than(model.plain)
            rows.append((model.name, _said(row.way), row.weights_bytes, *row.bits_per_byte, *more))
    return Table("What was measured", columns, tuple(rows))


def _published(known: Assumptions) -> Table:
    """Of a larger model, by others."""
    said = {"f16": "f16", "q8_0": "8 bits, groups of 32", "q4_0": "4 bits, groups of 32"}
    found = {name: known.number(f"quality.open_llama_3b.{name}") for name in said}
    columns = (Quantity("weights"), Quantity("perplexity of a token"), Quantity("more", "bits/token"))
    rows = tuple((said[name], value, math.log2(value / found["f16"])) for name, value in found.items())
    return Table("Published, apart: OpenLLaMA 3B v2 in llama.cpp", columns, rows)


def _plots(judged: Sequence[Judged], ways: int, trained: Quality) -> tuple[Plot, ...]:
    first = judged[0].output
    price, loss = Quantity("output token, of bf16", "x"), Quantity("more than bf16", "bits/B")
    dots = {one.choice.name: ((one.output / first, one.more.value),) for one in judged}
    by_way: dict[str, list[tuple[float, float]]] = {}
    for model in trained.ladder:
        for row in model.rows:
            if row.way.cache_dtype == flags.BF16:
                by_way.setdefault(_said(row.way), []).append((row.weights_bytes, row.bits_per_byte.value))
    lines = {name: tuple(line) for name, line in by_way.items()}
    lines["taught, bf16"] = tuple((t.plain.weights_bytes, t.plain.bits_per_byte.value) for t, _, _ in trained.taught)
    return (
        Plot("Price against quality", price, loss, dots, log_x=False, log_y=False),
        Plot(
            "The trained models in few bits",
            Quantity("weights", "B"),
            Quantity("held-out text", "bits/B"),
            {name: line for name, line in lines.items() if line},
            log_y=False,
        ),
    )


QUANTIZATION = Driver(
    "quantization",
    "What do fewer bits, and a smaller model that was taught, save and cost?",
    _define,
    _points,
    _find,
    "llama3-8b",
)
main = QUANTIZATION.main

if __name__ == "__main__":
    sys.exit(main())
