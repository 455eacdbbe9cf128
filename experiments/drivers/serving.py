"""Driver 13: what it takes to serve given traffic within given latencies.

    python -m stepbill.experiments.drivers.serving --target=h200 --arrival_rate=20 --ttft=0.5 --tpot=0.02
    python -m stepbill.experiments.drivers.serving --prompt_tokens=lognormal:800,1.0,8000 --replicas=4

Decode steps of a few batches and contexts, and prompts of a few lengths, are compiled and billed. At the
roofline they make the step times of a simulated server (profiling/serving.py); its memory is what the bills leave.
"""

import csv
import itertools
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from absl.flags import FlagValues

from ...profiling import chips, serving, targets
from ...profiling.assumptions import Assumptions
from ...profiling.bill import Bill
from ...profiling.roofline import PICOSECONDS
from ...profiling.serving import (
    Grid,
    ImpossibleTarget,
    Memory,
    PrefixCached,
    Request,
    Result,
    Server,
    StepTimes,
    Targets,
)
from .. import fit, flags
from ..flags import UsageError
from . import sweep
from .driver import Bills, Driver, bill, require_times
from .finding import Finding, Plot, Quantity, Table, Value, cell
from .sweep import Point

if TYPE_CHECKING:
    import numpy as np

    from ...model.config import ModelConfig

BATCHES = (1, 8, 32, 128)
CONTEXTS = (1024, 4096, 16_384, 65_536)  # those below the longest request, and that
PROMPTS = (128, 1024, 4096, 16_384, 65_536)
ROUND = 128  # the longest request is rounded up to a multiple, so that few grids are compiled
LOADS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)  # of one replica's full throughput
AUTO = "auto"
LOGGED = ("seconds", "prompt_tokens", "output_tokens")  # columns of a log
CLAIM = "Latency has a price: within the targets a token costs more than on a server that is always full."


def _define(to: flags.Definer) -> None:
    flags.define_storage(to)
    to.string("mesh", AUTO, "chips of one replica, such as tensor=4; auto: the fewest that hold the smallest batches")
    to.number("arrival_rate", 8.0, "requests a second", low=1e-6)
    to.one_of(("poisson", "regular"), "arrivals", "poisson", "requests come by chance (poisson) or evenly (regular)")
    lengths = "N; N,N,... in turn; or lognormal:MEDIAN,SIGMA,MOST"
    to.string("prompt_tokens", "1024", f"lengths of prompts: {lengths}")
    to.string("output_tokens", "256", f"lengths of answers: {lengths}")
    to.number("cached_prompt", 0.0, "the share of each prompt that is found in a cache of prompts", low=0.0)
    to.count("requests", 2000, "how many are simulated")
    to.string("log", None, f"a CSV of {', '.join(LOGGED)} of each request, instead of arrivals and lengths")
    to.number("ttft", 1.0, "seconds to the first token, the target", low=0.0)
    to.number("tpot", 0.05, "seconds for each token after it, the target", low=0.0)
    to.number("within", 0.95, "the share of requests that must keep to both", low=0.0)
    to.integer("seed", 0, "of arrivals and lengths", low=0)
    to.string("replicas", AUTO, "how many, each of --mesh chips; auto: the fewest that keep to the targets")
    to.count("max_batch", None, "requests at a time in a replica. Default: the largest batch that was compiled")
    to.one_of(("paged", "contiguous"), "cache", "paged", "memory in pages, or in slots for the longest request")
    to.count("block", 16, "positions of a page")
    to.count(
        "chunk", None, "positions of prompts read in one step beside decoding. Default: prompts whole, by themselves"
    )


# --- from flags to traffic -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens: a list that is taken in turn, or drawn."""

    listed: tuple[int, ...] = ()
    median: float = 0.0
    sigma: float = 0.0
    most: int = 0

    @classmethod
    def parse(cls, flag: str, text: str) -> "Lengths":
        """The value of a flag; UsageError."""
        drawn = re.fullmatch(r"lognormal:([\d.]+),([\d.]+),(\d+)", text)
        try:
            if drawn:
                found = cls((), float(drawn[1]), float(drawn[2]), int(drawn[3]))
                if not 1 <= found.median <= found.most:
                    raise ValueError
                return found
            listed = tuple(int(part) for part in text.split(","))
            if min(listed) < 1:
                raise ValueError
            return cls(listed, most=max(listed))
        except ValueError:
            raise UsageError(
                f"--{flag}={text}: it must be a whole number from 1 on, several with commas between, or "
                "lognormal:MEDIAN,SIGMA,MOST with a median from 1 to MOST"
            ) from None

    def draw(self, count: int, generator: "np.random.Generator") -> list[int]:
        if self.listed:
            return list(itertools.islice(itertools.cycle(self.listed), count))
        return serving.lognormal(self.median, self.sigma, self.most, count, generator)


