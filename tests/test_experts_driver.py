"""The driver of experts: over bills that are made up and can be done by hand, and of a small model that is compiled."""

import findings
import pytest
from stepbill.experiments.drivers import experts, sweep
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.model.architectures import ARCHITECTURES
from stepbill.profiling.bill import Bill, Row, Work

MODEL = ARCHITECTURES["qwen3-30b-a3b"]
E, k, WIDTH = 128, 8, 768
COLUMN = 6 * 2048 * 48  # of a feed-forward, all layers: its bytes, and a token's FLOPs
REST, EACH = 2 * 10**9, 98_304  # bytes of other weights, and a token's FLOPs with them; of a position
ROUTING = 10**6  # picoseconds
PEAK, BANDWIDTH = 989 * 10**12, 4_800_000_000_000
RIDGE = PEAK / BANDWIDTH
HOUR, MILLION = 3600, 1_000_000


def made_up(point):
    """A step at the roofline of an H200: up to 128 tokens go through every expert, of which fewer are read below 16."""
    sparse, decode = point.config.experts is not None, point.step == "decode"
    tokens = point.batch if decode else point.context
    cache = point.batch * point.context * EACH if decode else 0
    routed = tokens * (k * WIDTH if sparse else point.config.mlp_width) * COLUMN
    share = min(1, tokens * k / E)
    held = (E * WIDTH if sparse else point.config.mlp_width) * COLUMN
    rows = [made_row("attention/qkv", tokens * REST, REST, cache)]
    if sparse:
        rows.append(made_row("moe/experts", routed, int(held * share)))
        rows.append(Row("moe/router", "forward", None, Work(picoseconds=ROUTING), "hbm"))
        if tokens <= E:
            rows.append(made_row("moe/experts", tokens * E * WIDTH * COLUMN - routed, 0, tax="masked"))
    else:
        rows.append(made_row("mlp/up", routed, held))
    total = Work()
    for row in rows:
        total.add(row.work)
    bill = Bill({"chips": 1, "batch": point.batch, "target": point.target}, rows, Work(), [], total)
    bill.program["experts"] = {"dispatch": "all" if tokens <= E else "blocks"} if sparse else {}
    bill.memory = {"peak_bytes": held + REST + cache, "cache": cache, "weights": held + REST, "capacity_bytes": 10**12}
    dollars = total.seconds / HOUR / tokens * MILLION
    bill.price = {"chip_dollars_per_hour": 1.0, "dollars_per_million_tokens": dollars}
    return bill


def made_row(component, flops, weights, cache=0, tax=None):
    seconds = 0 if tax else max(flops / PEAK, (weights + cache) / BANDWIDTH)
    read = {"weights": weights, "cache": cache}
    return Row(component, "forward", tax, Work(flops, hbm_read=read, picoseconds=round(seconds * 1e12)), "hbm")


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})


def found(capsys, *argv):
    return findings.found(capsys, experts.main, *argv)


def made(capsys, *argv):
    return found(capsys, "--model=qwen3-30b-a3b", "--mesh=", *argv)


def table(one, start):
    """Its table of that title, as a dictionary of column to cell for each row."""
    (chosen,) = (table for table in one.tables if table.title.startswith(start))
    names = [str(column) for column in chosen.columns]
    return [dict(zip(names, row, strict=True)) for row in chosen.rows]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3"])
def test_dense_models_have_the_parameters_that_they_must(name):
    config = ARCHITECTURES[name]
    for asked in (config.active_parameters, config.parameters):
        other = experts.dense(config, asked, "dense")
        assert other.experts is None and other.mlp_width % 128 == 0
        assert abs(other.parameters / asked - 1) <= experts.WITHIN
        assert other.name.startswith(name) and (other.num_layers, other.width) == (config.num_layers, config.width)


