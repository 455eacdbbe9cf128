"""The bench beside transformers runs from end to end, and holds the two to the same numbers before it times them."""

import json
import sys

import pytest
from stepbill.experiments import bench_peers

TINY = ["--num_layers=2", "--width=32", "--heads=2", "--kv_heads=1", "--mlp_width=48", "--vocabulary=64"]
SHORT = ["--context=32", "--prompt=32", "--tokens=8"]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the test extra has transformers for Python 3.11 alone")
def test_both_agree_and_are_timed(plain, monkeypatch, capsys):
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    assert bench_peers.main([*TINY, *SHORT, "--repeats=1", "--format=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["program"] for one in said["programs"]] == list(bench_peers.PROGRAMS)
    for one in said["programs"]:
        assert one["apart"] <= bench_peers.LOGITS
        assert all(
            len(one["seconds"][side]) == 1 and one["peak_bytes"][side] > 0 for side in ("stepbill", "transformers")
        )
    assert said["environment"]["torch"] and said["settings"]


@pytest.mark.parametrize("argv", [["--repeats=0"], ["--model=gpt9"], ["--format=xml"]])
def test_wrong_flags_are_one_line(argv, capsys):
    assert bench_peers.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and argv[0] in err
