"""Ink: numbers in engineering units, a table that fits its width, and CSV that loses nothing."""

import csv
import io
import json
import re

import pytest
from rich.console import Console
from stepbill.profiling import render
from stepbill.profiling.attribution import ROLES
from stepbill.profiling.bill import Bill, Row, Unknown, Work
from stepbill.profiling.chips import chip
from stepbill.profiling.compare import Comparison
from stepbill.profiling.hlo import HloError
from stepbill.profiling.walk import itemize_text


@pytest.mark.parametrize(
    "value,text",
    [
        *((0, "0"), (1, "1"), (7, "7"), (999, "999"), (1000, "1.00 k"), (1234, "1.23 k"), (999_499, "999 k")),
        *(
            (999_500, "1.00 M"),
            (805_306_368, "805 M"),
            (16_060_522_496, "16.1 G"),
            (1.5e12, "1.50 T"),
            (2e15, "2.00 P"),
        ),
        *((4.7e18, "4.70 E"), (0.25, "0.250"), (-2048, "-2.05 k"), (None, "-")),
    ],
)
def test_amounts_have_three_digits_and_a_prefix(value, text):
    assert render.amount(value) == text


def test_amounts_with_a_unit():
    assert render.amount(805_306_368, "B") == "805 MB"
    assert render.amount(12, "FLOP") == "12 FLOP"
    assert render.amount(16_060_522_496, "B", 4) == "16.06 GB"


@pytest.mark.parametrize(
    "value,text",
    [
        (1.5, "1.50 s"),
        (0.00123, "1.23 ms"),
        (9.28e-7, "928 ns"),
        (3e-13, "0.300 ps"),
        (0.0, "0 s"),
        (None, "-"),
        (61, "61.0 s"),
    ],
)
def test_seconds(value, text):
    assert render.seconds(value) == text


def test_shares_and_dollars_never_round_something_to_nothing():
    assert [render.share(part, 1000) for part in (0, 0.1, 1, 123, 1000)] == ["0.0%", "<0.1%", "0.1%", "12.3%", "100.0%"]
    assert render.share(1, 0) == "-"
    values = (None, 0, 5e-5, 0.00123, 0.513, 12.34)
    assert [render.dollars(value) for value in values] == ["-", "0", "<0.0001", "0.00123", "0.513", "12.3"]


def test_parameters_in_words():
    assert render.parameters(8_030_261_248) == "8.030 billion parameters"
    assert render.parameters(9_540_096) == "9.540 million parameters"
    assert render.parameters(12) == "12 parameters"


def a_bill(target: str = "h200", chips: int = 1, phases: tuple[str, ...] = ("forward",), **total: int) -> Bill:
    """Every component, phase and role that a wide table can have."""
    rows, whole = [], Work()
    timed = 0 if target == "host" else 1_234_567_890
    for phase in phases:
        for n, component in enumerate(("embed", "attention/qkv", "attention/core", "mlp/up", "logits"), 1):
            for tax in (None, "layout"):
                traffic = dict.fromkeys(ROLES, 987654321 * n)
                work = Work(123_456_789 * n, 98_765 * n, 11 * n, traffic, dict(traffic), 55_555_555 * n, timed * n)
                rows.append(Row(component, phase, tax, work, "compute"))
                whole.add(work)
    program = {"model": "a", "parameters": 8_030_261_248, "step": "train", "batch": 8, "context": 4096}
    program |= {"target": target, "chips": chips, "mesh": {"data": chips} if chips > 1 else {}}
    bill = Bill(program, rows, Work(), [], whole, ideal_flops=1_000_000, ideal_hbm_bytes=2_000_000)
    if timed:
        bill.price = {"chip_dollars_per_hour": 3.5, "dollars_per_million_tokens": 0.25, "tokens_per_second": 12_345.6}
    bill.check()
    return bill


