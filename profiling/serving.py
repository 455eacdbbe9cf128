"""What a server of requests does with given step times: continuous batching, simulated event by event.

    found = simulate(requests, times, Server(memory=Memory(positions=700_000), max_batch=128), replicas=4)
    found.share_within(Targets(ttft_seconds=1.0, tpot_seconds=0.05)), found.output_tokens_per_second

Time is whole picoseconds, so that sums are exact; the same requests give the same result, whatever the machine.

A replica works in steps, one after the other. At the start of each it admits requests, first come, first served, as far
as its batch and its memory allow. Without `chunk` it then reads one admitted prompt whole, if any waits, while those
that decode stand still; else it decodes, one token for each. With `chunk`, each step decodes and reads up to so many
positions of prompts besides; its time is the sum of both, an upper bound, for the weights need be read only once.
Reading a prompt gives the first token.

Memory is blocks. Paged (Kwon et al., "Efficient memory management for large language model serving with
PagedAttention", 2023): an admitted request holds what its prompt needs, and takes a block whenever the last one is
full; where none is left, the request admitted last gives back all of its blocks, waits again before all others, and its
prompt and what it has written is read again (recompute). Nobody is admitted into the last blocks, one for each request
that decodes. Contiguous: each request holds a slot for the longest one from its admission on.

A request goes to the replica that has the fewest; of several, to the first.
"""

import heapq
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from .price import SECONDS_PER_HOUR
from .roofline import PICOSECONDS

MOST_REPLICAS = 4096
PERCENTILES = (50, 90, 99)


class StepTimes(Protocol):
    """Picoseconds of the steps of one replica; neither may fall where there is more to do."""

    def prefill(self, tokens: int, past: int = 0) -> int:
        """Of reading `tokens` positions of one prompt, after `past` of it."""
        ...

    def decode(self, batch: int, positions: int) -> int:
        """Of one token for each of `batch` requests, whose caches hold `positions` in all, the new ones included."""
        ...


@dataclass(frozen=True)
class Grid:
    """Step times between those of compiled programs.

    decode: (batch, context) -> picoseconds, for all of `batches` x `contexts`; prefill: prompt -> picoseconds.

    Exact at the points of the grid; between them linear along each axis (bilinear), so that it is monotone wherever the
    grid is, which is required. Requests of different lengths count with their mean context: where the cache's bytes
    decide, that is exact, for time is then linear in their sum. Below the smallest batch, context or prompt it is the
    smallest one's, an upper bound; beyond the largest nothing is known: ValueError. `tokens` of a prompt after `past`
    of it take prefill(past + tokens) - prefill(past), which is what attention to the past costs too, and never less
    than so many tokens without a past.
    """

    decode_picoseconds: Mapping[tuple[int, int], int]
    prefill_picoseconds: Mapping[int, int]
    batches: tuple[int, ...] = field(init=False)
    contexts: tuple[int, ...] = field(init=False)
    prompts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        points = self.decode_picoseconds
        set_field = object.__setattr__  # frozen for everybody else
        set_field(self, "batches", tuple(sorted({batch for batch, _ in points})))
        set_field(self, "contexts", tuple(sorted({context for _, context in points})))
        set_field(self, "prompts", tuple(sorted(self.prefill_picoseconds)))
        if not self.prompts or not points or len(points) != len(self.batches) * len(self.contexts):
            raise ValueError("a grid needs a prompt, and a decode step for each of its batches with each context")
        rows = [[points[batch, context] for context in self.contexts] for batch in self.batches]
        lines = [*rows, *map(list, zip(*rows, strict=True)), [self.prefill_picoseconds[n] for n in self.prompts]]
        if any(later < earlier for line in lines for earlier, later in pairwise(line)):
            raise ValueError("the step times of a grid must not fall as batch, context or prompt grow")

    def decode(self, batch: int, positions: int) -> int:
        """See StepTimes."""
        low, high, share = _between(self.batches, batch, "batch")
        near, far, along = _between(self.contexts, positions / batch, "context")
        of = self.decode_picoseconds
        few = of[low, near] * (1 - along) + of[low, far] * along
        many = of[high, near] * (1 - along) + of[high, far] * along
        return round(few * (1 - share) + many * share)

    def prefill(self, tokens: int, past: int = 0) -> int:
        """See StepTimes."""
        alone = self._prompt(tokens)
        return max(alone, self._prompt(past + tokens) - self._prompt(past)) if past else alone

    def _prompt(self, tokens: int) -> int:
        low, high, share = _between(self.prompts, tokens, "prompt")
        return round(self.prefill_picoseconds[low] * (1 - share) + self.prefill_picoseconds[high] * share)


