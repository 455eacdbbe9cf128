"""Bills side by side: saved and read again, ranked by what changed, in every form, and what is refused."""

import copy
import csv
import io
import json
import re
from collections import Counter

import capture
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.profiling import Bill, Row, Work, render, targets
from stepbill.profiling.attribution import ROLES
from stepbill.profiling.compare import Comparison
from stepbill.profiling.walk import itemize_text

TINY = ("--num_layers=2", "--width=64", "--heads=4", "--kv_heads=2", "--mlp_width=128", "--context=32")


def captured(name: str) -> Bill:
    bill = itemize_text(capture.read(name), targets.chip(capture.PROGRAMS[name][1]))
    bill.program |= {"model": name, "batch": 8, "mesh": {"data": 2}}
    bill.price = {"dollars_per_million_tokens": 0.25, "tokens_per_second": 64.5}
    bill.memory = {"peak_bytes": 1 << 40, "weights": None}
    bill.differences.append({"quantity": "matmul_flops", "amount": -3, "reason": "none"})
    bill.notes.append("read from a dump")
    return bill


# --- saved bills ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", capture.PROGRAMS)
def test_a_bill_read_again_is_the_bill_that_was_saved(name):
    bill = captured(name)
    again = Bill.from_json(json.loads(bill.dumps()))
    assert again.dumps() == bill.dumps()
    assert str(again) == str(bill) and again.total == bill.total and again.timed is bill.timed


def test_time_is_exact_however_long_and_is_read_of_a_bill_that_has_only_seconds():
    long = Work(picoseconds=10**18 + 1)
    assert Work.from_json(long.to_json()) == long
    old = Work(picoseconds=123_456_789).to_json()
    del old["roofline_picoseconds"]
    assert Work.from_json(old).picoseconds == 123_456_789


@pytest.mark.parametrize(
    "path,value,reason",
    [
        (("schema",), 2, "schema is 2; it must be 1"),
        (("rows",), None, ".*not iterable"),
        (("total", "link_bytes"), 5, "the bill does not add up: .*"),
        (("total", "flops", "matmul"), 1.5, "1.5 must be a whole number"),
        (("total", "flops", "matmul"), True, "True must be a whole number"),
        (("total", "flops", "matmul"), 10**400, "1000+ must be a whole number"),
        (("rows", 0, "component"), 7, "7 must be text"),
        (("price", "tokens_per_second"), float("nan"), "nan must be a number"),
        (("memory", "peak_bytes"), "much", "'much' must be a number"),
        (("program", "batch"), "many", "'many' must be a whole number"),
    ],
)
def test_what_is_no_bill_is_told_why(path, value, reason):
    saved = captured("decode-h200").to_json()
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValueError, match=f"^{reason}$"):
        Bill.from_json(saved)


GARBLED = captured("decode-h200").to_json()
GARBLED["rows"] = [next(row for row in GARBLED["rows"] if row["component"] == "mlp/up")]
GARBLED["unattributed"] = Work().to_json() | {"bound": "latency"}
GARBLED["total"] = Work.from_json(GARBLED["rows"][0]).to_json()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_garbled_bill_is_refused_or_can_be_shown(data):
    saved = copy.deepcopy(GARBLED)
    inner = saved
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(inner[key], dict | list) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            continue
        inner[key] = data.draw(JSON)
        break
    try:
        bill = Bill.from_json(saved)
    except ValueError:
        return
    render.comparison_text(Comparison({"a": bill, "b": bill}))
    str(bill)


# --- what differs --------------------------------------------------------------------------------------------------


def made(model: str = "m", timed: bool = True, **works: Work) -> Bill:
    """A bill with these rows, `unattributed` among them."""
    nobody = works.pop("unattributed", Work())
    total = sum(works.values(), nobody)
    rows = [Row(name.replace("_", "/"), "forward", None, work) for name, work in works.items()]
    return Bill({"model": model, "target": "h200"}, rows, nobody, [], total, timed=timed)


def test_what_differs_most_comes_first_and_what_is_alike_last():
    a = made(mlp_up=Work(1, picoseconds=100), attention_core=Work(2, picoseconds=50), embed=Work(3, picoseconds=500))
    b = made(mlp_up=Work(1, picoseconds=90), embed=Work(3, picoseconds=500), unattributed=Work(9, picoseconds=20))
    compared = Comparison({"a": a, "b": b})
    assert [line.component for line in compared.lines] == ["attention/core", None, "mlp/up", "embed"]
    assert [line.differs for line in compared.lines] == [True, True, True, False]
    assert compared.lines[0].works == (Work(2, picoseconds=50), Work())


