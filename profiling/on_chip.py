"""What a GPU's L2 cache is taken to serve of the bytes that kernels ask for: a stated model, not a measurement.

The model is a least-recently-used stack over buffers in the order of the schedule, byte by byte:

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
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import NamedTuple

from .chips import Chip
from .hlo import RUNS, Computation, Instruction
from .loops import while_parts

SHARE = Fraction(1, 2)
# How often one computation is simulated: twice a loop that it is in, or once a caller.
MOST_VISITS = 8


class Touch(NamedTuple):
    """One kernel touching one buffer: `bytes` of the array of `size` bytes that is in it."""

    buffer: Hashable
    bytes: int
    size: int
    write: bool


class Runs(NamedTuple):
    """What each touch of a kernel finds in the cache, in bytes: on the first trip of its loop, and on the others."""

    first: Sequence[int]
    others: Sequence[int]


def capacity(chip: Chip) -> int:
    """Bytes of a GPU's L2 that hold what a program reuses; 0 where nothing is modelled."""
    return int(chip.l2_bytes * SHARE) if chip.platform == "cuda" and chip.l2_bytes else 0


class Cache:
    """A least-recently-used stack of buffers, the oldest first, with the bytes that are left of each."""

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


def served(
    entry: Computation,
    capacity: int,
    touches: Callable[[Instruction], Sequence[Touch]],
    branch: Callable[[Instruction], int],
) -> dict[Instruction, Runs]:
    """What the cache serves of every kernel that runs when `entry` runs once.

    Args:
      touches: of a kernel; none for what is no kernel.
      branch: which branch of a conditional is billed.
    """
    cache = Cache(capacity)
    found: dict[Instruction, Runs] = {}
    visits: dict[Computation, int] = {}

    def visit(computation: Computation, is_first: bool) -> None:
        visits[computation] = visits.get(computation, 0) + 1
        if visits[computation] > MOST_VISITS:
            return
        for i in computation.instructions:
            if i.opcode == "while":
                body, condition = while_parts(i)
                for trip in (True, False):
                    visit(condition, trip)
                    visit(body, trip)
            elif i.opcode == "conditional":
                visit(i.called[branch(i)], is_first)
            elif i.opcode in RUNS:
                for called in i.called:
                    visit(called, is_first)
            elif touched := touches(i):
                now = cache.run(touched)
                if is_first or i not in found:
                    found[i] = Runs(now, now)
                else:
                    found[i] = found[i]._replace(others=now)

    visit(entry, True)
    return found