def test_as_many_active_is_as_wide_as_the_experts_of_a_token():
    assert experts.dense(MODEL, MODEL.active_parameters, "").mlp_width == k * WIDTH
    # 128 routers of 2,048 in each layer have 128/3 columns; 43 more are within no multiple of 128.
    assert experts.dense(MODEL, MODEL.parameters, "").mlp_width == E * WIDTH


def test_a_token_costs_what_a_dense_one_does_where_as_much_is_read(nothing_compiled, capsys):
    one = made(capsys, "--batches=1,512", "--context=256")
    alone, many, _ = table(one, "A million tokens")
    rest, wide = REST + 256 * EACH, k * WIDTH * COLUMN
    # One token reads k experts, and is as dear as the dense model of as many, but for the routing.
    least = (rest + wide) / BANDWIDTH
    assert alone["chip-time of a token [s]"] == pytest.approx(least + 1e-6)
    assert alone["over dense, active [x]"] == pytest.approx((least + 1e-6) / least)
    assert alone["over dense, total [x]"] == pytest.approx((least + 1e-6) / ((rest + E * WIDTH * COLUMN) / BANDWIDTH))
    # 512 read all experts; the dense feed-forward multiplies for longer than it reads.
    attends = max(512 * REST / PEAK, (REST + 512 * 256 * EACH) / BANDWIDTH)
    mixture = attends + E * WIDTH * COLUMN / BANDWIDTH + 1e-6
    over = many["over dense, active [x]"]
    assert over == pytest.approx(mixture / (attends + 512 * wide / PEAK)) and over > experts.NEAR
    assert many["mixture, M tokens [$]"] == pytest.approx(mixture / 512 * MILLION * 3.5 / HOUR)
    # And so do 256 of a prompt, without a cache.
    reads = max(256 * REST / PEAK, REST / BANDWIDTH)
    most = (reads + E * WIDTH * COLUMN / BANDWIDTH + 1e-6) / (reads + 256 * wide / PEAK)
    assert one.holds is False and one.factor == pytest.approx(most) and "in a prompt" in one.headline


def test_alone_and_in_a_long_prompt_the_claim_holds(nothing_compiled, capsys):
    one = made(capsys, "--batches=1", "--context=16384")
    assert one.holds and one.factor == pytest.approx(1, abs=0.01)
    *_, prompt = table(one, "Experts")
    assert prompt["chosen, expected [%]"] == pytest.approx(1) and prompt["step"] == "prefill"


def test_what_is_read_of_the_experts_beside_what_is_expected(nothing_compiled, capsys):
    one = made(capsys, "--batches=1,8,32,512", "--context=256")
    *rows, _ = table(one, "Experts: a token goes to 8 of 128")
    assert [row["chosen, expected [%]"] for row in rows] == pytest.approx(
        [1 / 16, 1 - (15 / 16) ** 8, 1 - (15 / 16) ** 32, 1]
    )
    assert [row["read [%]"] for row in rows] == pytest.approx([1 / 16, 1 / 2, 1, 1])
    assert [row["FLOPs over routed [x]"] for row in rows] == pytest.approx([16, 16, 16, 1])
    assert [row["dispatch"] for row in rows] == ["all", "all", "all", "blocks"]
    first, eight, *_ = table(one, "A million tokens")
    assert rows[0]["routing of the time [%]"] == pytest.approx(1e-6 / first["chip-time of a token [s]"])
    assert rows[0]["of the predicted [%]"] is None  # for nothing is
    saved = (1 / 2 - rows[1]["chosen, expected [%]"]) * E * WIDTH * COLUMN / BANDWIDTH / 8
    ratio = eight["with the chosen read alone [x]"] / eight["over dense, active [x]"]
    assert ratio == pytest.approx(1 - saved / eight["chip-time of a token [s]"])
    assert rows[0]["masked of all FLOPs [%]"] == pytest.approx(15 / 16 / (1 + REST / (E * WIDTH * COLUMN)))
    read = dict(one.plots[1].lines)["read by the program"]
    assert [share for _, share in read] == [row["read [%]"] for row in rows]


