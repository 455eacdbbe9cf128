"""Drivers of prefill and decode, batching and infrastructure: over bills that are made up and can be done by hand, and
of small models that are compiled."""

import pytest
from findings import found, table
from stepbill.experiments.drivers import batching, infrastructure, prefill_decode, sweep
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.profiling.bill import Bill, Row, Work
from test_drivers import SIZES
from test_economics import PLAIN

WEIGHTS, EACH, CAPACITY = 16 * 10**9, 131_072, 150 * 10**9  # bytes; of a position
PARAMETERS, ATTENDED = 8 * 10**9, 524_288  # FLOPs of a token with a position
PEAK, BANDWIDTH = 989 * 10**12, 4_800_000_000_000
RIDGE = PEAK / BANDWIDTH
MILLION, HOUR = 1_000_000, 3600


def work(step, batch, context):
    if step == "decode":
        return batch * (2 * PARAMETERS + ATTENDED * context), WEIGHTS, batch * context * EACH
    return 2 * PARAMETERS * context + ATTENDED // 2 * context**2, WEIGHTS, context * EACH


def seconds(step, batch, context):
    flops, *moved = work(step, batch, context)
    return max(flops / PEAK, sum(moved) / BANDWIDTH)


def made_up(point):
    """A step at the roofline of an H200, whose products are those of 8 billion parameters and of attention."""
    batch, context = point.batch, point.context
    flops, weights, cache = work(point.step, batch, context)
    time = round(seconds(point.step, batch, context) * 1e12)
    bound = "compute" if flops / PEAK > (weights + cache) / BANDWIDTH else "hbm"
    total = Work(flops, hbm_read={"weights": weights, "cache": cache}, picoseconds=time)
    bill = Bill(
        {"chips": 1, "batch": batch, "context": context, "target": point.target},
        [Row("mlp/up", "forward", None, total, bound)],
        Work(),
        [],
        total,
    )
    peak = WEIGHTS + cache
    bill.memory = {"peak_bytes": peak, "cache": cache, "weights": WEIGHTS, "capacity_bytes": CAPACITY}
    tokens = batch if point.step == "decode" else context
    bill.price = {
        "chip_dollars_per_hour": 1.0,
        "dollars_per_million_tokens": time * 1e-12 / HOUR / tokens * MILLION,
    }
    return bill if peak <= CAPACITY else Refusal(f"{point} does not fit")


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: {point: made_up(point) for point in points})


def assume(**values):
    return [f"--assume={name}={value}" for name, value in values.items()]


# --- prefill and decode --------------------------------------------------------------------------------------------


def test_intensity_and_what_an_output_token_costs_over_an_input_token(nothing_compiled, capsys):
    one = found(capsys, prefill_decode.main, "--beside=", "--batches=1,128", "--context=4096", "--mesh=")
    prompt, single, many = table(one, "A chip's work")
    assert prompt["step"] == "prefill" and (single["batch"], many["batch"]) == (1, 128)
    assert many["intensity"] == pytest.approx(128 * (2 * PARAMETERS + ATTENDED * 4096) / (WEIGHTS + 128 * 4096 * EACH))
    assert many["over the ridge point"] == pytest.approx(many["intensity"] / RIDGE)
    assert prompt["tokens/s"] == pytest.approx(4096 / seconds("prefill", 1, 4096))
    ratios = [row["output / input"] for row in table(one, "An output token")]
    of_input = seconds("prefill", 1, 4096) / 4096
    assert ratios == pytest.approx(
        [seconds("decode", 1, 4096) / of_input, seconds("decode", 128, 4096) / 128 / of_input]
    )
    assert one.holds and one.factor == pytest.approx(ratios[-1])
    assert all(one.tables[0].commands) and "--batch=128" in str(one.tables[0].commands[-1])


def test_a_batch_that_is_bound_by_compute_refutes_the_claim(nothing_compiled, capsys):
    one = found(capsys, prefill_decode.main, "--beside=", "--batches=1,1024", "--context=64", "--mesh=")
    assert table(one, "A chip's work")[-1]["over the ridge point"] > 1 and one.holds is False


def test_a_cached_part_of_a_prompt_saves_its_reading_and_takes_memory(nothing_compiled, capsys):
    one = found(capsys, prefill_decode.main, "--beside=", "--prompt=16384", "--mesh=")
    rows = table(one, "A prompt of 16,384")
    assert [row["of it tokens"] for row in rows] == [0, 4096, 8192, 12_288, 15_360]
    whole = seconds("prefill", 1, 16_384)
    for row in rows[1:]:
        past = row["of it tokens"]
        saved = seconds("prefill", 1, past)
        assert row["prompt"] == pytest.approx(whole - saved)
        assert row["1,000 of them"] == pytest.approx((whole - saved) * 1000 * 3.5 / HOUR)
        assert row["saved"] == pytest.approx(saved / whole) and row["takes of each chip"] == past * EACH
        usable = sweep.CHIPS["h200"].usable_hbm_bytes
        assert row["worth keeping in HBM for"] == pytest.approx(saved * usable / (past * EACH))
        assert row["loading it from the host"] == pytest.approx(past * EACH / 64e9)
    assert rows[0]["saved"] == 0


