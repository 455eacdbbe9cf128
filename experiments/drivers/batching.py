"""Driver 5: what batching saves, and what latency targets and availability take of that.

    python -m stepbill.experiments.drivers.batching --target=h200
    python -m stepbill.experiments.drivers.batching --assume=scenario.chat-support.tpot_seconds=0.008

Sequences of a batch share the reading of the weights, and each brings its own cache. Within a latency target a server
cannot wait until a batch is full, nor be always busy: what is left of its full throughput is simulated
(profiling/serving.py), beside the wait of an M/D/1 queue. What stands by for failures and peaks is added line by line
(profiling/economics.py).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from absl.flags import FlagValues

from ...profiling import economics, price, serving, targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill, Work
from ...profiling.economics import Item
from ...profiling.roofline import PICOSECONDS
from ...profiling.serving import ImpossibleTarget, Request, Server, Targets
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, numbers, require_times
from .finding import Finding, Plot, Quantity, Table, cell
from .serving import AUTO, BATCHES, CONTEXTS, Replica, fewest_chips, step_points
from .sweep import Point

MORE = (*BATCHES, 512)
SLACK = (1.5, 2.0, 4.0)  # times the least latency that a target allows
LOADS = (0.5, 0.8, 0.9, 0.95)  # of the time that a queue's server is busy
POOLED = 4  # servers of one queue
QUEUED = 10_000  # prompts that are simulated in it
WITHIN = 0.95  # of the requests keep to a target
HALVINGS = 7  # of the arrival rate, until it is called the highest: to 1 % of full throughput
REGIONS = (1, 2, 3, 5)
SCENARIO = "scenario.chat-support"
CLAIM = (
    "A batch makes a token cheaper until decode is bound by compute, at the chip's ridge point; a latency target and "
    "spare capacity take a part of that back."
)


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.string("batches", ",".join(map(str, MORE)), "sequences that are decoded together, with commas")
    to.count("context", 4096, f"positions of the longest request; beside it, {CONTEXTS[0]} are priced")
    to.count("prompt_tokens", 1024, "of each simulated request")
    to.count("output_tokens", 256, "of each simulated request")
    to.count("requests", 1000, "how many are simulated")
    to.integer("seed", 0, "of arrivals", low=0)
    to.string("mesh", AUTO, "chips of one replica, such as tensor=2; auto: the fewest that hold the smallest batches")


def _points(values: FlagValues) -> list[Point]:
    require_times(values.target)
    longest = values.prompt_tokens + values.output_tokens
    if longest > values.context:
        raise UsageError(f"--context={values.context}: it must be at least the {longest} positions of a request")
    config = flags.model_config(values, "decode")
    roomy = replace(config, max_context=max(values.context, config.max_context))
    batches = numbers("batches", values.batches)
    mesh = values.mesh
    if mesh == AUTO:
        mesh = fewest_chips(roomy, values.target, batches[min(1, len(batches) - 1)], values.context)
    return step_points(roomy, values.target, mesh, values.context, batches)


# --- batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """Decode steps with one context, in order of the batch. ridge: FLOPs a byte of the chip. fits: the largest batch
    that memory has room for."""

    context: int
    points: tuple[Point, ...]
    bills: tuple[Bill, ...]
    ridge: float
    fits: int

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(point.batch or 1 for point in self.points)

    @property
    def costs(self) -> tuple[float, ...]:
        """Chip-seconds a token."""
        return tuple(
            one.total.seconds * one.program["chips"] / batch
            for batch, one in zip(self.batches, self.bills, strict=True)
        )

    @property
    def is_cheaper(self) -> bool:
        """Whether a larger batch makes a token cheaper, up to that at which compute bounds the step."""
        until = [cost for batch, cost in zip(self.batches, self.costs, strict=True) if batch <= (self.turns or batch)]
        return all(later < earlier for earlier, later in pairwise(until))

    @cached_property
    def limit(self) -> float | None:
        """FLOPs a byte that an endless batch tends to: of what one more sequence adds. None: with one batch alone."""
        return _slope(self._work)

    @cached_property
    def turns(self) -> float | None:
        """The batch from which on a step has the FLOPs a byte of the ridge point; None where no batch has."""
        return _turns(self.batches, self._work, self.ridge)

    @cached_property
    def mlp_turns(self) -> float | None:
        """The same of the MLPs alone."""
        return _turns(self.batches, [one.group("mlp") for one in self.bills], self.ridge)

    @property
    def _work(self) -> list[Work]:
        return [one.total for one in self.bills]


def _slope(work: Sequence[Work]) -> float | None:
    if len(work) < 2:
        return None
    more = work[-1] - work[-2]
    return more.matmul / more.hbm_bytes if more.hbm_bytes > 0 else None


def _turns(batches: Sequence[int], work: Sequence[Work], ridge: float) -> float | None:
    """FLOPs and bytes are linear in the batch, between two that were compiled and beyond the last."""
    over = [one.matmul - ridge * one.hbm_bytes for one in work]
    if over[0] >= 0:
        return batches[0]
    for n in range(1, len(batches)):
        if over[n] >= 0 or (n == len(batches) - 1 and over[n] > over[n - 1]):
            return batches[n - 1] - over[n - 1] * (batches[n] - batches[n - 1]) / (over[n] - over[n - 1])
    return None


# --- latency -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Requests that are all alike, and what one replica makes of them."""

    replica: Replica
    server: Server
    prompt: int
    output: int
    count: int
    seed: int

    def requests(self, rate: float, count: int | None = None) -> list[Request]:
        """By chance, `rate` a second: the same at any rate, but faster."""
        count = count or self.count
        come = serving.poisson(rate, count, np.random.default_rng(self.seed))
        return serving.traffic(come, [self.prompt] * count, [self.output] * count)

    @cached_property
    def full(self) -> serving.Result:
        """All requests at once."""
        together = serving.traffic([0] * self.count, [self.prompt] * self.count, [self.output] * self.count)
        return serving.simulate(together, self.replica.times, self.server)

    @property
    def full_rate(self) -> float:
        """Requests a second."""
        return self.count / self.full.seconds

    @property
    def least(self) -> tuple[float, float]:
        """Seconds to the first token and for each after it, on a replica that does nothing else."""
        times = self.replica.times
        return times.prefill(self.prompt) / PICOSECONDS, times.decode(1, self.prompt + 1) / PICOSECONDS

    def kept(self, goals: Targets) -> float | None:
        """Of the full rate, the most with which the targets are kept; None where not even an empty replica does."""
        try:
            serving.check_targets(self.requests(1.0, 1), self.replica.times, goals)
        except ImpossibleTarget:
            return None
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            share = (low + high) / 2
            found = serving.simulate(self.requests(share * self.full_rate), self.replica.times, self.server)
            low, high = (share, high) if found.share_within(goals) >= goals.share else (low, share)
        return low or None


