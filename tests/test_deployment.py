"""What traffic costs in steady state, over bills that are made up and can be done by hand; nothing is compiled."""

import math
from dataclasses import replace

import pytest
from stepbill.experiments.drivers import deployment
from stepbill.experiments.drivers.deployment import CHECK_CONTEXT, Deployment, Misses, serve, simulated
from stepbill.experiments.drivers.sweep import Refusal
from stepbill.experiments.flags import UsageError
from stepbill.model.architectures import get
from stepbill.model.config import ModelConfig
from stepbill.profiling.assumptions import Scenario, load
from stepbill.profiling.bill import Bill, Row, Work

CONFIG = ModelConfig("tiny", 2, 64, 4, 2, 64, 256, head_width=16, max_context=512)
MILLI = 10**9  # picoseconds
STEP, TOKEN, READ = 4 * MILLI, MILLI // 100, MILLI // 10  # of weights; of a request's cache; of a token of a prompt
EACH, WEIGHTS = 1000, 10**6  # bytes; of a position
LONGEST = 384  # 200 + 100 tokens, rounded up
PRICE = 3.5


def made_up(point, room: float = 100):
    """Reading weights and caches; a prompt in proportion to its tokens; memory for `room` requests."""
    batch, context, small = point.batch, point.context, point.config.width < CONFIG.width
    cache = batch * context * EACH
    if point.step == "decode":
        of_cache = batch * TOKEN * context // LONGEST
        rows = [
            Row("mlp/up", "forward", None, Work(hbm_read={"weights": WEIGHTS}, picoseconds=STEP), "hbm"),
            Row("attention/core", "forward", None, Work(hbm_read={"cache": cache}, picoseconds=of_cache), "hbm"),
        ]
    else:
        rows = [Row("mlp/up", "forward", None, Work(matmul=context, picoseconds=READ * context), "compute")]
    if small:
        for row in rows:
            row.work.picoseconds //= 10
    total = Work()
    for row in rows:
        total.add(row.work)
    one = Bill({"chips": 1}, rows, Work(), [], total)
    capacity = round(WEIGHTS + room * LONGEST * EACH)
    one.memory = {"peak_bytes": WEIGHTS + cache, "cache": cache, "capacity_bytes": capacity}
    return one if WEIGHTS + cache <= capacity or batch > 512 else Refusal(f"{point} does not fit")


def deployed(room: float = 100, now=None, **traffic):
    usual = {"input_tokens": 200, "cached_tokens": 0, "output_tokens": 101, "reasoning_tokens": 0}
    usual |= {"requests_per_second": 0.001, "ttft_seconds": 10.0, "tpot_seconds": 10.0} | traffic
    one = replace(now or Deployment(None, CONFIG, "h200", mesh=""), traffic=Scenario(**usual)).placed()
    bills = {point: made_up(point, room) for point in one.points()}
    return serve(one, bills, load({"chip.dollars_per_hour.h200": PRICE})), bills


def decode(batch, context=256):
    """Of the step of 200 tokens and half of the answer, rounded up."""
    return STEP + batch * TOKEN * context / LONGEST


def most(one):
    """Requests in flight in 99 of 100 moments, of a step whose time is linear in them."""
    spare = 100 * STEP / one.batch / one.picoseconds
    return deployment._quantile(one.batch, max(1.0, one.replicas) * one.batch * spare)


@pytest.mark.parametrize(("freedom", "expected"), [(2, 9.210), (10, 23.209), (100, 135.807)])
def test_the_quantile_is_that_of_tables_of_chi_square(freedom, expected):
    assert deployment._quantile(freedom, freedom / 2) == pytest.approx(expected, rel=2e-3)


def test_a_request_takes_its_prompt_and_its_share_of_each_step():
    one, _ = deployed()
    assert (one.deployment.written, one.deployment.longest, one.deployment.context) == (100, LONGEST, 256)
    # One replica: 99 of 100 moments have no more than memory holds.
    assert most(one) == pytest.approx(100)
    prompt = 256 * READ  # of the smallest program that reads it
    took = prompt + 100 * decode(one.batch) / one.batch
    assert one.picoseconds == pytest.approx(took, rel=1e-6)
    assert one.dollars_per_request == pytest.approx(took * 1e-12 / 3600 * PRICE, rel=1e-6)
    month = 0.001 * 3600 * 8766 / 12
    assert one.dollars_per_month == pytest.approx(one.dollars_per_request * month)
    assert one.dollars_per_million_tokens == pytest.approx(one.dollars_per_request / 301 * 1e6)
    assert one.whole_chips == 1 and one.replicas == pytest.approx(0.001 * took * 1e-12)


def test_parts_are_all_of_it_and_reading_weights_is_the_step_without_caches():
    one, _ = deployed()
    parts = {part.name: part for part in one.parts}
    assert sum(part.picoseconds for part in one.parts) == one.picoseconds
    assert parts["prefill: mlp"].picoseconds == 256 * READ
    weights = parts["decode: mlp"]
    assert weights.picoseconds == weights.reading_weights == pytest.approx(100 * STEP / one.batch, rel=1e-4)
    assert parts["decode: cache"].picoseconds == pytest.approx(100 * TOKEN * 256 / LONGEST, rel=1e-4)
    assert parts["decode: cache"].reading_weights == 0


