"""A bill as people read it: a table for the terminal, and CSV. Only ink: every number is the bill's own."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..model.scopes import COMPONENTS
from .attribution import ROLES, TAXES
from .chips import CHIPS
from .harmless import visible
from .on_chip import capacity
from .reconcile import UNEXPLAINED

if TYPE_CHECKING:
    from .bill import Bill, Row, Work
    from .compare import Comparison

WIDTH = 120  # columns, where nobody says otherwise
PHASES = ("forward", "recompute", "backward", "update")
GROUPS = ("attention", "mlp", "cache", "other")
NONE = "-"  # what is not known, as opposed to 0
LARGEST_SHOWN = 3  # buffers; all ten are in the JSON
NEGLIGIBLE = 0.001  # a difference below this part of its quantity is not worth a line
# A role with less of the traffic has no column of its own, but for the two that everybody asks for.
SMALL = {"weights": 0.005, "cache": 0.005}
SMALL_OTHER = 0.03

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


# --- numbers -------------------------------------------------------------------------------------------------------


def digits(value: float, count: int = 3) -> str:
    """At most `count` significant digits, without an exponent and without a needless point: 1234 stays 1234."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{count}g}")  # first, because 0.9996 is 1.00 and not 1.000
    return f"{value:.{max(0, count - 1 - math.floor(math.log10(abs(rounded))))}f}"


def amount(value: float | None, unit: str = "", count: int = 3) -> str:
    """Engineering units: 805306368 -> "805 M"; with unit "B" -> "805 MB". None -> "-". Decimal prefixes."""
    if value is None:
        return NONE
    size = abs(value)
    for scale, prefix in _PREFIXES:
        # What would be rounded up to four digits takes the next prefix: 999.9e6 is 1.00 G and not 1000 M.
        if size >= scale * (1 - 0.5 * 10.0**-count):
            scaled = value / scale
            text = digits(scaled, count) if scale > 1 or not float(value).is_integer() else str(int(value))
            return f"{text} {prefix}{unit}".rstrip()
    return f"{digits(value, count)} {unit}".rstrip()


def seconds(value: float | None, count: int = 3) -> str:
    """0.00123 -> "1.23 ms". None -> "-"."""
    if value is None:
        return NONE
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns")):
        if abs(value) >= scale * (1 - 0.5 * 10.0**-count):
            return f"{digits(value / scale, count)} {unit}"
    return "0 s" if value == 0 else f"{digits(value / 1e-12, count)} ps"


def share(part: float, whole: float) -> str:
    """"12.3%"; "-" of nothing."""  # fmt: skip
    if not whole:
        return NONE
    percent = 100 * part / whole
    return f"{percent:.1f}%" if part == 0 or abs(percent) >= 0.05 else "<0.1%"


