"""Drivers of size: a larger model, a smaller one, and one in few bits, over bills that are made up and can be done by
hand, and of small models that are compiled."""

import json
import math
from dataclasses import replace

import pytest
from findings import found
from stepbill.experiments.drivers import model_size, quantization, smaller, sweep
from stepbill.experiments.flags import UsageError
from stepbill.experiments.perplexity import Way
from stepbill.experiments.quality import FILE, Measured, Model, Quality, read
from stepbill.model.architectures import get
from stepbill.profiling.assumptions import load
from stepbill.profiling.bill import Bill, Row, Work

D, N, K, H, F, L, T = 512, 8, 4, 64, 1024, 2, 64
SIZES = (
    *("--model=nano", f"--num_layers={L}", f"--width={D}", f"--heads={N}", f"--kv_heads={K}", f"--head_width={H}"),
    *(f"--mlp_width={F}", "--vocabulary=256", f"--context={T}"),
)
BLOCK = 2 * D * (N + K) * H + 3 * D * F  # matrices of a layer
BF16, INT8, INT4 = Way(), Way("int8"), Way("int4:128")


def trained(int4_more: float = 0.01, ways: bool = True) -> Quality:
    """As if measured on two batches, of 3 and 5 bits a byte."""

    def model(name: str, width: int, more: float, teacher: str | None = None) -> Model:
        sizes = {"num_layers": 1, "width": width, "heads": 2, "kv_heads": 2, "head_width": width // 2}
        sizes |= {"mlp_width": 2 * width, "vocabulary": 256}
        parameters = 4 * width**2 + 3 * width * 2 * width + 2 * width + 257 * width
        rows = [Measured(BF16, 2 * parameters, (3 + more, 5 + more))]
        if ways:
            rows.append(Measured(INT8, parameters, (3 + more, 5 + more)))
            rows.append(Measured(INT4, parameters // 2, (3 + more + int4_more, 5 + more + int4_more)))
        return Model(name, width, parameters, sizes, teacher, tuple(rows))

    made = {"text": "a text", "tokens": 1e6, "seed": 0, "context": 32}
    return Quality(made, (model("wide", 128, 0), model("narrow", 64, 0.5), model("narrow-taught", 64, 0.25, "wide")))


BYTES = {"full": 2, "bf16": 2, "int8": 1, "int4:128": 0.5}
PEAK, BANDWIDTH = 10**15, 10**12  # FLOP/s, bytes/s


def made_up(point):
    """A step that reads its weights and its cache, and multiplies each parameter once for each token of a prompt; at a
    millionth of a dollar a second."""
    config, context, batch = point.config, point.context, point.batch or 1
    weights = round(config.parameters * BYTES[config.weights])
    position = config.num_layers * 2 * config.num_kv_heads * config.head_width * BYTES[config.cache_dtype]
    cache, tokens = round(position * batch * context), context if point.step == "prefill" else batch
    flops = 2 * config.parameters * tokens
    picoseconds = round((flops / PEAK if point.step == "prefill" else (weights + cache) / BANDWIDTH) * 1e12)
    total = Work(flops, hbm_read={"weights": weights, "cache": cache}, picoseconds=picoseconds)
    bill = Bill({"chips": 1}, [Row("mlp/up", "forward", None, total, "hbm")], Work(), [], total)
    bill.price = {"chip_dollars_per_hour": 1.0, "dollars_per_million_tokens": picoseconds * 1e-12 / tokens}
    return bill


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})
    monkeypatch.setattr("stepbill.experiments.drivers.driver._priced", lambda outcome, known: outcome)


@pytest.fixture
def measured(tmp_path):
    """measured(quality) -> the flag that names its file."""

    def write(found: Quality) -> str:
        path = tmp_path / "quality.json"
        path.write_text(json.dumps(found.to_json()))
        return f"--quality={path}"

    return write


# ---- the model's size


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(model_size, "FEWER", (0.5, 1.0))
    monkeypatch.setattr(model_size, "FACTORS", (1.0, 2.0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """llama(layers, vocabulary) -> a config.json of Hugging Face, with as many heads for keys as for queries."""
    folder = tmp_path_factory.mktemp("models")

    def write(layers: int, vocabulary: int = 32) -> str:
        path = folder / f"llama-{layers}-{vocabulary}.json"
        sizes = {"hidden_size": D, "num_attention_heads": N, "num_key_value_heads": N, "intermediate_size": F}
        sizes |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "rms_norm_eps": 1e-5}
        path.write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 4096} | sizes))
        return str(path)

    return write


