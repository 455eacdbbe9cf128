"""What a driver of cost ends in: a claim in one sentence, whether it holds, and the numbers that decide it.

A finding is data. It is printed here as a table or JSON, and written to TensorBoard; the report makes a page of many.
"""

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...profiling import render

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

SCHEMA = 1
Value = str | int | float | None


@dataclass(frozen=True)
class Quantity:
    """What a column or an axis is of: its name, and its unit as in "B", "s", "$", "FLOP", "" for a plain number."""

    name: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.name} [{self.unit}]" if self.unit else self.name


@dataclass(frozen=True)
class Table:
    """Rows of numbers, as many in each as there are columns. None: not known.

    commands: of each row, what makes its bill again, if one bill says it; or none at all.
    """

    title: str
    columns: tuple[Quantity, ...]
    rows: tuple[tuple[Value, ...], ...]
    commands: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        if self.commands and len(self.commands) != len(self.rows):
            raise ValueError(f"table {self.title!r} has {len(self.rows)} rows, and {len(self.commands)} commands")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r} has {len(self.columns)} columns, and a row of {len(row)}")


@dataclass(frozen=True)
class Plot:
    """Lines of points (x, y), by name."""

    title: str
    x: Quantity
    y: Quantity
    lines: Mapping[str, tuple[tuple[float, float], ...]]
    log_x: bool = True
    log_y: bool = True


@dataclass(frozen=True)
class PowerLaw:
    """y = factor x^exponent, by least squares in logarithms. r_squared: the share of log y's variance that it explains
    (1: all points lie on it)."""

    exponent: float
    factor: float
    r_squared: float
    points: int

    def __str__(self) -> str:
        return f"exponent {self.exponent:.3f} (R² {self.r_squared:.4f}, {self.points} points)"