def dollars(value: float | None) -> str:
    """Three significant digits as far as the fifth decimal: "0.00123", "12.3"."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return "<0.0001"
    return f"{value:.5f}" if abs(value) < 0.01 else digits(value)


def parameters(count: int) -> str:
    """"8.030 billion parameters"."""  # fmt: skip
    words = {"T": "trillion", "G": "billion", "M": "million", "k": "thousand"}
    number, _, prefix = amount(count, count=4).partition(" ")
    return " ".join(filter(None, (number, words.get(prefix), "parameters")))


def ratio(bill: float, ideal: float | None) -> str:
    """"1.04x"; "-" without an ideal."""  # fmt: skip
    return f"{bill / ideal:.2f}x" if ideal else NONE


# --- the table -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """A heading, and what it says of some work. `role` columns are of one role and side, or of all that have none."""

    heading: str
    cell: Callable[["Work", str], str]


def _columns(bill: "Bill", roles: int) -> list[_Column]:
    timed = bool(bill.total.picoseconds)
    per_million = bill.price.get("dollars_per_million_tokens")

    def weight(work: "Work") -> int:
        if bill.measured:
            return work.measured_picoseconds
        return work.picoseconds if timed else work.hbm_bytes

    whole = weight(bill.total)

    front = [
        _Column("matmul\nFLOPs", lambda work, _: amount(work.matmul)),
        _Column("other\nFLOPs", lambda work, _: amount(work.elementwise + work.transcendental)),
    ]
    back = []
    if bill.total.link_bytes:
        back.append(_Column("link\nbytes", lambda work, _: amount(work.link_bytes)))
    if bill.total.host_link_bytes:
        back.append(_Column("to / from\nhost", lambda work, _: amount(work.host_link_bytes)))
    back.append(_Column("roofline\ntime", lambda work, _: seconds(work.seconds) if timed else NONE))
    if timed:
        back.append(_Column("\nbound", lambda _, bound: bound))
    if bill.measured:
        back.append(_Column("measured\ntime", lambda work, _: seconds(work.measured_picoseconds * 1e-12)))
    if bill.measured and timed:
        back.append(_Column("times\nroofline", lambda work, _: _over_roofline(work)))
    back.append(
        _Column("% of\n" + ("time" if timed or bill.measured else "bytes"), lambda work, _: share(weight(work), whole)),
    )
    if per_million is not None and timed:
        roofline = bill.total.picoseconds
        back.append(_Column("$ / M\ntokens", lambda work, _: dollars(per_million * work.picoseconds / roofline)))
    return [*front, *_role_columns(bill, roles), *back]


def _over_roofline(work: "Work") -> str:
    return f"{digits(work.measured_picoseconds / work.picoseconds)}x" if work.picoseconds else ""


def _role_columns(bill: "Bill", room: int) -> list[_Column]:
    """A column for each role that is read or written in earnest, as far as there is room; the rest in "other"."""
    amounts = {("read", role): bill.total.hbm_read.get(role, 0) for role in ROLES}
    amounts |= {("write", role): bill.total.hbm_write.get(role, 0) for role in ROLES}
    notable = [key for key in amounts if amounts[key] > SMALL.get(key[1], SMALL_OTHER) * bill.total.hbm_bytes]
    notable.sort(key=lambda key: -amounts[key])
    if any(amounts[key] for key in amounts if key not in notable[:room]):
        notable = notable[: max(0, room - 2)]
    columns = []
    for side in ("read", "write"):
        named = [role for role in ROLES if (side, role) in notable]
        columns += [_Column(f"{side}\n{_short(role)}", _role_cell(side, (role,))) for role in named]
        rest = tuple(role for role in ROLES if role not in named)
        if any(amounts[side, role] for role in rest):
            heading = "other" if named else "bytes"
            columns.append(_Column(f"{side}\n{heading}", _role_cell(side, rest)))
    return columns


def _short(role: str) -> str:
    return {"activations": "activ.", "gradients": "grads", "optimizer": "optim.", "constants": "const."}.get(role, role)


def _role_cell(side: str, roles: tuple[str, ...]) -> Callable[["Work", str], str]:
    def cell(work: "Work", _: str) -> str:
        moved = work.hbm_read if side == "read" else work.hbm_write
        return amount(sum(moved.get(role, 0) for role in roles))

    return cell


class _Writer:
    """Collects the lines of the table; zeros are left blank but where a zero is the news."""

    def __init__(self, columns: list[_Column]):
        self.columns = columns
        self.lines: list[tuple[list[str], str] | None] = []  # cells and style; None: a rule

    def row(self, name: str, work: "Work", bound: str = "", style: str = "", zeros: bool = False) -> None:
        cells = [visible(column.cell(work, bound)) for column in self.columns]
        blank = () if zeros else ("0", "0.0%", "0 s")
        self.lines.append(([visible(name), *("" if cell in blank else cell for cell in cells)], style))

    def heading(self, text: str, style: str = "bold italic") -> None:
        self.lines.append(([visible(text)], style))

    def rule(self) -> None:
        self.lines.append(None)

    def width(self) -> int:
        """Columns of the terminal that the table takes, two between its columns."""
        rows = [line[0] for line in self.lines if line is not None]
        widest = [max(len(cells[0]) for cells in rows)]
        for n, column in enumerate(self.columns, 1):
            headings = map(len, column.heading.split("\n"))
            widest.append(max(*headings, *(len(cells[n]) for cells in rows if n < len(cells))))
        return sum(widest) + 2 * len(self.columns)

    def table(self) -> Table:
        table = _plain_table()
        table.add_column("per chip", no_wrap=True, vertical="bottom")
        for column in self.columns:
            table.add_column(column.heading, justify="right", no_wrap=True, vertical="bottom")
        for line in self.lines:
            if line is None:
                table.add_section()
            else:
                table.add_row(*map(Text, line[0]), style=line[1])  # as text, brackets and all
        return table


def _plain_table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_edge=False)


def _table(bill: "Bill", width: int) -> Table:
    """With a column for as many roles as there is room for."""
    for roles in range(2 * len(ROLES), 2, -1):
        writer = _fill(_Writer(_columns(bill, roles)), bill)
        if writer.width() <= width:
            return writer.table()
    return _fill(_Writer(_columns(bill, 2)), bill).table()


def _fill(writer: _Writer, bill: "Bill") -> _Writer:
    phases = [p for p in PHASES if any(row.phase == p for row in bill.rows)]
    for phase in phases:
        if len(phases) > 1:
            writer.heading(phase)
        _phase(writer, [row for row in bill.rows if row.phase == phase], "  " if len(phases) > 1 else "")
        writer.rule()
    writer.row("unattributed", bill.unattributed, bill.unattributed_bound if bill.unattributed else "", zeros=True)
    writer.rule()
    chips = bill.program.get("chips") or 1
    writer.row("total" + (", per chip" if chips > 1 else ""), bill.total, style="bold", zeros=True)
    if chips > 1:
        writer.row(f"total, {chips} chips", _all_chips(bill.total, chips), zeros=True)
    writer.rule()
    writer.heading("of that")
    for name in GROUPS:
        writer.row("  " + name, bill.group(name), zeros=name != "other")
    for name in TAXES:
        if work := bill.tax(name):
            writer.row(f"  tax: {name}", work, style="yellow")
    return writer


# Behind a component that most of the row's work has from elsewhere than names that were written for it.
_MARKS = {"argument": "\u2020", "inferred": "*"}
_MARKED = {
    "argument": "told by the name of the argument that is read",
    "inferred": "told by the dataflow's shape alone",
}


def _phase(writer: _Writer, rows: "Iterable[Row]", indent: str) -> None:
    """A line a component, its taxes below it."""
    last = None
    for row in rows:
        if row.tax is None:
            writer.row(f"{indent}{row.component} {_MARKS.get(row.source, '')}".rstrip(), row.work, row.bound)
        else:
            if row.component != last:
                writer.heading(indent + row.component, style="")
            writer.row(f"{indent}  tax: {row.tax}", row.work, row.bound, style="yellow")
        last = row.component


def _all_chips(work: "Work", chips: int) -> "Work":
    """The work of all chips, who do it at the same time: seconds stay."""
    total = work - work
    total.add(work, chips)
    total.picoseconds, total.measured_picoseconds = work.picoseconds, work.measured_picoseconds
    return total


# --- above and below the table -------------------------------------------------------------------------------------


def title(bill: "Bill") -> str:
    """What was billed, in one line."""
    program = bill.program
    if "of" in program:
        return "stepbill of two programs"
    parts = [str(program.get("model") or "program")]
    if count := program.get("parameters"):
        parts[0] += f" ({parameters(count)})"
    if step := program.get("step"):
        parts.append(str(step))
    if batch := program.get("batch"):
        mesh = program.get("mesh") or {}
        shards = mesh.get("data", 1) * mesh.get("expert", 1)
        parts.append(f"batch {batch}" + (f" ({batch // shards} a data shard)" if shards > 1 else ""))
    if context := program.get("context"):
        parts.append(f"context {context}")
    if tokens := program.get("tokens"):
        parts.append(f"{tokens} tokens")
    chips = program.get("chips") or 1
    where = str(program.get("target", "?"))
    mesh = ",".join(f"{axis}={size}" for axis, size in (program.get("mesh") or {}).items())
    parts.append(where if chips == 1 else f"{chips} x {where}" + (f" ({mesh})" if mesh else ""))
    return " · ".join(parts)


def _lines(bill: "Bill") -> list[tuple[str, str]]:
    """(name, what is to be said) below the table."""
    lines = [("unknown", _unknown(bill)), ("ideal", _ideal(bill)), *_reconcile(bill)]
    if on_chip := _on_chip(bill):
        lines.append(("on chip", on_chip))
    if again := _reread(bill):
        lines.append(("read again", again))
    if memory := _memory(bill):
        lines.append(("memory", memory))
    lines.append(("price", _price(bill)))
    if bill.predicted:
        lines.append(("predicted", _predicted(bill)))
    if bill.measured:
        lines.append(("measured", _measured(bill.measured, bill.program.get("target") == "host")))
    return lines


def _unknown(bill: "Bill") -> str:
    if not bill.unknown:
        return "0 instructions: every one had a cost rule"
    least = sum(u.hbm_bytes_at_least for u in bill.unknown)
    said: dict[str, int] = {}
    for unknown in bill.unknown:
        said[unknown.reason] = said.get(unknown.reason, 0) + 1
    reasons = "; ".join(f"{count} x {reason}" if count > 1 else reason for reason, count in said.items())
    return f"{len(bill.unknown)} instructions, of at least {amount(least, 'B')}: {reasons}"


def _ideal(bill: "Bill") -> str:
    parts = []
    if bill.ideal_flops is not None:
        over = ratio(bill.total.matmul, bill.ideal_flops)
        parts.append(f"{amount(bill.ideal_flops, 'FLOP', 4)} of matmul (total/ideal {over})")
    if bill.ideal_hbm_bytes is not None:
        over = ratio(bill.total.hbm_bytes, bill.ideal_hbm_bytes)
        parts.append(f"{amount(bill.ideal_hbm_bytes, 'B', 4)} of {_memory_name(bill)} traffic (total/ideal {over})")
    return "; ".join(parts) or "not known for this program"


def _on_chip(bill: "Bill") -> str:
    """What kernels ask for, where that is more than what reaches HBM."""
    asked = bill.total.requested_bytes
    served = asked - bill.total.hbm_bytes
    if served <= NEGLIGIBLE * asked:
        return ""
    chip = CHIPS.get(str(bill.program.get("target")))
    holds = capacity(chip) if chip else 0
    by = "the L2 is taken to serve" if holds else "memory on the chip serves"
    text = f"requested {amount(asked, 'B')}, of which {by} {amount(served, 'B')}"
    return text + (f" (assumed: it holds the latest {amount(holds, 'B')} that were touched)" if holds else "")


def _reread(bill: "Bill") -> str:
    """What products read again, where that is much beside what is counted."""
    again, hbm = bill.total.reread_bytes, bill.total.hbm_bytes
    if again <= NEGLIGIBLE * hbm:
        return ""
    more = f"{amount(again, 'B')} beside the HBM bytes above ({again / hbm:.0%} of them)"
    return f"{more}: operands of large products and attention, which no cache holds (assumed: in waves)"


def _predicted(bill: "Bill") -> str:
    """How long it will take, and by what rates."""
    facts, whole = bill.predicted or {}, bill.total.predicted_picoseconds * 1e-12
    text = f"{seconds(whole)}: {facts['kernels']:,} kernels one after the other, {seconds(facts['launch_seconds'])} "
    if of := facts["measured_on"]:
        return text + f"to launch each, at the rates that were measured on {of['device']} on {of['date'][:10]}"
    return text + "to launch each, at the peaks of the datasheet"


def _measured(facts: Mapping[str, Any], on_host: bool) -> str:
    """How it was timed and how fast it was; what of the traced time is busy, idle and named."""
    traced = f"{seconds(facts['traced_median_seconds'])} on the device ({_each(facts['traced_seconds'])})"
    if clock := facts["traced_clock_median_seconds"]:
        traced += f", {seconds(clock)} by the clock"
    text = f"{facts['device']}; {facts['how']}\n"
    if untraced := facts["untraced_seconds"]:
        text += f"untraced {seconds(facts['untraced_median_seconds'])} an execution ({_each(untraced)}); "
    text += f"traced {traced}"
    gaps, busy = facts["gaps"], facts["busy_seconds"]
    text += f"\nbusy {seconds(busy)}, idle {seconds(facts['idle_seconds'])} in {gaps['count']} gaps, the largest "
    text += seconds(gaps["largest_seconds"])
    if loops := facts["loop_seconds"]:
        text += f"; {seconds(loops)} of it inside loops, where nothing ran"
    text += (
        f"\nnamed {_percent(facts['coverage'])} of busy time; {_percent(facts['joined'])} is of the HLO's instructions"
    )
    if unjoined := facts["unjoined"]:
        text += f", not {', '.join([*unjoined][:LARGEST_SHOWN])}{', ...' if len(unjoined) > LARGEST_SHOWN else ''}"
    rates = f"{amount(facts['flops_per_second'], 'FLOP/s')} of matmul, {amount(facts['hbm_bytes_per_second'], 'B/s')}"
    known = on_host and facts["mfu"] is not None
    peaks = "the highest rates that were measured on it" if known else "the chip's peaks"
    text += f"\n{rates}; MFU {_percent(facts['mfu'])}, MBU {_percent(facts['mbu'])} of {peaks}"
    return f"{text}\n{facts['split']}"


def _each(times: Sequence[float]) -> str:
    """`of 3: 1.20 ms to 1.31 ms`."""
    return f"of {len(times)}: {seconds(min(times))} to {seconds(max(times))}"


def _percent(part: float | None) -> str:
    return NONE if part is None else f"{part:.1%}"


def _memory_name(bill: "Bill") -> str:
    return "memory" if bill.program.get("target") == "host" else "HBM"


_HELD_AGAINST = {
    "matmul_flops": "matmul ",
    "ideal_flops": "of it useful ",
    "weights_bytes": "weights ",
    "cache_bytes": "cache ",
}


def _reconcile(bill: "Bill") -> list[tuple[str, str]]:
    lines = []
    for name, totals, key in (("closed form", bill.closed_form, _closed_form_key), ("XLA counts", bill.xla, _xla_key)):
        if totals is None:
            continue
        said = [f"{_HELD_AGAINST.get(what, '')}{amount(total, _unit(what), 4)}" for what, total in totals.items()]
        differences = [(d, totals.get(key(str(d["quantity"])) or "")) for d in bill.differences]
        lines.append(
            (name, ", ".join(said) + _differences([(d, total) for d, total in differences if total is not None]))
        )
    return lines


def _unit(quantity: str) -> str:
    return "FLOP" if "flops" in quantity else "B"


def _closed_form_key(quantity: str) -> str | None:
    """weights_read_bytes -> weights_bytes: what a difference is a difference of."""
    return None if quantity.startswith("xla_") else quantity.replace("_read", "").replace("_write", "")


def _xla_key(quantity: str) -> str | None:
    return quantity.removeprefix("xla_") if quantity.startswith("xla_") else None


def _differences(found: list[tuple[dict[str, Any], int]]) -> str:
    """What the bill has more (+) or less (-), a line each, but for what is too small to matter: the sum of those."""
    left = [one for one, _ in found if one["reason"] == UNEXPLAINED]
    proof = ", explained to the last unit" if left and not any(one["amount"] for one in left) else ""
    shown, small = [], {}
    for one, total in found:
        quantity, by = str(one["quantity"]), one["amount"]
        if abs(by) > NEGLIGIBLE * total or (by and one["reason"] == UNEXPLAINED and quantity.startswith("xla_")):
            shown.append(f"{_difference(quantity, by)}: {one['reason']}")
        elif by:
            count, sum_of_small = small.get(quantity, (0, 0))
            small[quantity] = count + 1, sum_of_small + by
    if not shown:
        return f"; the bill agrees{' within ' + format(NEGLIGIBLE, '.1%') if small else ' exactly'}{proof}"
    for quantity, (count, by) in small.items():
        shown.append(f"{_difference(quantity, by)}: {count} smaller reason{'s' * (count > 1)}")
    return f"{proof}; the bill has\n  " + "\n  ".join(shown)


def _difference(quantity: str, by: int) -> str:
    """`weights read +400 MB`."""
    name = quantity.removeprefix("xla_").replace("ideal", "useful").removesuffix("_bytes").removesuffix("_flops")
    sign = "+" if by > 0 else "-"
    return f"{name.replace('_', ' ').replace('flops', 'FLOPs')} {sign}{amount(abs(by), _unit(quantity))}"


def _memory(bill: "Bill") -> str:
    memory = bill.memory
    peak = memory.get("peak_bytes")
    if peak is None:
        return ""
    capacity = memory.get("capacity_bytes")
    text = f"peak {amount(peak, 'B', 4)}"
    if capacity:
        text += f" of {amount(capacity, 'B', 4)} ({share(peak, capacity)})"
    roles = memory.get("by_role")
    if roles is None:
        roles = {name: memory[name] for name in memory if not name.endswith("_bytes")}
    parts = [f"{name} {amount(size, 'B')}" for name, size in roles.items() if size]
    text += " by the schedule" if memory.get("plan") == "schedule" else ""
    text += ": " + ", ".join(parts) if parts else ""
    if at := memory.get("peak_at"):
        text += f"\nfullest in {at['instruction']} ({row_name(at['component'], at['phase'])})"
    if largest := memory.get("largest", [])[:LARGEST_SHOWN]:
        said = (f"{one['name']} {one['shape']} {amount(one['bytes'], 'B')}" for one in largest)
        text += f"\nlargest: {', '.join(said)}"
    return text


def _price(bill: "Bill") -> str:
    price = bill.price
    if not bill.total.picoseconds:
        return f"{NONE} (no peaks and no price are known for {bill.program.get('target', 'this target')})"
    took = f"{seconds(bill.total.seconds, 4)} at the roofline"
    if (rate := price.get("tokens_per_second")) is not None:
        took += f", {rate:,.0f} tokens/s" if rate >= 100 else f", {digits(rate)} tokens/s"
    unit, per_million = "tokens", price.get("dollars_per_million_tokens")
    if per_million is None and (a_run := price.get("dollars_per_run")) is not None:
        unit, per_million = "runs", a_run * 1e6
    if per_million is None:
        return took + "; no price is known"
    hourly = price.get("chip_dollars_per_hour") or 0.0
    chips = bill.program.get("chips") or 1
    each = " each" if chips > 1 else ""
    cost = "under $0.0001" if per_million < 1e-4 else f"${dollars(per_million)}"
    return f"{cost} per million {unit}: {took}, at ${hourly:.2f} a chip-hour{each}"


def renderable(bill: "Bill", width: int = WIDTH) -> RenderableType:
    """The whole bill, for a rich console."""
    head = _text(title(bill), "bold cyan")
    sources = {row.source for row in bill.rows}
    marked = [f"{mark} {_MARKED[source]}" for source, mark in _MARKS.items() if source in sources]
    said = [_text(note, "dim") for note in (*bill.notes, *marked)]
    below = Table.grid(padding=(0, 2))
    below.add_column(style="bold", no_wrap=True)
    below.add_column()
    for name, text in _lines(bill):
        below.add_row(name, _text(text))
    return Group(head, *said, Text(), _table(bill, width), Text(), below)


def _text(text: str, style: str = "") -> Text:
    """What may quote somebody else's program, harmless to print; its lines stay lines."""
    return Text("\n".join(map(visible, text.split("\n"))), style=style)


