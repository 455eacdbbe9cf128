"""Driver 7: what fewer bits and a taught, smaller model save, and what they cost in quality.

    python -m stepbill.experiments.drivers.quantization --target=h200

Price and quality on one plot are of the same models: those of experiments/quality.py, each compiled, billed and
measured in every way. Beside it the bill of the real model with its weights, its cache and its activations in few bits
(round to nearest, see model/quantized.py), whose quality is not measured here; what others have published stands apart.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from absl.flags import FlagValues

from ...profiling.assumptions import Assumptions
from .. import flags, quality
from ..flags import UsageError
from ..perplexity import Way
from ..quality import Measured, Model, Quality, Uncertain
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value
from .model_size import Pair, dense, per_million, scaled, unit
from .smaller import SEEDS, TRANSFER, trained_step
from .sweep import Point

BF16, INT8, INT4 = quality.WAYS[:3]
INT8_CACHE, INT8_ALL, INT4_AND_CACHE = Way(cache_dtype="int8"), Way("int8", "int8", "int8"), Way("int4:128", "int8")
WAYS = (BF16, INT8, INT4, INT8_CACHE, INT8_ALL, INT4_AND_CACHE)  # that are billed
READ = (
    BF16,
    INT4,
    INT8_ALL,
)  # of which a prompt of the real model is billed, too: a cache in few bits changes little of it
MOST = {INT8: 0.55, INT4: 0.30}  # of the price of bf16 that counts as half and as a quarter
LOSS = 0.01  # of the bits a byte: what still counts as no loss
PUBLISHED = {"f16": "16 bits", "q8_0": "8 bits, groups of 32", "q4_0": "4 bits, groups of 32"}
CLAIM = (
    "Fewer bits are nearly free: int8 weights halve the price of an output token and int4 weights quarter it, at next "
    "to no loss of quality."
)


def _define(to: flags.Definer) -> None:
    quality.define_quality(to)
    to.count("batch", 32, "sequences that are decoded together, beside one alone")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")


# --- the real model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One way to make the real model cheaper: its decode step, and its prefill where that is billed, too."""

    name: str
    decode: Point
    prefill: Point | None = None

    @property
    def alone(self) -> Point:
        """The decode step of one sequence, on the same chips."""
        return replace(self.decode, batch=1)

    @property
    def points(self) -> tuple[Point, ...]:
        return self.decode, self.alone, *([self.prefill] if self.prefill else [])


@dataclass(frozen=True)
class Saving:
    """A choice with its prices, as of `per_million`."""

    choice: Choice
    chips: int
    weights_bytes: int
    input: float | None
    output: float
    output_alone: float

    @classmethod
    def of(cls, choice: Choice, bills: Bills) -> "Saving":
        decode, alone = bill(bills, choice.decode), bill(bills, choice.alone)
        prefill = choice.prefill
        return cls(
            choice,
            decode.program["chips"],
            alone.total.hbm_read.get("weights", 0) * alone.program["chips"],
            per_million(bill(bills, prefill), prefill.context) if prefill else None,
            per_million(decode, choice.decode.batch or 1),
            per_million(alone, 1),
        )


def _said(way: Way) -> str:
    """`int8 weights, cache`; `int4:128 weights, int8 cache`."""
    parts = {"weights": way.weights, "cache": way.cache_dtype, "activations": way.activations}
    few: dict[str, list[str]] = {}
    for what, value in parts.items():
        if value not in (flags.BF16, "full"):
            few.setdefault(value, []).append(what)
    return ", ".join(f"{value} {', '.join(what)}" for value, what in few.items()) or flags.BF16


def _choices(values: FlagValues, trained: Quality) -> dict[Way | None, Choice]:
    """The model in each way, the first as it is; and as much smaller as the trained student (no way)."""
    require_times(values.target)
    base = dense(values)
    found: dict[Way | None, Choice] = {}
    for way in WAYS:
        pair = Pair.of(replace(base, **way.changes), values)  # pyright: ignore[reportArgumentType]
        found[way] = Choice(_said(way), pair.decode, pair.prefill if way in READ else None)
    student = next((taught for taught, _, _ in trained.taught), None)
    if student is not None:
        largest = trained.ladder[0]
        config = scaled(base, student.width / largest.width)
        if config.parameters >= base.parameters:
            raise UsageError(f"--model={base.name}: it must be wide enough to be made {student.width}/{largest.width}")
        pair = Pair.of(config, values)
        found[None] = Choice(f"{student.width}/{largest.width} of the width", pair.decode, pair.prefill)
    return found


# --- the trained models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A model that was trained here, kept in one way: its step, and what was measured of it."""

    model: Model
    row: Measured
    step: Point

    @property
    def name(self) -> str:
        return f"{self.model.name}, {_said(self.row.way)}"

    @property
    def bits(self) -> float:
        return self.row.bits_per_byte.value


