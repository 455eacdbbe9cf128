"""Calls of a served model: what reading a prompt and writing an answer take, by compiled steps at the roofline.

`points` names the steps, on the grid that the serving driver has, too; `ModelCall.of` makes times of their bills.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from ...profiling import targets
from ...profiling.serving import Grid
from ..flags import UsageError
from .driver import Bills, bill
from .serving import AUTO, CONTEXTS, PROMPTS, ROUND, Replica, fewest_chips, held
from .sweep import Point

if TYPE_CHECKING:
    from ...model.config import ModelConfig


@dataclass(frozen=True)
class Taken:
    """What a part of a request takes, in picoseconds: of the clock, and of one busy chip (its share of all chips)."""

    picoseconds: int = 0
    chip_picoseconds: int = 0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(self.picoseconds + other.picoseconds, self.chip_picoseconds + other.chip_picoseconds)

    @property
    def seconds(self) -> float:
        return self.picoseconds * 1e-12


def points(config: "ModelConfig", target: str, mesh: str, batch: int, prompt: int, longest: int) -> list[Point]:
    """The steps for calls that decode `batch` at a time, read up to `prompt` positions and end with `longest` at most.

    mesh: as a flag; auto: the fewest chips that hold such a batch.
    """
    rounded, further = -(-longest // ROUND) * ROUND, _first(CONTEXTS, longest)

    def roomy(context: int) -> "ModelConfig":
        return replace(config, max_context=max(context, config.max_context))

    if mesh == AUTO:
        mesh = fewest_chips(roomy(rounded), target, batch, rounded)
    beside, each = held(roomy(further), further, mesh)
    capacity = targets.chip(target).usable_hbm_bytes or math.inf
    last = further if beside + batch * each <= capacity else rounded
    contexts = [*(context for context in CONTEXTS if context < last), last]
    prompts = [*(one for one in PROMPTS if one < prompt), _first(PROMPTS, prompt)]
    return [
        *(Point(roomy(context), "decode", batch, context, target, mesh) for context in contexts),
        *(Point(roomy(context), "prefill", 1, context, target, mesh) for context in prompts),
    ]


def _first(grid: Sequence[int], least: int) -> int:
    """Of the grid, from `least` on; beyond it, that rounded up."""
    return next((one for one in grid if one >= least), -(-least // ROUND) * ROUND)


@dataclass(frozen=True)
class ModelCall:
    """Times of a model that is served: `batch` requests decode together on `chips` chips, prompts are read alone.

    positions: that the caches on these chips have room for.
    """

    grid: Grid
    batch: int
    chips: int
    positions: int

    @classmethod
    def of(cls, asked: Sequence[Point], bills: Bills) -> "ModelCall":
        """From the outcomes of `points`; UsageError where one was refused, or times are not known."""
        replica = Replica.of(asked, {point: bill(bills, point) for point in asked})
        return cls(replica.times, replica.times.batches[0], replica.chips, replica.positions)

    def read(self, tokens: int, past: int = 0) -> Taken:
        """`tokens` positions of a prompt, after `past` of it that are in the cache."""
        time = self.grid.prefill(tokens, past) if tokens else 0
        return Taken(time, time * self.chips)

    def write(self, tokens: int, past: int) -> Taken:
        """`tokens` after a prompt of `past`. Reading gives the first of them; each of the others is a decode step."""
        if past + tokens > len(self._so_far):
            raise UsageError(f"a call ends with {past + tokens} positions; times are known up to {len(self._so_far)}")
        time = self._so_far[past + tokens - 1] - self._so_far[past]
        return Taken(time, round(time * self.chips / self.batch))

    @cached_property
    def _so_far(self) -> list[int]:
        """Picoseconds of the decode steps that fill a cache up to each number of positions."""
        steps = (self.grid.decode(self.batch, self.batch * n) for n in range(1, self.grid.contexts[-1] + 1))
        return [0, *accumulate(steps)]
