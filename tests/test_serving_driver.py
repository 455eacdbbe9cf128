"""The command of the serving simulator, over bills that are made up: nothing is compiled."""

import json
from dataclasses import replace

import pytest
from stepbill.experiments.drivers import finding, serving, serving_day, sweep
from stepbill.experiments.drivers.serving import Lengths, Replica
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.profiling.assumptions import load
from stepbill.profiling.bill import Bill, Work

WEIGHTS, EACH, CAPACITY = 16 * 10**9, 131_072, 150 * 10**9
MILLI = 10**9  # picoseconds


def made_up(point):
    """A step of 4 ms that reads its cache at a picosecond for each 5 bytes; 0.05 ms for each token of a prompt."""
    batch, context = point.batch, point.context
    cache = batch * context * EACH
    time = 4 * MILLI + cache // 5 if point.step == "decode" else 4 * MILLI + context * MILLI // 20
    bill = Bill(
        {"chips": 1, "batch": batch, "context": context}, [], Work(picoseconds=time), [], Work(picoseconds=time)
    )
    bill.memory = {"peak_bytes": WEIGHTS + cache, "cache": cache, "weights": WEIGHTS, "capacity_bytes": CAPACITY}
    return bill if bill.memory["peak_bytes"] <= CAPACITY else Refusal(f"{point} does not fit")


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})


def run(capsys, *argv):
    status = serving.main(["--requests=300", *argv])
    out, err = capsys.readouterr()
    return status, out, err


def found(capsys, *argv):
    status, out, err = run(capsys, "--format=json", *argv)
    assert (status, err) == (0, "")
    return finding.Finding.from_json(json.loads(out))


def served(one):
    table = one.tables[0]
    return dict(zip((column.name for column in table.columns), table.rows[0], strict=True))


def test_step_times_are_those_of_the_bills_and_memory_is_what_they_leave(nothing_compiled, capsys):
    one = found(capsys, "--arrival_rate=4")
    titles = [table.title for table in one.tables]
    decode = one.tables[titles.index("Step times: decode")]
    assert [row[0] for row in decode.rows] == [1, 8, 32, 128]
    assert decode.rows[1][1] == pytest.approx((4 * MILLI + 8 * 1024 * EACH // 5) * 1e-12)
    setting = {name: value for name, value, _ in one.tables[titles.index("Setting")].rows}
    assert setting["room for caches"] == str((CAPACITY - WEIGHTS) // EACH)
    assert float(setting["a position"]) == EACH
    assert one.holds and "a token costs" in one.evidence and served(one)["replicas"] == 1


def test_more_traffic_needs_more_replicas_and_the_search_finds_how_many(nothing_compiled, capsys):
    few, many = (served(found(capsys, f"--arrival_rate={rate}", "--ttft=0.5")) for rate in (4, 60))
    assert few["replicas"] < many["replicas"] and many["in time"] >= 0.95
    fewer = found(capsys, "--arrival_rate=60", "--ttft=0.5", f"--replicas={many['replicas'] - 1}")
    assert served(fewer)["in time"] < 0.95 and fewer.holds is None


def test_a_seed_makes_the_result(nothing_compiled, capsys):
    flags = ("--prompt_tokens=lognormal:700,0.8,3000", "--output_tokens=100,300", "--cached_prompt=0.5", "--chunk=512")
    one, same, other = (found(capsys, *flags, f"--seed={seed}").to_json() for seed in (3, 3, 4))
    assert one == same and one["tables"] != other["tables"]


def test_the_table_ends_in_its_command(nothing_compiled, capsys):
    status, out, _ = run(capsys, "--ttft=2", "--cache=contiguous", "--assume=chip.dollars_per_hour.h200=7")
    assert status == 0
    assert "again     python -m stepbill.experiments.drivers.serving --requests=300 --ttft=2.0" in out
    assert "Seconds of a request" in out and "chip.dollars_per_hour.h200 = 7.0" in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--ttft=0.01"], "--ttft=0.01: ttft of 0.01 s is impossible: on a replica that does nothing else"),
        (["--tpot=0.001"], "--tpot=0.001: tpot of 0.001 s is impossible"),
        (["--prompt_tokens=0"], "--prompt_tokens=0: it must be a whole number from 1 on"),
        (["--output_tokens=lognormal:9,1,8"], "--output_tokens=lognormal:9,1,8: it must be"),
        (["--prompt_tokens=9000"], "--prompt_tokens=9000: with --output_tokens=256 a request may take 9256 positions"),
        (["--replicas=none"], "--replicas=none: it must be a whole number from 1 on, or auto"),
        (["--mesh=data=2"], "--mesh=data=2: it must be tensor=N or auto"),
        (["--within=1.5"], "--within=1.5: it must be a share"),
        (["--target=host"], "--target=host: its step times are not known"),
        (["--max_batch=500"], "--max_batch=500: it must be at most 128"),
        (["--assume=chip.dollars_per_hour.h200=-1"], "chip.dollars_per_hour.h200"),
        (["--arrival_rate=0"], "arrival_rate"),
    ],
)
def test_what_is_wrong_is_one_line(nothing_compiled, capsys, argv, text):
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert text in err and err.count("\n") == 1


def test_what_fits_nowhere_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: dict.fromkeys(points, Refusal("it needs --mesh=tensor=16")))
    assert run(capsys)[::2] == (2, "stepbill: it needs --mesh=tensor=16\n")


