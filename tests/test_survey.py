"""Bills of published architectures, a few layers of each kind that they have, and the table of all."""

import json
from dataclasses import replace

import pytest
from compiled import ready
from stepbill.experiments import steps, survey
from stepbill.experiments.bill import bill_of
from stepbill.model.architectures import ARCHITECTURES
from stepbill.profiling import targets

# One of each family that has something of its own. All of them at full depth: BUILD_NOTES.md.
# llama3-8b: test_model_bills.py; mixtral-8x7b and qwen3-30b-a3b: test_experts.py.
NAMES = ("gpt2-small", "gemma2-9b", "gemma3-27b", "qwen2.5-7b", "deepseek-v3", "gpt-oss-20b")
SIZES = {"decode": (8, 1024), "prefill": (1, 1024), "train": (1, 1024)}  # batch, context


def cut(name):
    """The architecture with as many layers as it takes to have each kind."""
    config = ARCHITECTURES[name]
    experts = config.experts
    if experts is not None:  # and as few experts as let two layers of DeepSeek-V3 be trained on one chip
        few = replace(experts, count=min(experts.count, 64), dense_layers=min(experts.dense_layers, 1))
        config = replace(config, experts=few)
    return replace(config, num_layers=max(2, config.global_every))


# Training and reading a prompt take longest to compile, and differ least.
PROGRAMS = [(name, "decode") for name in NAMES]
PROGRAMS += [(name, "prefill") for name in ("gemma2-9b", "deepseek-v3")]
PROGRAMS += [("deepseek-v3", "train")]


@pytest.mark.parametrize(("name", "step"), PROGRAMS)
def test_bills_of_published_architectures_are_attributed(name, step):
    ready("h200")
    batch, context = SIZES[step]
    config = replace(cut(name), remat="full" if step == "train" else "none")
    built = steps.build(config, step, batch=batch, context=context, mesh=targets.mesh("h200", {}))
    compilation = targets.compile(built.lower(), "h200", options=built.compiler_options("cuda"))
    bill = bill_of(built, compilation, "h200")
    bill.check()
    assert not bill.unknown
    assert bill.unattributed.flops <= 0.01 * bill.total.flops
    assert bill.unattributed.hbm_bytes <= 0.03 * bill.total.hbm_bytes
    sought = bill.to_json()["reconcile"]["closed_form"]["matmul_flops"]
    assert bill.total.matmul == pytest.approx(sought, rel=0.001)
    if step == "decode":
        assert bill.efficiency is not None and bill.efficiency < 1.2


def test_the_table_has_a_line_a_bill_and_what_is_there_is_not_computed_again(tmp_path, capsys):
    ready("h200")
    out = tmp_path / "survey.jsonl"
    argv = ["--models=gpt2-small", "--steps=decode", "--context=64", f"--out={out}"]
    assert survey.main(argv) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["model"] == "gpt2-small" and line["unknown"] == 0 and line["flops"] > 0
    out.write_text(json.dumps(line | {"mesh": "as it was written"}) + "\n")
    capsys.readouterr()
    assert survey.main(argv) == 0
    assert "as it was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--models=gpt9", "--models=gpt9: 'gpt9' must be one of "),
        ("--steps=fly", "--steps=fly: 'fly' must be one of train, prefill, decode"),
        ("--out=/", "--out=/: it must be a file of lines of JSON"),
    ],
)
def test_wrong_flags_are_one_line(flag, words, capsys):
    assert survey.main([flag]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err