def _all_trained(values: FlagValues, trained: Quality) -> list[Trained]:
    """Every model in each of WAYS in which it was measured, the largest as it is first."""
    models = sorted(trained.models, key=lambda model: -model.parameters)
    return [
        Trained(model, row, trained_step(trained, model, values.target, row.way))
        for model in models
        for row in model.rows
        if row.way in WAYS
    ]


def _best(rows: Sequence[tuple[Trained, float]]) -> list[tuple[Trained, float]]:
    """Those, with their prices, that no other beats in price and quality: the Pareto front, from the cheapest on."""
    front: list[tuple[Trained, float]] = []
    for one, price in sorted(rows, key=lambda row: (row[1], row[0].bits)):
        if not front or one.bits < front[-1][0].bits:
            front.append((one, price))
    return front


def _points(values: FlagValues) -> list[Point]:
    trained = quality.read(values.quality)
    real = [point for choice in _choices(values, trained).values() for point in choice.points]
    return [*real, *(one.step for one in _all_trained(values, trained))]


# --- the finding ---------------------------------------------------------------------------------------------------


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    trained = quality.read(values.quality)
    savings = {way: Saving.of(choice, bills) for way, choice in _choices(values, trained).items()}
    rows = [(one, per_million(bill(bills, one.step), 1)) for one in _all_trained(values, trained)]
    first, largest = savings[BF16], trained.ladder[0]
    name = first.choice.decode.config.name
    money = unit([bill(bills, first.choice.decode), *(bill(bills, one.step) for one, _ in rows)])
    holds, evidence = _verdict(savings, rows, name, values.batch)
    front = _best(rows)
    evidence += f" {_front_said(front, rows)}"
    evidence += "".join(f" {_lesson(three)}" for three in trained.taught)
    cheapest = min((saving for way, saving in savings.items() if way), key=lambda one: one.output)
    return Finding(
        "quantization",
        QUANTIZATION.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        QUANTIZATION.command(values),
        tables=(
            _saved(list(savings.values()), name, values.batch, money),
            _frontier(rows, front, money),
            _taught(trained),
            _published(known),
        ),
        plots=_plots(rows, front, [savings[way] for way in (BF16, INT8, INT4)], name, values.batch, money),
        notes=(
            f"{TRANSFER} ({trained})",
            f"{name}: its price is billed, its quality was not measured; a decode step has {values.batch} sequences, "
            f"or one alone, with {values.context:,} positions each",
            f"trained models: their price is of one sequence with {trained.context} positions; their kernels are so "
            "small that in truth launching them takes longer than the roofline says",
            "few bits are rounded to nearest after training, with a scale for each channel (int8) or group (int4); "
            "methods that correct for it lose less",
            f"half and a quarter: at most {MOST[INT8]:.0%} and {MOST[INT4]:.0%} of the price of {name}, alone and at "
            f"batch {values.batch}; next to no loss: at most {LOSS:.0%} more bits a byte of {largest.name}",
            "int8 activations change prompts alone; an int8 cache has a scale for each head and position",
            "seconds and dollars are at the roofline: a lower bound",
            SEEDS,
        ),
        headline=f"{cheapest.choice.name}: {cheapest.output / first.output:.0%} of the price of an output token",
        factor=first.output / cheapest.output,
    )


def _verdict(
    savings: dict[Way | None, Saving], rows: Sequence[tuple[Trained, float]], name: str, batch: int
) -> tuple[bool | None, str]:
    """By int8 and int4 weights alone: the price of the real model, the quality of the largest that was trained."""
    first, prices, losses, holds = savings[BF16], [], [], []
    largest, at_first = rows[0][0].model, rows[0][1]
    plain = largest.plain
    for way, most in MOST.items():
        alone = savings[way].output_alone / first.output_alone
        together = savings[way].output / first.output
        prices.append(f"{_said(way)} cost {alone:.0%} for one sequence and {together:.0%} at batch {batch}")
        holds += [alone <= most, together <= most]
        row = largest.in_way(way)
        if row is not None:
            more = row.more_than(plain)
            price = next(price for one, price in rows if one.model is largest and one.row is row)
            losses.append(f"{more} bits a byte in {_said(way)} at {price / at_first:.0%} of the price")
            holds.append(more.value <= LOSS * plain.bits_per_byte.value)
    sentence = f"Of an output token's price of {name} {'; '.join(prices)}."
    if len(losses) < len(MOST):
        return None, f"{sentence} What that does to quality was not measured."
    return all(holds), (
        f"{sentence} Of {largest.name}, of {largest.parameters / 1e6:.2f} million parameters, trained here: "
        f"{', '.join(losses)} (of {plain.bits_per_byte.value:.3f})."
    )


def _front_said(front: Sequence[tuple[Trained, float]], rows: Sequence[tuple[Trained, float]]) -> str:
    weights = Counter(one.row.way.weights for one, _ in front)
    parts = " and ".join(f"{count} in {name}" for name, count in weights.most_common())
    return f"Of {len(rows)} trained choices {len(front)} are beaten by none in price and quality at once: {parts}."


