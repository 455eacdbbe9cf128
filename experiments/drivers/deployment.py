"""What given traffic costs on given chips, in steady state, by compiled steps: what the adviser compares.

A replica holds b requests in the mean. Each takes of it the time P of reading what is new of its prompt, and one in b
of each decode step of its W further tokens: T = P + W D(b) / b of a replica's time. Traffic of `rate` keeps rate x T
replicas busy, whole or not, for a fleet shares what is left. Prompts are read one by one while those that decode wait.
b is the largest that memory holds and with which 99 of 100 requests keep to both latencies:

- requests in flight vary with mean b and variance b / (replicas x spare), where spare is the
  share of T that more requests in flight would share: a queue has the less hold on its length, the less is left to
  share. What 99 of 100 moments hold at most must fit, and gets its tokens in D of it;
- prompts that arrive meanwhile hold them up: W D of work take W D / (1 - load) in the mean, with a variance of
  W D rate P^2 / (1 - load)^3 (the busy period of a queue after a delay), where load = P / T is the share of the time in
  which prompts are read; replicas share arrivals evenly, so that each has its part of the variance;
- the first token comes after a decode step, the prompts before (M/D/1: the wait's tail falls as
  load exp(-2 (1 - load) t / P), in heavy traffic) and its own.

profiling/serving.py simulates the same, event by event; `simulated` holds this against it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from ...profiling import chips, economics, serving, targets
from ...profiling.assumptions import Assumptions, Scenario
from ...profiling.bill import GROUPS, Bill, Work
from ...profiling.roofline import PICOSECONDS
from ...profiling.serving import Memory, Server, Targets
from ..flags import UsageError
from .driver import Bills, bill
from .serving import AUTO, BATCHES, ROUND, Replica, fewest_chips, held
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig

WITHIN = 0.99  # of the requests must keep to a scenario's latencies, as its record says
SIGMAS = NormalDist().inv_cdf(WITHIN)
MOST_BATCH = 512  # beyond it, products are no longer bound by the weights' bytes
MIDDLE = 128  # between it and one request, and it and the most, a step's time is linear in the batch within some 5 %
ROOM = 0.95  # of the requests that weights and caches alone would leave room for: the rest is for what a step needs
CHECK_CONTEXT = 128  # of the step that tells what checking guesses takes beside the cache
LEAST_SPARE = 1e-3  # where nothing is left to share, the model of a queue ends
MOVED = 1.25  # times the cache's bytes: what a step that reads it once stays below
ALONE = 512  # new tokens of a prompt, below which reading weights may decide their time


class Misses(Exception):
    """Traffic that no number of such replicas serves in time. name: "ttft_seconds" or "tpot_seconds"; least_seconds:
    what an empty replica takes."""

    def __init__(self, name: str, least_seconds: float, seconds: float):
        self.name, self.least_seconds = name, least_seconds
        what = {"ttft_seconds": "the first token", "tpot_seconds": "the fastest step"}[name]
        super().__init__(f"misses the latency: {what} takes {least_seconds:.4g} s, allowed are {seconds:g} s")


@dataclass(frozen=True)
class Deployment:
    """How traffic is served.

    Attributes:
      mesh: the chips of a replica, as a flag; auto: the fewest that hold a few requests, or one.
      draft: a model that guesses `drafted` tokens for each check (Leviathan et al., 2023); None: without guesses.
      batch: requests in flight in a replica, at most, in the mean; None: as many as go.
      in_time: whether latencies are kept to.
    """

    traffic: Scenario
    config: "ModelConfig"
    target: str
    mesh: str = AUTO
    draft: "ModelConfig | None" = None
    drafted: int = 0
    batch: float | None = None
    in_time: bool = True

    @property
    def written(self) -> int:
        """Tokens that are decoded after the first one; one at least."""
        return max(1, self.traffic.output_tokens + self.traffic.reasoning_tokens - 1)

    @property
    def longest(self) -> int:
        """Positions of a request at its end, rounded up."""
        return _rounded(self.traffic.input_tokens + self.written)

    @property
    def context(self) -> int:
        """Positions of a request in the mean over its decode steps, rounded up."""
        return _rounded(self.traffic.input_tokens + (self.written + 1) // 2)

    @property
    def prompts(self) -> tuple[int, ...]:
        """What is compiled to read a prompt: all of it, without what is cached and with it; or what is new alone, if
        nothing to speak of is cached. Where little is new, both: it may be bound by reading weights; and a longer end
        of the whole, for a small difference of two programs would be that of their kernels."""
        whole, new = self.traffic.input_tokens, max(1, self.traffic.input_tokens - self.traffic.cached_tokens)
        past = min(self.traffic.cached_tokens, whole * 7 // 8) // ROUND * ROUND
        if not past:
            return (_rounded(new),)
        return (*((_rounded(new),) if new < ALONE and _rounded(new) < past else ()), past, _rounded(whole))

    def placed(self) -> "Deployment":
        """The same with its mesh and its positions decided; UsageError where no mesh will do."""
        config = replace(self.config, max_context=max(self.longest, self.config.max_context))
        draft = self.draft and replace(self.draft, max_context=max(self.longest, self.draft.max_context))
        mesh = self.mesh
        if mesh == AUTO:
            mesh = _fewest_chips(config, self.target, self.longest)
        return replace(self, config=config, draft=draft, mesh=mesh)

    def batches(self) -> tuple[int, ...]:
        """Of the decode steps that are compiled: one request, the most that fit by estimate, and between them."""
        beside, each = held(self.config, self.longest, self.mesh)
        capacity = targets.chip(self.target).usable_hbm_bytes
        most = MOST_BATCH if capacity is None else min(MOST_BATCH, int(ROOM * (capacity - beside) / each))
        return (1, *((MIDDLE,) if most > 3 * MIDDLE / 2 else ()), *((most,) if most > 1 else ()))

    def points(self) -> list[Point]:
        """The steps that say what it costs, of a placed one; those of a check and of the draft last."""
        return [*self.own_points(self.config), *((self.check_point(), *self.draft_points()) if self.draft else ())]

    def own_points(self, config: "ModelConfig") -> list[Point]:
        """Decode steps and prompts of a model on these chips."""
        return [
            *(Point(config, "decode", batch, self.context, self.target, self.mesh) for batch in self.batches()),
            *(Point(config, "prefill", 1, prompt, self.target, self.mesh) for prompt in self.prompts),
        ]

    def draft_points(self) -> list[Point]:
        """The same of the draft; none without one."""
        return self.own_points(self.draft) if self.draft else []

    def check_point(self) -> Point:
        """A decode step of so many sequences as there are positions to check, the cache small."""
        batch = self.batches()[-1] * (self.drafted + 1)
        return Point(self.config, "decode", batch, CHECK_CONTEXT, self.target, self.mesh)


def _fewest_chips(config: "ModelConfig", target: str, longest: int) -> str:
    """That hold a few requests; where nothing does, one. UsageError where that fits nowhere."""
    try:
        return fewest_chips(config, target, BATCHES[1], longest)
    except UsageError:
        return fewest_chips(config, target, 1, longest)


def _rounded(positions: int) -> int:
    return -(-positions // ROUND) * ROUND


@dataclass(frozen=True)
class Part:
    """Of the picoseconds of a replica that a request takes. reading_weights: of them, those in which a step reads
    weights and nothing else decides its time; None: not a part of which a bill says so."""

    name: str
    picoseconds: int
    reading_weights: int | None = None


@dataclass(frozen=True)
class Served:
    """What a deployment comes to.

    Attributes:
      chips: of a replica. replicas: busy ones, in the mean. batch: requests in flight in one.
      parts: of a replica's time for a request; they add up to all of it.
      ttft_seconds, tpot_seconds: that 99 of 100 requests keep. missed: why latencies are not kept to, if they are not.
      dollars_per_hour: of a chip; None where its price is not known.
      notes: what was done to step times.
    """

    deployment: Deployment
    chips: int
    batch: float
    parts: tuple[Part, ...]
    ttft_seconds: float
    tpot_seconds: float
    dollars_per_hour: float | None
    missed: str = ""
    notes: tuple[str, ...] = ()

    @property
    def picoseconds(self) -> int:
        """Of a replica for a request."""
        return sum(part.picoseconds for part in self.parts)

    @property
    def replicas(self) -> float:
        return self.deployment.traffic.requests_per_second * self.picoseconds / PICOSECONDS

    @property
    def chip_seconds(self) -> float:
        """For a request."""
        return self.picoseconds / PICOSECONDS * self.chips

    def dollars(self, seconds: float) -> float | None:
        """What so many seconds of one chip cost; None where the price is not known."""
        return None if self.dollars_per_hour is None else seconds / 3600 * self.dollars_per_hour

    @property
    def dollars_per_request(self) -> float | None:
        return self.dollars(self.chip_seconds)

    @property
    def dollars_per_month(self) -> float | None:
        """Of the chips that are busy with this traffic, in the mean; a fleet shares what is left of the last."""
        requests = self.deployment.traffic.requests_per_second * 3600 * economics.HOURS_PER_MONTH
        return self.dollars(self.chip_seconds * requests)

    @property
    def dollars_per_million_tokens(self) -> float | None:
        """Of prompts and answers, reasoning too."""
        traffic = self.deployment.traffic
        tokens = traffic.input_tokens + traffic.output_tokens + traffic.reasoning_tokens
        return self.dollars(self.chip_seconds / tokens * 1e6)

    @property
    def whole_chips(self) -> int:
        """That this traffic needs if nothing else runs on them."""
        return math.ceil(self.replicas) * self.chips


@dataclass(frozen=True)
class _Point:
    """A way to run a replica: requests in flight in the mean, and in 99 of 100 moments at most; seconds."""

    batch: float
    most: float
    picoseconds: float
    ttft_seconds: float
    tpot_seconds: float


@dataclass(frozen=True)
class _Times:
    """Step times of one deployment, and its room, by the bills of its points."""

    deployment: Deployment
    replica: Replica
    bills: Bills

    @classmethod
    def of(cls, deployment: Deployment, bills: Bills) -> "_Times":
        """UsageError where it does not fit."""
        found = cls(deployment, Replica.of(deployment.own_points(deployment.config), bills), bills)
        if found.room < 1:
            raise UsageError(
                f"--mesh={deployment.mesh}: {deployment.config.name} does not fit: beside the weights "
                f"{found.replica.chips} x {deployment.target} have room for {found.replica.positions} positions, and a "
                f"request takes up to {deployment.longest}; {_more_chips(deployment)}"
            )
        return found

    @property
    def draft(self) -> "_Times | None":
        d = self.deployment
        if d.draft is None:
            return None
        return _Times(replace(d, config=d.draft, draft=None), Replica.of(d.draft_points(), self.bills), self.bills)

    @property
    def room(self) -> float:
        """Requests at a time, at most: by memory, and by the largest step that was compiled."""
        positions, own, draft = self.replica.positions, self.replica.bytes_per_position, self.draft
        if draft is not None:
            theirs = draft.replica.bytes_per_position
            beside = max(0.0, _capacity(self) - draft.replica.positions * theirs)
            positions = int((positions * own - beside) / (own + theirs))
        return min(positions // self.deployment.longest, self.replica.times.batches[-1])

    def own_reading(self) -> int:
        """Of a request's prompt, what is new of it, without the draft."""
        traffic, prefill, prompts = self.deployment.traffic, self.replica.times.prefill, self.deployment.prompts
        new = max(1, traffic.input_tokens - traffic.cached_tokens)
        if len(prompts) == 1:
            return prefill(new)
        whole = prefill(traffic.input_tokens)
        longer = whole - prefill(min(traffic.cached_tokens, traffic.input_tokens - 1))
        # Later tokens take no less than earlier ones; of other kernels, two programs may not show it.
        longer = max(longer, whole * new // traffic.input_tokens)
        return longer if len(prompts) == 2 else max(prefill(new), longer)

    def reading(self) -> int:
        """P, of the draft too."""
        return self.own_reading() + (self.draft.own_reading() if self.draft else 0)

    def decode(self, batch: float) -> float:
        """D: of a token of each request, linear between whole batches; below one request it is one's."""
        low, context = max(1, math.floor(batch)), self.deployment.context
        few = self.replica.times.decode(low, low * context)
        share = max(0.0, batch - low)
        return few if not share else few + share * (
            self.replica.times.decode(low + 1, (low + 1) * context) - few
        )  # fmt: skip

    def per_token(self, batch: float, accepted: float) -> float:
        """D where tokens are guessed: of a check and the guesses before it, by the tokens that they yield."""
        drafted, draft = self.deployment.drafted, self.draft
        if draft is None:
            return self.decode(batch)
        beside = self._beside_cache()
        batches, times = zip(*sorted(beside.items()), strict=True)
        more, one = (float(np.interp(max(1, n), batches, times)) for n in (batch * (drafted + 1), batch))
        check = self.decode(batch) + max(0.0, more - one)
        return (check + drafted * draft.decode(batch)) / economics.tokens_per_check(accepted, drafted)

    def slope(self, batch: float, accepted: float) -> float:
        """Of `per_token`, by the batch, over half of it and as much again as there is room for."""
        high = min(max(2.0, batch * 3 / 2), self.room)
        low = max(1.0, min(batch / 2, high - 1))
        return (self.per_token(high, accepted) - self.per_token(low, accepted)) / (high - low) if high > low else 0.0

    def _beside_cache(self) -> dict[int, int]:
        """Batch -> what a decode step takes beside the cache, which a check reads once for all its positions."""
        points = [p for p in self.deployment.own_points(self.deployment.config) if p.step == "decode"]
        found = {p.batch or 1: bill(self.bills, p) for p in (*points, self.deployment.check_point())}
        return {batch: one.total.picoseconds - one.group("cache").picoseconds for batch, one in found.items()}


def _capacity(times: _Times) -> int:
    first = bill(times.bills, times.deployment.own_points(times.deployment.config)[0])
    return first.memory["capacity_bytes"]


def _more_chips(deployment: Deployment) -> str:
    try:
        mesh = _fewest_chips(deployment.config, deployment.target, deployment.longest)
    except UsageError as error:
        return str(error)
    return f"needs --mesh={mesh}" if mesh else "needs a mesh of one chip, --mesh="


def serve(deployment: Deployment, bills: Bills, known: Assumptions) -> Served:
    """What a placed deployment comes to, by the outcomes of its points.

    Raises UsageError where it does not fit or its times are not known, and Misses where it cannot be in time.
    """
    times = _Times.of(deployment, bills)
    accepted = known.number("speculation.accepted") if deployment.draft else 0.0
    reading, room = times.reading(), times.room
    traffic, written = deployment.traffic, deployment.written

    def at(batch: float) -> _Point:
        took = reading + written * times.per_token(batch, accepted) / batch
        load = reading / took
        replicas = max(1.0, traffic.requests_per_second * took / PICOSECONDS)
        spare = (times.per_token(batch, accepted) - batch * times.slope(batch, accepted)) * written / batch / took
        most = _quantile(batch, replicas * batch * min(1.0, max(LEAST_SPARE, spare)))
        step = times.per_token(min(most, room), accepted)
        wait = max(0.0, reading * math.log(load / (1 - WITHIN)) / (2 * (1 - load)))
        tpot = _quantile(step / (1 - load), replicas * written * step * (1 - load) * took / reading**2)
        return _Point(batch, most, took, (step + wait + reading) / PICOSECONDS, tpot / PICOSECONDS)

    def in_time(one: _Point) -> bool:
        return one.ttft_seconds <= traffic.ttft_seconds and one.tpot_seconds <= traffic.tpot_seconds

    empty = at(1e-9)
    missed = None
    if not in_time(empty):
        name = "tpot_seconds" if empty.tpot_seconds > traffic.tpot_seconds else "ttft_seconds"
        missed = Misses(name, getattr(empty, name), getattr(traffic, name))
    if deployment.in_time and missed:
        raise missed
    chosen = _largest(at, room, lambda one: one.most <= room and (in_time(one) or not deployment.in_time))
    if deployment.batch is not None and deployment.batch < chosen.batch:
        chosen = at(deployment.batch)
    if not in_time(chosen):
        late = [n for n in ("ttft_seconds", "tpot_seconds") if getattr(chosen, n) > getattr(traffic, n)]
        text = " and ".join(f"{n} {getattr(chosen, n):.3g}, allowed {getattr(traffic, n):g}" for n in late)
        text = f"misses the latency: {text}"
    else:
        text = ""
    price = chips.priced(targets.chip(deployment.target), known).dollars_per_hour
    parts = tuple(_parts(times, reading, chosen))
    notes = (*times.replica.notes, *_moved_twice(times))
    figures = (chosen.ttft_seconds, chosen.tpot_seconds, price, text, notes)
    return Served(deployment, times.replica.chips, chosen.batch, parts, *figures)


def _moved_twice(times: _Times) -> Iterator[str]:
    """Says so where the largest decode step that was compiled moves its cache several times."""
    found = [p for p in times.deployment.own_points(times.deployment.config) if p.step == "decode"]
    point, one = max(
        ((p, b) for p in found if isinstance(b := times.bills[p], Bill)), key=lambda one: one[0].batch or 1
    )
    moved = one.group("cache").hbm_bytes / one.memory["cache"] if one.memory["cache"] else 0.0
    if moved > MOVED:
        yield f"compiled as it is, {point} moves {moved:.1f} times the bytes of its cache"


def _quantile(mean: float, shape: float) -> float:
    """That WITHIN of a gamma distribution of that mean and shape (mean^2 / variance) keep to (Wilson and Hilferty,
    1931: the cube root of it is nearly normal)."""
    return mean * max(0.0, 1 - 1 / (9 * shape) + SIGMAS / (3 * math.sqrt(shape))) ** 3


def _largest(at: Callable[[float], _Point], room: float, fits: Callable[[_Point], bool]) -> _Point:
    """The one of the largest batch that fits, where each smaller one fits, too; up to `room`."""
    if fits(whole := at(room)):
        return whole
    low, high = math.log(1e-9), math.log(room)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(at(math.exp(middle))) else (low, middle)
    return at(math.exp(low))


# --- where it goes ---------------------------------------------------------------------------------------------------


def _parts(times: _Times, reading: int, chosen: _Point) -> Iterator[Part]:
    """Of a request's time, its prompt and its share of each decode step."""
    yield from _grouped("prefill", reading, _prompt_groups(times))
    yield from _grouped("decode", round(chosen.picoseconds) - reading, _decode_groups(times, chosen.batch))


def _grouped(step: str, picoseconds: int, groups: Mapping[str, tuple[float, float]]) -> Iterator[Part]:
    """That time, in the proportions of groups: (time, of it reading weights). It adds up exactly."""
    whole, so_far, given = math.fsum(time for time, _ in groups.values()) or 1.0, 0.0, 0
    for n, (name, (time, weights)) in enumerate(groups.items(), 1):
        so_far += time
        until = picoseconds if n == len(groups) else round(picoseconds * so_far / whole)
        part, given = until - given, until
        yield Part(f"{step}: {name}", part, round(part * weights / time) if time else 0)


def _prompt_groups(times: _Times) -> dict[str, tuple[float, float]]:
    """Of the program, or the difference of two, whose time is that of a prompt."""
    d = times.deployment
    found = {p.context: bill(times.bills, p) for p in d.own_points(d.config) if p.step == "prefill"}
    first, last = found[d.prompts[0]], found[d.prompts[-1]]
    alone = 0 if len(d.prompts) == 2 else first.total.picoseconds
    if alone >= times.own_reading():
        return _groups(first)
    past = found[d.prompts[-2]]
    longer = {name: work.picoseconds for name, work in _named(last).items()}
    # What is more than without it; the weights are read in both.
    return {name: (max(0.0, longer[name] - work.picoseconds), 0.0) for name, work in _named(past).items()}


def _decode_groups(times: _Times, batch: float) -> dict[str, tuple[float, float]]:
    """Of the compiled decode steps around that batch, linear between them as step times are."""
    d = times.deployment
    found = {p.batch or 1: p for p in d.own_points(d.config) if p.step == "decode" and isinstance(times.bills[p], Bill)}
    low = max(one for one in found if one <= max(1, batch))
    high = min((one for one in found if one > low), default=low)
    share = min(1.0, max(0.0, (batch - low) / (high - low))) if high > low else 0.0
    few, many = (_groups(bill(times.bills, found[one])) for one in (low, high))

    def between(name: str, n: int) -> float:
        return few[name][n] * (1 - share) + many[name][n] * share

    return {name: (between(name, 0), between(name, 1)) for name in few}


def _named(one: Bill) -> dict[str, Work]:
    """The headline groups; what no component can be named for is with the others."""
    return {name: one.group(name) + (one.unattributed if name == "other" else Work()) for name in GROUPS}


def _groups(one: Bill) -> dict[str, tuple[float, float]]:
    """Group -> (time, of it that in which weights are read, by their part of the bytes of rows that HBM bounds)."""
    reading: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for row in one.rows:
        if row.bound == "hbm" and row.work.hbm_bytes:
            home = {"attention": "attention", "mlp": "mlp", "moe": "mlp"}.get(row.component.split("/")[0], "other")
            share = row.work.hbm_read.get("weights", 0) / row.work.hbm_bytes
            reading[home] += row.work.picoseconds * share
    return {name: (work.picoseconds, min(reading[name], work.picoseconds)) for name, work in _named(one).items()}


# --- held against the simulator --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flat:
    """Step times of one mean context for requests of any, and of what is new of a prompt for all of it."""

    times: _Times

    def prefill(self, tokens: int, past: int = 0) -> int:
        """See StepTimes."""
        del tokens, past
        return self.times.own_reading()

    def decode(self, batch: int, positions: int) -> int:
        """See StepTimes."""
        del positions
        return self.times.replica.times.decode(batch, batch * self.times.deployment.context)


def simulated(served: Served, bills: Bills, count: int) -> float:
    """The share of `count` requests that are in time, event by event, on whole replicas that are as busy as `served`
    says; of a deployment without a draft. Arrivals by chance, the same each time. Where little is left to share, the
    number in flight wanders slowly, and it takes many thousands to see its mean."""
    deployment = served.deployment
    times, traffic = _Times.of(deployment, bills), deployment.traffic
    replicas = math.ceil(served.replicas)
    rate = traffic.requests_per_second * replicas / served.replicas
    come = serving.poisson(rate, count, np.random.default_rng(0))
    requests = serving.traffic(come, [traffic.input_tokens] * count, [deployment.written + 1] * count)
    room = int(times.room)
    memory = Memory(room * _rounded(deployment.longest), ROUND)
    goals = Targets(traffic.ttft_seconds, traffic.tpot_seconds)
    return serving.simulate(requests, _Flat(times), Server(memory, room), replicas).share_within(goals)