def test_a_latency_target_makes_the_batch_smaller():
    free, _ = deployed(requests_per_second=1000.0)
    held, _ = deployed(requests_per_second=1000.0, tpot_seconds=0.02)
    assert free.tpot_seconds > 0.02 and held.batch < free.batch and held.dollars_per_request > free.dollars_per_request
    load = 256 * READ / held.picoseconds
    work = 100 * decode(most(held))
    mean, variance = work / (1 - load), work * (256 * READ) ** 2 / held.picoseconds / (1 - load) ** 3 / held.replicas
    assert held.tpot_seconds == pytest.approx(0.02, rel=1e-6)
    assert held.tpot_seconds * 1e12 * 100 == pytest.approx(deployment._quantile(mean, mean**2 / variance), rel=1e-6)
    assert sum(part.picoseconds for part in held.parts) == held.picoseconds


def test_the_first_token_waits_for_a_step_and_for_other_prompts():
    one, _ = deployed(requests_per_second=1000.0)
    prompt = 256 * READ
    load = prompt / one.picoseconds
    wait = prompt * math.log(load / 0.01) / (2 * (1 - load))
    assert one.ttft_seconds == pytest.approx((decode(most(one)) + wait + prompt) * 1e-12, rel=1e-6)


@pytest.mark.parametrize(
    ("whole", "cached", "programs", "read"),
    [
        (200, 0, (256,), 256),  # tokens: the smallest program takes all of its time
        (200, 100, (128,), 128),
        (1200, 600, (512, 1280), 600),
        (1200, 1100, (128, 1024, 1280), 128),
        (1200, 800, (512, 768, 1280), 512),
    ],
)
def test_what_is_cached_is_not_read(whole, cached, programs, read):
    now = Deployment(None, CONFIG, "h200", mesh="", batch=8)
    none, some = (deployed(4000, now, input_tokens=whole, cached_tokens=n)[0] for n in (0, cached))
    assert some.deployment.prompts == programs
    prompts = [sum(p.picoseconds for p in one.parts if p.name.startswith("prefill")) for one in (none, some)]
    assert prompts[1] == pytest.approx(read * READ, rel=1e-9)
    assert none.picoseconds - prompts[0] == pytest.approx(some.picoseconds - prompts[1], rel=1e-9)


@pytest.mark.parametrize(
    ("late", "name", "least"),
    [
        ({"ttft_seconds": 0.01}, "ttft_seconds", (decode(1) + 256 * READ) * 1e-12),
        ({"tpot_seconds": 0.001}, "tpot_seconds", decode(1) * 1e-12),
    ],
)
def test_what_no_replica_does_in_time_says_what_it_takes(late, name, least):
    with pytest.raises(Misses) as raised:
        deployed(**late)
    assert raised.value.name == name and raised.value.least_seconds == pytest.approx(least, rel=1e-6)
    assert "misses the latency" in str(raised.value)
    one, _ = deployed(now=Deployment(None, CONFIG, "h200", mesh="", in_time=False), **late)
    assert one.missed and most(one) == pytest.approx(100)


def test_a_batch_may_be_held_down():
    one, _ = deployed(now=Deployment(None, CONFIG, "h200", mesh="", batch=4))
    assert one.batch == 4 and one.picoseconds == pytest.approx(256 * READ + 100 * decode(4) / 4, rel=1e-6)


def test_guesses_cost_a_check_and_the_draft_and_yield_more_tokens():
    draft = replace(CONFIG, name="draft", width=32)
    now = Deployment(None, CONFIG, "h200", mesh="", draft=draft, drafted=3, batch=4)
    one, bills = deployed(now=now, room=400)
    assert any(point.context == CHECK_CONTEXT and point.batch % 4 == 0 for point in bills)
    yields = 1 + 0.7 + 0.7**2 + 0.7**3
    # A check reads no more than a step does: here nothing depends on how many positions there are beside the cache.
    a_token = (decode(4) + 3 * decode(4) / 10) / yields
    assert one.picoseconds == pytest.approx(256 * READ * 1.1 + 100 * a_token / 4, rel=1e-4)


def test_what_does_not_fit_says_what_it_needs():
    text = "does not fit: beside the weights 1 x h200 have room for 288 positions, and a request takes up to 384"
    with pytest.raises(UsageError, match=text):
        deployed(room=0.75)


@pytest.mark.parametrize(
    ("traffic", "least"),
    [
        ({}, 0.98),
        ({"tpot_seconds": 0.02}, 0.98),
        ({"tpot_seconds": 0.02, "requests_per_second": 100.0}, 0.98),
        ({"cached_tokens": 100}, 0.98),
        ({"output_tokens": 11}, 0.94),  # so few tokens are held up by whole prompts
    ],
)
def test_the_simulator_agrees(traffic, least):
    """Event by event, 99 of 100 requests are in time; and where there are fewer replicas than that they are not."""
    one, bills = deployed(400, **{"requests_per_second": 20.0, "ttft_seconds": 1.0, "tpot_seconds": 0.05} | traffic)
    assert simulated(one, bills, 4000) > least
    fewer = replace(one, parts=tuple(replace(part, picoseconds=part.picoseconds * 3 // 4) for part in one.parts))
    assert simulated(fewer, bills, 4000) < 0.9


def test_batches_of_a_deployment_are_those_that_fit():
    placed = replace(
        Deployment(None, CONFIG, "h200", mesh=""), traffic=Scenario(200, 0, 101, 0, 1.0, 1.0, 1.0)
    ).placed()
    assert placed.batches() == (1, deployment.MIDDLE, deployment.MOST_BATCH)


def test_where_a_few_requests_fit_on_no_mesh_one_may_do():
    long = Scenario(140_000, 0, 257, 0, 1.0, 100.0, 100.0)
    placed = Deployment(long, get("llama3-8b"), "v5e").placed()
    # A cache is split over its 8 heads at most: 8 requests of 131,072 B a position take more than a chip has.
    assert 8 * 140_000 * 131_072 / 8 > 15.75 * 2**30 and placed.mesh == "tensor=4"
