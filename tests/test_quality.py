"""The quality program: a tiny ladder to its file and back, and files that are none of its own."""

import json
import math
import statistics
from dataclasses import replace

import pytest
from stepbill.experiments import flags, quality
from stepbill.experiments.flags import UsageError
from stepbill.experiments.perplexity import Way
from stepbill.experiments.quality import Measured, Model, Quality, Uncertain

BF16, INT4 = Way(), Way("int4:128")


def model(name, parameters, bits, teacher=None, more=()):
    """As if measured: rows of bf16 and of `more`."""
    rows = [Measured(way, 2 * parameters, tuple(values)) for way, values in ((BF16, bits), *more)]
    return Model(name, 8, parameters, {"width": 8}, teacher, tuple(rows))


SMALL = Quality(
    {"text": "a text", "tokens": 10, "seed": 0, "context": 4},
    (
        model("large", 200, (2.0, 4.0), more=[(INT4, (2.5, 4.7))]),
        replace(model("little", 100, (3.0, 5.0)), width=4),
        model("little-taught", 100, (2.5, 4.5), "large"),
    ),
    (replace(model("little-mqa", 90, (3.5, 5.5)), width=4), replace(model("little-seed", 100, (3.0, 5.5)), width=4)),
)


def test_differences_are_taken_batch_by_batch():
    large, little, taught = (one.plain for one in SMALL.models)
    # Texts differ by 2 bits, models by 1 on each text: the mean is uncertain, the difference is not.
    assert large.bits_per_byte == Uncertain(3.0, pytest.approx(1.0))
    assert little.more_than(large) == Uncertain(1.0, 0.0) and taught.more_than(little) == Uncertain(-0.5, 0.0)
    rounded = SMALL.models[0].in_way(INT4)
    assert rounded is not None and SMALL.models[1].in_way(INT4) is None
    assert rounded.more_than(large) == Uncertain(pytest.approx(0.6), pytest.approx(0.1))


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "quality.json"
    path.write_text(quality._compact(SMALL.to_json()))
    assert quality.read(str(path)) == SMALL
    row = json.loads(path.read_text())["models"][0]["rows"][1]
    assert (row["bits_per_byte"], row["more"], row["more_standard_error"]) == (3.6, 0.6, 0.1)
    assert [one.name for one in SMALL.ladder] == ["large", "little"]
    assert [tuple(one.name for one in three) for three in SMALL.taught] == [("little-taught", "little", "large")]
    mqa = SMALL.variant("mqa")
    assert mqa is not None and [one.name for one in mqa] == ["little-mqa", "little"] and SMALL.variant("window") is None
    del (earlier := json.loads(path.read_text()))["variants"]  # as files were before there were any
    assert Quality.from_json(earlier) == replace(SMALL, variants=())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: saved.update(schema=2), "schema is 2; it must be 1"),
        (lambda saved: saved.pop("made"), "it has no 'made'"),
        (lambda saved: saved["made"].pop("tokens"), "it has no 'tokens'"),
        (lambda saved: saved["models"].pop(1), "at least two models that nobody taught"),
        (lambda saved: saved["made"].pop("context"), "it has no 'context'"),
        (lambda saved: saved["models"][1].update(parameters=99), "its own size alone"),
        (lambda saved: saved["models"][2].update(teacher="nobody"), "must have its teacher"),
        (lambda saved: saved["models"][0]["rows"][1]["bits"].pop(), "rows of the same batches"),
        (lambda saved: saved["models"][0]["rows"][1].update(bits=[1, math.nan]), "rows of positive numbers"),
        (lambda saved: saved["models"][0]["rows"].pop(0), "rows of which the first is"),
        (lambda saved: saved["variants"][0].update(width=5), "variants of width 5 must have their own size alone"),
        (lambda saved: saved.update(models=3), "not iterable"),
    ],
)
def test_another_file_is_named(tmp_path, change, said):
    saved = SMALL.to_json()
    change(saved)
    path = tmp_path / "other.json"
    path.write_text(json.dumps(saved))
    with pytest.raises(UsageError) as caught:
        quality.read(str(path))
    assert str(caught.value).startswith(f"--quality={path}: ") and said in str(caught.value)
    assert str(caught.value).endswith("it must be a file that python -m stepbill.experiments.quality writes")


def test_a_file_that_is_none_is_named(tmp_path):
    for text, said in ((None, "no such file"), ("{", "Expecting"), ("[]", "indices")):
        path = tmp_path / "none.json"
        if text is not None:
            path.write_text(text)
        with pytest.raises(UsageError, match=said):
            quality.read(str(path))


