"""Driver 10: what training costs, from 6 FLOPs for each parameter and token to the dollars of a run, line by line.

    python -m stepbill.experiments.drivers.training --target=h200
    python -m stepbill.experiments.drivers.training --chips=16384 --assume=training.mfu=0.5 --runs=

A training step is compiled as it runs, over several chips; its bill says how much of the chip's peak it can reach at
best. What a run reaches of it, what fails, what is tried before and measured beside it are assumptions (`training.*`,
`failure.*`). Published runs stand beside steps of the same models, compiled for the chips that they had.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import chips, closed_form, economics, price, targets
from ...profiling.assumptions import Assumptions, TrainingRun
from ...profiling.bill import Bill
from ...profiling.economics import Item
from .. import flags, published
from ..assumptions import facts
from ..flags import UsageError
from . import post_training
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value, cell, power_law
from .post_training import STAGES, Pass
from .sweep import Point, mesh_of

if TYPE_CHECKING:
    from ...model.config import ModelConfig

AUTO = flags.AUTO
HOST = 8  # chips of one host, which share a step where it fits
STATE = 16  # bytes a parameter: itself, its gradient and the optimizer's two, each in float32
ROOM = 0.5  # of memory that these may fill, to leave as much to activations
SMALL = 0.1  # what is less than this share is small
TRILLION = 1e12
COUNTS = (1024, 4096, 16_384, 65_536, 262_144)  # chips, whose failures are shown
LADDER = (3, 10, 30, 100)  # times as small are the models that are tried first
ZETTA = 1e21
CLAIM = "Training costs 6 FLOPs a parameter a token at the chip's rate; everything else is small."
KIN = {"h800": "h100"}  # a chip that is compiled for in place of another: the same but for its links
RUNS = "llama1-65b,llama3-405b,deepseek-v3"
FIGURES = (  # of published.csv
    *("gpt3-125m-train", "gpt3-1.3b-train", "gpt3-6.7b-train", "gpt3-175b-train", "llama3.1-405b-train"),
    *("llama1-65b-hours", "deepseek-v3-dollars", "palm-540b-mfu"),
    *("llama3-405b-mtbf", "llama3-405b-interval", "llama3-405b-overhead"),
)


def _define(to: flags.Definer) -> None:
    to.values.set_default("remat", "full")
    to.count("context", 8192, "positions of a sequence")
    to.count("sequences", 1, "of them that each data shard takes in one step")
    to.string("mesh", AUTO, "chips that share a step, such as data=8; auto: a host of 8 if it fits, else the fewest")
    to.count("chips", 2048, "that the run is on: as many meshes side by side")
    to.number("tokens", None, "trillions of them. Default: as published of the model, else training.tokens_a_parameter")
    to.count("rollouts", 64, "answers that are written together where rewards are learned from")
    to.string("runs", RUNS, "published runs whose step is compiled, too, with commas")


# --- the steps -------------------------------------------------------------------------------------------------------


def _published_points() -> dict[str, Point]:
    """A step of each published run that can be compiled: its model, its context, and a mesh of its chips that fits."""
    from ...model.architectures import get

    llama1 = replace(get("llama2-70b"), name="llama2-70b(K=64,F=22016)", num_kv_heads=64, mlp_width=22_016)
    return {
        name: Point(replace(config, remat="full"), "train", batch, context, chip, mesh)
        for name, config, batch, context, chip, mesh in (
            ("llama1-65b", llama1, 64, 2048, "a100", "data=32"),
            ("llama3-8b", get("llama3-8b"), 8, 8192, "h100", "data=8"),
            ("llama3-70b", get("llama3-70b"), 32, 8192, "h100", "data=32"),
            ("llama3-405b", get("llama3-405b"), 16, 8192, "h100", "data=16,tensor=8"),
            ("deepseek-v3", get("deepseek-v3"), 256, 4096, "h100", "data=32,expert=8"),
        )
    }


@dataclass(frozen=True)
class Plan:
    """step: of the run. others: the same but for one thing, by what that is. published: of other runs, by name.
    post: of what follows."""

    config: "ModelConfig"
    target: str
    step: Point
    others: Mapping[str, Point]
    published: Mapping[str, Point]
    post: Mapping[str, Point]

    @classmethod
    def of(cls, values: FlagValues, known: Assumptions) -> "Plan":
        require_times(values.target)
        config = flags.model_config(values, "train")
        config = replace(config, max_context=max(values.context, config.max_context))
        mesh = values.mesh
        if mesh == AUTO:
            mesh = _host(config, values)
        step = _point(config, values, mesh)
        others = {
            "twice as many sequences": replace(step, batch=2 * step.batch if step.batch else None),
            "--remat=dots": replace(step, config=replace(config, remat="dots")),
        }
        return cls(
            config,
            values.target,
            step,
            {name: point for name, point in others.items() if point != step},
            _chosen(values.runs),
            post_training.points(step, values.rollouts, known),
        )

    @property
    def points(self) -> list[Point]:
        return list(dict.fromkeys((self.step, *self.others.values(), *self.published.values(), *self.post.values())))


def _host(config: "ModelConfig", values: FlagValues) -> str:
    """The mesh of one host, where the step fits it by the rule of `ROOM`; else auto."""
    capacity = targets.chip(values.target).usable_hbm_bytes
    fits = capacity is None or STATE * config.parameters <= ROOM * HOST * capacity
    return f"data={HOST}" if fits else AUTO


def _point(config: "ModelConfig", values: FlagValues, mesh: str) -> Point:
    batch = None
    if mesh != AUTO:
        batch = mesh_of(mesh).get("data", 1) * values.sequences
    elif values.sequences > 1:
        raise UsageError(f"--sequences={values.sequences}: it needs a --mesh that is not {AUTO}")
    return Point(config, "train", batch, values.context, values.target, mesh)


def _chosen(names: str) -> dict[str, Point]:
    """Steps of published runs, by name; those whose compiler is not installed here are left out."""
    known = _published_points()
    chosen = {}
    for name in filter(None, names.split(",")):
        if name not in known:
            raise UsageError(f"--runs={names}: {name} is none of {', '.join(known)}")
        try:
            targets.require(known[name].target)
        except targets.MissingExtra:
            continue
        chosen[name] = known[name]
    return chosen


def _points(values: FlagValues) -> list[Point]:
    return Plan.of(values, facts(values)).points


@dataclass(frozen=True)
class Step:
    """What the bill of a training step says."""

    bill: Bill

    @property
    def chips(self) -> int:
        return self.bill.program["chips"]

    @property
    def tokens(self) -> int:
        """Over all chips."""
        return self.bill.program["batch"] * self.bill.program["context"]

    @property
    def peak(self) -> int:
        """FLOP/s of a chip, in bfloat16."""
        return targets.chip(self.bill.program["target"]).peak_flops["bf16"]

    @property
    def flops_per_token(self) -> float:
        """Of the model: products of its parameters and of attention's causal half, forward and twice backward."""
        assert self.bill.ideal_flops is not None
        return self.bill.ideal_flops * self.chips / self.tokens

    @property
    def mfu(self) -> float:
        """The share of the peak that the model's FLOPs are at the roofline's speed."""
        return self.flops_per_token / self.peak / self.seconds_per_token

    @property
    def seconds_per_token(self) -> float:
        """Of one chip, at the roofline."""
        return self.bill.total.seconds * self.chips / self.tokens

    @cached_property
    def beyond(self) -> dict[str, int]:
        """Where the roofline's time goes beyond the model's FLOPs at the peak, in picoseconds of a step."""
        again = sum(row.work.picoseconds for row in self.bill.rows if row.phase == "recompute")
        waiting = {
            bound: sum(r.work.picoseconds for r in self.bill.rows if r.bound == bound and r.phase != "recompute")
            for bound in ("hbm", "link")
        }
        assert self.bill.ideal_flops is not None
        least = round(self.bill.ideal_flops / self.peak * 1e12)
        other = self.bill.total.picoseconds - least - again - sum(waiting.values())
        return {
            "computed again": again,
            "waiting for memory": waiting["hbm"],
            "waiting for links": waiting["link"],
            "more FLOPs than the least": other,
        }