def _lesson(three: tuple[Model, Model, Model]) -> str:
    taught, alone, teacher = three
    return (
        f"Taught by {teacher.name}, {alone.name} takes {taught.plain.more_than(alone.plain)} bits a byte against the "
        f"same alone, and {taught.plain.more_than(teacher.plain)} against its teacher."
    )


def _saved(savings: Sequence[Saving], name: str, batch: int, money: str) -> Table:
    first = savings[0]
    columns = (
        *(Quantity("choice"), Quantity("chips"), Quantity("weights", "B"), Quantity("1M in", money)),
        *(Quantity("1M out, alone", money), Quantity(f"1M out, batch {batch}", money)),
        *(Quantity("in, of bf16", "%"), Quantity("out alone, of bf16", "%"), Quantity("out, of bf16", "%")),
    )
    rows: list[tuple[Value, ...]] = []
    for one in savings:
        of_input = None if one.input is None or first.input is None else one.input / first.input
        rows.append(
            (
                *(one.choice.name, one.chips, one.weights_bytes, one.input, one.output_alone, one.output),
                *(of_input, one.output_alone / first.output_alone, one.output / first.output),
            )
        )
    commands = tuple(one.choice.decode.command for one in savings)
    return Table(f"What it saves of {name}: quality at this size not measured here", columns, tuple(rows), commands)


def _frontier(rows: Sequence[tuple[Trained, float]], front: Sequence[tuple[Trained, float]], money: str) -> Table:
    """Price against quality of the same models: which no other one beats in both."""
    columns = (
        *(Quantity("trained here"), Quantity("kept as"), Quantity("weights", "B"), Quantity("1M out", money)),
        *(Quantity("of the first", "%"), Quantity("held-out text", "bits/B"), Quantity("standard error", "bits/B")),
        *(Quantity("more than its bf16", "bits/B"), Quantity("± of that", "bits/B"), Quantity("beaten by")),
    )
    table: list[tuple[Value, ...]] = []
    ordered = sorted(rows, key=lambda row: -row[1])
    for one, price in ordered:
        plain = one.model.plain
        more = Uncertain(0.0, 0.0) if one.row is plain else one.row.more_than(plain)
        better = [best for best, at in front if at <= price and best.bits <= one.bits]
        beaten = "nothing" if any(best is one for best, _ in front) or not better else better[-1].name
        table.append(
            (
                *(one.model.name, _said(one.row.way), one.row.weights_bytes, price, price / rows[0][1]),
                *(*one.row.bits_per_byte, *more, beaten),
            )
        )
    commands = tuple(one.step.command for one, _ in ordered)
    return Table("Price and quality of the models that were trained here", columns, tuple(table), commands)


def _taught(trained: Quality) -> Table:
    columns = (
        *(Quantity("trained here"), Quantity("size", "params"), Quantity("FLOPs of training", "x")),
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


def _published(known: Assumptions) -> Table:
    """Of larger models, by others."""
    columns = (
        *(Quantity("model"), Quantity("weights"), Quantity("perplexity of a token")),
        *(Quantity("of 16 bits", "x"), Quantity("more", "bits/token")),
    )
    rows: list[tuple[Value, ...]] = []
    for name, said in (("llama3_8b", "Llama 3 8B"), ("open_llama_3b", "OpenLLaMA 3B v2")):
        found = {bits: known.number(f"quality.{name}.{bits}") for bits in PUBLISHED}
        for bits, value in found.items():
            rows.append((said, PUBLISHED[bits], value, value / found["f16"], math.log2(value / found["f16"])))
    return Table("Published, apart: of llama.cpp on wikitext-2", columns, tuple(rows))


def _plots(
    rows: Sequence[tuple[Trained, float]],
    front: Sequence[tuple[Trained, float]],
    few: Sequence[Saving],
    name: str,
    batch: int,
    money: str,
) -> tuple[Plot, ...]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for one, price in sorted(rows, key=lambda row: row[1]):
        line = _said(one.row.way) if one.model.teacher is None else "taught, in all ways"
        lines.setdefault(line, []).append((price, one.bits))
    lines["beaten by none"] = [(price, one.bits) for one, price in front]
    by_bytes = sorted(few, key=lambda one: one.weights_bytes)
    prices = {
        "one sequence": tuple((one.weights_bytes, one.output_alone) for one in by_bytes),
        f"batch {batch}": tuple((one.weights_bytes, one.output) for one in by_bytes),
    }
    return (
        Plot(
            "Price against quality, of the models trained here",
            Quantity("1M output tokens, alone", money),
            Quantity("held-out text", "bits/B"),
            {line: tuple(found) for line, found in lines.items()},
            log_y=False,
        ),
        Plot(f"Price of {name} in few bits", Quantity("weights", "B"), Quantity("1M output tokens", money), prices),
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
