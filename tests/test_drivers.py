"""Drivers of cost: small models through the same commands, so that what they find can be told beforehand."""

import shlex

import pytest
from findings import found
from stepbill.experiments.drivers import cache as cache_driver
from stepbill.experiments.drivers import context
from stepbill.experiments.drivers.sweep import Point

SIZES = (
    "--model=nano",
    "--num_layers=1",
    "--width=64",
    "--heads=4",
    "--kv_heads=2",
    "--head_width=16",
    "--mlp_width=64",
)


def test_context_finds_the_square_and_the_line(cache, capsys):
    argv = (*SIZES, "--target=h200", "--contexts=1024,4096,16384", "--mesh=")
    result = found(capsys, context.main, *argv)
    assert result.fits["cache bytes of a decode step"].exponent == pytest.approx(1, abs=0.02)
    assert result.fits["attention/core FLOPs of a prompt"].exponent == pytest.approx(2, abs=0.1)
    longest, shortest = (result.fits[f"attention FLOPs, {which} two contexts"] for which in ("longest", "shortest"))
    assert longest.exponent > shortest.exponent
    (table, *_), (flops, times) = result.tables, result.plots
    assert [row[0] for row in table.rows] == [1024, 4096, 16384]
    assert dict(flops.lines)["attention"][-1][1] > dict(flops.lines)["MLP"][-1][1]
    assert times.lines["a prompt"][-1][1] == table.rows[-1][2]
    assert str(result.command).endswith("--contexts=1024,4096,16384 --mesh=")


def test_cache_ranks_the_kinds_of_attention(cache, capsys):
    result = found(capsys, cache_driver.main, *SIZES, "--target=h200", "--contexts=4096", "--batch=4")
    (table,) = result.tables
    read, requests = ({row[0]: row[column] for row in table.rows} for column in (2, 3))
    K, H, bf16 = 2, 16, 2
    for name, heads in (("MHA", 2 * K), ("GQA, 2 heads", K), ("MQA", 1)):
        assert read[name] == pytest.approx(2 * heads * H * bf16, rel=0.01)
    assert read["GQA, window 1024"] == pytest.approx(read["GQA, 2 heads"] / 4, rel=0.01)
    assert requests["MQA"] > requests["GQA, int8 cache"] > requests["GQA, 2 heads"] > requests["MHA"] > 0
    assert result.holds is not None and "MQA" in result.evidence


def test_a_price_is_an_assumption_that_can_be_another(cache, capsys):
    argv = (*SIZES, "--target=h200", "--contexts=1024,4096,16384", "--mesh=")
    usual, dearer = (
        found(capsys, context.main, *argv, *more) for more in ((), ("--assume=chip.dollars_per_hour.h200=7",))
    )
    (price,) = (one for one in usual.assumptions if one["name"] == "chip.dollars_per_hour.h200")
    for before, after in zip(usual.tables[0].rows, dearer.tables[0].rows, strict=True):
        assert after[4] == pytest.approx(before[4] * 7 / price["value"])
    assert price["date"] and price["source"]


def test_every_point_says_its_own_command(cache):
    values = context.CONTEXT.parse([*SIZES, "--contexts=256", "--mesh="])
    prefill, decode = context.CONTEXT.points(values)
    assert isinstance(prefill, Point) and (prefill.step, decode.step) == ("prefill", "decode")
    assert decode.command is not None and "--num_layers=1" in decode.command


def test_a_command_says_all_that_was_given():
    given = ["--target=v5e", "--assume=power.pue=1.2", "--assume=power.load=0.5", "--num_layers=2", "--jobs=1"]
    command = context.CONTEXT.command(context.CONTEXT.parse([*given, "--mesh=data=1,tensor=1 "]))
    start, *argv = shlex.split(command)
    assert (start, *argv[:2]) == ("python", "-m", "stepbill.experiments.drivers.context")
    again = context.CONTEXT.parse(argv[2:])
    assert dict(again.assume) == {"power.pue": 1.2, "power.load": 0.5}
    assert (again.num_layers, again.mesh, again.jobs) == (2, "data=1,tensor=1 ", None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--contexts=0"], "--contexts=0: it must be whole numbers from 1 on"),
        (["--contexts=many"], "--contexts=many: it must be whole numbers from 1 on"),
        (["--target=h2000"], "--target=h2000: it must be one of"),
        (["--model=none"], "--model=none: "),
        (["--format=csv"], "--format"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(capsys, argv, said):
    assert context.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1