@dataclass(frozen=True)
class PrefixCached:
    """Step times where the first `share` of every prompt is found in a cache of prompts, and need not be read: the rest
    attends to it. Its positions take memory as any others; finding them takes no time."""

    times: StepTimes
    share: float

    def prefill(self, tokens: int, past: int = 0) -> int:
        """See StepTimes."""
        found = min(tokens - 1, int(tokens * self.share))
        return self.times.prefill(tokens - found, past + found)

    def decode(self, batch: int, positions: int) -> int:
        """See StepTimes."""
        return self.times.decode(batch, positions)


def _between(points: Sequence[int], at: float, name: str) -> tuple[int, int, float]:
    """The points on both sides, and how far from the first to the second it is, from 0 to 1."""
    if at > points[-1]:
        raise ValueError(f"{name} is {at:g}; step times are known up to {points[-1]}")
    if at <= points[0]:
        return points[0], points[0], 0.0
    after = min(bisect_right(points, at), len(points) - 1)
    low, high = points[after - 1], points[after]
    return low, high, (at - low) / (high - low)


# --- traffic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """When it arrives (picoseconds), tokens of its prompt, and how many it is answered with."""

    arrival: int
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for name, least in (("arrival", 0), ("prompt", 1), ("output", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    @property
    def positions(self) -> int:
        """Of the cache, when the last token is written: that token itself need not be in it."""
        return self.prompt + self.output - 1


def poisson(rate: float, count: int, generator: np.random.Generator) -> list[int]:
    """`count` arrivals in picoseconds, independent of each other, `rate` a second in the mean."""
    return [round(at * PICOSECONDS) for at in np.cumsum(generator.exponential(1 / rate, count)).tolist()]


def regular(rate: float, count: int) -> list[int]:
    """`count` arrivals in picoseconds, one every 1 / `rate` seconds, the first at 0."""
    return [round(n * PICOSECONDS / rate) for n in range(count)]


def lognormal(median: float, sigma: float, most: int, count: int, generator: np.random.Generator) -> list[int]:
    """`count` lengths from 1 to `most`, whose logarithms are normal with standard deviation `sigma` (0: all alike)."""
    drawn = np.rint(median * np.exp(sigma * generator.standard_normal(count)))
    return np.clip(drawn, 1, most).astype(int).tolist()


def traffic(arrivals: Sequence[int], prompts: Sequence[int], outputs: Sequence[int]) -> list[Request]:
    """Requests of three lists of one length."""
    return [Request(*one) for one in zip(arrivals, prompts, outputs, strict=True)]


# --- servers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Of one replica, for caches.

    positions: that fit in all. block: positions of a block; slot: positions that each request holds from its admission
    on (contiguous), None: paged.
    """

    positions: int
    block: int = 16
    slot: int | None = None

    @property
    def blocks(self) -> int:
        return self.positions // self.block

    def for_positions(self, positions: int) -> int:
        """Blocks."""
        return -(-positions // self.block)


@dataclass(frozen=True)
class Server:
    """One replica. max_batch: requests at a time. chunk: positions of prompts a step, None: one whole prompt."""

    memory: Memory
    max_batch: int
    chunk: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """After a step: where a replica is, in picoseconds, blocks, requests and tokens.

    owed: tokens that those of its requests which have not ended are still to get. emitted: that it has given so far.
    """

    time: int
    replica: int
    blocks: int
    waiting: int
    admitted: int
    emitted: int
    owed: int


Watch = Callable[[Snapshot], None]


@dataclass(eq=False, slots=True)
class _Running:
    """A request in a replica. `generated` is of when it last joined those that decode, at step `joined` of these."""

    number: int
    request: Request
    generated: int = 0
    filled: int = 0
    blocks: int = 0
    joined: int | None = None
    admitted_at: int | None = None
    first_at: int | None = None
    ended_at: int | None = None

    @property
    def to_fill(self) -> int:
        """Positions to read before it can decode: its prompt and, after a preemption, what it has written."""
        return self.request.prompt + self.generated

    def written(self, step: int) -> int:
        """Tokens it has got when the replica has decoded `step` steps."""
        return self.generated + (0 if self.joined is None else step - self.joined)


class _Replica:
    """The cost of a step does not grow with the batch: those that decode are counted, and met again when one of them
    ends or needs a block."""

    def __init__(self, number: int, times: StepTimes, server: Server):
        self.number, self.times, self.server = number, times, server
        self.memory = server.memory
        self.waiting: deque[_Running] = deque()
        self.admitted: dict[_Running, None] = {}  # in the order of their admission
        self.filling: dict[_Running, None] = {}
        self.step = self.decoding = self.positions = 0  # steps decoded; requests and positions of those that decode
        self.ending: dict[int, dict[_Running, None]] = {}  # step -> who has the last token after it
        self.crossing: Counter[int] = Counter()  # step modulo block -> how many of those that decode need a block at it
        self.blocks = self.emitted = self.preemptions = 0
        self.most_blocks = self.most_admitted = 0
        self.prefill_time = self.decode_time = self.request_time = self.block_time = 0
        self.parts: list[tuple[_Running, int]] = []  # the step that runs: who reads how many positions
        self.decodes = self.working = False

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.admitted)

    def start(self, now: int) -> int | None:
        """Begins a step: when it ends, or None where there is nothing to do."""
        self._admit(now)
        self.parts, budget = [], self.server.chunk
        for one in self.filling:
            reads = one.to_fill - one.filled
            reads = reads if budget is None else min(reads, budget)
            self.parts.append((one, reads))
            budget = 0 if budget is None else budget - reads
            if not budget:
                break
        self.decodes = self.decoding > 0 and not (self.parts and self.server.chunk is None)
        if self.decodes:
            self._grow()
            self.decodes = self.decoding > 0  # unless the one that reads came first, and all others had to make room
            self.parts = [(one, reads) for one, reads in self.parts if one in self.filling]
        reading = sum(self.times.prefill(reads, one.filled) for one, reads in self.parts)
        decoding = self.times.decode(self.decoding, self.positions + self.decoding) if self.decodes else 0
        self.working = bool(self.parts) or self.decodes
        if not self.working:
            return None
        self.prefill_time += reading
        self.decode_time += decoding
        self.request_time += (reading + decoding) * len(self.admitted)
        self.block_time += (reading + decoding) * self.blocks
        return now + reading + decoding

    def end(self, now: int) -> Iterator[_Running]:
        """Ends the step: those that have all of their tokens."""
        if self.decodes:
            self.step += 1
            self.positions += self.decoding
            self.emitted += self.decoding
            for one in self.ending.pop(self.step, ()):
                self._stop_decoding(one)
                yield self._ended(one, now)
        for one, reads in self.parts:
            one.filled += reads
            if one.filled < one.to_fill:
                continue
            del self.filling[one]
            self.emitted += 1
            positions = one.to_fill
            one.generated += 1
            one.first_at = now if one.first_at is None else one.first_at
            if one.generated == one.request.output:
                yield self._ended(one, now)
                continue
            one.joined = self.step
            self.decoding += 1
            self.positions += positions
            self.crossing[self._residue(one)] += 1
            self.ending.setdefault(self._last_step(one), {})[one] = None
        self.working = False

    def owed(self) -> int:
        """Tokens that its requests are still to get."""
        return sum(one.request.output - one.written(self.step) for one in (*self.waiting, *self.admitted))

    def _admit(self, now: int) -> None:
        while self.waiting and len(self.admitted) < self.server.max_batch:
            one, slot = self.waiting[0], self.memory.slot
            needs = self.memory.for_positions(one.to_fill if slot is None else slot)
            spare = self.decoding if slot is None else 0
            if self.blocks + needs + spare > self.memory.blocks:
                return
            self.waiting.popleft()
            self.admitted[one] = self.filling[one] = None
            one.blocks, one.filled = needs, 0
            self.blocks += needs
            one.admitted_at = now if one.admitted_at is None else one.admitted_at
            self.most_blocks = max(self.most_blocks, self.blocks)
            self.most_admitted = max(self.most_admitted, len(self.admitted))

    def _grow(self) -> None:
        """Gives a block to each whose last one is full, preempting those admitted last until there are enough."""
        if self.memory.slot is not None:
            return
        while self.blocks + self.crossing[self.step % self.memory.block] > self.memory.blocks:
            self._preempt(next(reversed(self.admitted)))
        self.blocks += self.crossing[self.step % self.memory.block]
        self.most_blocks = max(self.most_blocks, self.blocks)

    def _preempt(self, one: _Running) -> None:
        if one in self.filling:
            del self.filling[one]
        else:
            generated = one.written(self.step)
            del self.ending[self._last_step(one)][one]
            self._stop_decoding(one)
            one.generated, one.joined = generated, None
        self._free(one)
        self.waiting.appendleft(one)
        self.preemptions += 1

    def _stop_decoding(self, one: _Running) -> None:
        self.crossing[self._residue(one)] -= 1
        self.decoding -= 1
        self.positions -= one.request.prompt + one.written(self.step) - 1
        if self.memory.slot is None:
            one.blocks = self.memory.for_positions(one.request.prompt + one.written(self.step) - 1)

    def _ended(self, one: _Running, now: int) -> _Running:
        one.ended_at = now
        self._free(one)
        return one

    def _free(self, one: _Running) -> None:
        self.blocks -= one.blocks
        del self.admitted[one]

    def _residue(self, one: _Running) -> int:
        """Of the steps, modulo block, at which its last block is full: it held so many positions when it joined."""
        assert one.joined is not None
        return (one.joined - (one.request.prompt + one.generated - 1)) % self.memory.block

    def _last_step(self, one: _Running) -> int:
        assert one.joined is not None
        return one.joined + one.request.output - one.generated


def simulate(
    requests: Sequence[Request], times: StepTimes, server: Server, replicas: int = 1, watch: Watch | None = None
) -> "Result":
    """All requests, from the first arrival until the last has its last token.

    watch: is told of each replica after each of its steps.
    Raises ValueError where there is no request, or one that no empty replica has room for.
    """
    _check(requests, server, replicas)
    coming = deque(_Running(n, one) for n, one in sorted(enumerate(requests), key=lambda one: (one[1].arrival, one[0])))
    states = [_Replica(number, times, server) for number in range(replicas)]
    ended: list[_Running] = []
    ends: list[tuple[int, int]] = []  # of running steps: when, and of which replica
    while coming or ends:
        now = min(([coming[0].request.arrival] if coming else []) + ([ends[0][0]] if ends else []))
        touched: dict[int, None] = {}
        while ends and ends[0][0] == now:
            _, number = heapq.heappop(ends)
            ended += states[number].end(now)
            touched[number] = None
            if watch is not None:
                watch(_snapshot(states[number], now))
        while coming and coming[0].request.arrival == now:
            least = min(states, key=lambda state: state.load)
            least.waiting.append(coming.popleft())
            touched[least.number] = None
        for number in touched:
            if not states[number].working and (end := states[number].start(now)) is not None:
                heapq.heappush(ends, (end, number))
    return Result(server, states, sorted(ended, key=lambda one: one.number))


def _check(requests: Sequence[Request], server: Server, replicas: int) -> None:
    for name, value in (("replicas", replicas), ("max_batch", server.max_batch), ("chunk", server.chunk or 1)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not requests:
        raise ValueError("requests is empty; there must be one at least")
    memory, longest = server.memory, max(one.positions for one in requests)
    if memory.slot is not None and memory.slot < longest:
        raise ValueError(f"slot is {memory.slot}; it must hold the longest request, of {longest} positions")
    if memory.for_positions(memory.slot or longest) > memory.blocks:
        raise ValueError(
            f"memory is {memory.positions} positions in blocks of {memory.block}; a request alone needs "
            f"{memory.slot or longest}"
        )


def _snapshot(state: _Replica, now: int) -> Snapshot:
    sizes = (state.blocks, len(state.waiting), len(state.admitted), state.emitted, state.owed())
    return Snapshot(now, state.number, *sizes)


# --- results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Targets:
    """Seconds to the first token, and for each token after it, that `share` of the requests must keep to."""

    ttft_seconds: float = math.inf
    tpot_seconds: float = math.inf
    share: float = 0.95


@dataclass(eq=False)
class Result:
    """What became of the requests, in their order; seconds. The time that counts is from the first arrival to the last
    token: where requests come one by one, its end is a little emptier than the rest."""

    server: Server
    replicas: list[_Replica] = field(repr=False)
    requests: list[_Running] = field(repr=False)

    @cached_property
    def wait_seconds(self) -> np.ndarray:
        """From arrival to admission."""
        return self._seconds(lambda one: one.admitted_at - one.request.arrival)

    @cached_property
    def ttft_seconds(self) -> np.ndarray:
        """From arrival to the first token."""
        return self._seconds(lambda one: one.first_at - one.request.arrival)

    @cached_property
    def tpot_seconds(self) -> np.ndarray:
        """A token after the first, in the mean over each request; 0 where there is none."""
        return self._seconds(lambda one: (one.ended_at - one.first_at) / max(1, one.request.output - 1))

    @cached_property
    def e2e_seconds(self) -> np.ndarray:
        """From arrival to the last token."""
        return self._seconds(lambda one: one.ended_at - one.request.arrival)

    def _seconds(self, of: Callable[[Any], float]) -> np.ndarray:
        return np.array([of(one) / PICOSECONDS for one in self.requests])

    @cached_property
    def seconds(self) -> float:
        """From the first arrival to the last token."""
        return self._span / PICOSECONDS

    @cached_property
    def _span(self) -> int:
        first = min(one.request.arrival for one in self.requests)
        return max(one.ended_at or 0 for one in self.requests) - first

    @property
    def input_tokens(self) -> int:
        return sum(one.request.prompt for one in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(state.emitted for state in self.replicas)

    @property
    def input_tokens_per_second(self) -> float:
        """Of all replicas together."""
        return self.input_tokens / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        """Of all replicas together."""
        return self.output_tokens / self.seconds

    @property
    def preemptions(self) -> int:
        return sum(state.preemptions for state in self.replicas)

    @property
    def most_admitted(self) -> int:
        """Requests at a time in one replica, at most."""
        return max(state.most_admitted for state in self.replicas)

    def share_within(self, targets: Targets) -> float:
        """Of the requests, those that keep to both targets."""
        good = (self.ttft_seconds <= targets.ttft_seconds) & (self.tpot_seconds <= targets.tpot_seconds)
        return float(np.mean(good))

    def utilisation(self) -> dict[str, float]:
        """Shares of the time, of the largest batch and of memory, in the mean over time and replicas; and the most."""
        whole = self._span * len(self.replicas)
        reading, decoding, requests, blocks = (
            sum(getattr(state, name) for state in self.replicas) / whole
            for name in ("prefill_time", "decode_time", "request_time", "block_time")
        )
        most = max(state.most_blocks for state in self.replicas)
        return {
            "busy": reading + decoding,
            "busy_prefill": reading,
            "busy_decode": decoding,
            "batch": requests / self.server.max_batch,
            "memory": blocks / self.server.memory.blocks,
            "memory_most": most / self.server.memory.blocks,
        }

    def dollars(self, chips: int, dollars_per_chip_hour: float) -> float:
        """Of all replicas, each of `chips` chips, for the whole time, busy or not."""
        return dollars_per_chip_hour * chips * len(self.replicas) * self.seconds / SECONDS_PER_HOUR

    def to_json(self, targets: Targets, chips: int, dollars_per_chip_hour: float | None) -> dict[str, Any]:
        """Everything, by name."""
        cost = None if dollars_per_chip_hour is None else self.dollars(chips, dollars_per_chip_hour)
        measures = ("wait", "ttft", "tpot", "e2e")
        return {
            "replicas": len(self.replicas),
            "chips": chips * len(self.replicas),
            "requests": len(self.requests),
            "seconds": self.seconds,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "input_tokens_per_second": self.input_tokens_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "utilisation": self.utilisation(),
            "preemptions": self.preemptions,
            "share_within_targets": self.share_within(targets),
            **{f"{name}_seconds": _percentiles(getattr(self, f"{name}_seconds")) for name in measures},
            "dollars": cost,
            "dollars_per_million_output_tokens": None if cost is None else cost / self.output_tokens * 1e6,
            "dollars_per_million_tokens": None
            if cost is None
            else cost / (self.input_tokens + self.output_tokens) * 1e6,
        }


def _percentiles(seconds: np.ndarray) -> dict[str, float]:
    found = np.percentile(seconds, PERCENTILES).tolist()
    return {"mean": float(seconds.mean())} | {f"p{n}": at for n, at in zip(PERCENTILES, found, strict=True)}


# --- how many replicas ---------------------------------------------------------------------------------------------


class ImpossibleTarget(Exception):
    """Even an empty replica misses it for too many requests; name: "ttft" or "tpot". least_seconds: that would do."""

    def __init__(self, name: str, seconds: float, least_seconds: float, share: float):
        self.name, self.seconds, self.least_seconds, self.share = name, seconds, least_seconds, share
        super().__init__(
            f"{name} of {seconds:g} s is impossible: on a replica that does nothing else, {share:.0%} of these "
            f"requests need up to {least_seconds:.4g} s"
        )


def check_targets(requests: Sequence[Request], times: StepTimes, targets: Targets) -> None:
    """ImpossibleTarget where no number of replicas would do: by the time of a prompt, and of the second token."""
    alone = {
        "ttft": (targets.ttft_seconds, [times.prefill(one.prompt) for one in requests]),
        "tpot": (targets.tpot_seconds, [times.decode(1, one.prompt + 1) if one.output > 1 else 0 for one in requests]),
    }
    for name, (seconds, takes) in alone.items():
        least = sorted(takes)[math.ceil(targets.share * len(takes)) - 1] / PICOSECONDS
        if least > seconds:
            raise ImpossibleTarget(name, seconds, least, targets.share)


def replicas_needed(
    requests: Sequence[Request], times: StepTimes, server: Server, targets: Targets, most: int = MOST_REPLICAS
) -> Result:
    """With the fewest replicas that keep to the targets: doubled until they do, then halved in between, which finds the
    fewest as far as more replicas never do worse.

    Raises ImpossibleTarget, and ValueError where `most` are not enough.
    """
    check_targets(requests, times, targets)
    low, high = 0, 1  # too few; tried next
    while (found := simulate(requests, times, server, high)).share_within(targets) < targets.share:
        low, high = high, min(2 * high, most)
        if low >= most:
            share = found.share_within(targets)
            raise ValueError(f"{most} replicas serve {share:.1%} within the targets; it must be {targets.share:.1%}")
    while high - low > 1:
        middle = (low + high) // 2
        tried = simulate(requests, times, server, middle)
        if tried.share_within(targets) >= targets.share:
            high, found = middle, tried
        else:
            low = middle
    return found
