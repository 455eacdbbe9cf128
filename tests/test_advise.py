"""The adviser, over bills that are made up and can be done by hand, and of a small model that is compiled."""

import json
from dataclasses import replace

import pytest
from stepbill.experiments import advise, alternatives, changes, quality
from stepbill.experiments.drivers import deployment, sweep
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.model.architectures import get
from stepbill.profiling.assumptions import Scenario, load
from stepbill.profiling.bill import Bill, Row, Work
from test_drivers import SIZES

TRAFFIC = {
    **{"input_tokens": 2048, "cached_tokens": 0, "output_tokens": 257, "reasoning_tokens": 0},
    **{"requests_per_second": 0.001, "ttft_seconds": 10.0, "tpot_seconds": 1.0},
}
MODEL = (*SIZES[:1], "--num_layers=2", *SIZES[2:])
BANDWIDTH = {"h200": 10**6, "b200": 2 * 10**6, "h100": 10**6 // 2}  # bytes a second, to be slow enough
ROOM = 32  # requests


def made_up(point):
    """A step at the bandwidth of its chip: weights, and in decode steps caches. A prompt: a millisecond a token."""
    config, batch, context = point.config, point.batch, point.context
    weights = config.parameters * {"full": 2.0, "int8": 1.0, "int4:128": 0.5}[config.weights]
    each = config.num_kv_heads * {"full": 2, "int8": 1}[config.cache_dtype]
    cache = batch * context * each
    per_second = BANDWIDTH[point.target] * (point.chips or 1)
    if point.step == "decode":
        work = Work(hbm_read={"weights": round(weights)}, picoseconds=round(weights / per_second * 1e12))
        cached = Work(hbm_read={"cache": cache}, picoseconds=round(cache / per_second * 1e12))
        rows = [Row("mlp/up", "forward", None, work, "hbm"), Row("attention/core", "forward", None, cached, "hbm")]
    else:
        work = Work(matmul=context, picoseconds=10**9 * context // (point.chips or 1))
        rows = [Row("mlp/up", "forward", None, work, "compute")]
    total = Work()
    for row in rows:
        total.add(row.work)
    one = Bill({"chips": point.chips or 1}, rows, Work(), [], total)
    capacity = round(weights) + ROOM * 2432 * 4
    one.memory = {"peak_bytes": round(weights) + cache, "cache": cache, "capacity_bytes": capacity}
    return one if one.memory["peak_bytes"] <= capacity or batch > 512 else Refusal(f"{point} does not fit")


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})
    monkeypatch.setattr(deployment, "MIDDLE", 16)
    monkeypatch.setattr(deployment, "MOST_BATCH", ROOM)


@pytest.fixture
def traffic(tmp_path):
    """traffic(field=value, ...) -> the flag of a file with that traffic."""

    def write(**changed):
        path = tmp_path / "my_traffic.json"
        path.write_text(json.dumps(TRAFFIC | changed))
        return f"--scenario={path}"

    return write


