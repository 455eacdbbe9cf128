"""A bill as pictures: where bytes, FLOPs and time go, and how far each component is from its roofline.

Only ink, as render.py is: every number is the bill's own. Drawn by Agg, which needs no display; matplotlib is imported
when the first figure is asked for.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model.scopes import COMPONENTS
from .attribution import ROLES
from .bill import FLOP_KINDS, Bill, Work
from .chips import Chip
from .harmless import visible
from .render import amount, seconds, share, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 100
MOST_BARS = 30  # components with a bar of their own; the least are one bar together
LONGEST_NAME, LONGEST_TITLE = 36, 110  # characters
LEAST_INTENSITY = 0.01  # FLOPs per byte: what has less is named below the roofline and not drawn far from all else
UNATTRIBUTED = "unattributed"

# Okabe and Ito's colours, which the colour-blind tell apart ("Color Universal Design", 2008), and a grey.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PINK, _SKY, _GREY = "#CC79A7", "#56B4E9", "#999999"
_OF_ROLE: dict[str, str] = dict(zip(ROLES, (_BLUE, _ORANGE, _GREEN, _RED, _PINK, _SKY, _GREY), strict=True))
_OF_KIND = dict(zip(FLOP_KINDS, (_BLUE, _SKY, _ORANGE), strict=True))
_OF_BOUND = {"compute": _BLUE, "hbm": _ORANGE, "link": _PINK, "latency": _SKY, "unknown": _GREY}
_WRITTEN = 0.5  # opacity of what is written
_MARKERS = "osD^vPX"

_Piece = tuple[str, str, float, Callable[["Bar"], int]]  # of a bar: its label, colour, opacity and size


@dataclass(frozen=True)
class Bar:
    """The work of one component, all phases and taxes together; and its roofline picoseconds by what bounds them."""

    name: str
    work: Work
    by_bound: Mapping[str, int]


def bars(bill: Bill, most: int = MOST_BARS) -> list[Bar]:
    """A bar a component in the order of the model, then the unattributed one: they add up to the total.

    Of more than `most`, the least are one bar together.
    """
    works: dict[str, Work] = {}
    bounds: dict[str, dict[str, int]] = {}
    parts = [(row.component, row.work, row.bound) for row in bill.rows]
    names = list(dict.fromkeys(name for name, _, _ in parts))
    size = {name: bill_magnitude(bill, [work for of, work, _ in parts if of == name]) for name in names}
    small = set(sorted(names, key=lambda name: size[name], reverse=True)[most:])
    lumped = f"{len(small)} others"
    for name, work, bound in [*parts, (UNATTRIBUTED, bill.unattributed, bill.unattributed_bound)]:
        name = lumped if name in small else name
        works.setdefault(name, Work()).add(work)
        by_bound = bounds.setdefault(name, {})
        by_bound[bound] = by_bound.get(bound, 0) + work.picoseconds
    last = [name for name in (lumped, UNATTRIBUTED) if name in works]
    ordered = sorted((name for name in works if name not in last), key=place) + last
    return [Bar(name, works[name], bounds[name]) for name in ordered]


def bill_magnitude(bill: Bill, works: Sequence[Work]) -> tuple[int, ...]:
    """By what components are ranked: time where the bill has any, measured or not, then bytes and FLOPs."""
    total = sum(works, Work())
    return (total.measured_picoseconds, *total.magnitude)


def place(name: str) -> int:
    """Where a component comes in the order of the model."""
    return COMPONENTS.index(name) if name in COMPONENTS else len(COMPONENTS)


def figures(bill: Bill, chip: Chip | None = None) -> dict[str, "Figure"]:
    """By name, all that the bill has the numbers for: `bytes`, `flops`, `seconds` at the roofline, `roofline`, and
    `measured`, where it has been.

    chip: whose ceilings are drawn; None: none are.
    """
    out = {"bytes": _bytes(bill), "flops": _flops(bill)}
    if bill.total.picoseconds:
        out["seconds"] = _bounds(bill)
    if bill.total.picoseconds or bill.total.measured_picoseconds:
        out["roofline"] = _roofline(bill, chip)
    if bill.total.measured_picoseconds:
        out["measured"] = _time(bill)
    return out


def png(figure: "Figure") -> tuple[bytes, int, int]:
    """The figure as a PNG image, its width and its height in pixels."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as boxes
        figure.savefig(out, format="png")
    width, height = (round(inches * figure.dpi) for inches in figure.get_size_inches())
    return out.getvalue(), width, height


# --- what is drawn -------------------------------------------------------------------------------------------------


def _bytes(bill: Bill) -> "Figure":
    """Bytes by role, read and written."""
    pieces: list[_Piece] = []
    for role in _present(bill.total):
        for side, label, opacity in (("hbm_read", role, 1.0), ("hbm_write", "", _WRITTEN)):
            pieces.append((label, _OF_ROLE.get(role, _GREY), opacity, _moved(side, role)))
    pieces.append(("(pale: written)", _GREY, _WRITTEN, lambda _: 0))
    label = f"bytes of {_memory(bill)}, per chip and step"
    return _stack(bill, pieces, label, "B", lambda bar: bar.work.hbm_bytes)