def to_text(bill: "Bill", width: int | None = None, color: bool = False) -> str:
    """The whole bill as text, `width` columns wide (120 if None), with terminal colours if asked."""
    width = width or WIDTH
    return _printed(renderable(bill, width), width, color)


def _printed(what: RenderableType, width: int, color: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=color, no_color=not color, highlight=False, emoji=False)
    console.print(what)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def side_by_side(bills: Mapping[str, "Bill"]) -> Table:
    """Several bills in short: a line a component, all phases and taxes together."""
    table = _plain_table()
    table.add_column("", no_wrap=True)
    for name, bill in bills.items():
        for heading in (f"{name}\nmatmul FLOPs", "memory\nbytes", "measured\ntime" if bill.measured else "% of\nbytes"):
            table.add_column(_text(heading), justify="right", no_wrap=True, vertical="bottom")

    def row(name: str, works: "Iterable[Work]", style: str = "") -> None:
        cells = []
        for work, bill in zip(works, bills.values(), strict=True):
            last = share(work.hbm_bytes, bill.total.hbm_bytes)
            if bill.measured:
                last = seconds(work.measured_picoseconds * 1e-12)
            cells += [amount(work.matmul), amount(work.hbm_bytes), last]
        table.add_row(_text(name), *("" if cell in ("0", "0.0%", "0 s") else cell for cell in cells), style=style)

    components = dict.fromkeys(row.component for bill in bills.values() for row in bill.rows)
    for component in sorted(components, key=lambda name: COMPONENTS.index(name) if name in COMPONENTS else 99):
        row(component, (bill.component(component) for bill in bills.values()))
    row("unattributed", (bill.unattributed for bill in bills.values()))
    table.add_section()
    row("total", (bill.total for bill in bills.values()), "bold")
    table.add_section()
    for name in GROUPS:
        row(f"  {name}", (bill.group(name) for bill in bills.values()))
    for name in TAXES:
        if any(bill.tax(name) for bill in bills.values()):
            row(f"  tax: {name}", (bill.tax(name) for bill in bills.values()), "yellow")
    return table