def advice(capsys, *argv):
    status = advise.main([*MODEL, "--chips=b200,h100", *argv, "--format=json"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return json.loads(out)


def by_name(found):
    return {one["name"]: one for one in found["alternatives"]}


def test_alternatives_are_ranked_by_the_dollars_they_save(nothing_compiled, capsys, traffic):
    found = advice(capsys, traffic())
    in_time = [one for one in found["alternatives"] if one["keeps_targets"]]
    assert [one["saved_share"] for one in in_time] == sorted((one["saved_share"] for one in in_time), reverse=True)
    now = found["now"]
    for one in found["alternatives"]:
        if one["runs"]:
            assert one["saved_share"] == pytest.approx(1 - one["dollars_per_request"] / now["dollars_per_request"])
            saved = (now["dollars_per_request"] - one["dollars_per_request"]) * 0.001 * 3600 * 8766 / 12
            assert one["saved_dollars_per_month"] == pytest.approx(saved)
    assert sum(one["share"] for one in found["drivers"]) == pytest.approx(1)
    assert sum(one["dollars_per_month"] for one in found["drivers"]) == pytest.approx(now["dollars_per_month"])


def test_savings_are_those_of_the_sums(nothing_compiled, capsys, traffic):
    found = advice(capsys, traffic(), "--batch=4")
    now, names = found["now"], by_name(found)
    parameters = get("nano")
    parameters = replace(parameters, num_layers=2, width=64, num_heads=4, num_kv_heads=2, mlp_width=64, head_width=16)
    step = (2 * parameters.parameters + 4 * 2176 * 4) / 10**6
    prompt = 2048e-3
    assert now["requests_in_flight"] == 4
    seconds = prompt + 256 * step / 4
    assert now["dollars_per_request"] == pytest.approx(seconds / 3600 * 3.5, rel=1e-6)

    def seconds_of(weights=2.0, each=4, reading=prompt, batch=4):
        return reading + 256 * (weights * parameters.parameters + batch * 2176 * each) / 10**6 / batch

    for name, took in {
        "weights in int8": seconds_of(weights=1.0),
        "weights in int4:128": seconds_of(weights=0.5),
        "cache in int8": seconds_of(each=2),
        "weights and cache in int8": seconds_of(weights=1.0, each=2),
        "attention: MQA": None,
        "prefix cache: 50% of each prompt": seconds_of(reading=prompt / 2),
    }.items():
        one = names[name]
        if took is not None:
            assert one["saved_share"] == pytest.approx(1 - took / seconds, rel=1e-5), name
    assert names["attention: MQA"]["risk"]["known"] == "measured here" and names["attention: MQA"]["needs"]
    assert names["batch: as large as is in time"]["requests_in_flight"] > 4
    half = next(one for name, one in names.items() if name.startswith("batch: half"))
    assert half["requests_in_flight"] == 2
    assert half["saved_share"] == pytest.approx(1 - seconds_of(batch=2) / seconds, rel=1e-5)


def test_another_chip_costs_what_its_hours_and_its_speed_say(nothing_compiled, capsys, traffic):
    argv = (traffic(), "--batch=4", "--assume=chip.dollars_per_hour.b200=3.5", "--assume=speculation.drafted=1")
    found = advice(capsys, *argv)
    b200, h100 = (by_name(found)[f"chip: {name}"] for name in ("b200", "h100"))
    assert b200["saved_share"] > 0 > h100["saved_share"] and b200["risk"]["known"] == "none"
    assert b200["target"] == "b200"
    # A prompt takes as long; half the time of decode steps is saved.
    reading = 2048e-3 / (found["now"]["dollars_per_request"] * 3600 / 3.5)
    assert b200["saved_share"] == pytest.approx((1 - reading) / 2, rel=1e-6)
    assert found["exact"].startswith("the cheapest change that keeps quality exactly: ")
    given = {one["name"] for one in found["assumptions"] if one["status"] == "given"}
    assert {"chip.dollars_per_hour.b200", "speculation.drafted"} <= given


def test_the_combination_has_the_best_of_each_part(nothing_compiled, capsys, traffic):
    found = advice(capsys, traffic(), "--batch=4", "--assume=chip.dollars_per_hour.b200=1.0")
    together = [one for one in found["alternatives"] if one["name"].startswith("together")]
    exact = [one for one in together if "together, exact" in one["name"]]
    safe = [one for one in together if "together, safe" in one["name"]]
    assert exact and safe and all("chip: b200" in one["name"] for one in together)
    assert all(one["risk"]["known"] == "none" for one in exact) and safe[0]["risk"]["known"] == "measured here"
    singles = by_name(found)
    assert max(one["saved_share"] for one in safe) >= max(
        singles[name]["saved_share"] for name in ("chip: b200", "weights and cache in int8")
    )


def test_how_a_risk_is_known(nothing_compiled, capsys, traffic):
    names = by_name(advice(capsys, traffic(reasoning_tokens=128)))
    trained = quality.read(str(quality.FILE))
    more = trained.ladder[0].in_way(quality.Way("int8")).more_than(trained.ladder[0].plain)
    int8 = names["weights in int8"]["risk"]
    assert int8["known"] == "measured here" and f"{more.value:+.5f}" in int8["text"] and "width-192" in int8["text"]
    assert int8["loss_share"] == pytest.approx(more.value / trained.ladder[0].plain.bits_per_byte.value)
    assert "published: perplexity +5.2%" in names["weights in int4:128"]["risk"]["text"]
    for name, title, said in (("mqa", "MQA", "num_kv_heads 1"), ("window", "window 1024, 1 in 6 global", "window 32")):
        (one, base), risk = trained.variant(name), names[f"attention: {title}"]["risk"]
        more = one.plain.more_than(base.plain)
        assert f"{more.value:+.3f} ± {more.standard_error:.3f}" in risk["text"] and said in risk["text"]
        assert "another seed" in risk["text"] and "; published: " in risk["text"]
        assert risk["loss_share"] == pytest.approx(more.value / base.plain.bits_per_byte.value)
    assert names["attention: MLA"]["risk"]["known"] == "published"
    assert names["no reasoning tokens"]["risk"]["known"] == "unknown"
    assert names["no reasoning tokens"]["saved_share"] > names["half of the reasoning tokens"]["saved_share"] > 0
    assert names["smaller model: half the width"]["risk"]["known"] == "measured here"
    speculation = next(one for name, one in names.items() if name.startswith("speculation"))
    assert speculation["risk"]["known"] == "none" and speculation["needs"] == "training the draft"


def test_a_model_of_the_family_is_the_smaller_one_and_guesses():
    assert [one.name for one in changes.family(get("llama3-70b"))] == ["llama3-8b"]
    assert not changes.family(get("llama3-8b"))
    draft, needs = changes._draft(get("llama3-70b"))
    assert (draft.name, needs) == ("llama3-8b", "")
    half, needs = changes._draft(get("llama3-8b"))
    assert half.num_layers == 16 and half.width == 2048 and needs
    (small,) = changes._smaller(get("llama3-70b"), quality.read(str(quality.FILE)), load())
    assert small.name == "smaller model: llama3-8b" and small.risk.known == "published"
    assert changes._draft(get("deepseek-v3")) is None and not list(
        changes._architectures(get("deepseek-v3"), quality.read(str(quality.FILE)))
    )


def test_what_is_late_or_does_not_fit_is_listed_with_why(nothing_compiled, monkeypatch, capsys, traffic):
    def tight(point):
        return Refusal("it needs --mesh=tensor=4") if point.target == "h100" else made_up(point)

    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: tight(point) for point in points})
    found = advice(capsys, traffic(tpot_seconds=0.3))
    *others, last = found["alternatives"]
    assert last["name"] == "chip: h100" and not last["runs"] and "tensor=4" in last["reason"]
    assert last["dollars_per_request"] is None
    late = by_name(found)["batch: all that memory holds"]
    assert late["runs"] and not late["keeps_targets"] and "misses the latency: tpot_seconds" in late["reason"]
    assert late["saved_share"] > 0
    assert all(one["keeps_targets"] or one is late or not one["runs"] for one in others)