def test_without_time_bytes_rank():
    a = made(timed=False, mlp_up=Work(9), embed=Work(1, hbm_read={"weights": 5}))
    b = made(timed=False, mlp_up=Work(1), embed=Work(1, hbm_write={"weights": 4}))
    assert [line.component for line in Comparison({"a": a, "b": b}).lines] == ["embed", "mlp/up", None]


def test_bytes_that_change_their_role_alone_are_a_difference():
    a, b = (made(mlp_up=Work(hbm_read={role: 5}, picoseconds=1)) for role in ("weights", "activations"))
    assert Comparison({"a": a, "b": b}).lines[0].differs
    assert (a - b).rows[0].work == Work(hbm_read={"weights": 5, "activations": -5})


def test_a_difference_of_bills_ranks_its_rows_and_has_no_time_where_one_has_none():
    a = made(mlp_up=Work(1, picoseconds=100), embed=Work(3, picoseconds=500), logits=Work(1, picoseconds=7))
    b = made(mlp_up=Work(1, picoseconds=300), embed=Work(3, picoseconds=500))
    assert [(row.component, row.work.picoseconds) for row in (a - b).rows] == [("mlp/up", -200), ("logits", 7)]
    c = made(timed=False, mlp_up=Work(2))
    assert (a - c).timed is False and (a - c).total == Work(3) and not any(r.work.picoseconds for r in (a - c).rows)


AMOUNTS = st.dictionaries(st.sampled_from(ROLES), st.integers(0, 10**12), max_size=2)
WORKS = st.builds(Work, st.integers(0, 10**12), hbm_read=AMOUNTS, hbm_write=AMOUNTS, picoseconds=st.integers(0, 10**12))
BILLS = st.builds(made, mlp_up=WORKS, attention_core=WORKS, embed=WORKS, unattributed=WORKS)


@given(st.lists(BILLS, min_size=2, max_size=4))
def test_every_bill_s_lines_add_up_to_its_total(bills):
    compared = Comparison({str(n): bill for n, bill in enumerate(bills)})
    for n, bill in enumerate(bills):
        assert sum((line.works[n] for line in compared.lines), Work()) == bill.total
    spreads = [line.spread for line in compared.lines]
    assert spreads == sorted(spreads, reverse=True)


def test_the_table():
    a = made(mlp_up=Work(4, hbm_read={"weights": 2000}, picoseconds=2000), embed=Work(3, picoseconds=500))
    b = made(mlp_up=Work(4, hbm_read={"weights": 1000}, picoseconds=1000), embed=Work(3, picoseconds=500))
    c = made(unattributed=Work(7, picoseconds=2500), embed=Work(3, picoseconds=501))
    text = render.comparison_text(Comparison({"bf16": a, "int8": b, "other": c}))
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines() if line]
    assert lines[0] == ["m · h200"]
    assert lines[1] == ["roofline time, per chip", "bf16", "int8", "change", "other", "change"]
    assert lines[3:7] == [
        ["unattributed", "0 s", "0 s", "2.50 ns", "new"],
        ["mlp/up", "2.00 ns", "1.00 ns", "-50.0%", "0 s", "-100.0%"],
        ["embed", "500 ps", "500 ps", "501 ps", "+0.2%"],
        ["total", "2.50 ns", "1.50 ns", "-40.0%", "3.00 ns", "+20.0%"],
    ]
    assert ["HBM bytes", "2.00 k", "1.00 k", "-50.0%", "0", "-100.0%"] in lines
    alike = render.comparison_text(Comparison({"a": a, "b": a}))
    assert re.search(r"^alike: 2 +2.50 ns +2.50 ns$", alike, re.M)
    assert "a: m · h200" not in alike and "b: n" in render.comparison_text(Comparison({"a": a, "b": made("n")}))


def test_a_table_of_many_is_as_wide_as_it_must_be():
    bills = {f"a variant with a long name {n}": made(mlp_up=Work(n + 1, picoseconds=n + 1)) for n in range(9)}
    text = render.comparison_text(Comparison(bills))
    assert all(name in text for name in bills) and "…" not in text


# --- the command ---------------------------------------------------------------------------------------------------