# --- the run, line by line -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of one model. parameters: those that a token meets. training: its bill by economics.training."""

    step: Step
    parameters: int
    tokens: float
    chips: int
    hourly: float
    mfu: float
    training: economics.Training
    post: tuple[Pass, ...] = ()

    @classmethod
    def of(cls, step: Step, parameters: int, tokens: float, chips: int, hourly: float, known: Assumptions) -> "Run":
        """At the stated MFU, or at the roofline's where that is less; UsageError where failures leave no time."""
        mfu = min(known.number("training.mfu"), step.mfu)
        try:
            flops = step.flops_per_token * tokens
            training = economics.training(flops, tokens, chips, step.peak, hourly, known, mfu)
        except ValueError as error:
            raise flags.as_usage(error) from None
        return cls(step, parameters, tokens, chips, hourly, mfu, training)

    @property
    def least_hours(self) -> float:
        """Chip-hours of 6 FLOPs a parameter a token at the peak."""
        flops = closed_form.training_flops(self.parameters, self.tokens)
        return economics.chip_hours(flops, self.step.peak, 1)

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """The lines: those of the useful steps apart, and what economics.training adds; dollars add up exactly."""
        useful, *others = self.training.cost.items
        parts = list(self._useful())
        ends = [0, *accumulate(hours for _, hours, _ in parts)]
        marks = [round(useful.picodollars * end / ends[-1]) for end in ends]
        return (
            *(Item(name, b - a, how) for (name, _, how), (a, b) in zip(parts, pairwise(marks), strict=True)),
            *others,
            *self._after(),
        )

    def _after(self) -> Iterator[Item]:
        """A line for each stage of post-training."""
        for stage, name in STAGES.items():
            hours = sum(one.hours for one in self.post if one.stage == stage)
            if self.post:
                yield Item(name, round(hours * self.hourly * economics.PICO), f"{hours:,.0f} chip-hours, after the run")

    def _useful(self) -> Iterator[tuple[str, float, str]]:
        """Name, chip-hours and how, of what makes up the useful steps."""
        step, tokens = self.step, self.tokens
        ideal = economics.chip_hours(step.flops_per_token * tokens, step.peak, 1)
        each = step.chips / step.tokens * tokens / price.SECONDS_PER_HOUR * 1e-12
        yield "6 N D at the peak", self.least_hours, f"6 x {self.parameters:.4g} x {tokens:.4g} FLOPs"
        yield "attention", ideal - self.least_hours, "its products, less the embeddings, which are none"
        for name, picoseconds in step.beyond.items():
            yield name, picoseconds * each, "of the compiled step, at the roofline"
        slower = self.training.chip_hours - step.seconds_per_token * tokens / price.SECONDS_PER_HOUR
        yield "slower than the roofline", slower, f"MFU {self.mfu:.1%} where the compiled step allows {step.mfu:.1%}"

    @property
    def picodollars(self) -> int:
        return sum(item.picodollars for item in self.items)

    @property
    def dollars(self) -> float:
        return self.picodollars / economics.PICO

    @property
    def useful_factor(self) -> float:
        """What the steps alone cost over that."""
        return self.training.cost.items[0].picodollars / self.items[0].picodollars

    @property
    def factor(self) -> float:
        """What the run costs over 6 FLOPs a parameter a token at the peak."""
        return self.picodollars / self.items[0].picodollars


