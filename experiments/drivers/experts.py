"""Driver 6: a mixture of experts beside dense models of as many active and of as many parameters.

    python -m stepbill.experiments.drivers.experts --target=h200
    python -m stepbill.experiments.drivers.experts --model=qwen3-30b-a3b --dispatch=blocks

The dense models are the same but for their feed-forward: attention, cache and vocabulary are alike, so that what
differs is what experts do. A token meets k of E experts, and B tokens that are routed evenly meet 1 - (1 - k/E)^B of
them: what the program reads is held against that.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import closed_form, targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill, Work
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, require_times
from .finding import Finding, Plot, Quantity, Table, Value, cell
from .prefill_decode import Model, Plan, Step
from .serving import AUTO, fewest_chips, held
from .sweep import Point, mesh_of

if TYPE_CHECKING:
    from ...model.config import Experts, ModelConfig

BATCHES = "1,8,128,512"
ACTIVE, TOTAL = "dense, active", "dense, total"
WITHIN = 0.01  # of the parameters that a dense model must have
TILE = 128  # a feed-forward width is a multiple of it, or of as large a power of two as keeps within that
NEAR = 1.25  # times as much that still counts as the same
ROUTING = ("moe/router", "moe/dispatch", "moe/combine")
FEEDS = ("mlp/up", "mlp/down", "moe/experts", "moe/shared")  # the components that multiply with a feed-forward
CLAIM = "A token of a mixture of experts costs what one of a dense model of its active parameters costs."


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.string("batches", BATCHES, "sequences that are decoded together, with commas")
    to.count("context", 4096, "tokens of a prompt, and positions in the cache of a decode step")
    to.string("mesh", AUTO, "chips, such as tensor=2; auto: for each model the fewest that hold the largest batch")


# --- the steps -----------------------------------------------------------------------------------------------------


def dense(config: "ModelConfig", parameters: int, name: str) -> "ModelConfig":
    """The same with a plain feed-forward in each layer, as wide as makes it so many parameters; UsageError."""
    from ...model.config import ModelConfig

    def of(width: int) -> ModelConfig:
        return replace(config, name=f"{config.name} ({name})", experts=None, mlp_width=width)

    each = of(2).parameters - of(1).parameters
    exact = 1 + (parameters - of(1).parameters) / each
    multiple = TILE
    while multiple >= 1:
        width = round(exact / multiple) * multiple
        if width > 0 and abs(of(width).parameters / parameters - 1) <= WITHIN:
            return of(width)
        multiple //= 2
    raise UsageError(f"--model={config.name}: no dense model of its sizes has {parameters:,} parameters")


def _plans(values: FlagValues) -> dict[str, Plan]:
    """Of the mixture, and of the two dense models, by what the tables call them."""
    require_times(values.target)
    config = flags.model_config(values, "decode")
    if config.experts is None:
        raise UsageError(f"--model={config.name}: it must be a mixture of experts, such as {EXPERTS.model}")
    configs = {
        config.name: config,
        ACTIVE: dense(config, config.active_parameters, ACTIVE),
        TOTAL: dense(config, config.parameters, TOTAL),
    }
    return {name: Plan.of(one, values) for name, one in configs.items()}


def _points(values: FlagValues) -> list[Point]:
    return [point for plan in _plans(values).values() for point in (*plan.decode, plan.prefill)]


# --- what bills say ------------------------------------------------------------------------------------------------


def expected(experts: "Experts", tokens: int) -> float:
    """The share of the experts that some of so many tokens goes to, where each k of them are as likely as any other."""
    return 1 - (1 - experts.active / experts.count) ** tokens


def expected_of(step: Step) -> float:
    """The same of a step."""
    assert step.point.config.experts is not None
    return expected(step.point.config.experts, step.tokens)


def _experts_bytes(step: Step) -> int:
    config = step.point.config
    assert config.experts is not None
    return closed_form.experts_bytes(config, config.experts.count, 4 if config.dtype == "float32" else 2)


def read(step: Step) -> float:
    """Bytes of experts that the program reads, over those of all experts."""
    weights = step.bill.component("moe/experts").hbm_read.get("weights", 0)
    return weights * step.bill.program["chips"] / _experts_bytes(step)


def feed(one: Bill) -> Work:
    """All that multiplies with the feed-forward's matrices, on a chip."""
    found = Work()
    for component in FEEDS:
        found.add(one.component(component))
    return found