# --- bills compared ------------------------------------------------------------------------------------------------


def comparison(compared: "Comparison") -> RenderableType:
    """What each bill has of each row and by how much that is more than the first's, what differs most first."""
    titles = {name: title(bill) for name, bill in compared.bills.items()}
    if len(set(titles.values())) == 1:
        head = [_text(next(iter(titles.values())), "bold cyan")]
    else:
        head = [_text(f"{name}: {text}", "bold cyan") for name, text in titles.items()]
    notes = dict.fromkeys(note for bill in compared.bills.values() for note in bill.notes)
    return Group(*head, *(_text(note, "dim") for note in notes), Text(), _compared(compared))


def comparison_text(compared: "Comparison") -> str:
    """The same as text, as wide as it has to be."""
    what = comparison(compared)
    return _printed(what, max(WIDTH, Console(width=1 << 16).measure(_compared(compared)).maximum))


def _compared(compared: "Comparison") -> Table:
    bills = list(compared.bills.values())
    timed = compared.timed
    table = _plain_table()
    table.add_column(("roofline time" if timed else f"{_memory_name(bills[0])} bytes") + ", per chip", no_wrap=True)
    for n, name in enumerate(compared.bills):
        table.add_column(_text(name), justify="right", vertical="bottom")
        if n:
            table.add_column("change", justify="right", no_wrap=True, vertical="bottom")

    def row(name: str, values: Sequence[float | None], form: Callable[[float | None], str], style: str = "") -> None:
        cells = [form(values[0])]
        for value in values[1:]:
            cells += [form(value), _change(values[0], value)]
        table.add_row(_text(name), *cells, style=style)

    def works(name: str, works: "Sequence[Work]", style: str = "") -> None:
        row(name, [work.seconds if timed else work.hbm_bytes for work in works], seconds if timed else amount, style)

    lines = compared.lines
    for line in lines:
        if line.differs:
            works(row_name(line.component, line.phase, line.tax), line.works, "yellow" if line.tax else "")
    if alike := [line.works[0] for line in lines if not line.differs and line.works[0]]:
        works(f"alike: {len(alike)}", [sum(alike, type(alike[0])())] * len(bills), "dim")
    table.add_section()
    works("total", [bill.total for bill in bills], "bold")
    table.add_section()
    for name, form, of in _TOTALS:
        values = [of(bill) for bill in bills]
        if any(values):
            row(name, values, form)
    return table