def _tokens(values: FlagValues, config: "ModelConfig", known: Assumptions) -> float:
    if values.tokens is not None:
        if values.tokens <= 0:
            raise UsageError(f"--tokens={values.tokens:g}: it must be more than 0 trillion")
        return values.tokens * TRILLION
    name = f"run.{config.name}.tokens"
    if name in known.entries:
        return known.number(name)
    return known.number("training.tokens_a_parameter") * config.active_parameters


def _price(target: str, known: Assumptions) -> float:
    hourly = chips.priced(targets.chip(target), known).dollars_per_hour
    if hourly is None:
        raise UsageError(f"--target={target}: an hour of it has no price")
    return hourly


# --- the finding -----------------------------------------------------------------------------------------------------


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    plan = Plan.of(values, known)
    found = bill(bills, plan.step)
    if not found.timed:
        raise UsageError(f"--target={values.target}: its step times are not known")
    step, config = Step(found), plan.config
    run = Run.of(
        *(step, config.active_parameters, _tokens(values, config, known), values.chips),
        *(_price(values.target, known), known),
    )
    passes = post_training.passes(plan.step, plan.post, bills, known, step.mfu / run.mfu)
    run = replace(run, post=tuple(passes))
    shares = {item.name: item.picodollars / run.picodollars for item in run.items}
    failing = sum(shares[name] for name in ("checkpoints", "lost work", "restarts"))
    wire = _wire(step, known)
    after = sum(shares[name] for name in STAGES.values())
    rewards = [one for one in run.post if one.stage == "policy"]
    written = sum(one.hours for one in rewards if "rollout" in one.name) / sum(one.hours for one in rewards)
    evidence = (
        f"6 FLOPs for each of {config.active_parameters:,} parameters and {run.tokens:.3g} tokens cost "
        f"{cell(run.items[0].dollars, '$')} at the peak of {values.target}, and the run {cell(run.dollars, '$')}: "
        f"{run.factor:.1f} times as much, {run.useful_factor:.1f} times for the steps alone. The compiled step "
        f"can reach {step.mfu:.0%} of the peak, and runs reach {run.mfu:.0%}; of the run the experiments before it are "
        f"{shares['experiments']:.0%}, data "
        f"{shares['data']:.0%}, evaluation {shares['evaluation']:.1%}, failures of {run.chips:,} chips, one in "
        f"{run.training.failure_hours:.3g} hours, {failing:.1%}, and post-training {after:.1%}, where writing answers "
        f"is {written:.0%} of learning from rewards. What a chip sends in a step would take {wire:.0%} of the "
        "step's time over the network between hosts."
    )
    overhead = [(count, _overhead(count, known)[-1]) for count in COUNTS]
    return Finding(
        TRAINING.name,
        TRAINING.question,
        values.target,
        CLAIM,
        run.factor <= 1 + SMALL,
        evidence,
        TRAINING.command(values),
        (
            _lines(run),
            _steps(plan, bills, known),
            *_runs(plan, bills, known),
            _figures(),
            _failures(known),
            *_experiments(run, known),
            _after(run),
            _published_after(run, known),
        ),
        _plots(run, known),
        {"share of the time lost to failures, of chips": power_law(overhead)},
        notes=(
            f"a step is compiled over {step.chips} chips, and the run is taken to be as many of them side by side as "
            "make its chips: what these exchange is not in the bill, and counts as slower than the roofline",
            f"model FLOPs are products alone, attention's causal half; MFU is theirs, of the bfloat16 peak: "
            f"{step.mfu:.1%} of the compiled step at the roofline, {known.number('training.mfu'):.1%} as assumed "
            "(training.mfu; Llama 3 405B: 38 to 43 %)",
            "what is lost to failures is counted to first order, and a checkpoint stops the work as long whatever the "
            "number of chips",
            "published chip-hours are of whatever was counted there, such as longer contexts and what was run again",
            *(_GATHERED,) * ("deepseek-v3" in plan.published),
            "people are not in it: 29 to 49 % of what developing a model costs (Cottier et al., 2024)",
        ),
        headline=f"{run.useful_factor:.1f} times 6 N D at the peak, and {run.factor:.1f} with all around the steps",
        factor=max(run.factor, 1.0),
    )