def turns(work: Work, masked: int, unread: float, batch: int, ridge: float) -> float | None:
    """The batch from which on the FLOPs that are not masked away for a byte of HBM are the chip's ridge point; None
    where they are not at any.

    A token brings its own FLOPs f and bytes a, of activations and cache; weights W are read once for all of them,
    those included that this step leaves unread: B f / (W + B a) = ridge.
    """
    weights = work.hbm_read.get("weights", 0)
    each = (work.matmul - masked) / ridge - (work.hbm_bytes - weights)
    return (weights + unread) / (each / batch) if each > 0 else None


def masked(one: Bill) -> int:
    """FLOPs of rows of experts in which no token is."""
    return sum(row.work.matmul for row in one.rows if row.tax == "masked" and row.component == "moe/experts")


def routing(one: Bill, predicted: bool) -> float | None:
    """Share of the step's time that choosing experts, gathering rows for them and adding up takes: at the roofline, or
    as predicted, with what launching kernels takes; None where nothing is predicted."""
    field = "predicted_picoseconds" if predicted else "picoseconds"
    whole = getattr(one.total, field)
    return sum(getattr(one.component(component), field) for component in ROUTING) / whole if whole else None


@dataclass(frozen=True)
class Beside:
    """A step of the mixture, and those of the dense models with as many sequences, if they fit."""

    mixture: Step
    active: Step | None
    total: Step | None

    @property
    def over_active(self) -> float | None:
        """Chip-time of a token, over the dense model's of as many active parameters."""
        return self.active and self.mixture.chip_seconds / self.active.chip_seconds

    @property
    def over_total(self) -> float | None:
        """The same over that of as many parameters in all."""
        return self.total and self.mixture.chip_seconds / self.total.chip_seconds

    def chosen_over_active(self, bytes_per_second: float) -> float | None:
        """The first, if of the experts only those were read that are expected to be chosen, as fast as memory can."""
        if self.active is None:
            return None
        unchosen = (read(self.mixture) - expected_of(self.mixture)) * _experts_bytes(self.mixture)
        saved = max(0.0, unchosen) / bytes_per_second / self.mixture.tokens
        return (self.mixture.chip_seconds - saved) / self.active.chip_seconds

    @property
    def at(self) -> str:
        """Which step it is."""
        point = self.mixture.point
        return f"in a prompt of {point.context:,}" if point.step == "prefill" else f"at batch {point.batch}"


def _beside(models: Sequence[Model]) -> list[Beside]:
    """Every decode step of the mixture, by batch, and last its prompt."""
    mixture, *others = models
    of = [{step.point.batch: step for step in other.decode} for other in others]
    decode = [Beside(step, *(steps.get(step.point.batch) for steps in of)) for step in mixture.decode]
    return [*decode, Beside(mixture.prefill, *(other.prefill for other in others))]