@dataclass(frozen=True)
class Log:
    """Requests that came: when, in seconds after the first, and the tokens of their prompts and answers."""

    seconds: tuple[float, ...]
    prompts: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Requests a second."""
        return (len(self.seconds) - 1) / self.seconds[-1]

    @classmethod
    @cache
    def read(cls, path: str) -> "Log":
        """A file with LOGGED in its first line; UsageError."""
        try:
            with open(path, newline="") as file:
                rows = [tuple(float(row[name]) for name in LOGGED) for row in csv.DictReader(file)]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--log={path}: cannot read it: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"--log={path}: each line must have numbers for {', '.join(LOGGED)}") from None
        rows.sort()
        whole = all(least >= 1 and least.is_integer() for row in rows for least in row[1:])
        if not whole or not all(math.isfinite(row[0]) for row in rows) or len({row[0] for row in rows}) < 2:
            raise UsageError(f"--log={path}: it must have requests at two times at least, of 1 token or more each")
        seconds, prompts, outputs = zip(*rows, strict=True)
        return cls(tuple(at - seconds[0] for at in seconds), tuple(map(int, prompts)), tuple(map(int, outputs)))


def _lengths(values: FlagValues) -> tuple[Lengths, Lengths]:
    if values.log is not None:
        log = Log.read(values.log)
        return Lengths(log.prompts, most=max(log.prompts)), Lengths(log.outputs, most=max(log.outputs))
    prompt, output = (Lengths.parse(name, getattr(values, name)) for name in ("prompt_tokens", "output_tokens"))
    return prompt, output


def _longest(values: FlagValues, config: "ModelConfig") -> int:
    """Positions of the longest request that there can be, rounded up."""
    prompt, output = _lengths(values)
    longest = prompt.most + output.most
    if longest > config.max_context:
        said = f"--prompt_tokens={values.prompt_tokens}: with --output_tokens={values.output_tokens}"
        said = said if values.log is None else f"--log={values.log}:"
        raise UsageError(
            f"{said} a request may take {longest} positions; {config.name} takes 1 to {config.max_context}"
        )
    return min(-(-longest // ROUND) * ROUND, config.max_context)


def _requests(values: FlagValues, rate: float) -> list[Request]:
    """The traffic; the same lengths at any rate, and of a log the same order with other distances in time."""
    import numpy as np

    if values.log is not None:
        log = Log.read(values.log)
        come = [round(at * log.rate / rate * PICOSECONDS) for at in log.seconds]
        return serving.traffic(come, log.prompts, log.outputs)

    generator, others = np.random.default_rng([values.seed, 0]), np.random.default_rng([values.seed, 1])
    prompt, output = (lengths.draw(values.requests, others) for lengths in _lengths(values))
    poisson = values.arrivals == "poisson"
    come = serving.poisson(rate, values.requests, generator) if poisson else serving.regular(rate, values.requests)
    return serving.traffic(come, prompt, output)


def _rate(values: FlagValues) -> float:
    """Requests a second."""
    return values.arrival_rate if values.log is None else Log.read(values.log).rate


# --- from bills to a server ----------------------------------------------------------------------------------------


def step_points(
    config: "ModelConfig", target: str, mesh: str, longest: int, batches: Iterable[int] = BATCHES
) -> list[Point]:
    """The steps that tell what a server of requests of up to `longest` positions can do: those that may fit."""
    contexts = [*(context for context in CONTEXTS if context < longest), longest]
    prompts = [*(prompt for prompt in PROMPTS if prompt < longest), longest]
    decode = [Point(config, "decode", batch, context, target, mesh) for batch in batches for context in contexts]
    capacity = targets.chip(target).usable_hbm_bytes or math.inf
    beside, each = held(config, longest, mesh)

    def may_fit(point: Point) -> bool:  # each request adds the same; a window's cache adds less, at most its part of it
        return beside + (point.batch or 1) * each * point.context / longest <= capacity

    fitting = [point for point in decode[1:] if may_fit(point)]
    return [decode[0], *fitting, *(Point(config, "prefill", 1, prompt, target, mesh) for prompt in prompts)]


@cache
def held(config: "ModelConfig", longest: int, mesh: str) -> tuple[int, int]:
    """Bytes that a chip must hold at least: beside caches, and for the cache of one request of `longest` positions."""
    sizes = sweep.mesh_of(mesh)
    one, two = (fit.estimate(config, "decode", batch, longest, sizes) for batch in (1, 2))
    return 2 * one - two, two - one


def fewest_chips(config: "ModelConfig", target: str, batch: int, longest: int) -> str:
    """A mesh, as a flag, of as few chips as hold `batch` such requests by estimate; UsageError where there is none."""
    capacity = targets.chip(target).usable_hbm_bytes or 0

    def needed(mesh: fit.Mesh) -> int:
        beside, each = held(config, longest, flags.mesh_name(mesh))
        return beside + batch * each

    found = fit.smallest(fit.candidates(config, "decode", 1), needed, None, capacity)
    if found is None:
        raise UsageError(f"--mesh=auto: {config.name} fits on no mesh of up to {fit.MOST_CHIPS} {target}")
    return flags.mesh_name(found.mesh)


@dataclass(frozen=True)
class Replica:
    """What bills say of one replica: its step times, and what it has room for. notes: what was done to them."""

    times: Grid
    chips: int
    positions: int
    bytes_per_position: float
    notes: tuple[str, ...]

    @classmethod
    def of(cls, points: Sequence[Point], bills: Bills) -> "Replica":
        """From the outcomes of `step_points`; UsageError where the smallest does not fit, or times are not known."""
        found = {point: bill(bills, point) for point in points if point == points[0] or point.step == "prefill"}
        found |= {one: out for one in points if isinstance(out := bills[one], Bill)}
        if not all(one.timed for one in found.values()):
            raise UsageError(f"--target={points[0].target}: its step times are not known")
        decode = {(p.batch or 1, p.context): _picoseconds(b) for p, b in found.items() if p.step == "decode"}
        prefill = {p.context: _picoseconds(b) for p, b in found.items() if p.step == "prefill"}
        filled, extended = _filled(decode)  # and without what is larger than any that fits
        raised_decode, raised_prefill = _rising(filled), _rising({(1, n): time for n, time in prefill.items()})
        raised = sum(raised_decode[key] > filled[key] for key in filled)
        raised += sum(raised_prefill[1, n] > prefill[n] for n in prefill)
        notes = []
        if extended:
            notes.append(
                f"{extended} decode steps that fit in no memory are extended: time of the cache grows with its size"
            )
        if raised:
            notes.append(f"{raised} step times are raised to that of a smaller step, so that none falls")
        grid = Grid(raised_decode, {n: time for (_, n), time in raised_prefill.items()})
        return cls(grid, found[points[0]].program["chips"], *_room(found), tuple(notes))

    def memory(self, kind: str, block: int, longest: int) -> Memory:
        """In pages or in slots."""
        return Memory(self.positions, block, longest if kind == "contiguous" else None)


def _picoseconds(one: Bill) -> int:
    return one.total.picoseconds


def _filled(times: Mapping[tuple[int, int], int]) -> tuple[dict[tuple[int, int], int], int]:
    """Decode times for every batch that is there with the smallest context, and how many of them had to be made: as if
    what a longer context adds, which is the cache's, were in proportion to the batch."""
    least_batch, least_context = (min(axis) for axis in zip(*times, strict=True))
    batches = sorted(batch for batch, context in times if context == least_context)
    contexts = sorted(context for batch, context in times if batch == least_batch)
    full = {(b, c): time for (b, c), time in times.items() if b in batches and c in contexts}
    made = 0
    for batch, context in itertools.product(batches, contexts):
        if (batch, context) not in full:
            fewer = batches[batches.index(batch) - 1]
            less = contexts[contexts.index(context) - 1]
            full[batch, context] = full[batch, less] + (full[fewer, context] - full[fewer, less]) * batch // fewer
            made += 1
    return full, made


