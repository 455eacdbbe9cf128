"""Where on a sheet the lines of a plot lie. Geometry alone: the page's template draws it, its style sheet colours it.

Text is HTML's and SVG's own, so that it can be read out, searched and coloured by the theme.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...profiling import render
from ..drivers.finding import Plot, Quantity, Value, cell

WIDTH, HEIGHT = 420, 280  # so that letters of 12 units can be read on the width of a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 42  # margins, for those letters
COLOURS = 8  # lines of the style sheet; the ninth is the first again, with dashes
# Outlines of marks about (0, 0), so that no line is told by colour alone.
MARKS = (
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3-3h6v6h-6z",
    "M0-4.5L4.5 0L0 4.5L-4.5 0z",
    "M0-4L4 3.5h-8z",
    "M0 4L4-3.5h-8z",
    "M-3.5-2L-2-3.5L0-1.5L2-3.5L3.5-2L1.5 0L3.5 2L2 3.5L0 1.5L-2 3.5L-3.5 2L-1.5 0z",
    "M-1.5-4.5h3v9h-3z",
    "M-1.3-4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z",
)
MOST_TICKS = 7
ROOM = 0.04  # of an axis, left empty at both of its ends


@dataclass(frozen=True)
class Tick:
    """A place on the sheet, and what is written there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """points: (x, y) on the sheet, and what they are in words. colour: from 1 to COLOURS. mark: its outline."""

    name: str
    colour: int
    mark: str
    dashed: bool
    points: tuple[tuple[float, float, str], ...]

    @property
    def path(self) -> str:
        """The points, as a polyline takes them."""
        return " ".join(f"{x:g},{y:g}" for x, y, _ in self.points)


@dataclass(frozen=True)
class Chart:
    """A plot on a sheet of WIDTH x HEIGHT. said: the same in words. rows: (line, x, y), for a table."""

    plot: Plot
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    said: str
    rows: tuple[tuple[str, str, str], ...]

    @classmethod
    def of(cls, plot: Plot) -> "Chart":
        """Lays it out; an axis that is to be logarithmic is so where all of its numbers are positive."""
        x_values, y_values = ([point[axis] for line in plot.lines.values() for point in line] for axis in (0, 1))
        across = _Axis.of(x_values, plot.log_x, LEFT, WIDTH - RIGHT)
        up = _Axis.of(y_values, plot.log_y, HEIGHT - BOTTOM, TOP)
        lines, rows = [], []
        for n, (name, points) in enumerate(plot.lines.items()):
            told = [(name, words(x, plot.x.unit), words(y, plot.y.unit)) for x, y in points]
            placed = tuple((across.at(x), up.at(y), ", ".join(each)) for (x, y), each in zip(points, told, strict=True))
            lines.append(Line(name, n % COLOURS + 1, MARKS[n % len(MARKS)], n >= COLOURS, placed))
            rows += told
        return cls(plot, across.ticks(plot.x), up.ticks(plot.y), tuple(lines), _said(plot), tuple(rows))


@dataclass(frozen=True)
class _Axis:
    """Numbers from `low` to `high` -> places from `start` to `end`."""

    low: float
    high: float
    is_log: bool
    start: float
    end: float

    @classmethod
    def of(cls, values: Iterable[float], is_log: bool, start: float, end: float) -> "_Axis":
        found = list(values) or [0.0, 1.0]
        is_log = is_log and min(found) > 0
        low, high = (math.log10(v) if is_log else v for v in (min(found), max(found)))
        if not is_log and 0 < low < high / 2:  # what is nearly 0 begins there
            low = 0.0
        if low == high:
            low, high = (0.0, 2 * high) if not is_log and high > 0 else (low - 0.5, high + 0.5)
        room = ROOM * (high - low)
        return cls(low if not is_log and low == 0 else low - room, high + room, is_log, start, end)

    def at(self, value: float) -> float:
        scaled = math.log10(value) if self.is_log else value
        return round(self.start + (scaled - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, quantity: Quantity) -> tuple[Tick, ...]:
        values = _decades(self.low, self.high) if self.is_log else _steps(self.low, self.high)
        return tuple(Tick(self.at(value), label(value, quantity.unit)) for value in values)


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten between two logarithms, every second or third where there are many; where there are few, also
    twice and five times each."""
    powers = range(math.ceil(low), math.floor(high) + 1)
    if len(powers) > 2:
        return [10.0**power for power in powers[:: -(-len(powers) // MOST_TICKS)]]
    between = [factor * 10.0**power for power in range(math.floor(low), math.floor(high) + 1) for factor in (1, 2, 5)]
    found = [value for value in between if low <= math.log10(value) <= high]
    return found if len(found) > 1 else _steps(10**low, 10**high)


def _steps(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, at most MOST_TICKS of them."""
    power = 10.0 ** math.floor(math.log10((high - low) / MOST_TICKS))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (power * factor) < MOST_TICKS)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def label(value: float, unit: str) -> str:
    """A number beside an axis whose own label says the unit, but for the prefix: "10 k", "5 ms", "20%"."""
    if value == 0:
        return "0"
    if unit == "s":
        return _short(render.seconds(value))
    if unit == "%":
        return f"{100 * value:.3g}%"
    return _short(render.amount(round(value, 12))) if abs(value) >= 1 else f"{value:.3g}"


def words(value: Value, unit: str) -> str:
    """As a terminal has it; but what has no unit, and no prefix therefore, with its thousands apart."""
    is_large = not unit and isinstance(value, float) and abs(value) >= 1e4
    return f"{value:,.0f}" if is_large else cell(value, unit)


def _short(text: str) -> str:
    """Without zeros that end a fraction: "1.50 k" -> "1.5 k"."""
    return re.sub(r"\.0+(?= |$)|(\.\d*[1-9])0+(?= |$)", r"\1", text)


def _said(plot: Plot) -> str:
    """For those who do not see it: what the axes are, and each line from its first to its last point."""
    parts = [f"{plot.y} over {plot.x}."]
    for name, points in plot.lines.items():
        if points:
            ends = (min(points), max(points))
            first, last = (f"{words(y, plot.y.unit)} at {words(x, plot.x.unit)}" for x, y in ends)
            parts.append(f"{name}: {first}." if len(points) == 1 else f"{name}: {first}, {last}.")
    return " ".join(parts)