def row_name(component: str | None, phase: str = "forward", tax: str | None = None) -> str:
    """`attention/core backward, tax: layout`; without a component, `unattributed`."""
    return (
        (component or "unattributed") + (f" {phase}" if phase != "forward" else "") + (f", tax: {tax}" if tax else "")
    )


def _change(before: float | None, after: float | None) -> str:
    """"-48.0%"; "" where nothing changed or nothing is known, "new" where there was nothing."""  # fmt: skip
    if before is None or after is None or before == after:
        return ""
    if not before:
        return "new"
    change = after / before - 1
    return f"{change:+.1%}" if abs(change) >= 0.0005 else "<0.1%"


_TOTALS: tuple[tuple[str, Callable[[float | None], str], "Callable[[Bill], float | None]"], ...] = (
    ("matmul FLOPs", amount, lambda bill: bill.total.matmul),
    ("other FLOPs", amount, lambda bill: bill.total.elementwise + bill.total.transcendental),
    ("HBM bytes", amount, lambda bill: bill.total.hbm_bytes),
    *((f"tax: {tax}, bytes", amount, lambda bill, tax=tax: bill.tax(tax).hbm_bytes) for tax in TAXES),
    ("link bytes", amount, lambda bill: bill.total.link_bytes),
    ("host link bytes", amount, lambda bill: bill.total.host_link_bytes),
    ("peak memory, bytes", amount, lambda bill: bill.memory.get("peak_bytes")),
    ("total/ideal bytes", lambda value: NONE if value is None else f"{value:.2f}x", lambda bill: bill.efficiency),
    ("measured, untraced", seconds, lambda bill: (bill.measured or {}).get("untraced_median_seconds")),
    ("tokens/s at the roofline", amount, lambda bill: bill.price.get("tokens_per_second")),
    ("$ / M tokens, likewise", dollars, lambda bill: bill.price.get("dollars_per_million_tokens")),
)


