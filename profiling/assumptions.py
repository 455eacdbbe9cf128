"""Facts about the world that results rest on, with their sources: `load()` reads assumptions.toml, which says how.

facts = load({"power.pue": 1.1})
facts.number("power.pue"), facts.record(Scenario, "scenario.chat-support")
facts.used, facts.oldest_price
"""

import difflib
import functools
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

FILE = Path(__file__).with_name("assumptions.toml")
INHERITED = ("unit", "source", "date", "status", "note")
SOURCED, ASSUMED, HISTORY, GIVEN = "sourced", "assumed", "history", "given"

Value = float | int | str
Record = TypeVar("Record")


@dataclass(frozen=True)
class Assumption:
    """One fact.

    Attributes:
      name: its tables and its own name, with dots. path: the same in parts, which may have dots themselves.
      low, high: the range that was seen, if one was. least, most: what may be put in its place.
      date: of the price or of the reading, as far as it is known: 2026, 2026-11 or 2026-11-24; "" where it has none.
      status: "sourced"; "assumed", by nobody but us; "history", which does not age; "given", in place of `default`.
    """

    path: tuple[str, ...]
    value: Value
    unit: str = ""
    low: float | None = None
    high: float | None = None
    least: float = 0
    most: float | None = None
    source: str = ""
    date: str = ""
    status: str = SOURCED
    note: str = ""
    default: Value | None = None

    @property
    def name(self) -> str:
        return ".".join(self.path)

    @property
    def is_price(self) -> bool:
        """Whether it is an amount of money that goes out of date."""
        return self.unit.startswith("$") and self.status not in (HISTORY, GIVEN) and bool(self.date)

    def instead(self, value: Value) -> "Assumption":
        """The same with another value; ValueError says what it must be."""
        return replace(self, value=self._checked(value), status=GIVEN, source="", date="", default=self.value)

    def _checked(self, value: Value) -> Value:
        if isinstance(self.value, str):  # the numbers beside it belong to it
            if value != self.value:
                raise ValueError(f"it must stay {self.value}")
            return value
        kind = "a whole number" if isinstance(self.value, int) else "a number"
        most = 1 if self.most is None and self.unit == "share" else self.most
        bounds = f"of at least {self.least:g}" if most is None else f"from {self.least:g} to {most:g}"
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        fits = math.isfinite(number) and self.least <= number <= (math.inf if most is None else most)
        if not fits or (isinstance(self.value, int) and not number.is_integer()):
            raise ValueError(f"it must be {kind} {bounds} ({self.unit})")
        return int(number) if isinstance(self.value, int) else number

    def to_json(self) -> dict[str, Any]:
        """Everything that a reader of a result needs to judge or to replace it."""
        kept = ("value", "unit", "low", "high", "status", "source", "date", "note", "default")
        return {"name": self.name, **{name: getattr(self, name) for name in kept}}


