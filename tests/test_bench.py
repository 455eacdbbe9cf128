"""The benchmark of the bill itself: its fit, its flags, and one run of it on this host."""

import json
import sys
import tracemalloc

import capture
import pytest
from stepbill.experiments import bench_bill
from stepbill.experiments.bench_bill import Compiled, Point
from stepbill.profiling import targets
from stepbill.profiling.walk import itemize_text


def point(megabytes: float, own_seconds: float, compile_seconds: float = 10.0, copies: int = 1) -> Point:
    size = round(megabytes * 1e6)
    parts = own_seconds / 2, own_seconds / 4, own_seconds / 4
    return Point(Compiled(1, 0.1, compile_seconds), copies, size, 1, *parts, 70_000_000 + 5 * size, 70_000_000)


def test_the_fit_is_least_squares():
    fitted = bench_bill.fit([point(x, 0.1 + 0.25 * x) for x in (1, 2, 4, 8)])
    assert fitted is not None
    assert fitted.seconds_per_megabyte == pytest.approx(0.25)
    assert fitted.intercept_seconds == pytest.approx(0.1)
    assert fitted.r_squared == pytest.approx(1)
    bent = bench_bill.fit([point(x, 0.01 * x**3) for x in (1, 2, 4, 8)])
    assert bent is not None and bent.r_squared < 0.95
    assert (bent.seconds_exponent, bent.memory_exponent) == (pytest.approx(3), pytest.approx(1))
    assert bench_bill.fit([point(1, 1), point(2, 2)]) is None


def test_the_share_is_of_compiling():
    assert point(1, 0.5, compile_seconds=10).share == pytest.approx(0.05)
    assert point(1, 0.5, copies=2).share is None


# --- linear growth ---------------------------------------------------------------------------------------------------

PROGRAMS = ("decode-host", "decode-h200", "decode-v5e")


@pytest.mark.parametrize("name", [*PROGRAMS, "train-h200-sharded", "train-v5e"])
def test_a_program_repeated_costs_so_many_times_as_much(name):
    target = capture.PROGRAMS[name][1]
    text = capture.read(name)
    once, thrice = (itemize_text(bench_bill.repeated(text, copies), targets.chip(target)) for copies in (1, 3))
    assert once.total == itemize_text(text, targets.chip(target)).total
    assert not thrice.unknown
    assert (thrice.total.matmul, thrice.total.elementwise) == (3 * once.total.matmul, 3 * once.total.elementwise)
    # More, where copies overwrite the same cache. (A small program's weights an L2 serves from the second copy on.)
    assert thrice.total.requested_bytes >= 3 * once.total.requested_bytes


def calls(text: str, target: str) -> int:
    """How many functions run to bill it, resumed generators and those written in C included."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(profile)
    try:
        itemize_text(text, targets.chip(target))
    finally:
        sys.setprofile(None)
    return count


def allocated(text: str, target: str) -> int:
    """The most bytes that are held at once to bill it."""
    tracemalloc.start()
    try:
        itemize_text(text, targets.chip(target))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("measured", "tolerance"), [(calls, 0.02), (allocated, 0.1)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_work_and_memory_grow_with_the_text(name, measured, tolerance):
    """Twice as much from 4 to 8 copies as from 2 to 4. In operations, which no busy machine changes; and tables take
    memory in steps."""
    text, target = capture.read(name), capture.PROGRAMS[name][1]
    itemize_text(text, targets.chip(target))  # fills caches of patterns
    two, four, eight = (measured(bench_bill.repeated(text, copies), target) for copies in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=tolerance)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag,line",
    [
        ("--layers_list=1,x", "--layers_list=1,x: it must be whole numbers"),
        ("--layers_list=0", "--layers_list=0: it must be whole numbers"),
        ("--megabytes_list=x", "--megabytes_list=x: it must be whole numbers"),
        ("--target=foo", "--target=foo: it must be one of host"),
        ("--model=foo", "1 layers: .*model is 'foo'"),
        ("--what=1", ".*what"),
    ],
)
def test_wrong_flags_end_in_one_line(capsys, flag, line):
    assert bench_bill.main([flag, *([] if "layers" in flag else ["--layers_list=1"])]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("stepbill: ") and line.split(".*")[-1] in err


def test_points_are_measured_each_in_a_process_of_its_own(capsys):
    argv = ["--model=nano", "--target=host", "--batch=1", "--context=32", "--layers_list=1,2", "--megabytes_list=1"]
    assert bench_bill.main([*argv, "--format=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["environment"]) == {"python", "jax", "stepbill", "cpu", "cores"}
    points = [Point(**(one | {"program": Compiled(**one["program"])})) for one in said["points"]]
    assert [p.program.num_layers for p in points] == [1, 2, 2]
    assert points[0].copies == points[1].copies == 1 < points[2].copies
    assert points[0].hlo_bytes < points[1].hlo_bytes < points[2].hlo_bytes == pytest.approx(1e6, rel=0.2)
    assert all(p.program.compile_seconds > 0 and p.own_seconds > 0 for p in points)
    assert all(p.peak_bytes >= p.base_bytes > 20e6 for p in points)
    names = {"seconds_per_megabyte", "intercept_seconds", "r_squared", "seconds_exponent", "memory_exponent"}
    assert set(said["fit"]) == names


def test_the_table_has_a_line_a_point(capsys, monkeypatch):
    points = [*(point(n, 0.1 * n) for n in (1, 2, 4)), point(10, 1.0, copies=25)]
    monkeypatch.setattr(bench_bill, "_children", lambda values: points)
    assert bench_bill.main(["--target=host"]) == 0
    out = capsys.readouterr().out
    assert "python 3." in out and "jax" in out and "cores of" in out and "25 x 1" in out
    assert out.count("1.00 MB") >= 1 and "parse + attribute + print =" in out and "R² 1.000" in out
    assert "CPU time grows with size to the power of 1.00, memory 1.00" in " ".join(out.split())