def test_a_replica_too_small_for_one_request_says_which_would_do(monkeypatch, capsys):
    def tight(point):
        bill = made_up(replace(point, batch=1))
        cache = point.batch * point.context * EACH
        bill.memory |= {"cache": cache, "peak_bytes": WEIGHTS + cache, "capacity_bytes": WEIGHTS + 1000 * EACH}
        return bill

    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: tight(point) for point in points})
    status, _, err = run(capsys, "--mesh=tensor=1")
    assert status == 2 and "does not fit" in err and "room for 1000 positions" in err


def test_steps_that_fit_in_no_memory_are_extended_and_none_falls():
    config = serving.flags.model_config(serving.SERVING.parse([]), "decode")
    points = serving.step_points(config, "h200", "", longest=8192)
    assert {point.step for point in points} == {"decode", "prefill"}
    larger = [sweep.Point(config, "decode", 128, context, "h200") for context in (1024, 4096, 8192)]
    points = [*points, *(point for point in larger if point not in points)]
    bills = {point: made_up(point) for point in points}
    refused = [(one.batch, one.context) for one in points if isinstance(bills[one], Refusal)]
    assert refused == [(128, 8192)]
    replica = Replica.of(points, bills)
    # As it is linear.
    assert replica.times.decode_picoseconds[128, 8192] == pytest.approx(4 * MILLI + 128 * 8192 * EACH / 5, rel=1e-9)
    assert "1 decode steps that fit in no memory" in replica.notes[0]
    first = next(point for point in points if (point.batch, point.context) == (8, 1024))
    bills[first].total.picoseconds = 1
    raised = Replica.of(points, bills)
    assert raised.times.decode_picoseconds[8, 1024] == raised.times.decode_picoseconds[1, 1024]
    assert "1 step times are raised" in raised.notes[-1]


def test_lengths_of_a_flag():
    assert Lengths.parse("f", "3,1").draw(5, None) == [3, 1, 3, 1, 3]
    assert Lengths.parse("f", "lognormal:5,0,9") == Lengths((), 5.0, 0.0, 9)


def test_traffic_of_a_log(nothing_compiled, capsys, tmp_path):
    """In the order of time, whatever the order of lines; at any other rate with distances in proportion."""
    log = tmp_path / "log.csv"
    log.write_text("output_tokens,seconds,prompt_tokens,who\n4,107.5,1000,b\n4,100,2000,a\n")
    one = found(capsys, f"--log={log}", "--mesh=", "--replicas=1", "--ttft=9", "--tpot=9")
    assert ("arrivals", str(1 / 7.5), f"requests/s, {log}") in one.tables[-3].rows
    assert serving._requests(serving.SERVING.parse([f"--log={log}"]), 1.0) == [
        serving.Request(0, 2000, 4),
        serving.Request(10**12, 1000, 4),  # as if one came a second
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seconds,prompt_tokens\n1,2\n", "each line must have numbers for seconds, prompt_tokens, output_tokens"),
        ("seconds,prompt_tokens,output_tokens\n1,2,x\n", "each line must have numbers"),
        ("seconds,prompt_tokens,output_tokens\n1,2,3\n1,2,3\n", "it must have requests at two times at least"),
        ("seconds,prompt_tokens,output_tokens\n1,2,0\n2,2,3\n", "of 1 token or more each"),
        ("seconds,prompt_tokens,output_tokens\nnan,2,1\n2,2,3\n", "at two times"),
        ("seconds,prompt_tokens,output_tokens\n1,9000,1\n2,2,3\n", "a request may take 9003 positions"),
    ],
)
def test_a_wrong_log_is_one_line(nothing_compiled, capsys, tmp_path, text, words):
    log = tmp_path / "log.csv"
    log.write_text(text)
    status, out, err = run(capsys, f"--log={log}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"--log={log}:" in err and words in err
    assert run(capsys, "--log=/no/such")[0] == 2


def test_a_published_day_is_set_beside_the_simulation(monkeypatch, capsys):
    def layered(point):  # all of it in proportion to the layers, but for the cache
        bill = made_up(replace(point, batch=1))
        cache = point.batch * point.context * 1000
        time = point.config.num_layers * (
            MILLI // 4 + (cache // 10 if point.step == "decode" else point.context * 1000)
        )
        memory = {"peak_bytes": point.config.num_layers * 10**9 + cache, "cache": cache, "capacity_bytes": CAPACITY}
        program = {"chips": 8, "model": point.config.name, "step": point.step, "batch": point.batch}
        return replace(bill, total=Work(picoseconds=time), memory=memory, program=program)

    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: layered(point) for point in points})
    assert serving_day.main(["--format=json"]) == 0
    found = finding.Finding.from_json(json.loads(capsys.readouterr().out))
    rates = {row[0]: row[1:] for row in found.tables[0].rows}
    day = serving_day.Day.of(load())
    assert day.prompt / day.output == pytest.approx((266 + 342) / 168, rel=1e-3)
    assert day.prompt + day.output / 2 == pytest.approx(4989, rel=1e-3)
    # 61 layers: what is not found in a cache is read, the smallest prompt at the least, one by each of eight chips.
    read = 61 * (MILLI // 4 + 2048 * 1000) * 1e-12 / 8
    assert rates["reading"][0] == pytest.approx(day.prompt / read, rel=1e-6)
    assert [rates["reading"][1], rates["writing"][1]] == [73_700, 14_800]
    step = 61 * (MILLI // 4 + 1024 * 4989 * 1000 // 10) * 1e-12
    assert step < 1 / 21.0
    assert rates["writing"][0] == pytest.approx(1024 / step, rel=0.01)
    assert found.holds == all(0.5 <= row[2] <= 2 for row in rates.values())