@dataclass(frozen=True, eq=False)
class Assumptions:
    """All facts, by name; remembers which of them were asked for."""

    entries: Mapping[str, Assumption]
    _used: set[str] = field(default_factory=set, repr=False)

    def entry(self, name: str) -> Assumption:
        """The fact called `name`, which counts as used; ValueError with near names where there is none."""
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=3, cutoff=0.75)
            tip = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"there is no assumption {name!r}{tip}")
        self._used.add(name)
        return self.entries[name]

    def but(self, name: str, value: Value) -> "Assumptions":
        """The same facts with another value for one of them, none used yet; ValueError as of `load`."""
        return Assumptions(_with(self.entries, name, value))

    def number(self, name: str) -> float:
        """The value of a fact that is a number."""
        return self._typed(name, (int, float))

    def whole(self, name: str) -> int:
        """The value of a fact that is a whole number."""
        return self._typed(name, (int,))

    def text(self, name: str) -> str:
        """The value of a fact that is a word."""
        return self._typed(name, (str,))

    def _typed(self, name: str, kinds: tuple[type, ...]) -> Any:
        value = self.entry(name).value
        if not isinstance(value, kinds):
            raise TypeError(f"{name} is {value!r}, not {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    def record(self, kind: type[Record], table: str) -> Record:
        """A dataclass, each of whose fields is the fact of that name in `table`; its default where there is none."""
        if table not in self._tables:
            raise ValueError(f"there is no table of assumptions {table!r}")
        types = get_type_hints(kind)
        values: dict[str, Any] = {}
        for one in fields(kind):  # pyright: ignore[reportArgumentType]
            name = f"{table}.{one.name}"
            if name in self.entries or (one.default is MISSING and one.default_factory is MISSING):
                value = self.entry(name).value
                values[one.name] = float(value) if types[one.name] is float else value
        return kind(**values)

    def members(self, table: str) -> tuple[str, ...]:
        """The names in `table`, one level down, such as every scenario's of "scenario"."""
        found = [
            entry.path[depth]
            for entry in self.entries.values()
            for depth in range(1, len(entry.path))
            if ".".join(entry.path[:depth]) == table
        ]
        return tuple(dict.fromkeys(found))

    @functools.cached_property
    def _tables(self) -> set[str]:
        return {".".join(entry.path[:depth]) for entry in self.entries.values() for depth in range(1, len(entry.path))}

    @property
    def used(self) -> tuple[Assumption, ...]:
        """What was asked for so far, in the order of the file: what a result rests on."""
        return tuple(entry for name, entry in self.entries.items() if name in self._used)

    @property
    def oldest_price(self) -> Assumption | None:
        """Of the prices that were asked for, the one of the earliest date: how stale a result may be."""
        return min((entry for entry in self.used if entry.is_price), key=lambda entry: entry.date, default=None)


def load(overrides: Mapping[str, Value] | None = None) -> Assumptions:
    """All facts, none of them used yet.

    overrides: values to put in the place of those of the file, by name, as numbers or text; ValueError names one that
      is not there or that is not a number, not whole, negative or out of its bounds, and says what it must be.
    """
    entries = _read()
    for name, value in (overrides or {}).items():
        entries = _with(entries, name, value)
    return Assumptions(entries)


def _with(entries: Mapping[str, Assumption], name: str, value: Value) -> dict[str, Assumption]:
    entry = Assumptions(entries).entry(name)
    try:
        return {**entries, name: entry.instead(value)}
    except ValueError as error:
        raise ValueError(f"{name} is {value}; {error}") from None


@functools.cache
def _read() -> dict[str, Assumption]:
    with FILE.open("rb") as file:
        return {entry.name: entry for entry in _entries(tomllib.load(file), (), {})}


def _entries(table: Mapping[str, Any], path: tuple[str, ...], above: Mapping[str, Any]) -> Iterator[Assumption]:
    """Every fact of a table and of those below it. above: what holds for all of them unless they say otherwise."""
    if table.get("status") == ASSUMED:
        above = {name: value for name, value in above.items() if name not in ("source", "date")}
    holds = {**above, **{name: table[name] for name in INHERITED if name in table}}
    if "value" in table:
        yield Assumption(path, **{**holds, **table})
        return
    for name, inner in table.items():
        if isinstance(inner, Mapping):
            yield from _entries(inner, (*path, name), holds)
        elif name not in INHERITED:
            yield Assumption((*path, name), inner, **holds)


# --- facts that belong together --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """Traffic. input_tokens is all of a prompt, its cached part too; output_tokens what is shown, reasoning apart.

    ttft_seconds, tpot_seconds: to the first token and from each to the next, which 99 of 100 requests must keep.
    """

    input_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    requests_per_second: float
    ttft_seconds: float
    tpot_seconds: float

    def __post_init__(self) -> None:
        if self.cached_tokens > self.input_tokens:
            raise ValueError(
                f"cached_tokens is {self.cached_tokens}; it must be at most input_tokens, {self.input_tokens}"
            )


@dataclass(frozen=True)
class ApiPrice:
    """A list price, in dollars for a million tokens; `long_` is of all of a request whose prompt exceeds long_from."""

    input: float
    cached: float
    output: float
    long_from: int | None = None
    long_input: float = 0.0
    long_cached: float = 0.0
    long_output: float = 0.0

    def dollars(self, input_tokens: float, output_tokens: float, cached_tokens: float = 0) -> float:
        """What a request costs. input_tokens: all of its prompt, cached_tokens too."""
        if cached_tokens > input_tokens:
            raise ValueError(f"cached_tokens is {cached_tokens}; it must be at most input_tokens, {input_tokens}")
        long = self.long_from is not None and input_tokens > self.long_from
        new, cached, out = (
            (self.long_input, self.long_cached, self.long_output) if long else (self.input, self.cached, self.output)
        )
        return ((input_tokens - cached_tokens) * new + cached_tokens * cached + output_tokens * out) / 1e6


@dataclass(frozen=True)
class TrainingRun:
    """A run that was published, as far as it was. parameters: those that a token meets."""

    parameters: int
    tokens: int
    chip: str | None = None
    chips: int | None = None
    chip_hours: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    dollars_per_hour: float | None = None

    @property
    def hours(self) -> float | None:
        """Chip-hours: as published, or by the speed and the chips that were."""
        if self.chip_hours is None and self.tokens_per_second is not None and self.chips is not None:
            return self.tokens / self.tokens_per_second / 3600 * self.chips
        return self.chip_hours