def test_deeper_models_are_in_proportion(cache, capsys, llama, few_steps):
    models = ",".join(llama(layers) for layers in (2, 6))
    result = found(capsys, model_size.main, *SIZES, f"--models={models}", "--batch=2")
    assert result.fits["FLOPs of an input token over the models"].exponent == pytest.approx(1, abs=0.02)
    assert result.holds is True
    priced, parts, dimensions = result.tables
    block = 4 * D * D + 3 * D * F + 2 * D
    assert [row[1] for row in priced.rows] == [n * block + 2 * 32 * D + D for n in (2, 6)]
    assert [row[1] for row in parts.rows] == [2, 6] and all(row[2] == 1 for row in priced.rows)
    by = {(row[0], row[1]): row for row in dimensions.rows}
    half, whole = by["layers", 0.5], by["layers", 1.0]
    # A layer more is its matrices twice for each token, and scores and sums of at most T positions.
    assert 2 * BLOCK < whole[4] - half[4] <= 2 * BLOCK + 4 * N * H * T
    assert by["heads alone", 2.0][2] - whole[2] == L * 2 * D * (N + K) * H
    assert by["width, heads and all", 2.0][2] == L * (4 * BLOCK + 4 * D) + 257 * 2 * D
    command = dict(zip(((row[0], row[1]) for row in dimensions.rows), dimensions.commands, strict=True))
    assert f"--heads={2 * N}" in (command["heads alone", 2.0] or "")


def test_a_table_of_words_is_not_in_proportion(cache, capsys, llama, few_steps):
    """A row of it is read, and a prompt's last position alone is multiplied with the other."""
    result = found(capsys, model_size.main, *SIZES, f"--models={llama(2)},{llama(2, 64_000)}", "--batch=2")
    assert result.holds is False
    priced, parts, _ = result.tables
    few, many = priced.rows
    assert many[1] - few[1] == 2 * (64_000 - 32) * D
    assert many[4] == pytest.approx(many[3] / many[1]) and many[4] < 0.5 < 2 < few[4]
    logits, layers = 64_000 * D, 2 * (4 * D * D + 3 * D * F + 2 * N * H * T)
    assert parts.rows[1][5] == pytest.approx(logits / (logits + layers), rel=0.01)


def test_what_does_not_fit_is_left_out_and_said(nothing_compiled, capsys, llama, monkeypatch):
    fits = model_size.fewest_chips

    def fewest(config, *rest):
        if config.name == "llama3-405b":
            raise model_size.UsageError(f"--mesh=auto: {config.name} fits on no mesh of up to 256 h200")
        return fits(config, *rest)

    monkeypatch.setattr(model_size, "fewest_chips", fewest)
    result = found(capsys, model_size.main, *SIZES, f"--models={llama(2)},{llama(6)},llama3-405b", "--batch=2")
    assert [row[1] for row in result.tables[1].rows] == [2, 6]
    assert any(note.startswith("left out: ") and "llama3-405b fits on no mesh" in note for note in result.notes)


def test_scaled_keeps_whole_heads_and_their_groups():
    base = get("llama3-8b")
    assert model_size.scaled(base, 1) is base
    half = model_size.scaled(base, 0.5)
    sizes = (half.num_layers, half.width, half.num_heads, half.num_kv_heads, half.head_width, half.mlp_width)
    assert sizes == (32, 2048, 16, 4, 128, 7168) and half.vocabulary == base.vocabulary
    third = model_size.scaled(base, 1 / 3)
    assert (third.width, third.num_heads, third.num_kv_heads, third.mlp_width) == (1408, 12, 3, 4736)


# ---- a smaller model