def test_list_prices_are_those_of_the_facts(nothing_compiled, capsys):
    one = found(capsys, prefill_decode.main, "--beside=", "--mesh=", *assume(**{"api.gpt-5.output": 1250}))
    ratios = {row["list price of"]: row for row in table(one, "What API lists")}
    assert ratios["gpt-5"]["output / input"] == pytest.approx(1000) and "lists charge 3 to 1e+03" in one.evidence
    assert ratios["gpt-4o"]["cached / input"] == pytest.approx(0.5)
    assert "claude-sonnet-4.5" not in ratios  # no longer in force


def test_of_compiled_small_models(cache, capsys):
    argv = (*SIZES, "--target=h200", "--beside=", "--batches=1,8", "--context=256", "--prompt=1024")
    one = found(capsys, prefill_decode.main, *argv)
    prompt, single, many = table(one, "A chip's work")
    assert prompt["intensity"] > many["intensity"] > single["intensity"]
    first, last = (row["output / input"] for row in table(one, "An output token"))
    assert first > last > 1 and one.holds is False  # so small a model's prompt has too few products for its bytes
    K, H, bf16 = 2, 16, 2
    cached = table(one, "A prompt of 1,024")[-1]
    assert cached["takes of each chip"] == pytest.approx(2 * K * H * bf16 * 960, rel=0.02)


# --- batching ------------------------------------------------------------------------------------------------------