def _flops(bill: Bill) -> "Figure":
    pieces = [(kind, _OF_KIND[kind], 1.0, _kind(kind)) for kind in FLOP_KINDS]
    return _stack(bill, pieces, "FLOPs, per chip and step", "FLOP", lambda bar: bar.work.flops)


def _bounds(bill: Bill) -> "Figure":
    """Roofline time by what bounds it."""
    found = {bound for bar in bars(bill) for bound, time in bar.by_bound.items() if time}
    pieces = [(name, colour, 1.0, _bound(name)) for name, colour in _OF_BOUND.items() if name in found]
    return _stack(bill, pieces, "roofline seconds of a step, by bound", "s", lambda bar: bar.work.picoseconds, 1e-12)


def _moved(side: str, role: str) -> Callable[[Bar], int]:
    return lambda bar: getattr(bar.work, side).get(role, 0)


def _kind(kind: str) -> Callable[[Bar], int]:
    return lambda bar: getattr(bar.work, kind)


def _bound(name: str) -> Callable[[Bar], int]:
    return lambda bar: bar.by_bound.get(name, 0)


def _present(total: Work) -> list[str]:
    """The roles of a bill, those of other programs' bills behind our own."""
    found = [
        role for role in (*total.hbm_read, *total.hbm_write) if total.hbm_read.get(role) or total.hbm_write.get(role)
    ]
    return [*(role for role in ROLES if role in found), *dict.fromkeys(role for role in found if role not in ROLES)]


def _stack(
    bill: Bill, pieces: "Sequence[_Piece]", label: str, unit: str, whole: Callable[[Bar], int], scale: float = 1
) -> "Figure":
    """A bar of pieces for each component; amounts, of which `whole` is the sum, are in `scale` times the unit."""
    shown = bars(bill)
    with _sheet(bill, _height(shown)) as (figure, axes):
        _names(axes, shown)
        ends = [0] * len(shown)
        for name, colour, opacity, of in pieces:
            width = [of(bar) for bar in shown]
            axes.barh(
                range(len(shown)),
                [piece * scale for piece in width],
                left=[end * scale for end in ends],
                color=colour,
                alpha=opacity,
                label=visible(name) or None,
                height=0.75,
            )
            ends = [end + piece for end, piece in zip(ends, width, strict=True)]
        total = sum(whole(bar) for bar in shown)
        for n, bar in enumerate(shown):
            if size := whole(bar):
                said = seconds(size * scale) if unit == "s" else amount(size, unit)
                axes.text(ends[n] * scale, n, f" {said} · {share(size, total)}", va="center", fontsize="small")
        axes.set_xlim(0, max(*ends, 1) * scale * 1.35)
        axes.set_xlabel(label)
        _unit(axes.xaxis, unit)
        axes.locator_params(axis="x", nbins=5)
        _legend_above(axes)
    return figure


def _roofline(bill: Bill, chip: Chip | None) -> "Figure":
    """Each component's FLOP/s over its FLOPs per byte, under the chip's ceilings (Williams, Waterman and Patterson,
    "Roofline", 2009): hollow at its roofline time, filled at its measured time."""
    found = [bar for bar in bars(bill) if bar.work]
    shown = [bar for bar in found if bar.work.flops > LEAST_INTENSITY * bar.work.hbm_bytes > 0]
    left_out = [bar.name for bar in found if bar not in shown]
    with _sheet(bill, 6.2, 10.5) as (figure, axes):
        axes.set_xscale("log")
        axes.set_yscale("log")
        intensities = [1.0]
        measured, timed = bill.total.measured_picoseconds, bill.total.picoseconds
        for n, bar in enumerate(shown):
            work = bar.work
            intensity = work.flops / work.hbm_bytes
            takes = [("none", work.picoseconds), ("full", work.measured_picoseconds)]
            rates = [(fill, work.flops / time * 1e12) for fill, time in takes if time]
            part = share(work.measured_picoseconds, measured) if measured else share(work.picoseconds, timed)
            colour, marker = _colour(n), _MARKERS[n % len(_MARKERS)]
            axes.plot([intensity] * len(rates), [rate for _, rate in rates], color=colour, linewidth=1, alpha=0.6)
            for fill, rate in rates:
                style = {"fillstyle": fill, "markersize": 9, "markeredgewidth": 1.8}
                axes.plot(intensity, rate, marker, color=colour, **style)
            fill = rates[-1][0] if rates else "none"
            axes.plot([], [], marker, color=colour, fillstyle=fill, label=f"{_short(bar.name)}  {part}")
            intensities.append(intensity)
        _ceilings(axes, chip, intensities)
        axes.set_xlabel(f"FLOPs per byte of {_memory(bill)}")
        axes.set_ylabel("FLOP/s, per chip")
        _unit(axes.yaxis, "FLOP/s")
        axes.xaxis.set_major_formatter("{x:g}")  # not 100 m, as thousandths would be
        axes.xaxis.set_tick_params(labelsize="small")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
        said = "; ".join(
            ([] if not timed else ["hollow: at the roofline"]) + ([] if not measured else ["filled: as measured"])
        )
        axes.set_title(said + ("" if _has_ceilings(chip) else "; no peaks are known here"), fontsize="small")
        of = "measured" if measured else "roofline"
        axes.legend(
            loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize="small", title=f"share of {of} time"
        )
        if left_out:
            names = ", ".join(map(_short, left_out[:6])) + (", ..." if len(left_out) > 6 else "")
            figure.supxlabel(
                f"under {LEAST_INTENSITY} FLOPs a byte, or without any byte: {names}", fontsize="small", color="#555555"
            )
    return figure