# --- CSV -----------------------------------------------------------------------------------------------------------

CSV_COLUMNS = (
    *("component", "phase", "tax", "matmul_flops", "elementwise_flops", "transcendental_flops"),
    *(f"hbm_read_{role}_bytes" for role in ROLES),
    *(f"hbm_write_{role}_bytes" for role in ROLES),
    *("link_bytes", "host_link_bytes", "roofline_picoseconds", "measured_picoseconds", "bound"),
)


def to_csv(bill: "Bill") -> str:
    """One line a row, then `unattributed` and `total`; exact integers, per chip."""
    rows = [_csv_line(row.component, row.phase, row.tax, row.work, row.bound) for row in bill.rows]
    rows.append(_csv_line("unattributed", "", None, bill.unattributed, bill.unattributed_bound))
    return _csv([CSV_COLUMNS, *rows, _csv_line("total", "", None, bill.total, "")])


def comparison_csv(compared: "Comparison") -> str:
    """For each row, those that differ most first, a line a bill; then the totals. Exact integers, per chip."""
    names, columns = list(compared.bills), CSV_COLUMNS[:-1]  # what bounds a row is of one bill
    lines: list[Sequence[Any]] = [("bill", *columns)]
    for line in compared.lines:
        named = (line.component, line.phase) if line.component else ("unattributed", "")
        lines += [[name, *_csv_line(*named, line.tax, work)] for name, work in zip(names, line.works, strict=True)]
    return _csv([*lines, *([name, *_csv_line("total", "", None, bill.total)] for name, bill in compared.bills.items())])