def power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """The power law through points with positive x and y, of at least two different x; ValueError."""
    if len({x for x, _ in points}) < 2 or min(min(point) for point in points) <= 0:
        raise ValueError(f"points are {points!r}; there must be positive ones at two x at least")
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    x_mean, y_mean = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - x_mean) ** 2 for x in xs)
    exponent = math.fsum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    left = math.fsum((y - y_mean - exponent * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    whole = math.fsum((y - y_mean) ** 2 for y in ys)
    return PowerLaw(exponent, math.exp(y_mean - exponent * x_mean), 1 - left / whole if whole else 1.0, len(points))


@dataclass(frozen=True)
class Finding:
    """What a driver found.

    Attributes:
      driver: its name, as of its module. question: that it answers.
      claim: what is commonly held, in one sentence. holds: whether it does here; None where the numbers cannot tell.
      evidence: the sentence with the numbers that say so.
      fits: exponents, each with its fit, by what they are of.
      assumptions: those that were used, each {name, value, unit, source, date}, given or overridden.
      command: that makes it again.
      headline: the one number that says most, in a few words, for a list of many findings; "" leaves the evidence.
      factor: how many times the cost what is asked about makes (or unmakes) at most, at least 1, where it is a factor.
    """

    driver: str
    question: str
    target: str
    claim: str
    holds: bool | None
    evidence: str
    command: str
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    fits: Mapping[str, PowerLaw] = field(default_factory=dict)
    assumptions: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    headline: str = ""
    factor: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the claim holds, in words."""
        return {True: "holds", False: "does not hold", None: "cannot be told"}[self.holds]

    def to_json(self) -> dict[str, Any]:
        """`schema` and every attribute."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Finding":
        """What `to_json` wrote, also after it went through a file."""
        fields = {key: value for key, value in saved.items() if key != "schema"}
        return cls(
            **fields
            | {
                "tables": tuple(
                    Table(
                        *(one["title"], _quantities(one["columns"]), tuple(map(tuple, one["rows"]))),
                        tuple(one.get("commands", ())),
                    )
                    for one in saved["tables"]
                ),
                "plots": tuple(
                    Plot(**one | {"x": Quantity(**one["x"]), "y": Quantity(**one["y"]), "lines": _lines(one["lines"])})
                    for one in saved["plots"]
                ),
                "fits": {name: PowerLaw(**one) for name, one in saved["fits"].items()},
                "assumptions": tuple(saved["assumptions"]),
                "notes": tuple(saved["notes"]),
            }
        )


def _quantities(saved: Sequence[Mapping[str, str]]) -> tuple[Quantity, ...]:
    return tuple(Quantity(**one) for one in saved)


def _lines(saved: Mapping[str, Any]) -> dict[str, tuple[tuple[float, float], ...]]:
    return {name: tuple((x, y) for x, y in points) for name, points in saved.items()}


# --- shown -----------------------------------------------------------------------------------------------------------


def cell(value: Value, unit: str) -> str:
    """A number in its unit as people read it; "-" for None."""
    if value is None or isinstance(value, str):
        return render.NONE if value is None else value
    if unit == "s":
        return render.seconds(value)
    if unit.startswith("$"):
        return render.dollars(value)
    if unit in ("%", "x"):
        return f"{value:.1%}" if unit == "%" else f"{value:.2f}"
    if not unit and isinstance(value, int):
        return f"{value:,}"
    return render.amount(value) if unit else render.digits(value)


def show(finding: Finding, form: str) -> None:
    """On standard output, as `table` or `json`."""
    if form == "json":
        print(json.dumps(finding.to_json(), indent=1))
        return
    from rich.console import Console

    width = None if sys.stdout.isatty() else render.WIDTH
    Console(highlight=False, emoji=False, width=width).print(renderable(finding))


def renderable(finding: Finding) -> "RenderableType":
    """The finding for a terminal: question, claim, verdict and evidence; tables; fits; assumptions."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as Grid
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"{finding.question} ({finding.target})", "bold cyan")]
    colour = {True: "green", False: "red", None: "yellow"}[finding.holds]
    parts.append(Text.assemble("claim     ", (finding.claim, "bold"), " ", (f"It {finding.verdict}.", colour)))
    parts.append(Text(f"evidence  {finding.evidence}"))
    for table in finding.tables:
        grid = Grid(box=box.SIMPLE_HEAD, title=Text(table.title), title_justify="left", title_style="bold")
        for n, column in enumerate(table.columns):
            is_text = any(isinstance(row[n], str) for row in table.rows)
            grid.add_column(Text(str(column)), justify="left" if is_text else "right")
        for row in table.rows:
            cells = zip(row, table.columns, strict=True)
            grid.add_row(*(Text(cell(value, column.unit)) for value, column in cells))
        parts.append(grid)
    parts += [Text(f"fit       {name}: {law}") for name, law in finding.fits.items()]
    for one in finding.assumptions:
        said = ", ".join(str(one[key]) for key in ("source", "date") if one.get(key))
        parts.append(Text(f"assumed   {one['name']} = {one['value']} {one.get('unit', '')} ({said})"))
    parts += [Text(f"note      {note}", "dim") for note in finding.notes]
    return Group(*parts, Text(f"again     {finding.command}", "dim"))


def figure(plot: Plot) -> "Figure":
    """The plot, drawn without a display."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    settings: dict[Any, Any] = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(settings):
        sheet = Figure((7.2, 4.2), 100, layout="constrained")
        axes = sheet.subplots()
        for marker, (name, points) in zip("osD^vPX*" * len(plot.lines), plot.lines.items(), strict=False):
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.5, label=name)
        axes.set(title=plot.title, xlabel=str(plot.x), ylabel=str(plot.y))
        for axis, is_log, quantity in ((axes.xaxis, plot.log_x, plot.x), (axes.yaxis, plot.log_y, plot.y)):
            if is_log:
                axes.set(**{f"{axis.axis_name}scale": "log"})
            axis.set_major_formatter(EngFormatter(quantity.unit if quantity.unit in ("s", "B") else ""))
        axes.grid(alpha=0.25)
        if len(plot.lines) > 1:
            axes.legend(frameon=False, fontsize="small")
    return sheet


def write(logdir: Path, finding: Finding) -> Path:
    """Writes the finding to TensorBoard's folder, as text and images of a run named after its driver; the run's folder.

    Raises:
      OSError: nothing can be written there.
    """
    from rich.console import Console

    from ...profiling import plots, tensorboard

    console = Console(width=render.WIDTH, file=io.StringIO(), highlight=False, emoji=False)
    with console.capture() as said:
        console.print(renderable(finding))
    folder = logdir / f"{finding.driver}_{finding.target}"
    with tensorboard.Writer(folder) as writer:
        writer.text("finding", said.get())
        for plot in finding.plots:
            writer.image(f"finding/{plot.title}", *plots.png(figure(plot)))
        writer.scalars({f"exponent/{name}": law.exponent for name, law in finding.fits.items()})
    return folder
