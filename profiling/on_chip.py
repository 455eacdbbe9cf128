"""What caches find of the bytes that kernels ask for, by the order in which a program touches its arrays.

`served` says what a GPU's L2 cache is taken to serve: a stated model, not a measurement. It is a least-recently-used
stack over buffers in the order of the schedule, byte by byte:

- A read finds in the cache what is still there of the buffer as it was last read or written. What has been touched
  since pushes out the oldest first; an array larger than the cache finds nothing and leaves nothing there.
- What a kernel reads it finds as the kernels before it left it; then come its operands, largest first, and its results.
- A read of a part (a slice, a gather) finds it only where all of its array is there: which part it is, is not known.
- Every write reaches HBM in the end (write-back). A temporary that is overwritten while it is in the cache could be
  spared; which temporaries share an address is not in the text, so none is.
- The first trip of a loop finds what ran before it, every other what the trip before it left.

ASSUMPTION: `SHARE` of the cache holds what a program reuses. The L2 of these chips is two partitions, one half of the
chip reads the other's over a link and may keep a copy (NVIDIA A100 whitepaper, 2020, "A100 L2 cache"), it is not fully
associative, and kernels do not read in order. To be held against hardware counters.

No bound on time by the L2's own bandwidth: no datasheet says it. So a kernel that is served by it still has a lower
bound that is one, only a looser one.

`reread` says what a large product on a GPU reads a second time and more: another stated model. Its results are made in
waves, of one tile for each multiprocessor, as nearly square as they go; each wave reads its rows of the one operand and
its columns of the other, all of the way, and finds nothing of the wave before it where both operands together are more
than the cache holds. ASSUMPTION: tiles of 128 x 256, the largest that libraries use. Held against DRAM counters of an
H200, in the five products of a layer of Llama 3 8B over 8192 positions: 0.87 to 1.05 of what was read (BUILD_NOTES.md,
stop 11).

`reread_by_waves` says the same of programs that go over arrays together, from one end to the other, as those of
attention go over keys and values. ASSUMPTION: one runs on each multiprocessor at a time, and all of them are as far as
each other. A wave finds what the one before it went over if all of that is held, else nothing: each part has been
pushed out when its turn comes. Held against the same counters, in the attention of that layer: 0.98 of what was read
(BUILD_NOTES.md, stop 12).

`distances` needs no size of a cache. It says how far back each array was touched last, the reuse distance, by which the
rates of a machine are measured (calibration.ByteRate).
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NamedTuple, Protocol

from .calls import Waves
from .chips import Chip
from .hlo import RUNS, Computation, Instruction
from .loops import trip_count, while_parts

SHARE = Fraction(1, 2)
TILE = 128 * 256  # results that a multiprocessor makes at a time
# How deep loops are simulated in each other. What many call is so too, as often as the body of the innermost.
DEPTH = 3


class Touch(NamedTuple):
    """One kernel touching one buffer: `bytes` of the array of `size` bytes that is in it."""

    buffer: Hashable
    bytes: int
    size: int
    write: bool


class Runs(NamedTuple):
    """A number of bytes for each touch of a kernel: on the first trip of its loop, and on the others."""

    first: Sequence[int]
    others: Sequence[int]


def capacity(chip: Chip) -> int:
    """Bytes of a GPU's L2 that hold what a program reuses; 0 where nothing is modelled."""
    return int(chip.l2_bytes * SHARE) if chip.platform == "cuda" and chip.l2_bytes else 0