def _csv_line(component: str, phase: str, tax: str | None, work: "Work", *bound: str) -> list[Any]:
    reads, writes = ([side.get(role, 0) for role in ROLES] for side in (work.hbm_read, work.hbm_write))
    flops = (work.matmul, work.elementwise, work.transcendental)
    links = work.link_bytes, work.host_link_bytes
    times = work.picoseconds, work.measured_picoseconds
    return [component, phase, tax or "", *flops, *reads, *writes, *links, *times, *bound]


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    harmless = ([visible(cell) if isinstance(cell, str) else cell for cell in line] for line in lines)
    csv.writer(out, lineterminator="\n").writerows(harmless)
    return out.getvalue()


def columns(rows: Sequence[Mapping[str, Any]], separated: str | None = None) -> str:
    """Rows with the same keys as lines of text: aligned under their names, or with a separator between."""
    names = list(rows[0])
    cells = [
        names,
        *([f"{row[name]:,}" if isinstance(row[name], int) else str(row[name]) for name in names] for row in rows),
    ]
    if separated is not None:
        out = io.StringIO()
        csv.writer(out, delimiter=separated, lineterminator="\n").writerows(
            [names, *([row[n] for n in names] for row in rows)]
        )
        return out.getvalue()
    widths = [max(len(line[n]) for line in cells) for n in range(len(names))]
    right = [isinstance(rows[0][name], int) for name in names]
    return "".join(
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        + "\n"
        for line in cells
    )