def _rising(times: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Each at least that of every step that is no larger in either way."""
    return {(b, c): max(time for (x, y), time in times.items() if x <= b and y <= c) for b, c in times}


def _room(found: Mapping[Point, Bill]) -> tuple[int, float]:
    """Positions that the caches of one replica have room for, and the bytes of one on a chip."""
    point, largest = max(
        ((point, one) for point, one in found.items() if point.step == "decode"),
        key=lambda pair: (pair[0].context, pair[0].batch),
    )
    each = largest.memory["cache"] / ((point.batch or 1) * point.context)
    beside = max(one.memory["peak_bytes"] - one.memory["cache"] for one in found.values())
    return max(0, int((largest.memory["capacity_bytes"] - beside) / each)), each


# --- the finding ---------------------------------------------------------------------------------------------------


def _points(values: FlagValues) -> list[Point]:
    require_times(values.target)
    for name in ("cached_prompt", "within"):
        if getattr(values, name) > 1:
            raise UsageError(f"--{name}={getattr(values, name)}: it must be a share, from 0 to 1")
    if values.replicas != AUTO and not re.fullmatch(r"[1-9]\d*", values.replicas):
        raise UsageError(f"--replicas={values.replicas}: it must be a whole number from 1 on, or auto")
    config = flags.model_config(values, "decode")
    longest = _longest(values, config)
    mesh = values.mesh
    if mesh == AUTO:
        mesh = fewest_chips(config, values.target, BATCHES[1], longest)
    elif not re.fullmatch(r"(tensor=[1-9]\d*)?", mesh):
        raise UsageError(f"--mesh={mesh}: it must be tensor=N or auto; more of them are --replicas")
    return step_points(config, values.target, mesh, longest)


def _find(values: FlagValues, bills: Bills, known: Assumptions) -> Finding:
    points = _points(values)
    replica = Replica.of(points, bills)
    times: StepTimes = PrefixCached(replica.times, values.cached_prompt) if values.cached_prompt else replica.times
    most = replica.times.batches[-1]
    if (values.max_batch or 1) > most:
        raise UsageError(
            f"--max_batch={values.max_batch}: it must be at most {most}, the largest batch with step times"
        )
    longest = points[-1].context
    if replica.positions < longest:
        raise UsageError(
            f"--mesh={points[0].mesh}: {points[0].config.name} does not fit: beside the weights {replica.chips} x "
            f"{values.target} have room for {replica.positions} positions, and a request takes up to {longest}; "
            f"--mesh={fewest_chips(points[0].config, values.target, BATCHES[1], longest)} has room for more"
        )
    memory = replica.memory(values.cache, values.block, longest)
    server = Server(memory, values.max_batch or most, values.chunk)
    goals = Targets(values.ttft, values.tpot, values.within)
    requests = _requests(values, _rate(values))
    try:
        found = (
            serving.replicas_needed(requests, times, server, goals)
            if values.replicas == AUTO
            else serving.simulate(requests, times, server, int(values.replicas))
        )
    except ImpossibleTarget as error:
        raise UsageError(f"--{error.name}={error.seconds:g}: {error}") from None
    except ValueError as error:
        raise UsageError(f"--{'replicas' if 'replicas' in str(error) else 'prompt_tokens'}: {error}") from None
    full = serving.simulate([replace(one, arrival=0) for one in requests], times, server)
    dollars = chips.priced(targets.chip(values.target), known).dollars_per_hour
    holds, evidence, ratio = _verdict(replica, found, full, goals, dollars)
    return Finding(
        "serving",
        SERVING.question,
        values.target,
        CLAIM,
        holds,
        evidence,
        SERVING.command(values),
        (
            *_tables(replica, found, full, goals, dollars),
            _setting(values, replica, server, points[0].mesh),
            *_step_tables(replica),
        ),
        _plots(values, times, server, full),
        notes=(*replica.notes, *NOTES),
        headline=f"within the targets a token costs {ratio:.2f} times that of a full server" if ratio else evidence,
        factor=max(ratio, 1.0) if ratio else None,
    )


NOTES = (
    "step times are the roofline's: a lower bound of the chip's work alone, nothing between steps, launches or hosts",
    "a prompt is read as one row; decode steps count their mean context; a step with both takes the sum of both",
)


def _verdict(
    replica: Replica, found: Result, full: Result, goals: Targets, dollars: float | None
) -> tuple[bool | None, str, float | None]:
    """-> holds, evidence, what a token costs over one of a full server (None: the targets are not kept)."""
    kept = found.share_within(goals)
    total = replica.chips * len(found.replicas)
    busy = found.utilisation()["busy"]
    text = (
        f"{len(found.replicas)} x {replica.chips} chips serve {kept:.1%} of the requests within "
        f"{goals.ttft_seconds:g} s to the first token and {goals.tpot_seconds:g} s a token after it, {busy:.0%} busy"
    )
    if kept < goals.share:
        return None, f"{text}, which is too few", None
    ratio = (total * found.seconds / found.output_tokens) / (replica.chips * full.seconds / full.output_tokens)
    cost = [
        None if dollars is None else 1e6 * one.dollars(replica.chips, dollars) / one.output_tokens
        for one in (found, full)
    ]
    priced = "" if dollars is None else f" ({cell(cost[0], '$')} against {cell(cost[1], '$')} a million)"
    return ratio > 1, f"{text}; a token costs {ratio:.2f} times that of a full server{priced}", ratio


def _tables(replica: Replica, found: Result, full: Result, goals: Targets, dollars: float | None) -> tuple[Table, ...]:
    of = {
        "this traffic": found.to_json(goals, replica.chips, dollars),
        "all at once": full.to_json(goals, replica.chips, dollars),
    }
    # All else follows: chips of a replica are in the setting, tokens read are to those written as prompts to answers.
    columns = {
        "replicas": Quantity("replicas"),
        "share_within_targets": Quantity("in time", "%"),
        "preemptions": Quantity("preempted"),
        "output_tokens_per_second": Quantity("written", "tokens/s"),
        "dollars_per_million_output_tokens": Quantity("written", "$/M"),
    }
    sums = Table(
        f"Served: {len(found.requests):,} requests",
        (Quantity("traffic"), *columns.values()),
        tuple((who, *(one[name] for name in columns)) for who, one in of.items()),
    )
    shares = found.utilisation()
    use = Table(
        "Utilisation, in the mean over time and replicas",
        tuple(Quantity(name.replace("_", ", "), "%") for name in shares),
        (tuple(shares.values()),),
    )
    measures = {
        "wait": "wait for admission",
        "ttft": "to the first token",
        "tpot": "a token after it",
        "e2e": "to the last token",
    }
    waits = {title: of["this traffic"][f"{name}_seconds"] for name, title in measures.items()}
    percentiles = tuple(Quantity(name, "s") for name in next(iter(waits.values())))
    times = Table(
        "Seconds of a request",
        (Quantity("time"), *percentiles),
        tuple((title, *one.values()) for title, one in waits.items()),
    )
    return sums, times, use


def _step_tables(replica: Replica) -> tuple[Table, ...]:
    grid = replica.times
    of = grid.decode_picoseconds
    decode = tuple((batch, *(of[batch, context] * 1e-12 for context in grid.contexts)) for batch in grid.batches)
    columns = (Quantity("batch"), *(Quantity(f"context {context}", "s") for context in grid.contexts))
    prefill = tuple((prompt, grid.prefill_picoseconds[prompt] * 1e-12) for prompt in grid.prompts)
    return (
        Table("Step times: decode", columns, decode),
        Table("Step times: prefill", (Quantity("prompt"), Quantity("time", "s")), prefill),
    )


def _plots(values: FlagValues, times: StepTimes, server: Server, full: Result) -> tuple[Plot, ...]:
    """What one replica makes of more and more traffic."""
    served = len(_requests(values, _rate(values))) / full.seconds
    lines: dict[str, list[tuple[float, float]]] = {"p50": [], "p99": []}
    for load in LOADS:
        found = serving.simulate(_requests(values, load * served), times, server)
        shown: Any = found.to_json(Targets(), 1, None)["ttft_seconds"]
        for name, line in lines.items():
            line.append((load * served, shown[name]))
    drawn = {name: tuple(line) for name, line in lines.items()}
    x, y = Quantity("requests to one replica", "1/s"), Quantity("time to the first token", "s")
    return (Plot("Time to the first token under load", x, y, drawn, log_x=False),)


def _setting(values: FlagValues, replica: Replica, server: Server, mesh: str) -> Table:
    """What the simulation was told, and what the bills told it."""
    said: dict[str, tuple[Value, str]] = {
        "arrivals": (_rate(values), f"requests/s, {values.arrivals if values.log is None else values.log}"),
        "prompt": (values.prompt_tokens if values.log is None else "of the log", "tokens"),
        "answer": (values.output_tokens if values.log is None else "of the log", "tokens"),
        "found in a cache of prompts": (values.cached_prompt, "of each prompt, in no time"),
        "seed": (values.seed, ""),
        "chips of a replica": (mesh or "1", ""),
        "room for caches": (replica.positions, "positions"),
        "a position": (replica.bytes_per_position, "bytes on each chip"),
        "memory": (values.cache, f"blocks of {server.memory.block} positions"),
        "largest batch": (server.max_batch, "requests"),
        "read beside decoding": (server.chunk or "nothing", "positions a step"),
    }
    rows = tuple((name, str(value), unit) for name, (value, unit) in said.items())
    return Table("Setting", (Quantity("what"), Quantity("value"), Quantity("unit")), rows)


SERVING = Driver(
    "serving", "How many chips serve this traffic within these latencies?", _define, _points, _find, "llama3-8b"
)
main = SERVING.main

if __name__ == "__main__":
    sys.exit(main())
