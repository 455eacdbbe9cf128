"""The simulator against a day of serving that was published: DeepSeek-V3 on 226.75 nodes of eight H800.

    python -m stepbill.experiments.drivers.serving_day --target=h200

What is published of traffic and hit rates goes in, and tokens/s of a node that reads prompts, and of one that decodes,
come out, with step times of our own programs: int8 weights, experts shared out over the eight chips of one node, each
with requests of its own. DeepSeek ran others (fp8, experts over 32 and 144 chips, two batches overlapping). So this
compares; nothing is fitted.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from absl.flags import FlagValues

from ...profiling import serving
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill, Work
from ...profiling.price import SECONDS_PER_HOUR
from ...profiling.roofline import PICOSECONDS
from ...profiling.serving import PrefixCached, Request, Result, Server, StepTimes
from .. import flags
from ..flags import UsageError
from .driver import Bills, Driver, bill
from .finding import Finding, Quantity, Table
from .serving import Replica
from .sweep import Point, mesh_of

if TYPE_CHECKING:
    from ...model.config import ModelConfig

BATCHES, CONTEXTS, PROMPTS = (128, 1024), (4096, 8192), (2048, 8192)  # a node's; a prompt for each that has its own
CUT = (1, 3)  # layers beyond the dense ones
NEAR = 2.0
CLAIM = (
    f"Step times of compiled programs give a published day's tokens per second of a node within a factor of {NEAR:g}."
)


@dataclass(frozen=True)
class Day:
    """What the published sums say of one request, on average: tokens of its prompt and answer, and the share of the
    prompt that was found in a cache. The mean cache while an answer is written is the prompt and half of the answer."""

    prompt: int
    output: int
    cached: float

    @classmethod
    def of(cls, known: Assumptions) -> "Day":
        """From `day` of the assumptions."""
        found, read = known.number("day.cached_tokens"), known.number("day.uncached_tokens")
        ratio = (found + read) / known.number("day.output_tokens")
        output = known.number("day.cache_positions") / (ratio + 0.5)
        return cls(round(ratio * output), round(output), found / (found + read))


@dataclass(frozen=True)
class _AfterPrefill:
    """Of a node that only decodes: prompts come from another, read, in no time."""

    times: StepTimes

    def prefill(self, tokens: int, past: int = 0) -> int:
        del tokens, past
        return 0

    def decode(self, batch: int, positions: int) -> int:
        return self.times.decode(batch, positions)


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.values.set_default("weights", "int8")
    to.string("mesh", "expert=8", "the chips of a node")


def _shallow(values: FlagValues) -> "tuple[ModelConfig, list[ModelConfig]]":
    """The model, and two with few of its layers: each layer more takes what another does."""
    config = flags.model_config(values, "decode")
    dense = config.experts.dense_layers if config.experts else 0
    depths = [dense + more for more in CUT]
    if config.num_layers <= depths[-1]:
        raise UsageError(f"--model={config.name}: it must have more than {depths[-1]} layers, which are compiled of it")
    return config, [replace(config, num_layers=depth, name=f"{config.name}(L={depth})") for depth in depths]


def _steps(config: "ModelConfig", values: FlagValues) -> list[Point]:
    decode = [Point(config, "decode", b, n, values.target, values.mesh) for b in BATCHES for n in CONTEXTS]
    together = flags.batch_shards(mesh_of(values.mesh))
    return [*decode, *(Point(config, "prefill", together, n, values.target, values.mesh) for n in PROMPTS)]


def _points(values: FlagValues) -> list[Point]:
    return [point for config in _shallow(values)[1] for point in _steps(config, values)]


def deepened(few: Bill, more: Bill, layers: int) -> Bill:
    """What of a bill a replica is made of, as if the step had `layers` layers: linear in them through two bills."""
    depths = (int(one.program["model"].partition("(L=")[2][:-1]) for one in (few, more))
    first, second = depths
    further = Fraction(layers - first, second - first)

    def at(low: int, high: int) -> int:
        return int(low + (high - low) * further)

    prompts = more.program["batch"] if more.program["step"] == "prefill" else 1  # read at one time, as if one by one
    total = Work(picoseconds=at(few.total.picoseconds, more.total.picoseconds) // prompts)
    memory = {name: at(few.memory[name], more.memory[name]) for name in ("peak_bytes", "cache", "capacity_bytes")}
    return replace(more, total=total, memory=memory)


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    config, cut = _shallow(values)
    few, more = (_steps(one, values) for one in cut)
    whole = {
        replace(point, config=config): deepened(bill(bills, low), bill(bills, point), config.num_layers)
        for low, point in zip(few, more, strict=True)
    }
    replica, day = Replica.of(list(whole), whole), Day.of(known)
    fastest = known.number("day.tokens_per_second_per_user")
    reads, writes = _reading(replica, day), _writing(replica, day, 1 / fastest)
    ours = {"reading": reads.input_tokens_per_second, "writing": writes.output_tokens_per_second}
    theirs = {
        "reading": known.number("day.prefill_tokens_per_second_per_node"),
        "writing": known.number("day.decode_tokens_per_second_per_node"),
    }
    nodes = {"simulated": _nodes(ours, known), "published": known.number("day.nodes")}
    holds = all(1 / NEAR <= ours[what] / theirs[what] <= NEAR for what in ours)
    evidence = (
        f"a node reads {ours['reading']:,.0f} tokens/s where {theirs['reading']:,.0f} are published, and writes "
        f"{ours['writing']:,.0f} where {theirs['writing']:,.0f} are; the day would take {nodes['simulated']:,.0f} "
        f"nodes instead of {nodes['published']:,.0f}"
    )
    columns = (
        Quantity("a node"),
        *(Quantity(name, "tokens/s") for name in ("simulated", "published")),
        Quantity("ratio", "x"),
    )
    rates = Table(
        "Tokens of a node", columns, tuple((what, ours[what], theirs[what], ours[what] / theirs[what]) for what in ours)
    )
    return Finding(
        DAY.name,
        DAY.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        DAY.command(values),
        (rates, _cost(nodes, known), _simulated(replica, day, writes)),
        notes=(*replica.notes, *_notes(values, cut, config)),
        headline=f"the day takes {nodes['simulated']:,.0f} nodes here, and took {nodes['published']:,.0f}",
    )


def _reading(replica: Replica, day: Day) -> Result:
    times = PrefixCached(replica.times, day.cached)
    return serving.simulate([Request(0, day.prompt, 1)] * 32, times, Server(replica.memory("paged", 64, 0), 1))


def _writing(replica: Replica, day: Day, seconds: float) -> Result:
    """With the largest batch at which a token takes no longer than that, or with one."""
    room = replica.positions // (day.prompt + day.output)
    if room < 1:
        raise UsageError(
            f"--mesh: there is room for {replica.positions} positions; a request has {day.prompt + day.output}"
        )
    mean = day.prompt + day.output / 2
    batches = range(2, min(replica.times.batches[-1], room) + 1)
    allowed = (batch for batch in batches if replica.times.decode(batch, int(batch * mean)) <= seconds * PICOSECONDS)
    batch = max(allowed, default=1)
    requests = [Request(0, day.prompt, day.output)] * (2 * batch)
    return serving.simulate(requests, _AfterPrefill(replica.times), Server(replica.memory("paged", 64, 0), batch))


def _nodes(rates: dict[str, float], known: Assumptions) -> float:
    """That a day of so many tokens takes, at full rates."""
    read = known.number("day.cached_tokens") + known.number("day.uncached_tokens")
    seconds = known.number("day.hours") * SECONDS_PER_HOUR
    return (read / rates["reading"] + known.number("day.output_tokens") / rates["writing"]) / seconds


def _cost(nodes: dict[str, float], known: Assumptions) -> Table:
    a_node = known.number("day.dollars_per_hour") * known.number("day.chips_per_node") * known.number("day.hours")
    rows = tuple((who, count, count * a_node) for who, count in nodes.items())
    return Table("The day", (Quantity("which"), Quantity("nodes"), Quantity("cost at the published price", "$")), rows)


def _simulated(replica: Replica, day: Day, writes: Result) -> Table:
    columns = ("prompt", "answer", "found in a cache", "positions that fit", "batch", "a token")
    units = ("tokens", "tokens", "%", "", "", "s")
    row = (
        day.prompt,
        day.output,
        day.cached,
        replica.positions,
        writes.server.max_batch,
        float(writes.tpot_seconds.mean()),
    )
    return Table("A request, and a node that writes", tuple(map(Quantity, columns, units)), (row,))


def _notes(values: FlagValues, cut: "Sequence[ModelConfig]", config: "ModelConfig") -> tuple[str, ...]:
    layers = " and ".join(str(one.num_layers) for one in cut)
    own = "each with requests of its own" if "expert" in mesh_of(values.mesh) else "each with the whole latent cache"
    return (
        f"step times: rooflines of {layers} layers, each layer more taken to cost the same up to {config.num_layers}",
        f"ours: {values.weights} weights, {values.mesh} of {values.target}, {own}; theirs: fp8, H800, experts over "
        "32 chips (reading) or 144 (writing), each with requests of its own",
        "every request is the average one; nodes that only read and nodes that only write, both always full",
    )


DAY = Driver(
    "serving_day", "Does the simulator agree with a published day of serving?", _define, _points, _find, "deepseek-v3"
)
main = DAY.main

if __name__ == "__main__":
    sys.exit(main())
