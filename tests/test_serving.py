"""The simulator against what can be worked out by hand, and what must hold of any traffic. Nothing is compiled."""

import json
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.profiling import serving
from stepbill.profiling.assumptions import load
from stepbill.profiling.serving import Grid, ImpossibleTarget, Memory, PrefixCached, Request, Server, Targets, simulate

SECOND = 10**12
AMPLE = Memory(positions=1 << 40)


@dataclass(frozen=True)
class Linear:
    """Picoseconds: of a prompt's step, of each of its tokens; of a decode step, of each request and position in it."""

    prompt: int = 0
    token: int = 0
    step: int = 0
    request: int = 0
    position: int = 0

    def prefill(self, tokens, past=0):
        return self.prompt + self.token * tokens

    def decode(self, batch, positions):
        return self.step + self.request * batch + self.position * positions


USUAL = Linear(
    prompt=SECOND // 10, token=SECOND // 1000, step=SECOND // 50, request=SECOND // 1000, position=SECOND // 10**6
)


def seconds(picoseconds):
    return picoseconds / SECOND


# --- by hand -------------------------------------------------------------------------------------------------------


def test_one_request_takes_its_prompt_and_then_its_decode_steps():
    times = Linear(prompt=SECOND, token=SECOND // 100, step=SECOND // 40)
    found = simulate([Request(5 * SECOND, 100, 11)], times, Server(AMPLE, max_batch=8))
    assert found.wait_seconds.tolist() == [0]
    assert found.ttft_seconds.tolist() == [seconds(times.prefill(100))] == [2.0]
    assert found.tpot_seconds.tolist() == [seconds(times.decode(1, 0))]
    assert found.e2e_seconds.tolist() == [2.25] and found.seconds == 2.25
    assert (found.input_tokens, found.output_tokens) == (100, 11)
    assert found.dollars(chips=8, dollars_per_chip_hour=3.6) == pytest.approx(8 * 3.6 * 2.25 / 3600)


def test_a_request_sees_its_cache_grow():
    found = simulate([Request(0, 7, 4)], Linear(position=SECOND), Server(AMPLE, 1))
    assert found.e2e_seconds.tolist() == [8 + 9 + 10]  # its prompt and what it has written, with the position it writes


def test_chunks_of_a_prompt_and_decoding_share_a_step():
    times = Linear(token=SECOND, step=10 * SECOND)
    server = Server(AMPLE, max_batch=2, chunk=3)
    found = simulate([Request(0, 3, 3), Request(1, 7, 1)], times, server)
    # The first reads 3 tokens; then it decodes, twice, while the other reads 3 and 3; which is left with 1.
    assert found.ttft_seconds.tolist() == [3, pytest.approx(3 + 13 + 13 + 1)]
    assert found.e2e_seconds[0] == 3 + 13 + 13
    whole = simulate([Request(0, 3, 3), Request(1, 7, 1)], times, replace(server, chunk=None))
    assert whole.e2e_seconds[0] == 3 + 7 + 10 + 10  # decoding stands still while a prompt is read


def test_a_full_batch_gives_its_size_a_step():
    batch, times = 64, Linear(step=SECOND // 50)
    found = simulate([Request(0, 16, 1000)] * (4 * batch), times, Server(AMPLE, batch))
    assert found.output_tokens_per_second == pytest.approx(batch / (1 / 50), rel=0.01)
    assert found.utilisation()["batch"] == pytest.approx(1, rel=0.01)
    assert found.utilisation()["busy"] == 1.0


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
def test_a_queue_before_a_batch_of_one_is_that_of_pollaczek_and_khinchine(load):
    # M/D/1: the mean wait is load x service / (2 (1 - load)). Its error here: from the spread of the means of batches.
    arrivals = serving.poisson(load, 40_000, np.random.default_rng(1))
    found = simulate([Request(at, 1, 1) for at in arrivals], Linear(prompt=SECOND), Server(AMPLE, max_batch=1))
    waits = found.wait_seconds[1000:]  # the queue was empty when it began
    means = waits.reshape(30, -1).mean(axis=1)
    error = means.std(ddof=1) / np.sqrt(len(means))
    expected = load / (2 * (1 - load))
    assert error < 0.06 * expected
    assert abs(waits.mean() - expected) < 3 * error
    assert found.utilisation()["busy"] == pytest.approx(load, rel=0.02)


def test_a_request_that_finds_no_block_makes_the_last_one_start_again():
    times = Linear(token=SECOND, step=SECOND)
    server = Server(Memory(positions=6, block=1), max_batch=2)
    found = simulate([Request(0, 2, 4), Request(0, 2, 3)], times, server)
    # Prompts end at 2 and 4, both decode until 5; then all 6 blocks are full, the second gives back its 3, and the
    # first ends at 7; the second reads 2 + 2 again, which gives it its third and last token.
    assert found.ttft_seconds.tolist() == [2, 4]
    assert found.e2e_seconds.tolist() == [7, 11]
    assert found.preemptions == 1 and found.output_tokens == 7
    slots = simulate([Request(0, 2, 4), Request(0, 2, 3)], times, Server(Memory(6, 1, slot=5), 2))
    assert slots.preemptions == 0 and slots.most_admitted == 1


def test_requests_go_where_there_are_fewest():
    found = simulate([Request(0, 1, 1)] * 6, Linear(prompt=SECOND), Server(AMPLE, 1), replicas=3)
    assert sorted(found.e2e_seconds.tolist()) == [1, 1, 1, 2, 2, 2]


# --- whatever comes ------------------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 40)
TRAFFIC = st.lists(st.builds(Request, st.integers(0, 3 * SECOND), LENGTHS, LENGTHS), min_size=1, max_size=30)
MEMORIES = st.builds(
    Memory, positions=st.integers(100, 400), block=st.sampled_from([1, 5, 16]), slot=st.sampled_from([None, 79])
)
SERVERS = st.builds(Server, MEMORIES, st.integers(1, 12), st.sampled_from([None, 1, 8, 64]))


@settings(max_examples=100, deadline=None)
@given(TRAFFIC, SERVERS, st.integers(1, 3))
def test_nothing_is_lost_or_made_and_memory_is_never_exceeded(requests, server, replicas):
    seen = []
    found = simulate(requests, USUAL, server, replicas, watch=seen.append)
    assert [one.request for one in found.requests] == requests
    assert all(before.time <= after.time for before, after in pairwise(seen))
    assert all(0 <= one.blocks <= server.memory.blocks and one.admitted <= server.max_batch for one in seen)
    for number in range(replicas):
        mine = [one for one in seen if one.replica == number]
        assert all(before.emitted <= after.emitted for before, after in pairwise(mine))
        if mine:
            assert (mine[-1].owed, mine[-1].blocks, mine[-1].waiting, mine[-1].admitted) == (0, 0, 0, 0)
    assert found.output_tokens == sum(one.output for one in requests)
    if replicas == 1:  # at each moment: all that arrived before it is given or owed
        for one in seen:
            came = sum(request.output for request in requests if request.arrival < one.time)
            assert one.emitted + one.owed == came
    assert (found.wait_seconds >= 0).all() and (found.ttft_seconds > found.wait_seconds).all()
    assert (found.e2e_seconds >= found.ttft_seconds).all()
    shares = found.utilisation()
    assert all(0 <= share <= 1 + 1e-9 for share in shares.values())
    assert server.memory.slot is None or not found.preemptions


@settings(max_examples=100, deadline=None)
@given(TRAFFIC, SERVERS, st.integers(1, 3))
def test_the_same_again_is_the_same(requests, server, replicas):
    one, other = (json.dumps(simulate(requests, USUAL, server, replicas).to_json(Targets(), 1, 2.0)) for _ in range(2))
    assert one == other


@settings(max_examples=100, deadline=None)
@given(TRAFFIC, st.integers(100, 400), st.sampled_from([1, 5, 16]))
def test_pages_never_admit_fewer_than_slots(requests, positions, block):
    requests = [replace(one, arrival=0) for one in requests]
    longest = max(one.positions for one in requests)
    slot = -(-longest // block) * block
    if slot > positions // block * block:
        return
    paged, slots = (
        simulate(requests, USUAL, Server(Memory(positions, block, kind), max_batch=30)) for kind in (None, slot)
    )
    assert paged.most_admitted >= slots.most_admitted


def test_a_seed_makes_the_traffic():
    def drawn(seed):
        generator = np.random.default_rng(seed)
        return serving.poisson(2.0, 50, generator), serving.lognormal(300, 0.5, 1000, 50, generator)

    assert drawn(0) == drawn(0) != drawn(1)
    arrivals, lengths = drawn(0)
    assert arrivals == sorted(arrivals) and all(1 <= length <= 1000 for length in lengths)
    many = serving.lognormal(300, 0.5, 1 << 30, 20_000, np.random.default_rng(3))
    assert np.median(many) == pytest.approx(300, rel=0.03) and np.log(many).std() == pytest.approx(0.5, rel=0.03)
    assert serving.regular(4.0, 3) == [0, SECOND // 4, SECOND // 2]
    assert serving.lognormal(300, 0.0, 1000, 2, np.random.default_rng(3)) == [300, 300]


@pytest.mark.parametrize(
    ("requests", "server", "text"),
    [
        ([], Server(AMPLE, 1), "requests is empty"),
        ([Request(0, 90, 20)], Server(Memory(100), 1), "a request alone needs 109"),
        ([Request(0, 9, 2)], Server(Memory(100, slot=9), 1), "slot is 9; it must hold the longest request"),
        ([Request(0, 1, 1)], Server(AMPLE, 0), "max_batch is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_served_is_refused(requests, server, text):
    with pytest.raises(ValueError, match=text):
        simulate(requests, USUAL, server)


@pytest.mark.parametrize("values", [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_a_request_has_lengths(values):
    with pytest.raises(ValueError, match="it must be at least"):
        Request(*values)


# --- step times of a grid ------------------------------------------------------------------------------------------

GRID = Grid({(1, 100): 10, (1, 300): 20, (9, 100): 50, (9, 300): 140}, {10: 7, 100: 40, 300: 160})


def test_a_grid_is_exact_at_its_points_and_linear_between():
    for (batch, context), time in GRID.decode_picoseconds.items():
        assert GRID.decode(batch, batch * context) == time
    for tokens, time in GRID.prefill_picoseconds.items():
        assert GRID.prefill(tokens) == time
    assert GRID.decode(1, 200) == 15 and GRID.decode(5, 500) == 30 and GRID.decode(5, 1000) == 55
    assert GRID.prefill(200) == 100
    assert GRID.decode(1, 3) == 10 and GRID.prefill(1) == 7  # below, as the smallest
    assert GRID.prefill(100, past=200) == 160 - 100 and GRID.prefill(10, past=10) == 7
    with pytest.raises(ValueError, match="batch is 10; step times are known up to 9"):
        GRID.decode(10, 10)
    with pytest.raises(ValueError, match="context is 301"):
        GRID.decode(2, 602)
    with pytest.raises(ValueError, match="prompt is 301"):
        GRID.prefill(301)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_grid_is_monotone(data):
    batch = data.draw(st.integers(1, 8))
    context, more = sorted(data.draw(st.tuples(st.integers(1, 300), st.integers(1, 300))))
    assert GRID.decode(batch, batch * context) <= GRID.decode(batch, batch * more)
    assert GRID.decode(batch, batch * context) <= GRID.decode(batch + 1, (batch + 1) * context)
    assert GRID.prefill(context) <= GRID.prefill(more)


@pytest.mark.parametrize(
    ("decode", "prefill", "text"),
    [
        ({(1, 1): 2, (2, 1): 1}, {1: 1}, "must not fall"),
        ({(1, 1): 1}, {1: 2, 2: 1}, "must not fall"),
        ({(1, 1): 1, (2, 2): 1}, {1: 1}, "each of its batches with each context"),
        ({(1, 1): 1}, {}, "needs a prompt"),
    ],
)
def test_a_grid_must_be_whole_and_monotone(decode, prefill, text):
    with pytest.raises(ValueError, match=text):
        Grid(decode, prefill)


def test_what_is_found_of_a_prompt_is_not_read():
    cached = PrefixCached(GRID, 0.5)
    assert cached.prefill(200) == GRID.prefill(100, past=100) and cached.decode(5, 500) == 30
    assert PrefixCached(GRID, 1.0).prefill(200) == GRID.prefill(1, past=199)


# --- how many ------------------------------------------------------------------------------------------------------


def test_the_fewest_replicas_that_will_do():
    # 3.5 requests a second of 1 s each: four replicas keep up, three do not.
    requests = [Request(at, 1, 1) for at in serving.regular(3.5, 400)]
    times, server, targets = Linear(prompt=SECOND), Server(AMPLE, 1), Targets(ttft_seconds=2.0)
    found = serving.replicas_needed(requests, times, server, targets)
    assert len(found.replicas) == 4
    assert simulate(requests, times, server, 3).share_within(targets) < targets.share
    with pytest.raises(ValueError, match=r"2 replicas serve .* within the targets; it must be 95.0%"):
        serving.replicas_needed(requests, times, server, targets, most=2)


@pytest.mark.parametrize(
    ("targets", "name", "least"),
    [(Targets(ttft_seconds=0.9), "ttft", 1.0), (Targets(ttft_seconds=1.0, tpot_seconds=0.01), "tpot", 0.5)],
)
def test_what_an_empty_replica_misses_is_impossible(targets, name, least):
    times = Linear(prompt=SECOND, step=SECOND // 2)
    with pytest.raises(ImpossibleTarget, match=f"{name} of .* is impossible") as refused:
        serving.replicas_needed([Request(0, 1, 2)], times, Server(AMPLE, 1), targets)
    assert (refused.value.name, refused.value.least_seconds) == (name, least)
    found = serving.replicas_needed([Request(0, 1, 2)], times, Server(AMPLE, 1), Targets(1.0, 0.5))
    assert len(found.replicas) == 1 and found.share_within(Targets(1.0, 0.5)) == 1.0


def test_rates_of_a_published_day_are_of_one_piece():
    # Tokens of the day at the published tokens/s of a node that prefills, and of one that decodes, make the nodes.
    day = load()
    second = day.number("day.hours") * 3600
    read = day.number("day.uncached_tokens") + day.number("day.cached_tokens")
    nodes = read / second / day.number("day.prefill_tokens_per_second_per_node")
    nodes += day.number("day.output_tokens") / second / day.number("day.decode_tokens_per_second_per_node")
    assert nodes == pytest.approx(day.number("day.nodes"), rel=0.002)
