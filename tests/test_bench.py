"""The benchmark of the bill itself: its fit, its flags, and one run of it on this host."""

import json

import pytest
from stepbill.experiments import bench_bill
from stepbill.experiments.bench_bill import Point


def point(megabytes: float, own_seconds: float, compile_seconds: float = 10.0) -> Point:
    return Point(
        1, round(megabytes * 1e6), 1, 0.1, compile_seconds, own_seconds / 2, own_seconds / 4, own_seconds / 4, 1
    )


def test_the_fit_is_least_squares():
    fitted = bench_bill.fit([point(x, 0.1 + 0.25 * x) for x in (1, 2, 4, 8)])
    assert fitted is not None
    assert fitted.seconds_per_megabyte == pytest.approx(0.25)
    assert fitted.intercept_seconds == pytest.approx(0.1)
    assert fitted.r_squared == pytest.approx(1)
    bent = bench_bill.fit([point(x, 0.01 * x**3) for x in (1, 2, 4, 8)])
    assert bent is not None and bent.r_squared < 0.95
    assert bench_bill.fit([point(1, 1), point(2, 2)]) is None


def test_the_share_is_of_compiling():
    assert point(1, 0.5, compile_seconds=10).share == pytest.approx(0.05)


@pytest.mark.parametrize(
    "flag,line",
    [
        ("--layers_list=1,x", "--layers_list=1,x: it must be whole numbers"),
        ("--layers_list=0", "--layers_list=0: it must be whole numbers"),
        ("--target=foo", "--target=foo: it must be one of host"),
        ("--model=foo", "1 layers: .*model is 'foo'"),
        ("--what=1", ".*what"),
    ],
)
def test_wrong_flags_end_in_one_line(capsys, flag, line):
    assert bench_bill.main([flag, *([] if "layers" in flag else ["--layers_list=1"])]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert err.startswith("bench_bill: ") and line.split(".*")[-1] in err


def test_points_are_measured_each_in_a_process_of_its_own(capsys):
    argv = ["--model=nano", "--target=host", "--batch=1", "--context=32", "--layers_list=1,2,3"]
    assert bench_bill.main([*argv, "--format=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["environment"]) == {"python", "jax", "stepbill", "cpu", "cores"}
    points = [Point(**one) for one in said["points"]]
    assert [p.num_layers for p in points] == [1, 2, 3]
    assert points[0].hlo_bytes < points[1].hlo_bytes < points[2].hlo_bytes
    assert all(p.compile_seconds > 0 and p.own_seconds > 0 and p.peak_bytes > 50e6 for p in points)
    assert set(said["fit"]) == {"seconds_per_megabyte", "intercept_seconds", "r_squared"}


def test_the_table_has_a_line_a_point(capsys, monkeypatch):
    monkeypatch.setattr(bench_bill, "_children", lambda values: [point(n, 0.1 * n) for n in (1, 2, 4)])
    assert bench_bill.main(["--target=host"]) == 0
    out = capsys.readouterr().out
    assert "python 3." in out and "jax" in out and "cores of" in out
    assert out.count("1.00 MB") >= 1 and "parse + attribute + print =" in out and "R² 1.000" in out