def test_half_the_width_beside_the_quality_that_was_measured(nothing_compiled, capsys, measured):
    result = found(capsys, smaller.main, *SIZES, measured(trained()), "--batch=2")
    saved, quality_table, published = result.tables
    (wide, narrow), law = saved.rows, load()
    full = L * (BLOCK + 2 * D) + 257 * D
    assert wide[1] == full and narrow[1] == L * (BLOCK // 4 + D) + 257 * D // 2
    assert narrow[2] == pytest.approx(narrow[1] / wide[1])
    slope = math.log(narrow[7] / wide[7]) / math.log(narrow[1] / wide[1])
    assert result.fits["$ of an output token"].exponent == pytest.approx(slope)
    assert narrow[9] == pytest.approx(1 - narrow[7] / wide[7])
    large, small = quality_table.rows
    assert [row[7:] for row in (large, small)] == [(None, None), (0.5, 0.0)] and large[5:7] == (4.0, 1.0)
    # Of one sequence, in bf16: 2 bytes of each parameter, and of 32 positions a key and a value of D each.
    dollars = [(2 * n + 32 * 2 * 2 * D) / BANDWIDTH for n, D in ((large[1], 128), (small[1], 64))]
    assert [large[3], small[3]] == pytest.approx(dollars) and small[4] == pytest.approx(1 - dollars[1] / dollars[0])
    assert "--width=64" in quality_table.commands[1] and "--context=32" in quality_table.commands[1]
    factor, exponent = law.number("quality.law.factor"), law.number("quality.law.exponent")
    more = factor * (narrow[1] ** -exponent - wide[1] ** -exponent)
    assert published.rows[1][2] == pytest.approx(more) and published.rows[0][2] == 0
    assert "not shown" in result.notes[0] and {"quality.law.factor"} <= {one["name"] for one in result.assumptions}
    assert result.holds == all(
        abs(math.log(narrow[n] / wide[n]) / math.log(narrow[1] / wide[1]) - 1) <= smaller.NEAR for n in (6, 7)
    )


# ---- few bits


def test_few_bits_on_one_frontier(nothing_compiled, capsys, measured):
    """Price and quality of the same models; the real model beside them, without a quality."""
    result = found(capsys, quantization.main, *SIZES, "--batch=2", measured(trained()))
    saved, frontier, taught, published = result.tables
    plain, int8, int4, in_cache, int8_all, int4_all, student = saved.rows
    parameters, position = L * (BLOCK + 2 * D) + 257 * D, L * 2 * K * H
    names = ("bf16", "int8 weights", "int4:128 weights", "int8 cache")
    assert (plain[0], int8[0], int4[0], in_cache[0]) == names and int8_all[0] == "int8 weights, cache, activations"
    assert int4_all[0] == "int4:128 weights, int8 cache"
    for row, weight, kept in ((plain, 2, 2), (int8, 1, 2), (int4, 0.5, 2), (in_cache, 2, 1), (int4_all, 0.5, 1)):
        assert row[2] == weight * parameters
        alone, together = (parameters * weight / n + position * T * kept for n in (1, 2))
        assert row[4:6] == pytest.approx((alone / BANDWIDTH, together / BANDWIDTH))
        assert row[7] == pytest.approx(row[4] / plain[4]) and row[8] == pytest.approx(row[5] / plain[5])
    assert plain[3] == pytest.approx(2 * parameters / PEAK) == int4[3] and int8[3] is int8[6] is None
    assert student[0] == "64/128 of the width" and student[3] < plain[3]
    assert saved.title.endswith("not measured here") and not any(column.unit == "bits/B" for column in saved.columns)
    rows = {(row[0], row[1]): row for row in frontier.rows}
    assert len(rows) == 9
    price = {key: row[3] for key, row in rows.items()}
    for name, width in (("wide", 128), ("narrow", 64), ("narrow-taught", 64)):  # who taught a model changes no bill
        n = 10 * width**2 + 259 * width
        for way, weight in (("bf16", 2), ("int8 weights", 1), ("int4:128 weights", 0.5)):
            assert price[name, way] == pytest.approx((weight * n + 32 * 2 * 2 * width) / BANDWIDTH, rel=1e-4)
    assert rows["wide", "bf16"][7:] == (0, 0, "wide, int8 weights")  # as good, and cheaper
    assert rows["wide", "int4:128 weights"][7] == pytest.approx(0.01)
    assert rows["narrow", "int8 weights"][9] == "narrow-taught, int8 weights"
    best = {key for key, row in rows.items() if row[9] == "nothing"}
    front = dict(result.plots[0].lines)["beaten by none"]
    assert sorted(front) == sorted((row[3], row[5]) for key, row in rows.items() if key in best)
    assert {("wide", "int8 weights"), ("narrow-taught", "int4:128 weights")} <= best
    assert f"Of 9 trained choices {len(best)} are beaten by none" in result.evidence
    teacher, by_itself, lesson = taught.rows
    assert (teacher[0], by_itself[0], lesson[0]) == ("wide", "narrow", "narrow-taught")
    parameters = {row[0]: row[1] for row in taught.rows}
    assert lesson[2] == pytest.approx(1 + 2 * parameters["wide"] / (6 * parameters["narrow"])) and lesson[5] == -0.25
    assert [row[4] for row in published.rows[:3]] == [0, *(math.log2(x / 6.23316) for x in (6.234284, 6.700147))]
    cheap = all(row[column] <= most for row, most in ((int8, 0.55), (int4, 0.30)) for column in (7, 8))
    assert result.holds is cheap


def test_a_loss_of_quality_is_no_saving(nothing_compiled, capsys, measured):
    argv = (*SIZES, "--batch=2")
    good, bad = (found(capsys, quantization.main, *argv, measured(trained(more))) for more in (0.01, 0.2))
    assert bad.holds is False and "+0.2000" in bad.evidence and "+0.0100" in good.evidence
    untold = found(capsys, quantization.main, *argv, measured(trained(ways=False)))
    assert untold.holds is None and "was not measured" in untold.evidence


def test_the_front_keeps_what_no_other_beats_in_both():
    def one(bits: float) -> quantization.Trained:
        quality = trained()
        row = Measured(BF16, 1, (bits, bits))
        return quantization.Trained(quality.models[0], row, smaller.trained_step(quality, quality.models[0], "h200"))

    dear, cheap, worse, tied = one(1.0), one(2.0), one(2.5), one(2.0)
    front = quantization._best([(dear, 4.0), (worse, 3.0), (cheap, 2.0), (tied, 2.5)])
    assert front == [(cheap, 2.0), (dear, 4.0)]


def test_the_packaged_models_are_those_that_were_trained():
    """A bill is of the sizes in the file, which must make as many parameters as were trained."""
    packaged = read(str(FILE))
    for model in packaged.models:
        step = smaller.trained_step(packaged, model, "h200", INT4)
        assert step.config.parameters == model.parameters and step.config.weights == "int4:128"
        assert (step.batch, step.context) == (1, 256) and "--weights=int4:128" in (step.command or "")
    other = replace(packaged.models[0], parameters=7)
    with pytest.raises(UsageError, match="model width-192 has 7 parameters, and sizes that make 1,820,352"):
        smaller.trained_step(packaged, other, "h200")


# ---- all of them


@pytest.mark.parametrize(
    ("driver", "argv", "said"),
    [
        (model_size, ["--models=nano"], "--models=nano: it must be at least two models of different sizes"),
        (model_size, ["--models=nano,none"], "--models=nano,none: --model=none: "),
        (model_size, ["--target=host"], "--target=host: its step times are not known"),
        (model_size, ["--model=mixtral-8x7b"], "--model=mixtral-8x7b: it must be a dense model"),
        (model_size, ["--models=gpt2-small,gpt2-xl"], "--context=4096: gpt2-small takes 1 to 1024 positions"),
        (smaller, ["--quality=none.json"], "--quality=none.json: cannot read it"),
        (smaller, ["--target=host"], "--target=host: its step times are not known"),
        (smaller, ["--batch=0"], "--batch"),
        (quantization, ["--quality=none.json"], "--quality=none.json: cannot read it"),
        (quantization, ["--model=deepseek-v3"], "--model=deepseek-v3: it must be a dense model"),
        (quantization, ["--model=nano", "--heads=1", "--kv_heads=1", "--width=8", "--mlp_width=8"], "wide enough"),
    ],
)
def test_wrong_flags_end_in_one_line_and_status_2(capsys, driver, argv, said):
    assert driver.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1