@pytest.mark.parametrize("width", [100, 120, 200])
@pytest.mark.parametrize("phases", [("forward",), render.PHASES])
@pytest.mark.parametrize("chips", [1, 8])
def test_no_line_is_wider_than_asked_and_none_is_cut(width, phases, chips):
    text = render.to_text(a_bill(chips=chips, phases=phases), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert text == "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_what_is_zero_but_matters_is_printed():
    lines = render.to_text(a_bill()).splitlines()
    (unattributed,) = [line for line in lines if line.startswith("unattributed")]
    assert set(unattributed.split()[1:]) == {"0", "s", "0.0%"}
    (unknown,) = [line for line in lines if line.startswith("unknown")]
    assert unknown.split(maxsplit=1)[1] == "0 instructions: every one had a cost rule"


def test_unknown_instructions_are_counted_by_reason():
    bill = a_bill()
    bill.unknown = [Unknown(f"c.{n}", "no rule for custom call magic", 1_000_000) for n in range(3)]
    assert "3 instructions, of at least 3.00 MB: 3 x no rule for custom call magic" in render.to_text(bill)


def test_phases_are_named_only_where_there_is_more_than_one():
    assert not any(line.strip() == "forward" for line in render.to_text(a_bill()).splitlines())
    lines = [line.strip() for line in render.to_text(a_bill(phases=("forward", "backward"))).splitlines()]
    assert lines.index("forward") < lines.index("backward") < lines.index("of that")


def test_all_chips_do_as_many_times_the_work_in_the_same_time():
    text = render.to_text(a_bill(chips=8))
    (one,) = [line for line in text.splitlines() if line.startswith("total, per chip")]
    (every,) = [line for line in text.splitlines() if line.startswith("total, 8 chips")]
    assert "3.70 G" in one and "29.6 G" in every
    assert "37.0 ms" in one and "37.0 ms" in every
    assert "8 x h200 (data=8)" in text and "batch 8 (1 a data shard)" in text


def test_a_host_has_no_times_and_no_price():
    text = render.to_text(a_bill("host"))
    (total,) = [line for line in text.splitlines() if line.startswith("total ")]
    assert " - " in total and "$" not in total and "bound" not in text
    assert "no peaks and no price are known for host" in text
    assert "0 s" not in text


def test_differences_that_matter_have_a_line_each():
    bill = a_bill()
    bill.closed_form = {"matmul_flops": 1_000_000, "weights_bytes": 5_000}
    assert "matmul 1.000 MFLOP, weights 5.000 kB; the bill agrees exactly" in render.to_text(bill)
    bill.differences = [{"quantity": "matmul_flops", "amount": 7, "reason": "nobody knows"}]
    assert "; the bill agrees within 0.1%" in render.to_text(bill)
    bill.differences.append({"quantity": "weights_read_bytes", "amount": -2_000, "reason": "tax: slice"})
    bill.differences.append({"quantity": "xla_flops", "amount": 9_000, "reason": "loops once"})
    bill.xla = {"flops": 2_000_000}
    text = render.to_text(bill)
    assert "; the bill has" in text and "weights read -2.00 kB: tax: slice" in text and "nobody knows" not in text
    assert "FLOPs +9.00 kFLOP: loops once" in text and "matmul +7 FLOP: 1 smaller reason" in text


def test_what_is_unexplained_is_shown_however_small():
    bill = a_bill()
    bill.xla = {"flops": 2_000_000, "bytes": 300}
    bill.differences = [
        {"quantity": "xla_flops", "amount": 900_000, "reason": "loops once"},
        {"quantity": "xla_flops", "amount": 0, "reason": "unexplained"},
        {"quantity": "xla_bytes", "amount": 0, "reason": "unexplained"},
    ]
    assert "XLA counts  2.000 MFLOP, 300 B, explained to the last unit; the bill has" in render.to_text(bill)
    bill.differences[2]["amount"] = -1
    text = render.to_text(bill)
    assert "bytes -1 B: unexplained" in text and "to the last unit" not in text


def test_csv_has_every_integer():
    bill = a_bill(phases=render.PHASES)
    lines = list(csv.DictReader(io.StringIO(render.to_csv(bill))))
    assert tuple(lines[0]) == render.CSV_COLUMNS
    assert len(lines) == len(bill.rows) + 2
    for line, row in zip(lines, bill.rows, strict=False):
        assert (line["component"], line["phase"], line["tax"] or None) == (row.component, row.phase, row.tax)
        assert int(line["matmul_flops"]) == row.work.matmul
        assert int(line["hbm_write_cache_bytes"]) == row.work.hbm_write["cache"]
        assert int(line["roofline_picoseconds"]) == row.work.picoseconds
    assert int(lines[-1]["link_bytes"]) == bill.total.link_bytes


def test_a_bill_prints_as_its_table():
    bill = a_bill()
    assert str(bill) == render.to_text(bill)
    assert "\x1b[" in render.to_text(bill, color=True) and "\x1b[" not in str(bill)


def test_a_program_that_holds_nothing():
    bill = a_bill()
    bill.memory = {"peak_bytes": 0, "by_role": {}, "plan": "schedule", "peak_at": None, "largest": []}
    assert re.search(r"^memory +peak 0 B by the schedule$", render.to_text(bill), re.M)


# --- names of somebody else's program ------------------------------------------------------------------------------

EVIL = "\x1b]0;gone\x07\x1b[31m<script>alert(1)</script>[red]a[/red]\u202e\x9b2J\r\x00"


def an_evil_bill() -> Bill:
    """Wherever a bill quotes a program or its arguments, the quotation is hostile."""
    bill = a_bill(chips=2)
    bill.program |= {"model": EVIL, "step": EVIL, "mesh": {EVIL: 2}}
    work = Work(7, 7, 7, {"weights": 1 << 40}, {"weights": 1 << 40})
    bill.rows.append(Row(EVIL, "forward", None, work, EVIL))
    bill.rows.append(Row("mlp/" + EVIL, "forward", "layout", Work(), "hbm"))
    bill.total.add(work)
    bill.unknown = [Unknown(EVIL, f"no rule for custom call {EVIL}", 7)]
    bill.notes = [EVIL]
    bill.differences = [{"quantity": f"xla_flops{EVIL}", "amount": 1 << 60, "reason": EVIL}]
    bill.differences.append({"quantity": "xla_flops", "amount": 1 << 60, "reason": EVIL})
    bill.xla = {"flops": 1, EVIL: 2}
    bill.memory = {"peak_bytes": 7, "capacity_bytes": 9, EVIL: 5}
    bill.check()
    return bill


def obeyed(text: str) -> set[str]:
    """Characters that a terminal obeys and does not show."""
    return {char for char in text.replace("\n", "") if not char.isprintable()}


def test_hostile_names_are_printed_and_not_obeyed():
    text = str(an_evil_bill())
    assert not obeyed(text)
    assert r"\x1b[31m<script>alert(1)</script>[red]a[/red]\u202e\x9b2J" in text


def test_hostile_names_in_colour_add_nothing_to_the_colours():
    tame = re.compile(r"\x1b\[[\d;]*m")  # colours, as rich writes them
    text = render.to_text(an_evil_bill(), color=True, width=500)
    assert not obeyed(tame.sub("", text))
    assert r"\x1b[31m<script>" in text and "\x1b[31m<script>" not in text


def test_hostile_names_in_csv_and_json():
    bill = an_evil_bill()
    text = render.to_csv(bill)
    assert not obeyed(text)
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == len(bill.rows) + 2
    assert not obeyed(bill.dumps())
    assert Bill.from_json(json.loads(bill.dumps())).rows[-2].component == EVIL


def test_hostile_names_side_by_side_and_compared():
    compared = Comparison({"a": an_evil_bill(), EVIL: a_bill(chips=2)})
    assert not obeyed(render.comparison_text(compared))
    assert not obeyed(render.comparison_csv(compared))
    out = io.StringIO()
    Console(file=out, width=400).print(render.side_by_side({EVIL: an_evil_bill(), "b": a_bill()}))
    assert not obeyed(out.getvalue()) and "[red]" in out.getvalue()


@pytest.mark.parametrize(
    "where", ["opcode", "custom call", "op_name", "parameter", "instruction", "module", "computation"]
)
def test_hostile_names_in_a_program(where):
    name = {at: EVIL.replace("\r", "").replace("\x00", "") if at == where else "x" for at in (
        "opcode", "custom call", "op_name", "parameter", "instruction", "module", "computation")}  # fmt: skip
    text = f"""HloModule {name["module"]}

ENTRY %{name["computation"]} () -> f32[] {{
  %p = f32[8]{{0}} parameter(0), metadata={{op_name="{name["parameter"]}"}}
  %{name["instruction"]} = f32[8]{{0}} {name["opcode"]}(%p), metadata={{op_name="{name["op_name"]}"}}
  ROOT %r = f32[8]{{0}} custom-call(%p), custom_call_target="{name["custom call"]}"
}}
"""
    try:
        bill = itemize_text(text, chip("h200"))
    except HloError as error:
        assert where in ("opcode", "instruction", "computation") and not obeyed(str(error))
        return
    assert not obeyed(str(bill)) and not obeyed(render.to_csv(bill)) and not obeyed(bill.dumps())