def test_more_chips_are_taken_until_it_is_in_time(nothing_compiled, capsys, traffic):
    found = advice(capsys, traffic(tpot_seconds=0.09))
    assert found["now"]["chips_per_replica"] == 2 and found["now"]["mesh"] == "tensor=2"
    half = by_name(found)["half the chips a replica"]
    assert not half["keeps_targets"] and "the fastest step takes" in half["reason"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ttft_seconds": 1e-6}, "the first token takes"),
        ({"tpot_seconds": 1e-6}, "the fastest step takes"),
    ],
)
def test_what_nothing_keeps_is_an_error(nothing_compiled, capsys, traffic, changed, said):
    assert advise.main([*MODEL, "--chips=b200", traffic(**changed)]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and "is in time" in err and err.count("\n") == 1


def test_what_fits_nowhere_is_an_error(monkeypatch, capsys, traffic):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: dict.fromkeys(points, Refusal("it needs --mesh=tensor=4")))
    assert advise.main([*MODEL, "--mesh=", traffic()]) == 2
    out, err = capsys.readouterr()
    assert not out and "it needs --mesh=tensor=4" in err and err.count("\n") == 1


def test_the_table_says_it_in_its_first_lines(nothing_compiled, capsys, traffic):
    assert advise.main([*MODEL, "--chips=b200", traffic()]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("What dominates the cost of my_traffic with nano")
    assert "the cheapest change that keeps quality exactly: " in out[:500] and "of the cost; the largest part is" in out
    assert "again python -m stepbill.experiments.advise --scenario=" in out and "measured here" in out


def test_without_a_price_nothing_can_be_ranked_but_all_is_said(nothing_compiled, capsys, traffic):
    found = advice(capsys, traffic(), "--assume=chip.dollars_per_hour.h200=0")
    assert found["now"]["dollars_per_request"] == 0 and found["alternatives"]
    assert all(one["saved_share"] is None for one in found["alternatives"])


def test_the_four_scenarios_and_a_file_are_traffic(traffic):
    known = load()
    for name in ("long-context-summarization", "coding-agent", "chat-support", "realtime-voice"):
        assert advise.scenario(name, known).input_tokens >= 1000
    path = traffic().removeprefix("--scenario=")
    assert advise.scenario(path, known) == Scenario(**TRAFFIC)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "it is no JSON"),
        ("[]", "it must be an object"),
        ("{}", "it has no input_tokens; it must have all of"),
        (json.dumps(TRAFFIC | {"input_token": 1}), "there is no field 'input_token'; did you mean input_tokens?"),
        (json.dumps(TRAFFIC | {"input_tokens": -5}), "input_tokens is -5; it must be a whole number from 1 on"),
        (json.dumps(TRAFFIC | {"input_tokens": 1.5}), "input_tokens is 1.5; it must be a whole number"),
        (json.dumps(TRAFFIC | {"input_tokens": "9"}), "input_tokens is '9'; it must be a whole number"),
        (json.dumps(TRAFFIC | {"output_tokens": 10**400}), "it must be a whole number from 1 on"),
        (json.dumps(TRAFFIC | {"output_tokens": True}), "output_tokens is True; it must be a whole number"),
        (json.dumps(TRAFFIC | {"cached_tokens": 4096}), "cached_tokens is 4096; it must be at most input_tokens, 2048"),
        (json.dumps(TRAFFIC | {"ttft_seconds": float("nan")}), "ttft_seconds is nan; it must be a positive number"),
        (json.dumps(TRAFFIC | {"tpot_seconds": 0}), "tpot_seconds is 0; it must be a positive number"),
        (json.dumps(TRAFFIC | {"requests_per_second": -1}), "requests_per_second is -1; it must be a positive"),
        (json.dumps(TRAFFIC | {"requests_per_second": float("inf")}), "requests_per_second is inf; it must be"),
    ],
)
def test_a_wrong_scenario_is_one_line(capsys, tmp_path, text, said):
    path = tmp_path / "traffic.json"
    path.write_text(text)
    assert advise.main([f"--scenario={path}"]) == 2
    out, err = capsys.readouterr()
    assert not out and said in err and f"--scenario={path}: " in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--scenario: it needs a value; long-context-summarization, coding-agent, chat-support, realtime-voice"),
        (["--scenario=chat"], "--scenario=chat: there is no such scenario; long-context-summarization"),
        (["--scenario=no.json"], "--scenario=no.json: cannot read it: no such file"),
        (["--scenario=chat-support", "--target=host"], "--target=host: its step times are not known"),
        (["--scenario=chat-support", "--chips=h1000"], "--chips=h1000: target is 'h1000'; it must be one of"),
        (["--scenario=chat-support", "--chips=host"], "--chips=host: --target=host: its step times are not known"),
        (["--scenario=chat-support", "--mesh=data=2"], "--mesh=data=2: it must be tensor=N or auto"),
        (["--scenario=chat-support", "--batch=0"], "--batch"),
        (["--scenario=chat-support", "--model=gpt2-small"], "a request takes 2816 positions; gpt2-small has 1024"),
        (["--scenario=chat-support", "--assume=chip.dollars_per_hour.h200=-1"], "it must be a number of at least 0"),
        (["--scenario=chat-support", "--assume=scenario.chat-support.cached_tokens=9999"], "it must be at most input"),
        (["--scenario=chat-support", "--assume=scenario.chat-support.tpot_seconds=0"], "at least 1e-05 (s)"),
    ],
)
def test_wrong_flags_are_one_line(capsys, argv, said):
    assert advise.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1


def test_of_a_compiled_small_model(cache, capsys, monkeypatch, traffic):
    monkeypatch.setattr(deployment, "MOST_BATCH", 64)
    argv = (traffic(input_tokens=256, output_tokens=65), "--num_layers=1", "--target=h200", "--chips=", "--jobs=1")
    monkeypatch.setattr(alternatives, "changes", lambda asked: list(changes._prefix(asked.now.traffic)))
    monkeypatch.setattr(alternatives, "meshes", lambda *_: [])
    found = advice(capsys, *argv)
    half = by_name(found)["prefix cache: 50% of each prompt"]
    # Never dearer, and of what is read no more is saved than the half of it.
    assert half["runs"] and half["keeps_targets"] and -0.01 < half["saved_share"] < 0.5
    assert half["needs"] == "prompts of which the first 128 tokens came before"
    assert found["now"]["chips"] == 1 and found["now"]["tpot_seconds"] > 0
    assert {one["phase"] for one in found["drivers"]} == {"prefill", "decode"}
    assert found["notes"][0] == "step times are the roofline's: a lower bound"
    assert advice(capsys, *argv) == found
