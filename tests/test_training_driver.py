"""The training driver: over bills that are made up and can be done by hand, and of a small model that is compiled."""

import findings
import pytest
from findings import table
from stepbill.experiments.drivers import sweep, training
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.model.architectures import get
from stepbill.profiling import economics
from stepbill.profiling.bill import Bill, Row, Work
from test_drivers import SIZES

N = get("llama3-8b").parameters
PEAK, HOUR = 989 * 10**12, 3600
TOKENS = 10**12
CHIP = 2.0  # dollars an hour
# Of the step's FLOPs at the peak: attention above 6 N, what is computed again, the waiting, and more than the least.
ATTENTION, AGAIN, MEMORY, LINKS, MORE = 0.05, 0.2, 0.1, 0.05, 0.15
PLAIN = {
    **{"training.mfu": 0.5, "training.experiments": 0.5, "training.evaluation": 0.1},
    **{"training.data_dollars_per_trillion_tokens": 1000, "failure.checkpoint_seconds": 180},
    **{"failure.restart_seconds": 360, "failure.interruptions": 24, "failure.days": 10, "failure.chips": 200},
    **{"chip.dollars_per_hour.h200": CHIP},
    # What follows it: next to nothing, unless a test says more.
    **{"post.sft.examples": 0, "post.preference.pairs": 0, "post.policy.answers": 1},
}


SERVED = {"score": 1.0, "prefill": 0.25, "decode": 0.01}  # seconds


def served(point):
    """A step of one chip that takes as long whatever its size."""
    total = Work(picoseconds=round(SERVED[point.step] * 1e12))
    about = {"chips": point.chips, "batch": point.batch, "context": point.context, "target": point.target}
    return Bill(about, [Row("mlp/up", "forward", None, total, "compute")], Work(), [], total)


def made_up(point):
    """A step whose time is stated shares of that of its 6 N D at the peak."""
    if point.step != "train":
        return served(point)
    config, chips = point.config, point.chips or 32  # of --mesh=auto
    batch = point.batch or chips
    least = 6 * config.active_parameters * batch * point.context / chips
    time = least / PEAK * 1e12
    ideal = least * (1 + ATTENTION)
    rows = [
        Row("mlp/up", "forward", None, Work(picoseconds=round(time * (1 + ATTENTION + MORE))), "compute"),
        Row("mlp/up", "recompute", None, Work(picoseconds=round(time * AGAIN)), "hbm"),
        Row("mlp/norm", "forward", None, Work(picoseconds=round(time * MEMORY)), "hbm"),
        Row("embed", "forward", None, Work(picoseconds=round(time * LINKS), link_bytes=10**9), "link"),
    ]
    total = sum((row.work for row in rows), Work())
    about = {"chips": chips, "batch": batch, "context": point.context, "target": point.target}
    return Bill(about, rows, Work(), [], total, ideal_flops=round(ideal), memory={"peak_bytes": 10**10})


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})


def found(capsys, *argv, **assumed):
    return findings.found(
        capsys, training.main, *argv, *(f"--assume={name}={value}" for name, value in assumed.items())
    )


def lines(one):
    return {row["line"]: row for row in table(one, "A run, line by line")}


LEAST = 6 * N * TOKENS / PEAK / HOUR * CHIP  # dollars of 6 N D at the peak