def _has_ceilings(chip: Chip | None) -> bool:
    return chip is not None and bool(chip.peak_flops) and chip.hbm_bytes_per_second is not None


def _ceilings(axes: "Axes", chip: Chip | None, intensities: Sequence[float]) -> None:
    """The bandwidth's slope, and from where it meets them the peaks of each class of operands."""
    if chip is None or chip.hbm_bytes_per_second is None or not chip.peak_flops:
        return
    peaks = sorted(chip.peak_flops.items(), key=lambda peak: peak[1])
    bandwidth = chip.hbm_bytes_per_second
    ridge = peaks[-1][1] / bandwidth
    low, high = min(intensities) / 2, max(*intensities, ridge) * 20
    axes.plot([low, ridge], [low * bandwidth, ridge * bandwidth], color="#333333", linewidth=1.6)
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"{amount(bandwidth, 'B/s')}",
        (middle, middle * bandwidth),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
        fontsize="small",
        color="#333333",
    )
    same: dict[int, list[str]] = {}
    for kind, peak in peaks:
        same.setdefault(peak, []).append(kind)
    for peak, kinds in same.items():
        style = "-" if "bf16" in kinds else "--"
        axes.plot([peak / bandwidth, high], [peak, peak], style, color="#333333", linewidth=1.2)
        axes.annotate(
            f"{', '.join(kinds)} {amount(peak, 'FLOP/s')}",
            (high, peak),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            color="#333333",
        )
    axes.set_xlim(low, high)


def _time(bill: Bill) -> "Figure":
    """Bars of what each component took, beside what was predicted or, without that, the roofline; and the ratio."""
    shown = bars(bill)
    other, expected = "roofline", [bar.work.picoseconds for bar in shown]
    if bill.predicted is not None:
        other, expected = "predicted", [bar.work.predicted_picoseconds for bar in shown]
    with _sheet(bill, _height(shown)) as (figure, axes):
        _names(axes, shown)
        series = [("measured", _BLUE, [bar.work.measured_picoseconds for bar in shown])]
        if any(expected):
            series.append((other, _ORANGE, expected))
        thick = 0.8 / len(series)
        for place, (name, colour, times) in enumerate(series):
            offset = (place - (len(series) - 1) / 2) * thick
            axes.barh(
                [n + offset for n in range(len(shown))],
                [time * 1e-12 for time in times],
                color=colour,
                height=thick,
                label=name,
            )
        for n, (bar, time) in enumerate(zip(shown, expected, strict=True)):
            if took := bar.work.measured_picoseconds:
                said = f" {seconds(took * 1e-12)}" + (f" · {took / time:.2f}x" if time else "")
                axes.text(max(took, time) * 1e-12, n, said, va="center", fontsize="small")
        axes.set_xlim(0, max(max(times) for _, _, times in series) * 1e-12 * 1.25)
        axes.set_xlabel(f"seconds, per step; x: measured over {other}" if any(expected) else "seconds, per step")
        _unit(axes.xaxis, "s")
        axes.locator_params(axis="x", nbins=5)
        _legend_above(axes)
    return figure


# --- paper and pencil ----------------------------------------------------------------------------------------------


@contextmanager
def _sheet(bill: Bill, height: float, width: float = 8.4) -> Iterator[tuple["Figure", "Axes"]]:
    """Empty axes under the bill's title, in inches. What is written there is taken for no formula."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False, "font.size": 11}):
        figure = Figure((width, height), DOTS_PER_INCH, layout="constrained", facecolor="white")
        figure.suptitle(_shortened(title(bill), LONGEST_TITLE), fontsize="small", fontweight="bold")
        yield figure, figure.subplots()


def _legend_above(axes: "Axes") -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, frameon=False, fontsize="small")


def _height(shown: Sequence[Bar]) -> float:
    return 1.9 + 0.33 * len(shown)


def _names(axes: "Axes", shown: Sequence[Bar]) -> None:
    axes.set_yticks(range(len(shown)), [_short(bar.name) for bar in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)  # the first on top


def _short(name: str) -> str:
    return _shortened(name, LONGEST_NAME)


def _shortened(text: str, most: int) -> str:
    text = visible(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _memory(bill: Bill) -> str:
    return "memory" if bill.program.get("target") == "host" else "HBM"


def _unit(axis: Any, unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(unit))
    axis.set_tick_params(labelsize="small")


def _colour(n: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab10"](n % 10)