def queue_wait(busy: float, service_seconds: float) -> float:
    """Mean seconds before service, of arrivals by chance that all take as long, on one server (Pollaczek-Khinchine)."""
    return service_seconds * busy / (2 * (1 - busy))


def _waits(traffic: Traffic) -> Table:
    """Prompts alone, read one after the other: as the formula has it, simulated, and with one queue for several."""
    service = traffic.least[0]
    columns = (
        *(Quantity("busy", "%"), Quantity("a token costs", "x"), Quantity("wait, M/D/1", "s")),
        *(Quantity("wait, simulated", "s"), Quantity(f"wait, {POOLED} replicas", "s")),
    )
    rows = []
    for busy in LOADS:
        waits = []
        for replicas in (1, POOLED):
            arriving = [replace(one, output=1) for one in traffic.requests(busy * replicas / service, QUEUED)]
            found = serving.simulate(arriving, traffic.replica.times, traffic.server, replicas)
            waits.append(float(found.ttft_seconds.mean()) - service)
        rows.append((busy, 1 / busy, queue_wait(busy, service), *waits))
    return Table(
        f"Waiting for prompts of {traffic.prompt:,} tokens alone, each {cell(service, 's')}", columns, tuple(rows)
    )


# --- the finding ---------------------------------------------------------------------------------------------------


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    points = _points(values)
    replica = Replica.of(points, bills)
    if replica.positions < values.context:
        raise UsageError(
            f"--context={values.context}: {points[0].config.name} does not fit: beside the weights {replica.chips} x "
            f"{values.target} have room for {replica.positions} positions; more chips are --mesh"
        )
    sweeps = _sweeps(values, points, bills, replica)
    server = Server(replica.memory("paged", 16, values.context), replica.times.batches[-1])
    sizes = values.prompt_tokens, values.output_tokens, values.requests, values.seed
    traffic = Traffic(replica, server, *sizes)
    goals = Targets(known.number(f"{SCENARIO}.ttft_seconds"), known.number(f"{SCENARIO}.tpot_seconds"), WITHIN)
    asked = traffic.kept(goals)
    lines = _lines(values, traffic, asked, known)
    whole, busy = sum(line.picodollars for line in lines), lines[0].picodollars
    first = sweeps[0]
    cheaper = first.costs[0] / first.costs[-1]
    reached = [one.turns is not None and one.turns <= one.fits for one in sweeps]
    holds = None if asked is None else all(one.is_cheaper for one in sweeps) and all(reached) and whole > busy
    evidence = (
        f"{first.batches[-1]} sequences make a token {cell(cheaper, 'x')} times as cheap as {first.batches[0]}; "
        + "; ".join(map(_turning, sweeps))
        + ". "
        + (
            f"The targets of {goals.ttft_seconds:g} s and {goals.tpot_seconds:g} s a token cannot be kept here"
            if asked is None
            else f"Within {goals.ttft_seconds:g} s to the first token and {goals.tpot_seconds:g} s a token "
            f"{asked:.0%} of the full throughput is left"
        )
        + f", and with idle and spare capacity a token costs {cell(whole / busy, 'x')} times that of a full chip."
    )
    return Finding(
        "batching",
        BATCHING.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        BATCHING.command(values),
        (
            *(_batches(one) for one in sweeps),
            _edges(sweeps),
            _latencies(traffic, goals, asked),
            _waits(traffic),
            _availability(lines),
            _standing_by(known),
        ),
        _plots(sweeps),
        notes=(
            *replica.notes,
            "step times are the roofline's: a lower bound, with nothing between steps",
            "the ridge point is that of bfloat16 products, and whole steps are compared with it",
            "a batch that memory has room for is of sequences that all are as long as the context",
        ),
        headline=f"{first.batches[-1]} at a time are {cheaper:.0f} times as cheap a token as {first.batches[0]}",
        factor=max(cheaper, 1.0),
    )


