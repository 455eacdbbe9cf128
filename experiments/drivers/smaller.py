"""Driver 14: what a smaller model saves, and what it costs in quality.

    python -m stepbill.experiments.drivers.smaller --target=h200

The model is made narrower as the small models of experiments/quality.py are, rung by rung: what that saves. Beside it
those small models, with their own bills and the quality that was measured of them. That a large model loses as much is
not shown.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from absl.flags import FlagValues

from ...profiling.assumptions import Assumptions
from .. import flags, quality
from ..flags import UsageError
from ..perplexity import Way
from ..quality import Model, Quality
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value, power_law
from .model_size import Costs, Pair, dense, per_million, scaled, unit
from .sweep import Point

NEAR = 0.1  # of an exponent of 1: a half of the size at 0.47 to 0.54 of the price
CLAIM = "Half the parameters are half the price of a token, read or written."
TRANSFER = (
    "quality was measured of models of at most a few million parameters, after a short training; that it goes the same "
    "way with large ones is not shown"
)

SEEDS = "a standard error is over batches of text; each model was trained once, so what chance did to it is not in it"


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    quality.define_quality(to)
    to.count("batch", 32, "sequences that are decoded together")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")


def rungs(values: FlagValues, trained: Quality) -> list[tuple[Model, Pair]]:
    """Each trained size with the steps of --model in the same proportion, from the largest on."""
    base, largest = dense(values), trained.ladder[0]
    found = []
    for model in trained.ladder:
        config = scaled(base, model.width / largest.width)
        if found and config.parameters >= found[-1][1].decode.config.parameters:
            raise UsageError(f"--model={base.name}: it must be wide enough to be made {model.width}/{largest.width}")
        found.append((model, Pair.of(config, values)))
    return found


def trained_step(trained: Quality, model: Model, target: str, way: Way = quality.WAYS[0]) -> Point:
    """One sequence's decode step of a model that was trained, with all positions that it was trained on in the cache;
    UsageError where its sizes make another model."""
    argv = [f"--{name}={size}" for name, size in model.sizes.items()]
    config = flags.model_config(flags.parse(argv, lambda own: flags.define_model(flags.Definer(own))), "decode")
    if config.parameters != model.parameters:
        parameters = f"{model.parameters:,} parameters, and sizes that make {config.parameters:,}"
        raise UsageError(f"--quality: model {model.name} has {parameters}")
    return Point(replace(config, **way.changes), "decode", 1, trained.context, target)  # pyright: ignore[reportArgumentType]


def _points(values: FlagValues) -> list[Point]:
    require_times(values.target)
    trained = quality.read(values.quality)
    small = [trained_step(trained, model, values.target) for model in trained.ladder]
    return [*small, *(point for _, pair in rungs(values, trained) for point in pair)]


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    trained = quality.read(values.quality)
    ladder = rungs(values, trained)
    costs = [Costs.of(pair, bills) for _, pair in ladder]
    money = unit([bill(bills, pair.decode) for _, pair in ladder])
    priced = {
        f"{money} of an input token": [(one.size, one.input) for one in costs],
        f"{money} of an output token": [(one.size, one.output) for one in costs],
    }
    fits = {name: power_law(line) for name, line in priced.items()}
    worst = [(model.parameters, model.plain.bits_per_byte.value) for model in trained.ladder]
    fits["bits a byte of the trained models"] = power_law(worst)
    # Of each step down: log price over log size.
    slopes = [
        (math.log(small.input / large.input) / size, math.log(small.output / large.output) / size)
        for large, small in pairwise(costs)
        if (size := math.log(small.size / large.size))
    ]
    holds = all(abs(slope - 1) <= NEAR for both in slopes for slope in both)
    (first, *_, last), (top, *_, bottom) = costs, trained.ladder
    lost = bottom.plain.more_than(top.plain)
    steps = [trained_step(trained, model, values.target) for model in trained.ladder]
    prices = [per_million(bill(bills, step), 1) for step in steps]
    of_input, of_output, _ = fits.values()
    halved = [2**-law.exponent for law in (of_input, of_output)]
    evidence = (
        f"By the fit half of {first.config.name} reads at {halved[0]:.0%} and writes at {halved[1]:.0%} of the price "
        f"(exponents {of_input.exponent:.3f} and {of_output.exponent:.3f}, batch {values.batch}); at "
        f"{last.size / first.size:.0%} of the parameters an output token costs {last.output / first.output:.0%}, for "
        f"caches, which shrink with the width and not its square, go from {first.cached:.0%} to {last.cached:.0%} of "
        f"the bytes. What {first.config.name} would lose was not measured here; the models that were trained here take "
        f"{lost} bits a byte more from {top.parameters / 1e6:.2f} down to {bottom.parameters / 1e6:.2f} million "
        f"parameters, at {prices[-1] / prices[0]:.0%} of the price."
    )
    return Finding(
        "smaller",
        SMALLER.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        SMALLER.command(values),
        tables=(
            _saved([pair for _, pair in ladder], costs, money),
            _measured(trained.ladder, steps, prices, money),
            _published(costs, known),
        ),
        plots=(
            Plot("Price of a million tokens", Quantity("parameters"), Quantity("price", money), _lines(priced)),
            Plot(
                "Price and quality of the models trained here",
                Quantity("1M output tokens, alone", money),
                Quantity("held-out text", "bits/B"),
                {"trained here": tuple(zip(prices, (bits for _, bits in worst), strict=True))},
                log_y=False,
            ),
        ),
        fits=fits,
        notes=(
            f"{TRANSFER} ({trained})",
            "a narrower model: width, heads and feed-forward in proportion; layers and vocabulary stay",
            f"half the price: log price over log size within {NEAR:.0%} of 1 at each step down",
            f"a decode step has {values.batch} sequences with {values.context:,} positions each; the prompt as many",
            "seconds and dollars are at the roofline: a lower bound",
            SEEDS,
        ),
        headline=f"half the parameters, {halved[1]:.0%} of the price of an output token",
        factor=first.output / last.output,
    )


def _lines(priced: Mapping[str, Sequence[tuple[float, float]]]) -> dict[str, tuple[tuple[float, float], ...]]:
    return {name: tuple(line) for name, line in priced.items()}


def _saved(pairs: Sequence[Pair], costs: Sequence[Costs], money: str) -> Table:
    columns = (
        *(Quantity("model"), Quantity("size", "params"), Quantity("of the largest", "%"), Quantity("chips")),
        *(Quantity("input token", "FLOP"), Quantity("output token", "B")),
        *(Quantity("1M in", money), Quantity("1M out", money)),
        *(Quantity("saved of input", "%"), Quantity("saved of output", "%")),
    )
    first = costs[0]
    rows = tuple(
        (
            *(one.config.name, one.size, one.size / first.size, one.chips, one.input_flops, one.output_bytes),
            *(one.input, one.output, 1 - one.input / first.input, 1 - one.output / first.output),
        )
        for one in costs
    )
    return Table("What a smaller model saves", columns, rows, tuple(pair.decode.command for pair in pairs))


def _measured(ladder: Sequence[Model], steps: Sequence[Point], prices: Sequence[float], money: str) -> Table:
    """Cost and quality of the same models."""
    columns = (
        *(Quantity("trained here"), Quantity("size", "params"), Quantity("of the largest", "%")),
        *(Quantity("1M out, alone", money), Quantity("saved of one size up", "%")),
        *(Quantity("held-out text", "bits/B"), Quantity("standard error", "bits/B")),
        *(Quantity("more than one size up", "bits/B"), Quantity("± of that", "bits/B")),
    )
    rows: list[tuple[Value, ...]] = []
    for n, (one, price) in enumerate(zip(ladder, prices, strict=True)):
        more = one.plain.more_than(ladder[n - 1].plain) if n else (None, None)
        saved = 1 - price / prices[n - 1] if n else None
        share = one.parameters / ladder[0].parameters
        rows.append((one.name, one.parameters, share, price, saved, *one.plain.bits_per_byte, *more))
    commands = tuple(step.command for step in steps)
    return Table("What it saves and costs of models that were trained here", columns, tuple(rows), commands)


def _published(costs: Sequence[Costs], known: Assumptions) -> Table:
    """By a published law of larger models."""
    factor, exponent = known.number("quality.law.factor"), known.number("quality.law.exponent")
    columns = (Quantity("model"), Quantity("size", "params"), Quantity("loss beyond the largest", "nats/token"))
    rows = tuple(
        (one.config.name, one.size, factor * (one.size**-exponent - costs[0].size ** -exponent)) for one in costs
    )
    return Table("Published, apart: by the law of Hoffmann et al. (2022), of as many tokens", columns, rows)


SMALLER = Driver(
    "smaller", "What does a smaller model save, and what does it cost in quality?", _define, _points, _find, "llama3-8b"
)
main = SMALLER.main

if __name__ == "__main__":
    sys.exit(main())