@dataclass(frozen=True)
class Edge:
    """From which batch on memory does not bound the feed-forward, and the step; and how many sequences it holds."""

    last: Step
    feed: float | None
    step: float | None
    fits: int

    @classmethod
    def of(cls, model: Model, ridge: float, values: FlagValues) -> "Edge":
        """By the largest batch that was compiled."""
        last = model.decode[-1]
        batch, wasted = last.point.batch or 1, masked(last.bill)
        beside, each = held(last.point.config, values.context, last.point.mesh)
        fits = max(0, ((targets.chip(values.target).usable_hbm_bytes or 0) - beside) // each)
        unread = 0.0
        if last.point.config.experts is not None:
            unread = max(0.0, 1 - read(last)) * _experts_bytes(last) / last.bill.program["chips"]
        work = feed(last.bill), last.bill.total
        return cls(last, *(turns(one, wasted, unread, batch, ridge) for one in work), fits=fits)


# --- the finding ---------------------------------------------------------------------------------------------------


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    del known
    plans = _plans(values)
    models = [replace(Model.of(plan, bills), name=name) for name, plan in plans.items()]
    pairs = _beside(models)
    config = next(iter(plans.values())).config
    chip = targets.chip(values.target)
    assert config.experts is not None and chip.hbm_bytes_per_second is not None  # or no step would be timed
    experts, ridge = config.experts, chip.peak_flops["bf16"] / chip.hbm_bytes_per_second
    worst = max(pairs, key=lambda pair: pair.over_active or 0)
    most = worst.over_active or 1.0  # which there is: a model's smallest batch has a bill, or there is no finding
    edges = [Edge.of(model, ridge, values) for model in models]
    weights = [_weights_bytes(model) for model in models]
    evidence = (
        f"{config.name} ({experts.active} of {experts.count} experts, {config.active_parameters / 1e9:.3g} of "
        f"{config.parameters / 1e9:.3g} billion parameters active) has {weights[0] / weights[1]:.1f} times the bytes "
        "of a dense model of as many active parameters, and a token costs so many times as much: "
        + ", ".join(f"{cell(pair.over_active, 'x')} {pair.at}" for pair in pairs if pair.active)
        + f" ({cell(worst.chosen_over_active(chip.hbm_bytes_per_second), 'x')} {worst.at} if only those experts were "
        "read that are expected to be chosen). Over one of as many in all: "
        + ", ".join(f"{cell(pair.over_total, 'x')} {pair.at}" for pair in pairs if pair.total)
        + f". Memory bounds its experts {_until(edges[0].feed)}, the dense MLP {_until(edges[1].feed)}; it is full "
        f"at {edges[0].fits:,}. Routing takes at most {_most_routing(pairs, predicted=False)} of a step at the "
        f"roofline, and {_most_routing(pairs, predicted=True)} with what it takes to launch its kernels."
    )
    return Finding(
        "experts",
        EXPERTS.question,
        values.target,
        CLAIM,
        most <= NEAR,
        evidence,
        EXPERTS.command(values),
        (
            _footprint(models, config, weights, values),
            _work(pairs),
            _prices(pairs, chip.hbm_bytes_per_second),
            _experts(pairs, experts),
            _edge_table(models, edges, ridge),
        ),
        _plots(models, pairs[:-1], experts),
        notes=(
            "the dense models are alike but for a feed-forward of "
            f"{models[1].prefill.point.config.mlp_width:,} and of {models[2].prefill.point.config.mlp_width:,} columns",
            f"the claim holds where a token costs at most {NEAR:g} times as much, in every step",
            f"expected: of {experts.count} experts a token's {experts.active} are as likely to be any as any others; "
            "traffic that is not routed evenly meets fewer",
            "dispatch all: every token goes through every expert, all of which are read, and most products are masked "
            "away; blocks: counted are the most experts that the tokens can ask for, each read once, and a run reads "
            "those that they do ask for",
            "memory is the bound at any batch (-) where a sequence brings more bytes of cache than it has FLOPs for",
            "seconds and dollars are at the roofline: a lower bound",
        ),
        headline=f"{most:.1f} times a dense model of its active parameters {worst.at}",
        factor=max(most, 1.0),
    )


def _until(batch: float | None) -> str:
    return "at any batch" if batch is None else f"up to {batch:,.0f} sequences"


def _most_routing(pairs: Sequence[Beside], predicted: bool) -> str:
    return cell(max(routing(pair.mixture.bill, predicted) or 0 for pair in pairs) or None, "%")


def _weights_bytes(model: Model) -> int:
    """Of all chips."""
    one = model.decode[-1].bill
    return one.memory["weights"] * one.program["chips"]


def _footprint(models: Sequence[Model], config: "ModelConfig", weights: Sequence[int], values: FlagValues) -> Table:
    columns = (
        *(Quantity("model"), Quantity("size", "params"), Quantity("of what it must be", "x"), Quantity("weights", "B")),
        *(Quantity("chips, one sequence"), Quantity("chips here"), Quantity("largest batch")),
        Quantity("takes of each chip", "B"),
    )
    rows, commands = [], []
    asked = config.parameters, config.active_parameters, config.parameters
    for model, parameters, size in zip(models, asked, weights, strict=True):
        last = model.decode[-1]
        point, found = last.point, last.bill
        fewest = flags.chips(mesh_of(fewest_chips(point.config, values.target, 1, values.context)))
        rows.append(
            (
                *(model.name, point.config.parameters, point.config.parameters / parameters, size),
                *(fewest, found.program["chips"], point.batch, found.memory["peak_bytes"]),
            )
        )
        commands.append(point.command)
    return Table("Alike but for the feed-forward", columns, tuple(rows), tuple(commands))


def _by_step(
    title: str, pairs: Sequence[Beside], columns: Sequence[Quantity], of: Callable[[Beside], Iterable[Value]]
) -> Table:
    """A row for each step of the mixture, with what is said of it and those beside it."""
    points = [pair.mixture.point for pair in pairs]
    rows = ((point.step, point.batch, *of(pair)) for point, pair in zip(points, pairs, strict=True))
    commands = tuple(point.command for point in points)
    return Table(title, (Quantity("step"), Quantity("batch"), *columns), tuple(rows), commands)


def _work(pairs: Sequence[Beside]) -> Table:
    """What a token takes of all three."""
    names = "mixture", ACTIVE, TOTAL
    columns = (
        *(Quantity(name, unit) for unit in ("FLOP", "B") for name in names),
        *(Quantity(f"{name}: MLP time", "%") for name in names[:2]),
    )

    def of(pair: Beside) -> Iterator[Value]:
        steps = (pair.mixture, pair.active, pair.total)
        yield from (step and step.bill.total.matmul * _each(step) for step in steps)
        yield from (step and step.bill.total.hbm_bytes * _each(step) for step in steps)
        yield from (step and feed(step.bill).picoseconds / step.bill.total.picoseconds for step in steps[:2])

    title = "FLOPs and HBM bytes of a token, and the feed-forward's share of the time"
    return _by_step(title, pairs, columns, of)


def _each(step: Step) -> float:
    """Of what a chip does in the step, to what all of them do for a token."""
    return step.bill.program["chips"] / step.tokens


def _prices(pairs: Sequence[Beside], bytes_per_second: float) -> Table:
    columns = (
        Quantity("chip-time of a token", "s"),
        *(Quantity(f"{name}, M tokens", "$") for name in ("mixture", ACTIVE, TOTAL)),
        *(Quantity(f"over {ACTIVE}", "x"), Quantity("with the chosen read alone", "x"), Quantity(f"over {TOTAL}", "x")),
    )

    def of(pair: Beside) -> Iterator[Value]:
        yield pair.mixture.chip_seconds
        for step in (pair.mixture, pair.active, pair.total):
            yield step and step.bill.price.get("dollars_per_million_tokens")
        yield from (pair.over_active, pair.chosen_over_active(bytes_per_second), pair.over_total)

    return _by_step("A million tokens, and the mixture over dense models", pairs, columns, of)


def _experts(pairs: Sequence[Beside], experts: "Experts") -> Table:
    """What the mixture's steps do with experts."""
    columns = (
        *(Quantity("dispatch"), Quantity("chosen, expected", "%"), Quantity("read", "%")),
        *(Quantity("FLOPs over routed", "x"), Quantity("masked of all FLOPs", "%")),
        *(Quantity("routed, experts", "FLOP/B"), Quantity("routing of the time", "%")),
        Quantity("of the predicted", "%"),
    )

    def of(pair: Beside) -> Iterator[Value]:
        step, one = pair.mixture, pair.mixture.bill
        work, wasted = one.component("moe/experts"), masked(one)
        routed = work.matmul - wasted
        yield one.program.get("experts", {}).get("dispatch")
        yield from (expected_of(step), read(step), work.matmul / routed, wasted / one.total.matmul)
        yield from (routed / work.hbm_bytes, routing(one, predicted=False), routing(one, predicted=True))

    return _by_step(f"Experts: a token goes to {experts.active} of {experts.count}", pairs, columns, of)


def _edge_table(models: Sequence[Model], edges: Sequence[Edge], ridge: float) -> Table:
    columns = (
        *(Quantity("model"), Quantity("feed-forward, from batch"), Quantity("whole step, from batch")),
        *(Quantity("memory ends at"), Quantity("by what batch")),
    )
    rows = [
        (model.name, edge.feed and round(edge.feed), edge.step and round(edge.step), edge.fits, edge.last.point.batch)
        for model, edge in zip(models, edges, strict=True)
    ]
    title = f"Where memory stops being the bound: {ridge:.0f} FLOPs, none of them masked, for a byte"
    return Table(title, columns, tuple(rows), tuple(edge.last.point.command for edge in edges))


def _plots(models: Sequence[Model], decode: Sequence[Beside], experts: "Experts") -> tuple[Plot, ...]:
    x = Quantity("batch")
    times = {model.name: tuple((step.point.batch or 1, step.chip_seconds) for step in model.decode) for model in models}
    batches = [pair.mixture.point.batch or 1 for pair in decode]
    shares = {
        "expected": tuple((batch, expected(experts, batch)) for batch in batches),
        "read by the program": tuple((batch, read(pair.mixture)) for batch, pair in zip(batches, decode, strict=True)),
    }
    return (
        Plot("A decoded token", x, Quantity("chip-time", "s"), times),
        Plot("Experts that a decode step reads", x, Quantity("share of all experts"), shares),
    )


EXPERTS = Driver(
    "experts",
    "What does a mixture of experts cost beside a dense model?",
    _define,
    _points,
    _find,
    "gpt-oss-20b",
)
main = EXPERTS.main

if __name__ == "__main__":
    sys.exit(main())