def test_flags_against_flags_in_one_process(stepbill):
    """Also: devices of the host are made for the largest mesh; what a variant says wins; JSON and CSV agree."""
    argv = ("--compare=batch=1; --batch=4 cache_dtype=int8", *TINY, "--batch=2")
    status, out, err = stepbill(*argv, "--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["schema"] == 1
    first, second = said["bills"]
    assert (first["name"], second["name"]) == ("batch=1", "--batch=4 cache_dtype=int8")
    assert (first["program"]["batch"], second["program"]["batch"]) == (1, 4)
    assert second["program"]["cache_dtype"] == "int8" and "compare" not in second["program"]["flags"]
    (difference,) = said["differences"]
    assert (difference["bill"], difference["minus"]) == (second["name"], first["name"])
    more = second["total"]["flops"]["matmul"] - first["total"]["flops"]["matmul"]
    parts = [*difference["rows"], difference["unattributed"]]
    assert difference["total"]["flops"]["matmul"] == more == sum(part["flops"]["matmul"] for part in parts) > 0
    assert Bill.from_json(first).dumps() == json.dumps({key: first[key] for key in first if key != "name"})

    status, out, err = stepbill(*argv, "--format=csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (status, err, Counter(row["bill"] for row in rows)[first["name"]]) == (0, "", len(rows) // 2)
    for column in render.CSV_COLUMNS[3:-1]:
        for one in said["bills"]:
            of_one = [row for row in rows if row["bill"] == one["name"]]
            assert sum(int(row[column]) for row in of_one[:-1]) == int(of_one[-1][column]), column


def test_files_against_files_without_jax(stepbill, tmp_path):
    for name in ("decode-h200", "prefill-h200"):
        (tmp_path / f"{name}.hlo").write_text(capture.read(name))
        (tmp_path / f"{name}.json").write_text(captured(name).dumps())
    both = {
        kind: ";".join(f"{tmp_path}/{name}.{kind}" for name in ("decode-h200", "prefill-h200"))
        for kind in ("hlo", "json")
    }
    status, dumps, err = stepbill(f"--compare={both['hlo']}", "--target=h200")
    assert (status, err) == (0, "")
    assert re.search(r"^roofline time, per chip +decode-h200.hlo +prefill-h200.hlo +change$", dumps, re.M)
    status, saved, err = stepbill(f"--compare={both['json']}")
    assert (status, err) == (0, "")
    table = re.compile(r"^(?:attention|mlp|embed|logits|final_norm|total|unattributed).*", re.M)
    assert [one.split() for one in table.findall(dumps)] == [one.split() for one in table.findall(saved)]
    mixed = f"--compare={tmp_path}/decode-h200.json;{tmp_path}/decode-h200.hlo"
    status, out, err = stepbill(mixed, "--target=h200")
    assert (status, err) == (0, "") and re.search(r"^alike: \d+ ", out, re.M) and not re.search("^mlp", out, re.M)


@pytest.mark.parametrize(
    "argv,line",
    [
        (["--compare=weights=int8"], "--compare=weights=int8: it must be two or more variants with ; between, .*"),
        (["--compare=weights=int8;"], "--compare=weights=int8;: it must be two or more variants .*"),
        (["--compare=batch=1; batch=1"], "--compare=batch=1; batch=1: batch=1 is given twice"),
        (["--compare=batch=1;batch=x"], "--compare=batch=x: --batch=x: it must be a whole number of at least 1"),
        (["--compare=batch=1;format=json"], "--compare=format=json: --format: a variant has flag=value, .*"),
        (["--compare=batch=1;batch=2 list"], "--compare=batch=2 list: --list: a variant has flag=value, .*"),
        (["--compare=batch=1;batch='2"], "--compare=batch='2: no closing quotation"),
        (["--compare=batch=1;colour=2"], "--compare=colour=2: --colour: there is no such flag; .*"),
        (["--compare=/no/a;/no/b"], "--compare=/no/a: cannot read it: no such file or directory"),
        (["--compare={a};{a}"], "--compare={a};{a}: {a} is given twice"),
        (["--compare={a};{text}"], "--compare={text}: --hlo={text}: not a dump of an optimised HLO module: .*"),
        (["--compare={a};{garbled}"], "--compare={garbled}: not a saved bill: .*"),
        (["--compare={a};{deep}"], "--compare={deep}: not a saved bill: .*"),
        (["--compare={a};{several}"], "--compare={several}: not a saved bill: it holds several bills, .*"),
        (["--compare={a};{empty}"], "--compare={empty}: not a saved bill: it has no 'schema'"),
        (["--compare={a};./{name}", "--batch=2"], "--batch: it cannot be given with --compare of saved bills alone"),
        (["--compare={a};{hlo}", "--batch=2"], "--compare={hlo}: --batch=2: it cannot be given with --hlo.*"),
    ],
)
def test_wrong_input_ends_in_one_line_and_status_2(stepbill, tmp_path, monkeypatch, argv, line):
    monkeypatch.chdir(tmp_path)
    files = {"a": captured("decode-h200").dumps(), "text": "no program", "garbled": '{"schema": 1', "empty": "{}"}
    files |= {"deep": '{"a":' * 100_000, "several": '{"schema": 1, "bills": []}', "hlo": capture.read("decode-h200")}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    paths = {name: str(tmp_path / name) for name in files} | {"name": "a"}
    status, out, err = stepbill(*(part.format(**paths) for part in argv))
    assert (status, out) == (2, "")
    assert re.fullmatch(f"stepbill: {line.format(**paths)}\n", err), err