def test_a_run_line_by_line(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1", "--chips=200", **PLAIN)
    useful = 1.05 / 0.5  # model FLOPs at half of the peak
    over = {name: row["over 6 N D"] for name, row in lines(one).items()}
    expected = {
        **{"6 N D at the peak": 1, "attention": ATTENTION, "computed again": AGAIN, "waiting for memory": MEMORY},
        **{"waiting for links": LINKS, "more FLOPs than the least": MORE},
        "slower than the roofline": useful - (1 + ATTENTION + AGAIN + MEMORY + LINKS + MORE),
        # A failure in 10 hours, a checkpoint an hour: 3 minutes and half an hour in ten, and 6 minutes each time.
        **{"checkpoints": useful / 20, "lost work": useful / 20, "restarts": useful / 100},
        **{"experiments": useful / 2, "evaluation": useful / 10, "data": 1000 / LEAST},
    }
    after = {name: over.pop(name) for name in ("fine-tuning", "preferences", "rewards")}
    assert after["fine-tuning"] == after["preferences"] == 0 and 0 < after["rewards"] < 1e-4
    expected["the run"] = sum(expected.values()) + after["rewards"]
    assert over == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert lines(one)["6 N D at the peak"]["cost"] == pytest.approx(LEAST)
    assert one.factor == pytest.approx(expected["the run"]) and one.holds is False
    assert one.headline == f"2.1 times 6 N D at the peak, and {one.factor:.1f} with all around the steps"
    assert "--assume=chip.dollars_per_hour.h200=2.0" in one.command and "--tokens=1" in one.command


def test_dollars_add_up_to_the_picodollar(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1", **PLAIN)
    *parts, whole = (round(row["cost"] * economics.PICO) for row in table(one, "A run, line by line"))
    assert sum(parts) == pytest.approx(whole, rel=1e-15)


def test_the_claim_holds_where_nothing_else_costs(nothing_compiled, capsys, monkeypatch):
    for name in ("ATTENTION", "AGAIN", "MEMORY", "LINKS", "MORE"):
        monkeypatch.setitem(globals(), name, 0.0)
    nothing = {"training.mfu": 1, "training.experiments": 0, "training.evaluation": 0, "failure.checkpoint_seconds": 1}
    nothing |= {"training.data_dollars_per_trillion_tokens": 0, "failure.restart_seconds": 0}
    one = found(capsys, "--runs=", "--tokens=1", "--chips=8", **PLAIN | nothing)
    assert one.holds and 1 < one.factor < 1.01


def test_a_stated_mfu_beyond_the_roofline_is_not_taken(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1", **PLAIN | {"training.mfu": 0.9})
    assert lines(one)["slower than the roofline"]["cost"] == pytest.approx(0, abs=1e-6)
    (step, *_) = table(one, "Compiled training steps")
    assert step["MFU"] == pytest.approx(1.05 / 1.55) and "runs reach 68%" in one.evidence


def test_what_follows_pass_by_pass(nothing_compiled, capsys):
    amounts = {
        **{"post.sft.examples": 1_000_000, "post.sft.tokens": 500, "post.sft.epochs": 2},
        **{"post.preference.pairs": 100_000, "post.preference.tokens": 8192, "post.preference.epochs": 3},
        **{"post.policy.answers": 32_000, "post.policy.prompt_tokens": 192, "post.policy.answer_tokens": 8000},
        **{"post.policy.group": 16, "post.policy.judged": 0.5, "post.policy.epochs": 2, "serving.roofline_share": 0.5},
    }
    one = found(capsys, "--runs=", "--tokens=1", "--rollouts=64", **PLAIN | amounts)
    rows = {(row["stage"], row["pass"]): row for row in table(one, "After the run")}
    slower = 1.05 / 1.55 / 0.5  # the step's MFU at the roofline over that of the run
    token = 6 * N / PEAK * 1.55 * slower / HOUR  # hours of a chip, to train one
    score = 1 / 8192 * slower / HOUR
    pairs, answers = 2 * 100_000 * 8192, 32_000 * 8192
    hours = {
        ("fine-tuning", "update"): 1e9 * token,
        **{("preferences", "reference"): pairs * score, ("preferences", "update"): 3 * pairs * token},
        ("rewards", "rollout: reading"): 32_000 / 16 * 0.25 * 2 / HOUR,
        ("rewards", "rollout: writing"): 32_000 * 8000 / 64 * 0.01 * 2 / HOUR,
        **{("rewards", "reward"): answers / 2 * score, ("rewards", "reference"): answers * score},
        **{("rewards", "as written"): answers * score, ("rewards", "update"): 2 * answers * token},
    }
    assert {key: row["time"] for key, row in rows.items()} == pytest.approx(hours, rel=1e-6)
    assert rows["preferences", "update"]["step"] == "train by preference, batch 16, 8192 positions"
    writing = rows["rewards", "rollout: writing"]
    assert writing["step"] == "decode, batch 64, 4192 positions"  # in the middle of the answer
    assert writing["of its stage"] == pytest.approx(
        writing["time"] / sum(t for (s, _), t in hours.items() if s == "rewards")
    )
    for stage in ("fine-tuning", "preferences", "rewards"):
        of_it = sum(time for (name, _), time in hours.items() if name == stage)
        assert lines(one)[stage]["cost"] == pytest.approx(of_it * CHIP)
    commands = [command for table in one.tables if table.title.startswith("After") for command in table.commands]
    assert any("--step=score" in one for one in commands) and any("--objective=policy" in one for one in commands)
    v3, r1, ours = table(one, "Post-training beside")
    assert v3["after / before"] == pytest.approx(5 / 2664) and r1["after / before"] == pytest.approx(147 / 2664)
    assert ours["after"] == pytest.approx(sum(hours.values()))


def test_a_model_that_fits_no_host_takes_as_many_chips_as_it_needs(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--model=llama3-70b", "--target=h100", "--tokens=1")
    step, dots = table(one, "Compiled training steps")  # and no twice as many sequences of nobody knows how many
    assert (step["chips"], step["tokens of a chip"], dots["step"]) == (32, 8192, "--remat=dots")
    assert "--mesh=auto" in one.tables[1].commands[0]
    updates = [row["step"] for row in table(one, "After the run") if row["pass"] == "update"]
    assert updates == ["train, batch auto, 8192 positions"] * 3  # whose loss is another, of the same products


def test_what_a_step_waits_for_and_sends(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1", "--sequences=2", **{"training.network_bytes_per_second": 1e10})
    step, twice, dots = table(one, "Compiled training steps")
    assert (step["step"], dots["step"], step["chips"]) == ("the run's", "--remat=dots", 8)
    assert (step["tokens of a chip"], twice["tokens of a chip"]) == (16_384, 32_768)
    assert step["again"] == pytest.approx(AGAIN / 1.55) and step["memory"] == 10**10
    assert step["on links"] == pytest.approx(LINKS / 1.55) and step["over 6 N"] == pytest.approx(1.05)
    assert step["between hosts"] == pytest.approx(0.1)
    (of_step, *_) = one.tables[1].commands
    assert "--step=train" in of_step and "--remat=full" in of_step and "--mesh=data=8" in of_step


def test_published_runs_beside_compiled_steps(nothing_compiled, capsys):
    one = found(capsys, "--tokens=1", "--runs=llama3-405b")
    runs = {row["run"]: row for row in table(one, "Published runs")}
    big = runs["llama3-405b"]
    assert big["10²¹ FLOPs, 6 N D"] == pytest.approx(6 * 405e9 * 15.6e12 / 1e21)
    assert big["at the peak"] == pytest.approx(6 * 405e9 * 15.6e12 / PEAK / HOUR)
    assert big["published"] == 30_840_000 and big["MFU"] == pytest.approx(big["at the peak"] / 30_840_000)
    of_step = 6 * get("llama3-405b").parameters * 15.6e12 / PEAK / HOUR * 1.55
    assert big["at the roofline"] == pytest.approx(of_step) and big["over roofline"] == pytest.approx(30.84e6 / of_step)
    assert runs["deepseek-v3"]["cost"] == 5_576_000 and runs["deepseek-v3"]["at the roofline"] is None
    assert runs["gpt3-175b"]["published"] is None
    figures = {row["figure"]: row["verdict"] for row in table(one, "Published figures")}
    assert len(figures) == len(training.FIGURES) and set(figures.values()) == {"agrees"}


def test_failures_by_the_number_of_chips(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1")
    rows = {row["chips"]: row for row in table(one, "Failures")}
    assert rows[16_384]["between failures"] == pytest.approx(54 * 24 / 419)
    assert rows[16_384]["between checkpoints"] == pytest.approx(13.6, abs=0.03)
    assert rows[16_384]["checkpoints and lost work"] == pytest.approx(0.0734, abs=1e-4)
    for few, many in ((1024, 4096), (4096, 16_384)):  # four times as many fail four times as often: Young's root
        assert rows[many]["checkpoints and lost work"] == pytest.approx(2 * rows[few]["checkpoints and lost work"])
    (fit,) = one.fits.values()
    assert 0.5 < fit.exponent < 1


def test_experiments(nothing_compiled, capsys):
    one = found(capsys, "--runs=", "--tokens=1", **PLAIN | {"training.tokens_a_parameter": 10})
    for row, times in zip(table(one, "Small experiments"), training.LADDER, strict=True):
        small = N // times
        assert row["runs"] == pytest.approx(0.5 * N * TOKENS / (10 * small**2))
    assumed, low, high = table(one, "The run with all")
    assert (assumed["over the run"], low["over the run"], high["over the run"]) == (0.5, 2.3, 9)
    assert assumed["cost"] == pytest.approx(lines(one)["the run"]["cost"])
    assert high["cost"] - low["cost"] == pytest.approx(6.7 * 1.05 / 0.5 * LEAST)


def test_without_tokens_as_many_as_the_parameters_ask_for(nothing_compiled, capsys):
    one = found(capsys, "--model=llama2-7b", "--context=2048", "--runs=")
    assert f"6.738e+09 x {20 * get('llama2-7b').parameters:.4g} FLOPs" in lines(one)["6 N D at the peak"]["how"]


def test_a_step_that_was_refused(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: Refusal("does not fit: 1 GB") for point in points})
    assert training.main(["--runs="]) == 2
    assert capsys.readouterr().err == "stepbill: does not fit: 1 GB\n"


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--tokens=-1"], "--tokens=-1: it must be more than 0 trillion"),
        (["--runs=gpt-5"], "--runs=gpt-5: gpt-5 is none of llama1-65b, llama3-8b, "),
        (["--mesh=auto", "--model=llama3-405b", "--sequences=2"], "--sequences=2: it needs a --mesh that is not auto"),
        (["--target=host"], "--target=host: its step times are not known"),
        (["--chips=100000000"], "--chips=100000000: it must be less: one fails each 1.82 s, and no work is done"),
    ],
)
def test_wrong_flags(nothing_compiled, argv, message, capsys):
    assert training.main(["--runs=", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"stepbill: {message}") and err.count("\n") == 1


def test_of_a_compiled_small_model(cache, capsys):
    short = {"post.policy.prompt_tokens": 64, "post.policy.answer_tokens": 192}
    argv = (*SIZES, "--context=256", "--mesh=data=2", "--runs=", "--tokens=0.001", "--rollouts=4")
    one = found(capsys, *argv, **short)
    step, twice, dots = table(one, "Compiled training steps")
    D, F, V, T = 64, 64, 256, 256
    products, norms = D * (D + 64) + D * D + 3 * D * F + D * V, 3 * D
    attention = 3 * 4 * D * (T + 1) / 2  # three times a query's two products with, on average, half of the keys
    assert step["over 6 N"] == pytest.approx((6 * products + attention) / (6 * (products + norms)))
    assert step["sent"] == pytest.approx(twice["sent"], rel=0.05)  # weights and gradients, whatever the batch
    assert step["again"] > dots["again"] >= 0 and twice["MFU"] > step["MFU"] > 0
    assert lines(one)["slower than the roofline"]["cost"] == pytest.approx(0, abs=1e-6)  # so small, it is slow itself
    hours = {
        (row["stage"], row["pass"]): row["time"] / row["10⁹ tokens"]
        for row in table(one, "After the run")
        if row["time"]
    }
    # Other losses cost what the cross-entropy does; a forward pass a third at most, and writing more than it.
    update = hours["fine-tuning", "update"]
    assert hours["rewards", "update"] == pytest.approx(update, rel=0.25)
    assert 0 < hours["rewards", "reference"] < min(update / 3, hours["rewards", "rollout: writing"] / 3)
