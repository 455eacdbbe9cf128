"""Drivers of cost: small models through the same commands, so that what they find can be told beforehand."""

import json

import pytest
from stepbill.experiments.drivers import context
from stepbill.experiments.drivers.finding import Finding
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


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for the bills of this module's sweeps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPBILL_CACHE", str(tmp_path_factory.mktemp("bills")))
        yield


def found(capsys, main, *argv) -> Finding:
    assert main([*argv, "--format=json"]) == 0
    return Finding.from_json(json.loads(capsys.readouterr().out))


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


def test_every_point_says_its_own_command(cache):
    values = context.CONTEXT.parse([*SIZES, "--contexts=256", "--mesh="])
    prefill, decode = context.CONTEXT.points(values)
    assert isinstance(prefill, Point) and (prefill.step, decode.step) == ("prefill", "decode")
    assert decode.command is not None and "--num_layers=1" in decode.command


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