_GATHERED = (
    "the weights of each expert are gathered over the chips along `data` here, in bfloat16; DeepSeek sent tokens to "
    "experts, and multiplied in fp8: so its published hours can be less than those of the compiled step"
)


def _wire(step: Step, known: Assumptions) -> float:
    """What a step sends, over the network between hosts, as a share of its roofline time."""
    network = known.number("training.network_bytes_per_second")
    return step.bill.total.link_bytes / network / step.bill.total.seconds


def _lines(run: Run) -> Table:
    columns = (
        *(Quantity("line"), Quantity("how"), Quantity("cost", "$"), Quantity("of the run", "%")),
        Quantity("over 6 N D", "x"),
    )
    whole, least = run.picodollars, run.items[0].picodollars
    rows: list[tuple[Value, ...]] = [
        (item.name, item.how, item.dollars, item.picodollars / whole, item.picodollars / least) for item in run.items
    ]
    how = f"{run.training.wall_hours / 24:.3g} days on {run.chips:,} chips at ${run.hourly:g} an hour of one"
    rows.append(("the run", how, run.dollars, 1.0, run.factor))
    return Table("A run, line by line", columns, tuple(rows))


def _steps(plan: Plan, bills: Bills, known: Assumptions) -> Table:
    """Each compiled step: how far from the peak, and why; what it sends."""
    columns = (
        *(Quantity("step"), Quantity("chips"), Quantity("tokens of a chip"), Quantity("time", "s")),
        *(Quantity("memory", "B"), Quantity("over 6 N", "x"), Quantity("MFU", "%")),
        *(Quantity("again", "%"), Quantity("on memory", "%"), Quantity("on links", "%")),
        *(Quantity("sent", "B"), Quantity("between hosts", "s")),
    )
    network = known.number("training.network_bytes_per_second")
    rows, commands = [], []
    asked = {"the run's": plan.step, **plan.others, **plan.published}
    for name, point in asked.items():
        commands.append(point.command)
        outcome = bills[point]
        title = f"{name}: {point.config.name}, {point.target}" if name in plan.published else name
        if not isinstance(outcome, Bill) or not outcome.timed:
            rows.append((title, *[None] * (len(columns) - 1)))
            continue
        step, total = Step(outcome), outcome.total
        six = closed_form.training_flops(point.config.active_parameters, 1)
        waits = [step.beyond[name] / total.picoseconds for name in list(step.beyond)[:3]]
        rows.append(
            (
                *(title, step.chips, step.tokens // step.chips, total.seconds, outcome.memory.get("peak_bytes")),
                *(step.flops_per_token / six, step.mfu, *waits, total.link_bytes, total.link_bytes / network),
            )
        )
    return Table(
        "Compiled training steps, at the roofline: time by what it goes to, and what a chip sends",
        columns,
        tuple(rows),
        tuple(commands),
    )


def _runs(plan: Plan, bills: Bills, known: Assumptions) -> tuple[Table, ...]:
    """Published runs: their FLOPs, their hours, and what the compiled step of such a model would have taken."""
    columns = (
        *(Quantity("run"), Quantity("chip"), Quantity("10⁹ parameters"), Quantity("10⁹ tokens")),
        *(Quantity("10²¹ FLOPs, 6 N D"), Quantity("at the peak", "chip-h"), Quantity("at the roofline", "chip-h")),
        *(Quantity("published", "chip-h"), Quantity("MFU", "%"), Quantity("over roofline", "x"), Quantity("cost", "$")),
    )
    rows, commands = [], []
    for name in known.members("run"):
        run = known.record(TrainingRun, f"run.{name}")
        flops = closed_form.training_flops(run.parameters, run.tokens)
        least = share = roofline = dollars = hourly = None
        if run.chip is not None:
            chip = targets.chip(KIN.get(run.chip, run.chip))
            peak = chip.peak_flops["bf16"]
            least = economics.chip_hours(flops, peak, 1)
            hourly = run.dollars_per_hour or chips.priced(chip, known).dollars_per_hour
            share = economics.mfu(flops, peak, run.hours) if run.hours else None
            dollars = run.hours * hourly if run.hours and hourly else None
        point = plan.published.get(name)
        outcome = bills[point] if point else None
        if isinstance(outcome, Bill) and outcome.timed:
            roofline = Step(outcome).seconds_per_token * run.tokens / price.SECONDS_PER_HOUR
        over = run.hours / roofline if run.hours and roofline else None
        rows.append(
            (
                *(name, run.chip, run.parameters / 1e9, run.tokens / 1e9, flops / ZETTA, least, roofline, run.hours),
                *(share, over, dollars),
            )
        )
        commands.append(point.command if point else None)
    return (
        Table(
            "Published runs, beside the compiled step of such a model on such a chip",
            columns,
            tuple(rows),
            tuple(commands),
        ),
    )


def _after(run: Run) -> Table:
    """Post-training, pass by pass."""
    columns = (
        *(Quantity("stage"), Quantity("pass"), Quantity("step"), Quantity("10⁹ tokens")),
        *(Quantity("time", "chip-h"), Quantity("cost", "$"), Quantity("of its stage", "%")),
    )
    rows, commands = [], []
    for one in run.post:
        whole = sum(other.hours for other in run.post if other.stage == one.stage)
        objective = "" if one.point.objective == flags.OBJECTIVES[0] else f" by {one.point.objective}"
        step = f"{one.point.step}{objective}, batch {one.point.batch or 'auto'}, {one.point.context} positions"
        rows.append(
            (
                *(STAGES[one.stage], one.name, step, one.tokens / 1e9, one.hours, one.hours * run.hourly),
                one.hours / whole if whole else None,
            )
        )
        commands.append(one.point.command)
    return Table("After the run, pass by pass", columns, tuple(rows), tuple(commands))


def _published_after(run: Run, known: Assumptions) -> Table:
    """Published post-training as a share of the pre-training before it, beside ours."""
    before = known.number("run.deepseek-v3.pre_training")
    hours = {
        "deepseek-v3": (known.number("run.deepseek-v3.post_training"), before),
        "deepseek-r1, of deepseek-v3": (known.number("post.deepseek-r1.chip_hours"), before),
        "ours": (sum(one.hours for one in run.post), run.training.chip_hours),
    }
    columns = (
        Quantity("model"),
        Quantity("after", "chip-h"),
        Quantity("before", "chip-h"),
        Quantity("after / before", "%"),
    )
    rows = tuple((name, after, before, after / before) for name, (after, before) in hours.items())
    return Table("Post-training beside what was published", columns, rows)


def _figures() -> Table:
    """Published figures beside what comes out here."""
    columns = (
        *(Quantity("figure"), Quantity("quantity"), Quantity("published"), Quantity("ours")),
        *(Quantity("difference", "%"), Quantity("verdict"), Quantity("source")),
    )
    rows = []
    for case in published.cases():
        if case.name in FIGURES:
            ours = published.OURS[case.name]()
            difference = ours / case.published - 1
            rows.append(
                (
                    *(case.name, case.quantity, f"{case.published:.6g}", f"{ours:.6g}", difference),
                    *(published.verdict(case, ours), case.source),
                )
            )
    return Table("Published figures of training, made again", columns, tuple(rows))


def _overhead(count: int, known: Assumptions) -> tuple[float, float, float, float]:
    """Hours between failures of so many chips, minutes between checkpoints, and shares of the useful time that
    checkpoints with lost work take, and that all takes, restarts too."""
    writing = known.number("failure.checkpoint_seconds")
    hours = economics.failure_hours(count, known)
    between = hours * price.SECONDS_PER_HOUR
    interval = price.checkpoint_interval(writing, between)
    lost = price.checkpoint_overhead(writing, between, interval)
    return hours, interval / 60, lost, lost + known.number("failure.restart_seconds") / between


def _failures(known: Assumptions) -> Table:
    columns = (
        *(Quantity("chips"), Quantity("between failures", "h"), Quantity("between checkpoints", "min")),
        *(Quantity("checkpoints and lost work", "%"), Quantity("with restarts", "%")),
    )
    rows = tuple((count, *_overhead(count, known)) for count in COUNTS)
    return Table("Failures, by the number of chips, as shares of the useful time", columns, rows)


def _experiments(run: Run, known: Assumptions) -> tuple[Table, Table]:
    """What is tried before the run: how many small runs that pays for; and the whole with as much as is published."""
    each, assumed = known.number("training.tokens_a_parameter"), known.number("training.experiments")
    whole = closed_form.training_flops(run.parameters, run.tokens)
    small = [
        (run.parameters // times, whole / closed_form.training_flops(run.parameters // times, 1)) for times in LADDER
    ]
    ladder = tuple((n / 1e9, each * n / 1e9, assumed * tokens / (each * n)) for n, tokens in small)
    published_ratio = known.entry("training.research_over_run")
    useful = run.training.chip_hours * run.hourly
    ratios = {
        "as assumed": assumed,
        "the least published": published_ratio.low,
        "the most published": published_ratio.value,
    }
    budgets = []
    for name, ratio in ratios.items():
        dollars = run.dollars + (float(ratio or 0) - assumed) * useful
        budgets.append((name, ratio, dollars, dollars / run.items[0].dollars))
    return (
        Table(
            f"Small experiments that the assumed compute before the run pays for, of {each:g} tokens a parameter",
            (Quantity("10⁹ parameters"), Quantity("10⁹ tokens"), Quantity("runs")),
            ladder,
        ),
        Table(
            "The run with all that was tried before it",
            (Quantity("experiments"), Quantity("over the run"), Quantity("cost", "$"), Quantity("over 6 N D", "x")),
            tuple(budgets),
        ),
    )


def _plots(run: Run, known: Assumptions) -> tuple[Plot, ...]:
    so_far = accumulate(item.dollars for item in run.items)
    built = tuple((float(number), dollars) for number, dollars in enumerate(so_far, 1))
    counts: Sequence[tuple[int, tuple[float, ...]]] = [(count, _overhead(count, known)) for count in COUNTS]
    lines = {
        "checkpoints and lost work": tuple((float(count), lost[2]) for count, lost in counts),
        "with restarts": tuple((float(count), lost[3]) for count, lost in counts),
    }
    return (
        Plot("Lines of a run", Quantity("lines added up"), Quantity("cost", "$"), {"the run": built}, False, False),
        Plot("Lost to failures", Quantity("chips"), Quantity("of the useful time"), lines),
    )


TRAINING = Driver(
    "training",
    "What does it cost to train a model, and what of that is arithmetic?",
    _define,
    _points,
    _find,
    "llama3-8b",
)
main = TRAINING.main

if __name__ == "__main__":
    sys.exit(main())