def _turning(one: Sweep) -> str:
    limit = "" if one.limit is None else f" (one more sequence adds {one.limit:.3g} FLOPs a byte)"
    if one.turns is None:
        where = f"never reaches the ridge point of {one.ridge:.0f}{limit}"
    else:
        where = f"reaches the ridge point of {one.ridge:.0f} FLOPs a byte at {one.turns:,.0f} sequences"
    return f"with {one.context:,} positions each decode {where}, and memory ends at {one.fits:,}"


def _sweeps(values: FlagValues, points: Sequence[Point], bills: Bills, replica: Replica) -> list[Sweep]:
    chip = targets.chip(values.target)
    assert chip.hbm_bytes_per_second is not None  # or no step would be timed
    ridge = chip.peak_flops["bf16"] / chip.hbm_bytes_per_second
    found = []
    for context in dict.fromkeys((min(CONTEXTS[0], values.context), values.context)):
        steps = [
            (point, one)
            for point in points
            if point.step == "decode" and point.context == context and isinstance(one := bills[point], Bill)
        ]
        if steps:
            of, billed = zip(*steps, strict=True)
            found.append(Sweep(context, of, billed, ridge, replica.positions // context))
    return found


def _batches(one: Sweep) -> Table:
    columns = (
        *(
            Quantity("batch"),
            Quantity("a token", "s"),
            Quantity("tokens/s of a replica"),
            Quantity("$ / M tokens", "$"),
        ),
        *(Quantity("chip-time of a token", "s"), Quantity("of batch 1's", "x"), Quantity("intensity", "FLOP/B")),
        *(Quantity("cache of the time", "%"), Quantity("time bound by compute", "%")),
    )
    rows = []
    for batch, found, cost in zip(one.batches, one.bills, one.costs, strict=True):
        whole = found.total
        compute = sum(row.work.picoseconds for row in found.rows if row.bound == "compute")
        rows.append(
            (
                *(batch, whole.seconds, price.tokens_per_second(whole.seconds, batch)),
                *(found.price.get("dollars_per_million_tokens"), cost, cost / one.costs[0]),
                whole.matmul / whole.hbm_bytes,
                *(found.group("cache").picoseconds / whole.picoseconds, compute / whole.picoseconds),
            )
        )
    commands = tuple(point.command for point in one.points)
    return Table(f"Decode with {one.context:,} positions each", columns, tuple(rows), commands)


def _edges(sweeps: Sequence[Sweep]) -> Table:
    columns = (
        *(Quantity("context"), Quantity("fits, sequences"), Quantity("ridge point", "FLOP/B")),
        *(Quantity("of an endless batch", "FLOP/B"), Quantity("MLP reaches it at"), Quantity("the step reaches it at")),
    )
    rows = tuple((one.context, one.fits, one.ridge, one.limit, one.mlp_turns, one.turns) for one in sweeps)
    return Table("Where a batch ends: memory, or compute", columns, rows)


def _latencies(traffic: Traffic, goals: Targets, asked: float | None) -> Table:
    """Each target alone, as so many times the least; and both of the scenario."""
    ttft, tpot = traffic.least
    columns = (
        *(Quantity("target"), Quantity("first token", "s"), Quantity("each after it", "s")),
        *(Quantity("of the full throughput", "%"), Quantity("a token costs", "x")),
    )
    tried = {f"first token within {slack:g} x the least": (slack * ttft, None) for slack in SLACK}
    tried |= {f"each after it within {slack:g} x the least": (None, slack * tpot) for slack in SLACK}
    rows = []
    for name, (first, each) in tried.items():
        limits = {"ttft_seconds": first, "tpot_seconds": each}
        share = traffic.kept(Targets(share=WITHIN, **{key: at for key, at in limits.items() if at is not None}))
        rows.append((name, first, each, share, share and 1 / share))
    rows.append((SCENARIO, goals.ttft_seconds, goals.tpot_seconds, asked, asked and 1 / asked))
    title = f"Throughput that {WITHIN:.0%} of the requests leave: {traffic.prompt:,} tokens in, {traffic.output:,} out"
    return Table(title, columns, tuple(rows))


def _lines(values: FlagValues, traffic: Traffic, asked: float | None, known: Assumptions) -> list[Item]:
    """A million output tokens on rented chips: of a full server, within the targets, and available."""
    full, chips = traffic.full, traffic.replica.chips
    hours = full.seconds * chips / full.output_tokens * economics.MILLION / price.SECONDS_PER_HOUR
    busy = economics.rented(values.target, hours, known).items[0]
    built = economics.built_up(values.target, hours / (asked or 1), known, rent=True)
    late = Item("latency", built["rent"].picodollars - busy.picodollars, f"{asked or 1:.0%} of the throughput is left")
    return [replace(busy, name="a full server"), late, *(built[name] for name in ("idle", "spare", "regions"))]


def _availability(lines: Sequence[Item]) -> Table:
    columns = (
        *(
            Quantity("line"),
            Quantity("$ / M output tokens", "$"),
            Quantity("so far", "$"),
            Quantity("over a full server", "x"),
        ),
        Quantity("how"),
    )
    rows, so_far = [], 0
    for line in lines:
        so_far += line.picodollars
        rows.append((line.name, line.dollars, so_far / economics.PICO, so_far / lines[0].picodollars, line.how))
    return Table("From a full chip to an available service, at the chip's rent", columns, tuple(rows))


def _standing_by(known: Assumptions) -> Table:
    """Capacity that must be there for each unit that serves: (1 + 1/N) (1 + 1/(R - 1)), with any of R regions lost."""
    units = known.entry("redundancy.spared_units")
    tried = sorted({int(n) for n in (units.low, units.value, units.high) if n is not None})
    columns = (Quantity("regions"), *(Quantity(f"one spare for {n}", "x") for n in tried))
    rows = tuple(
        (regions, *((1 + 1 / n) * (1 + (1 / (regions - 1) if regions > 1 else 0)) for n in tried))
        for regions in REGIONS
    )
    return Table("Capacity over what serves, any one region lost", columns, rows)


def _plots(sweeps: Sequence[Sweep]) -> tuple[Plot, ...]:
    lines: dict[str, tuple[tuple[float, float], ...]] = {}
    for one in sweeps:
        costs: Mapping[float, float | None] = {
            found.total.seconds: found.price.get("dollars_per_million_tokens") for found in one.bills
        }
        lines[f"{one.context:,} positions, batch {', '.join(map(str, one.batches))}"] = tuple(
            (seconds, dollars) for seconds, dollars in costs.items() if dollars is not None
        )
    x, y = Quantity("a token of one sequence", "s"), Quantity("$ / M tokens", "$")
    return (Plot("Price against speed, by the batch", x, y, {name: line for name, line in lines.items() if line}),)


BATCHING = Driver(
    "batching",
    "What does batching save, and what do latency and availability cost?",
    _define,
    _points,
    _find,
    "llama3-8b",
)
main = BATCHING.main

if __name__ == "__main__":
    sys.exit(main())