def test_where_memory_stops_being_the_bound(nothing_compiled, capsys):
    one = made(capsys, "--batches=1,512", "--context=16")
    mixture, active, total = table(one, "Where memory stops")
    # Each expert has k/E of the tokens.
    assert mixture["feed-forward, from batch"] == round(RIDGE * E / k)
    assert active["feed-forward, from batch"] == total["feed-forward, from batch"] == round(RIDGE)
    each = (REST + k * WIDTH * COLUMN) / RIDGE - 16 * EACH
    assert mixture["whole step, from batch"] == round((REST + E * WIDTH * COLUMN) / each)
    assert "Memory bounds its experts up to 3,297 sequences, the dense MLP up to 206 sequences" in one.evidence
    few = table(made(capsys, "--batches=1", "--context=16"), "Where memory stops")  # in which 8 experts are read
    assert few[0]["feed-forward, from batch"] == mixture["feed-forward, from batch"]
    long = made(capsys, "--batches=1,64", "--context=4096")  # whose cache alone has more bytes than that
    assert [row["whole step, from batch"] for row in table(long, "Where memory stops")][:2] == [None, None]


def test_footprint(nothing_compiled, capsys):
    mixture, active, total = table(made(capsys, "--batches=1", "--context=256"), "Alike")
    assert mixture["size [params]"] == MODEL.parameters and mixture["of what it must be [x]"] == 1
    assert active["of what it must be [x]"] == pytest.approx(0.9962, abs=1e-4)
    assert total["of what it must be [x]"] == total["size [params]"] / MODEL.parameters
    assert [row["chips, one sequence"] for row in (mixture, active, total)] == [1, 1, 1]
    assert mixture["weights [B]"] == REST + E * WIDTH * COLUMN == total["weights [B]"]
    assert active["weights [B]"] == REST + k * WIDTH * COLUMN


def test_a_batch_that_only_the_small_model_holds_is_left_out(monkeypatch, capsys):
    def outcomes(points, *_):
        return {
            point: Refusal("too large") if point.batch == 8 and "total" in point.config.name else made_up(point)
            for point in points
        }

    monkeypatch.setattr(sweep, "sweep", outcomes)
    one, eight, prompt = table(made(capsys, "--batches=1,8", "--context=256"), "A million tokens")
    assert eight["over dense, total [x]"] is eight["dense, total, M tokens [$]"] is None
    assert None not in {*one.values(), *prompt.values(), eight["over dense, active [x]"]}


def test_of_a_compiled_small_model(cache, capsys):
    small = ("--num_layers=1", "--width=128", "--heads=4", "--kv_heads=2", "--head_width=32", "--vocabulary=512")
    argv = ("--model=qwen3-30b-a3b", *small, "--target=h200", "--batches=2,32", "--context=256", "--mesh=")
    one = found(capsys, *argv)
    few, many, prompt = table(one, "Experts")
    assert [row["dispatch"] for row in (few, many, prompt)] == ["blocks", "all", "blocks"]
    # 16 choices are 16 experts at most, and all of 32 sequences read all.
    assert few["read [%]"] == pytest.approx(16 / 128, rel=0.02) and many["read [%]"] == pytest.approx(1, rel=0.02)
    assert few["FLOPs over routed [x]"] == 1 and many["FLOPs over routed [x]"] == pytest.approx(16)
    work = table(one, "FLOPs and HBM bytes")[1]
    assert work["mixture [FLOP]"] > work["dense, active [FLOP]"]
    assert work["mixture [B]"] == pytest.approx(work["dense, total [B]"], rel=0.1) and one.holds is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model=llama3-8b"], "--model=llama3-8b: it must be a mixture of experts, such as gpt-oss-20b"),
        (["--batches=0"], "--batches=0: it must be whole numbers from 1 on"),
        (["--target=host"], "--target=host: its step times are not known; it must be a chip"),
        (["--dispatch=some"], "some"),
    ],
)
def test_wrong_flags_are_one_line(nothing_compiled, capsys, argv, said):
    assert experts.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1