def reread(chip: Chip, m: int, n: int, lhs_bytes: int, rhs_bytes: int) -> int:
    """Bytes that [m, k] x [k, n] reads beyond each operand once; 0 where nothing is modelled."""
    if not chip.multiprocessors or lhs_bytes + rhs_bytes <= capacity(chip):
        return 0
    wave = TILE * chip.multiprocessors
    wide = min(n, math.isqrt(wave))
    high = min(m, wave // wide)
    wide = min(n, wave // high)
    return lhs_bytes * n // wide - lhs_bytes + rhs_bytes * m // high - rhs_bytes


def reread_by_waves(chip: Chip, waves: Waves) -> int:
    """Bytes that such programs read beyond each array once; 0 where nothing is modelled."""
    held, rows = capacity(chip), waves.rows
    if not chip.multiprocessors or max(rows) <= held:
        return 0
    each = max(Fraction(1), Fraction(chip.multiprocessors, waves.programs))  # rows of a wave, or of all waves of a row
    total, before = 0, held + 1
    for number in range(math.ceil(len(rows) / each)):
        over = max(rows[math.floor(number * each) : math.ceil((number + 1) * each)])
        total += over if max(over, before) > held else 0
        before = over
    return max(0, total - waves.whole) * waves.times


class Cache:
    """A least-recently-used stack of buffers, the oldest first, with the bytes that are left of each."""

    trips = 2  # of a loop that are simulated

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._held: OrderedDict[Hashable, int] = OrderedDict()
        self._taken = 0

    def run(self, touches: Sequence[Touch]) -> tuple[int, ...]:
        """One kernel: what each of its touches finds."""
        found = tuple(0 if touch.write else self._found(touch) for touch in touches)
        for touch in sorted(touches, key=lambda touch: (touch.write, -touch.bytes)):
            self._touch(touch)
        return found

    def mark(self) -> int:
        """For `repeat`."""
        return 0

    def repeat(self, mark: int, times: int) -> None:
        """Nothing: what other trips of a loop leave is taken to be what the last of those that were run has left."""

    def _found(self, touch: Touch) -> int:
        held = self._held.get(touch.buffer, 0)
        if touch.bytes < touch.size:
            return touch.bytes if held >= touch.size else 0
        return min(touch.bytes, held)

    def _touch(self, touch: Touch) -> None:
        key = touch.buffer
        if touch.bytes < touch.size:
            if self._held.get(key, 0) >= touch.size:
                return  # a part of what is there
            key = object()  # a part by itself, that nobody finds again
        self._taken -= self._held.pop(key, 0)
        if touch.bytes > self.capacity:
            self._held.clear()
            self._taken = 0
            return
        self._held[key] = touch.bytes
        self._taken += touch.bytes
        while self._taken > self.capacity:
            oldest = next(iter(self._held))
            left = self._held[oldest] - (self._taken - self.capacity)
            if left > 0:
                self._held[oldest] = left
                self._taken = self.capacity
            else:
                self._taken -= self._held.pop(oldest)


@dataclass
class _Array:
    """When the parts of an array were touched, the oldest first: (kernel, bytes); and how much of it that is."""

    pieces: deque[tuple[int, int]] = field(default_factory=deque)
    bytes: int = 0


class Recency:
    """Reuse distances (Mattson et al., 1970): how many bytes are touched between two touches of the same array.

    Each byte counts once, however often it is touched in between, and so do those of the kernel that touched the array
    before: kernels that touch arrays in turn, all of them different, find each at the distance of the bytes of all.

    Which part a part is (of a slice, a gather, an update) is not known: it is taken to be the one that was touched
    longest ago. What was never touched is further away than all else.
    """

    trips = 3  # of a loop that are simulated: the first, and the last two, for the last finds all as in between

    def __init__(self):
        self._arrays: dict[Hashable, _Array] = {}
        self._last = _Sums()  # of each kernel, the bytes that none has touched since
        self._parts: list[Touch] = []
        self._now = 0

    def run(self, touches: Sequence[Touch]) -> tuple[int, ...]:
        """One kernel: how far back each of its touches reaches."""
        found = tuple(self._distance(touch) for touch in touches)
        self._now += 1
        for touch in touches:
            self._touch(touch)
        return found

    def mark(self) -> int:
        """Now, for `repeat`."""
        return len(self._parts)

    def repeat(self, mark: int, times: int) -> None:
        """All kernels since `mark` run so many times more, if any: of arrays they touch other parts."""
        if times < 1:
            return
        self._now += 1
        for touch in self._parts[mark:]:
            self._touch(touch._replace(bytes=min(touch.bytes * times, touch.size)))

    def _distance(self, touch: Touch) -> int:
        array = self._arrays.get(touch.buffer)
        return self._last.since(0 if array is None or array.bytes < touch.size else array.pieces[0][0])

    def _touch(self, touch: Touch) -> None:
        if not touch.bytes:
            return
        array = self._arrays.setdefault(touch.buffer, _Array())
        if touch.bytes < touch.size:
            self._parts.append(touch)
        array.pieces.append((self._now, touch.bytes))
        array.bytes += touch.bytes
        self._last.add(self._now, touch.bytes)
        while (over := array.bytes - touch.size) > 0:
            kernel, amount = array.pieces.popleft()
            again = min(over, amount)
            array.bytes -= again
            self._last.add(kernel, -again)
            if again < amount:
                array.pieces.appendleft((kernel, amount - again))


class _Sums:
    """Numbers by position, and the sum of all from one on (Fenwick, 1994)."""

    def __init__(self):
        self._tree = [0, 0]  # number n is the sum of as many as n's lowest bit says, up to position n; none is 0
        self._total = 0

    def add(self, position: int, amount: int) -> None:
        while position >= (size := len(self._tree)):
            self._tree += [0] * (size - 1)
            self._tree[-1] = self._total
        self._total += amount
        while position < len(self._tree):
            self._tree[position] += amount
            position += position & -position

    def since(self, position: int) -> int:
        found, position = self._total, position - 1
        while position > 0:
            found -= self._tree[position]
            position &= position - 1
        return found


class _Model(Protocol):
    """A Cache or a Recency."""

    trips: int

    def run(self, touches: Sequence[Touch]) -> tuple[int, ...]: ...
    def mark(self) -> int: ...
    def repeat(self, mark: int, times: int) -> None: ...


Touches = Callable[[Instruction], Sequence[Touch]]
Branch = Callable[[Instruction], int]


def served(entry: Computation, capacity: int, touches: Touches, branch: Branch) -> dict[Instruction, Runs]:
    """What the cache serves of every kernel that runs when `entry` runs once.

    Args:
      touches: of a kernel; none for what is no kernel.
      branch: which branch of a conditional is billed.
    """
    return _visited(entry, Cache(capacity), touches, branch)


def distances(entry: Computation, touches: Touches, branch: Branch) -> dict[Instruction, Runs]:
    """How far back each touch of every kernel reaches where `entry` runs again and again; of a kernel that many call,
    nothing. The arguments are those of `served`."""
    recency = Recency()
    _visited(entry, recency, touches, branch)
    return _visited(entry, recency, touches, branch)


def _visited(entry: Computation, model: _Model, touches: Touches, branch: Branch) -> dict[Instruction, Runs]:
    """What the model says of every kernel that runs when `entry` runs once."""
    found: dict[Instruction, Runs] = {}
    visits: dict[Computation, int] = {}

    def visit(computation: Computation, is_first: bool) -> None:
        visits[computation] = visits.get(computation, 0) + 1
        if visits[computation] > model.trips**DEPTH:
            return
        for i in computation.instructions:
            if i.opcode == "while":
                body, condition = while_parts(i)
                mark, trips = model.mark(), trip_count(i) or 1
                for trip in range(min(model.trips, max(2, trips))):
                    if trip == 1:
                        model.repeat(mark, trips - model.trips)
                    visit(condition, not trip)
                    visit(body, not trip)
            elif i.opcode == "conditional":
                visit(i.called[branch(i)], is_first)
            elif i.opcode in RUNS:
                for called in i.called:
                    visit(called, is_first)
            elif touched := touches(i):
                now = model.run(touched)
                if is_first or i not in found:
                    found[i] = Runs(now, now)
                else:
                    found[i] = found[i]._replace(others=now)

    visit(entry, True)
    return found