def test_the_packaged_run_is_whole_and_says_how_it_was_made():
    found = quality.read(str(quality.FILE))
    assert {"command", "date", "hardware", "corpus", "steps", "seed", "text", "tokens"} <= found.made.keys()
    assert (
        found.made["command"].startswith(quality.COMMAND) and {"python", "jax", "cpu"} <= found.made["hardware"].keys()
    )
    assert len(found.ladder) >= 3 and list(found.taught) and all(map(found.variant, quality.VARIANTS))
    for one in found.models:
        assert tuple(row.way for row in one.rows) == quality.WAYS
    for saved, one in zip(json.loads(quality.FILE.read_text())["models"], found.models, strict=True):
        for row, measured in zip(saved["rows"], one.rows, strict=True):
            assert row["bits_per_byte"] == pytest.approx(statistics.fmean(measured.bits), abs=1e-6)
            assert row["more"] == pytest.approx(measured.more_than(one.plain).value, abs=1e-6)
    # A scale a channel or a group is what int8 and int4 have beside a half and a quarter of the bytes; norms stay.
    for one in found.models:
        wide, int8, int4, *_ = (row.weights_bytes for row in one.rows)
        assert 2 * one.parameters == wide and 1 / 2 < int8 / wide < 0.56 and 1 / 4 < int4 / wide < 0.34


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n\n" for n in range(400)))
    return path


def test_a_tiny_ladder_is_trained_measured_and_written(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr("stepbill.profiling.targets.prepare", lambda target: None)
    monkeypatch.setattr(quality, "WAYS", (BF16, Way("int8", "int8", "int8")))
    monkeypatch.setattr(quality, "VARIANTS", {"window": {"window": 4, "global_every": 2, "num_kv_heads": 1}})
    monkeypatch.setattr(quality, "LAYERS", 2)
    out, file = tmp_path / "runs", tmp_path / "quality.json"
    argv = [f"--out={out}", f"--write={file}", f"--data={text}", f"--cache={tmp_path / 'cache'}"]
    argv += "--widths=8,12 --student=8 --steps=3 --batch=2 --context=16 --warmup=1 --batches=3".split()
    assert quality.main(argv) == 0
    printed = capsys.readouterr().out
    found = quality.read(str(file))
    assert [one.name for one in found.models] == ["width-12", "width-8", "width-8-taught"]
    assert [one.teacher for one in found.models] == [None, None, "width-12"]
    # 2 layers of 4 D x D and 3 D x F, two norms; the table, which is tied; a norm. F: 64.
    assert found.models[0].parameters == 2 * (4 * 144 + 3 * 12 * 64 + 24) + 256 * 12 + 12
    assert found.made["tokens"] == 3 * 2 * 16 and found.made["seed"] == 0
    assert len(found.made["date"]) == len("2026-11-24")
    assert f"--data={text}" in found.made["command"] and str(out) not in found.made["command"]
    learning = [json.loads((out / f"width-{width}" / "run.json").read_text())["recipe"] for width in (12, 8)]
    assert learning[1]["learning_rate"] == pytest.approx(learning[0]["learning_rate"] * 12 / 8)
    for one in found.models:
        plain, int8 = one.rows
        assert len(plain.bits) == 3 and all(5 < value < 12 for value in plain.bits)  # of 256 bytes: 8 at first
        assert 0 < abs(int8.more_than(plain).value) < 0.1 and int8.weights_bytes < plain.weights_bytes
    (window,) = found.variants
    # Of 2 heads' keys and values of 4, in 2 layers, one is left; it is measured as it is alone.
    assert found.models[1].parameters - window.parameters == 2 * 2 * 8 * 4 and len(window.rows) == 1
    assert "width-8-window against width-8: " in printed
    assert "width-8-taught against width-8: " in printed and "width-8 against width-12: " in printed


def test_variants_differ_in_what_they_say_alone(tmp_path):
    asked = quality.request(flags.parse([f"--out={tmp_path}", f"--write={tmp_path / 'x'}"], quality.define))
    plain, mqa, window, seed = (asked.training(96, variant=name) for name in ("", "mqa", "window", "seed"))
    assert [one.out.name for one in (plain, mqa, window, seed)] == [
        *("width-96", "width-96-mqa", "width-96-window", "width-96-seed")
    ]
    assert (plain.config.num_kv_heads, mqa.config.num_kv_heads, plain.seed, seed.seed) == (3, 1, 0, 1)
    assert [kind.local for kind in window.config.kinds] == [True, True, True, False]
    assert replace(mqa, out=plain.out, config=plain.config) == plain
    assert replace(window, out=plain.out, config=replace(window.config, window=0, global_every=0)) == plain
    assert replace(seed, out=plain.out, seed=0) == plain


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--write=x", "--out: it needs a value"),
        ("--out=x", "--write: it needs a value"),
        ("--out=x --write=y --widths=64", "--widths=64: it must be two or more"),
        ("--out=x --write=y --widths=64,62", "--widths=64,62: it must be two or more"),
        ("--out=x --write=y --widths=wide", "--widths=wide: it must be two or more"),
        ("--out=x --write=y --student=192", "--student=192: it must be one of --widths below the largest"),
        ("--out=x --write=y --context=100000", "--context=100000: "),
        ("--out=x --write=y --steps=0", "--steps"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(capsys, argv, said):
    assert quality.main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1