def test_batches_share_the_weights_until_memory_ends(nothing_compiled, capsys):
    one = found(capsys, batching.main, "--mesh=", "--requests=100")
    short = table(one, "Decode with 1,024")
    assert [row["batch"] for row in short] == [1, 8, 32, 128, 512]
    for row in short:
        assert row["a token"] == pytest.approx(seconds("decode", row["batch"], 1024))
    edges = table(one, "Where a batch ends")
    assert [row["fits, sequences"] for row in edges] == [(CAPACITY - WEIGHTS) // EACH // n for n in (1024, 4096)]
    assert edges[0]["of an endless batch"] == pytest.approx((2 * PARAMETERS + ATTENDED * 1024) / (1024 * EACH))
    assert [row["the step reaches it at"] for row in edges] == [None, None]
    assert one.holds is False and "never reaches the ridge point of 206" in one.evidence


def test_with_short_contexts_decode_turns_and_the_claim_holds(nothing_compiled, capsys):
    argv = ("--mesh=", "--context=128", "--prompt_tokens=64", "--output_tokens=64", "--requests=300")
    one = found(capsys, batching.main, *argv)
    (edge,) = table(one, "Where a batch ends")
    turns = RIDGE * WEIGHTS / (2 * PARAMETERS + ATTENDED * 128 - RIDGE * 128 * EACH)
    assert edge["the step reaches it at"] == pytest.approx(turns, rel=1e-6) and 128 < turns < 512
    assert one.holds


def test_what_a_latency_target_leaves_of_the_throughput(nothing_compiled, capsys):
    one = found(capsys, batching.main, "--mesh=", "--requests=300")
    rows = table(one, "Throughput that 95%")
    first, each = ([row["of the full throughput"] for row in rows[at : at + 3]] for at in (0, 3))
    assert first == sorted(first) and each == sorted(each) and 0 < each[0] < each[-1] <= 1
    for row in rows:
        assert row["a token costs"] == pytest.approx(1 / row["of the full throughput"])
    no_time = assume(**{"scenario.chat-support.tpot_seconds": 0.001})
    impossible = found(capsys, batching.main, "--mesh=", "--requests=30", *no_time)  # for however few
    assert impossible.holds is None and "cannot be kept here" in impossible.evidence


def test_prompts_wait_as_in_a_queue_and_less_where_it_is_shared(nothing_compiled, capsys):
    one = found(capsys, batching.main, "--mesh=", "--requests=50", "--batches=1,8")
    service = seconds("prefill", 1, 1024)
    for row in table(one, "Waiting for prompts")[:2]:
        busy = row["busy"]
        assert row["wait, M/D/1"] == pytest.approx(service * busy / (1 - busy) / 2)
        assert row["wait, simulated"] == pytest.approx(row["wait, M/D/1"], rel=0.15)
        assert row["wait, 4 replicas"] < row["wait, simulated"] / 2


def test_availability_adds_up_line_by_line(nothing_compiled, capsys):
    chosen = {"redundancy.utilisation": 0.5, "redundancy.spared_units": 4, "redundancy.regions": 3}
    one = found(capsys, batching.main, "--mesh=", "--requests=100", *assume(**chosen))
    lines = table(one, "From a full chip")
    full, late, idle, spare, regions = (row["$ / M output tokens"] for row in lines)
    assert idle == pytest.approx(full + late, abs=1e-11)
    assert spare == pytest.approx(2 * (full + late) / 4, abs=1e-11)
    assert regions == pytest.approx(2 * (full + late) * 1.25 / 2, abs=1e-11)
    assert lines[-1]["over a full server"] == pytest.approx((1 + late / full) * 2 * 1.25 * 1.5)
    stands = {row["regions"]: row for row in table(one, "Capacity over what serves")}
    assert stands[1]["one spare for 4"] == 1.25 and stands[2]["one spare for 32"] == pytest.approx(2 * 33 / 32)


def test_batches_of_a_compiled_small_model(cache, capsys):
    sizes = ("--batches=1,8", "--context=256", "--prompt_tokens=128", "--output_tokens=128", "--requests=100")
    one = found(capsys, batching.main, *SIZES, "--target=h200", *sizes)
    rows = table(one, "Decode with 256")
    assert rows[0]["of batch 1's"] == 1 > rows[1]["of batch 1's"] > 1 / 8
    (edge,) = table(one, "Where a batch ends")
    assert edge["fits, sequences"] > 8 and edge["the step reaches it at"] is None  # so narrow, all are bytes


# --- infrastructure ------------------------------------------------------------------------------------------------


def test_from_an_hour_to_the_price_of_a_token_by_hand(nothing_compiled, capsys):
    one = found(capsys, infrastructure.main, "--mesh=", "--batch=128", "--context=4096", *assume(**PLAIN))
    hour = table(one, "An hour")
    assert {row["line"]: row["owned"] for row in hour} == pytest.approx(
        # As in the economics' own test: 1.31 raw, and the rest on top of what is above it.
        {"rent": None, "chip": 1.0, "host": 0.1, "network": 0.05, "building": 0.1, "power": 0.06, "idle": 1.31}
        | {"spare": 0.655, "regions": 1.6375, "engineering": 0.49125, "margin": 16.21125, "price": 21.615}
    )
    past, new = 3072, 1024
    takes = {
        "input": seconds("prefill", 1, 4096) / 4096,
        "cached": (seconds("prefill", 1, 4096) - seconds("prefill", 1, past) - seconds("prefill", 1, new)) / past,
        "output": seconds("decode", 128, 4096) / 128,
    }
    price = table(one, "From raw compute to a price, owned")[-1]
    for kind, each in takes.items():
        assert price[f"{kind}, $ / M tokens"] == pytest.approx(21.615 * each * MILLION / HOUR, rel=1e-6)
    assert one.holds is False and "chip 4.6%" not in one.evidence and "4.6% is the chip" in one.evidence


@pytest.mark.parametrize("way", ["owned", "rented"])
def test_the_lines_of_a_price_add_up(nothing_compiled, capsys, way):
    *lines, price = table(found(capsys, infrastructure.main, "--mesh="), f"From raw compute to a price, {way}")
    for kind in infrastructure.KINDS:
        name = f"{kind}, $ / M tokens"
        picodollars = [round(row[name] * 10**12) for row in lines]
        assert sum(picodollars) == round(price[name] * 10**12) and min(picodollars) > 0
    assert sum(row["of the price"] for row in lines) == pytest.approx(1)
    assert (lines[0]["line"] == "rent") == (way == "rented")


def test_what_moves_the_price_most_comes_first_and_is_what_it_would_be(nothing_compiled, capsys):
    one = found(capsys, infrastructure.main, "--mesh=")
    rows = table(one, "A million output tokens")
    swings = [row["dearest / cheapest"] for row in rows]
    assert swings == sorted(swings, reverse=True) and rows[0]["assumption"] in one.evidence
    by_name = {row["assumption"]: row for row in rows}
    assert {"business.margin", "redundancy.utilisation", "capital.chip.h200", "power.pue", "batch"} <= by_name.keys()
    for name, row in by_name.items():
        if name == "batch":
            continue
        for end in ("low", "high"):
            again = found(
                capsys,
                infrastructure.main,
                "--mesh=",
                *assume(**{name: f"{row[end]:.0f}" if row[end] > 1 and row[end] == int(row[end]) else row[end]}),
            )
            price = table(again, "From raw compute to a price, owned")[-1]["output, $ / M tokens"]
            assert price == pytest.approx(row[f"price at {end}"])
        if name in ("business.margin", "power.pue"):
            assert row["price at low"] < row["price at high"]
    margin = by_name["business.margin"]
    assert margin["dearest / cheapest"] == pytest.approx((1 - margin["low"]) / (1 - margin["high"]))
    batch = by_name["batch"]
    assert batch["dearest / cheapest"] == pytest.approx(
        seconds("decode", 8, 4096) / 8 / (seconds("decode", 128, 4096) / 128)
    )


def test_without_all_that_is_on_top_the_claim_holds(nothing_compiled, capsys):
    nothing = ("capital.host", "capital.network", "capital.facility_dollars_per_kilowatt_month")
    nothing += ("business.engineering", "business.margin")
    bare = dict.fromkeys(nothing, 0) | {"redundancy.utilisation": 1, "redundancy.regions": 1}
    one = found(capsys, infrastructure.main, "--mesh=", *assume(**bare))
    assert one.holds and one.headline == "89% of the price is chips and electricity"  # an eighth on top stands by


def test_a_slower_server_is_dearer(nothing_compiled, capsys):
    prices = [
        table(found(capsys, infrastructure.main, "--mesh=", *given), "From raw compute to a price, rented")[-1]
        for given in ((), assume(**{"serving.roofline_share": 0.5}))
    ]
    for kind in infrastructure.KINDS:
        name = f"{kind}, $ / M tokens"
        assert prices[1][name] == pytest.approx(2 * prices[0][name], rel=1e-6)


def test_hosts_of_a_like_model_stand_beside_it_and_others_do_not(nothing_compiled, capsys):
    one = found(capsys, infrastructure.main, "--mesh=")
    rows = table(one, "Beside list prices")
    assert [(row["model"], row["tokens"]) for row in rows] == [("llama-3.1-8b", "input"), ("llama-3.1-8b", "output")]
    price = table(one, "From raw compute to a price, owned")[-1]["output, $ / M tokens"]
    assert rows[1]["owned / median"] == pytest.approx(price / 0.105)
    small = found(capsys, infrastructure.main, *SIZES, "--mesh=")
    assert not any(one.title.startswith("Beside") for one in small.tables)


def test_infrastructure_of_a_compiled_small_model(cache, capsys):
    one = found(capsys, infrastructure.main, *SIZES, "--target=v5e", "--batch=16", "--context=512")
    *_, price = table(one, "From raw compute to a price, owned")
    assert 0 <= price["cached, $ / M tokens"] < price["input, $ / M tokens"] < price["output, $ / M tokens"]
    assert one.holds is False


# --- what is wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "argv", "said"),
    [
        (prefill_decode.main, ["--prompt=8"], "--prompt=8: it must be at least 16"),
        (prefill_decode.main, ["--beside=none"], "--beside=none: --model=none: "),
        (prefill_decode.main, ["--batches=0"], "--batches=0: it must be whole numbers from 1 on"),
        (prefill_decode.main, ["--target=host"], "--target=host: its step times are not known; it must be a chip"),
        (batching.main, ["--context=1000"], "--context=1000: it must be at least the 1280 positions of a request"),
        (batching.main, ["--target=host"], "--target=host: its step times are not known; it must be a chip"),
        (batching.main, ["--requests=0"], "--requests"),
        (infrastructure.main, ["--cached=1"], "--cached=1: it must leave a cached and a new token of 4096"),
        (infrastructure.main, ["--cached=-1"], "--cached"),
        (infrastructure.main, ["--target=host"], "--target=host: its step times are not known; it must be a chip"),
        (infrastructure.main, assume(**{"chip.dollars_per_hour.h200": -1}), "it must be a number of at least 0 ($/h)"),
        (infrastructure.main, assume(**{"capital.chip.h200": -5}), "it must be a number of at least 0 ($)"),
        (infrastructure.main, assume(**{"redundancy.utilisation": 0}), "it must be a number from 0.01 to 1 (share)"),
        (infrastructure.main, assume(**{"business.margin": 1}), "it must be a number from 0 to 0.99 (share)"),
        (infrastructure.main, assume(**{"redundancy.regions": 0}), "it must be a whole number of at least 1"),
        (infrastructure.main, assume(**{"power.pue": 0.5}), "it must be a number of at least 1 (ratio)"),
        (infrastructure.main, assume(**{"serving.roofline_share": 0}), "it must be a number from 0.01 to 1 (share)"),
    ],
)
def test_wrong_flags_and_impossible_facts_are_one_line(nothing_compiled, capsys, main, argv, said):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("stepbill: ") and said in err and err.count("\n") == 1


def test_what_does_not_fit_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda points, *_: dict.fromkeys(points, Refusal("it needs --mesh=tensor=4")))
    for main in (prefill_decode.main, batching.main, infrastructure.main):
        assert main(["--mesh="]) == 2
        assert capsys.readouterr() == ("", "stepbill: it needs --mesh=tensor=4\n")
