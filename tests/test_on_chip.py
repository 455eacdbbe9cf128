"""What the L2 cache of a GPU is taken to serve, and how far apart two touches of an array are, in closed form."""

import json
import math
from collections import OrderedDict
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, bill, f32, hlo, module
from stepbill.model import flash
from stepbill.profiling import calls, render, targets
from stepbill.profiling.bill import Bill, Row, Work
from stepbill.profiling.calibration import ByteRate, Calibration
from stepbill.profiling.calls import Waves
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.hlo import parse
from stepbill.profiling.on_chip import SHARE, Cache, Recency, Touch, capacity, reread, reread_by_waves
from stepbill.profiling.walk import Kernel, itemize_text
from test_calibration import MADE

H200 = targets.chip("h200")
MIB = 1 << 20


def whole(buffer: str, size: int, write: bool = False) -> Touch:
    return Touch(buffer, size, size, write)


def part(buffer: str, amount: int, size: int, write: bool = False) -> Touch:
    return Touch(buffer, amount, size, write)


def found(cache: Cache, *touches: Touch) -> tuple[int, ...]:
    """What kernels of one touch each find, one after another."""
    return tuple(cache.run([touch])[0] for touch in touches)


def test_a_read_finds_what_was_touched_less_than_the_cache_ago():
    assert found(Cache(100), whole("a", 40), whole("b", 30), whole("a", 40)) == (0, 0, 40)
    assert found(Cache(100), whole("a", 40, write=True), whole("b", 60), whole("a", 40)) == (0, 0, 40)


def test_the_oldest_is_pushed_out_byte_by_byte():
    assert found(Cache(100), whole("a", 40), whole("b", 75), whole("a", 40)) == (0, 0, 25)
    # What is found again is young again: c pushes out b, and b then a.
    touches = [whole("a", 40), whole("b", 50), whole("a", 40), whole("c", 50), whole("b", 50), whole("a", 40)]
    assert found(Cache(100), *touches) == (0, 0, 40, 0, 10, 0)


def test_an_array_larger_than_the_cache_streams_through_it():
    assert found(Cache(100), whole("a", 101), whole("a", 101)) == (0, 0)
    assert found(Cache(100), whole("a", 40), whole("b", 101), whole("a", 40)) == (0, 0, 0)


def test_a_part_is_found_only_where_all_of_its_array_is():
    assert found(Cache(100), whole("a", 40), part("a", 10, 40)) == (0, 10)
    assert found(Cache(100), part("a", 10, 40), part("a", 10, 40)) == (0, 0)
    assert found(Cache(100), whole("a", 40), whole("b", 75), part("a", 10, 40)) == (0, 0, 0)


def test_a_kernel_finds_what_those_before_it_left():
    """Not what it reads itself: here the weights, which are larger than the cache, come first among its operands."""
    cache = Cache(100)
    cache.run([whole("x", 10, write=True)])
    assert cache.run([whole("weights", 1000), whole("x", 10), whole("y", 10, write=True)]) == (0, 10, 0)
    assert cache.run([whole("y", 10), whole("x", 10)]) == (10, 10)


# --- reuse distances -----------------------------------------------------------------------------------------------


def reached(*kernels: list[Touch]) -> list[tuple[int, ...]]:
    """How far back each touch of each kernel reaches where all of them run again and again."""
    recency = Recency()
    for touches in kernels:
        recency.run(touches)
    return [recency.run(touches) for touches in kernels]


def test_of_kernels_in_turn_all_bytes_lie_between_two_touches_of_an_array():
    """So that what `calibrate` measures of n such kernels is at the distance that it says: the bytes of all."""
    assert reached([whole("x", 40), whole("y", 40, write=True)]) == [(80, 80)]
    kernels = [[whole(f"x{n}", 40), whole(f"y{n}", 40, write=True)] for n in range(8)]
    assert reached(*kernels) == [(640, 640)] * 8


def test_each_byte_between_counts_once():
    touches = [whole("a", 40)], [whole("b", 30)], [whole("b", 30)], [whole("b", 30)], [whole("c", 5)]
    assert reached(*touches) == [(75,), (75,), (30,), (30,), (75,)]
    # What the kernel that touched it before has touched as well lies between, too.
    assert reached([whole("w", 100), whole("h", 7, write=True)], [whole("h", 7)])[1] == (107,)


def test_a_part_is_the_one_that_was_touched_longest_ago():
    """Slices of 10 from an array of 40, with 1 beside them: each is found after the three others."""
    beside = [whole("i", 1)]
    assert reached(*[[part("a", 10, 40)], beside] * 4)[0::2] == [(41,)] * 4
    # Written whole, then read in parts: all of them since it was written.
    assert reached([whole("a", 40, write=True)], *[[part("a", 10, 40)], beside] * 3)[1::2] == [(40,), (41,), (41,)]
    # What has never been touched is beyond all that has.
    assert reached([whole("b", 7)], [part("a", 10, 40)])[1] == (17,)


def test_distances_are_the_distinct_bytes_since_the_last_touch():
    """Against the definition: the distinct bytes since the kernel that touched the array before."""
    sizes = {"abcdefgh"[n]: 3 * n + 1 for n in range(8)}
    order = [sizes.keys() & set(word) for word in ("ab", "cad", "b", "efa", "bg", "h", "ha", "cde", "g", "fb")] * 2
    recency = Recency()
    for now, names in enumerate(order):
        found = recency.run([whole(name, sizes[name]) for name in sorted(names)])
        for name, distance in zip(sorted(names), found, strict=True):
            before = [n for n in range(now) if name in order[n]]
            since = set().union(*order[before[-1] if before else 0 : now])
            assert distance == sum(sizes[one] for one in since)


BY_DISTANCE = replace(  # 1 GB/s within 1 MiB, a tenth of that beyond 64 MiB
    MADE, copies=(ByteRate(MIB, MIB, 10**9), ByteRate(MIB, 64 * MIB, 10**8)), launch_seconds=0, dispatch_seconds=0
)


def looped(trips: int, body: str, carried: str, *entry: str) -> str:
    """A module with a loop over `carried`, arrays of a tuple after a counter."""
    count = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    state = f"(s32[], {carried})"
    return (
        "HloModule m\n\n"
        f"%body (p: {state}) -> {state} {{\n  %p = {state} parameter(0)\n{body}}}\n\n"
        f"%condition (q: {state}) -> pred[] {{\n  %q = {state} parameter(0)\n"
        "  ROOT %more = pred[] constant(true)\n}\n\n"
        "ENTRY %main {\n"
        + "".join(f"  {line}\n" for line in entry)
        + f"  ROOT %w = {state} while(%t), condition=%condition, body=%body, {count}\n}}\n"
    )


def reaches(text: str, calibration: Calibration = BY_DISTANCE) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Of each kernel by name: (times, distances of its accesses), of the first trip and of the others."""
    kernels: list[Kernel] = []
    itemize_text(text, targets.chip("host"), calibration=calibration, kernels=kernels)
    found: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    for kernel in kernels:
        found.setdefault(kernel.instruction.name, []).append((kernel.times, tuple(d for _, d in kernel.reaches)))
    return found


def test_a_loop_finds_what_the_trip_before_it_touched():
    """Two arrays of 256 KiB that each trip adds up into one of them, and one of 8 MiB that is touched outside."""
    small, large = "f32[65536]{0}", "f32[2097152]{0}"
    body = (
        "  %i = s32[] get-tuple-element(%p), index=0\n"
        f"  %x = {small} get-tuple-element(%p), index=1\n  %y = {small} get-tuple-element(%p), index=2\n"
        f"  %z = {small} add(%x, %y)\n  ROOT %r = (s32[], {small}, {small}) tuple(%i, %z, %y)\n"
    )
    text = looped(
        *(100, body, f"{small}, {small}", f"%a = {small} parameter(0)", f"%b = {small} parameter(1)"),
        *(f"%l = {large} parameter(2)", f"%n = {large} negate(%l)", "%c = s32[] constant(0)"),
        f"%t = (s32[], {small}, {small}) tuple(%c, %a, %b)",
    )
    found = reaches(text)
    whole_program, trip = 16 * MIB + MIB // 2, MIB // 2
    assert found["n"] == [(1, (whole_program, whole_program))]
    assert found["z"] == [(1, (whole_program,) * 3), (99, (trip,) * 3)]


def test_parts_that_a_loop_takes_in_turn_come_back_after_all_of_them():
    """64 KiB of 1 MiB each trip, of 100 trips: 16 of them touch all of it."""
    one, stack = "f32[1,16384]{1,0}", "f32[16,16384]{1,0}"
    body = (
        f"  %i = s32[] get-tuple-element(%p), index=0\n  %w = {stack} get-tuple-element(%p), index=1\n"
        f"  %s = {one} dynamic-slice(%w, %i, %i), dynamic_slice_sizes={{1,16384}}\n"
        f"  %n = {one} negate(%s)\n  ROOT %r = (s32[], {stack}) tuple(%i, %w)\n"
    )
    entry = f"%a = {stack} parameter(0)", f"%l = {stack} negate(%a)", "%c = s32[] constant(0)"
    found = reaches(looped(100, body, stack, *entry, f"%t = (s32[], {stack}) tuple(%c, %a)"))
    part, index = MIB // 16, 4
    trip = 3 * part + index  # the part of the stack, its copy, its negative
    (first_times, (first, *_)), (other_times, others) = found["s"]
    assert (first_times, other_times) == (1, 99)
    assert first == 2 * MIB  # since all of it was read, and its negative written
    assert others == (MIB + 2 * part + index, trip, 2 * part)
    assert found["n"][-1] == (99, (2 * part + index, trip))


def test_bytes_are_priced_by_the_distance_of_each_access():
    """256 KiB at 1 GB/s where the loop finds them again."""
    small = "f32[32768]{0}"  # 128 KiB
    body = (
        f"  %i = s32[] get-tuple-element(%p), index=0\n  %x = {small} get-tuple-element(%p), index=1\n"
        f"  %z = {small} negate(%x)\n  ROOT %r = (s32[], {small}) tuple(%i, %z)\n"
    )
    entry = f"%a = {small} parameter(0)", "%c = s32[] constant(0)", f"%t = (s32[], {small}) tuple(%c, %a)"
    rates = replace(BY_DISTANCE, vector_flops_per_second=10**15)
    total = itemize_text(looped(1000, body, small, *entry), targets.chip("host"), calibration=rates).total
    assert total.predicted_picoseconds == pytest.approx(1000 * MIB // 4 * 1000, rel=1e-9)


def test_chips_with_a_cache():
    assert capacity(H200) == 25 * MIB
    assert all(capacity(chip) == 0 for chip in CHIPS.values() if chip.platform != "cuda")
    assert all("L2" in chip.sources for chip in CHIPS.values() if chip.l2_bytes)


# --- programs ------------------------------------------------------------------------------------------------------


def chain(x, w, v):
    return x @ w @ v


def test_a_small_intermediate_is_read_from_the_cache():
    n = 1024
    total = bill("h200", chain, f32(n, n), f32(n, n), f32(n, n)).total
    square = 4 * n * n
    assert total.requested_bytes == 6 * square
    assert total.hbm_read_bytes == 3 * square
    assert total.hbm_write_bytes == 2 * square


def test_a_large_intermediate_is_not():
    n = 4096
    total = bill("h200", chain, f32(n, n), f32(n, n), f32(n, n)).total
    square = 4 * n * n  # 64 MiB
    assert total.requested_bytes == total.hbm_bytes == 6 * square


def test_three_consumers_read_it_once():
    dot = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    square = "f32[1024,1024]{1,0}"
    lines = [f"%a = {square} parameter(0)", *(f"%d{n} = {square} dot(%a, %a), {dot}" for n in range(3))]
    lines.append(f"ROOT %t = ({square}, {square}, {square}) tuple(%d0, %d1, %d2)")
    total = itemize_text(module(*lines), H200).total
    assert total.requested_bytes == 6 * 4 * MIB
    assert (total.hbm_read_bytes, total.hbm_write_bytes) == (4 * MIB, 3 * 4 * MIB)


@pytest.mark.parametrize(("width", "reads"), [(1024, 1), (4096, 8)])
def test_weights_that_a_loop_reads_again(width, reads):
    """2 MiB stay in the cache from trip to trip; 32 MiB are read by each of the 8 trips."""

    def loop(x, w):
        return jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ w), x)

    found = bill("h200", loop, bf16(64, width), bf16(width, width), roles={"w": "weights"})
    assert found.total.hbm_read["weights"] == reads * 2 * width * width
    found.check()


def test_stacked_weights_are_other_weights_on_each_trip():
    """A slice of 2 MiB a trip: never the one that the trip before has left."""

    def loop(x, w):
        return jax.lax.scan(lambda x, layer: (jnp.tanh(x @ layer), None), x, w)[0]

    found = bill("h200", loop, bf16(64, 1024), bf16(8, 1024, 1024), roles={"w": "weights"})
    needed = sum(row.work.hbm_read.get("weights", 0) for row in found.rows if row.tax is None)
    assert needed + found.unattributed.hbm_read.get("weights", 0) >= 8 * 2 * MIB


@pytest.mark.parametrize("target", ["host", "v5e"])
def test_no_cache_is_modelled_elsewhere(target):
    total = bill(target, chain, f32(1024, 1024), f32(1024, 1024), f32(1024, 1024)).total
    assert total.hbm_read_bytes >= 3 * 4 * MIB
    if target == "host":
        assert total.requested_bytes == total.hbm_bytes
    else:  # the intermediate stays in VMEM, and is asked for twice
        assert total.requested_bytes >= total.hbm_bytes


def test_requests_are_on_the_bill_and_can_be_read_back():
    n = 1024
    found = bill("h200", chain, f32(n, n), f32(n, n), f32(n, n))
    found.program["target"] = "h200"
    saved = found.to_json()
    assert saved["total"]["requested_bytes"] == 6 * 4 * n * n
    again = Bill.from_json(saved)
    assert again.total == found.total and again.rows == found.rows
    assert "requested 25.2 MB, of which the L2 is taken to serve 4.19 MB" in " ".join(render.to_text(found).split())
    for entry in (saved["total"], saved["unattributed"], *saved["rows"]):
        del entry["requested_bytes"]  # as bills were before
    assert Bill.from_json(saved).total.requested_bytes == found.total.hbm_bytes


# Of Llama 3 8B over 8192 positions, as Nsight Compute counted it on an H200 (results/h200-fifth.json): m, n, k, and the
# bytes that the kernel read.
COUNTED = {
    "qkv": (6144, 8192, 4096, 439e6),
    "out": (8192, 4096, 4096, 304e6),
    "gate": (8192, 14336, 4096, 877e6),
    "up": (8192, 14336, 4096, 889e6),
    "down": (8192, 4096, 14336, 1057e6),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_large_products_read_again_is_near_what_an_h200_counted(name):
    m, n, k, read = COUNTED[name]
    found = bill("h200", lambda x, w: x @ w, bf16(m, k), bf16(k, n))
    once = 2 * (m * k + k * n)
    assert found.total.hbm_read_bytes == once < read / 2
    assert once + found.total.reread_bytes == pytest.approx(read, rel=0.14)
    found.check()
    (row,) = [row for row in (*found.rows, Row("unattributed", "forward", None, found.unattributed)) if row.work.flops]
    assert row.work.reread_bytes == found.total.reread_bytes
    assert Bill.from_json(found.to_json()).total.reread_bytes == found.total.reread_bytes


@pytest.mark.parametrize(
    ("target", "m", "n", "k"),
    [
        ("h200", 2048, 2048, 2048),  # 16 MiB: they stay in the cache
        ("h200", 64, 16384, 4096),  # few rows: one wave has all of them
        ("v5e", 8192, 4096, 4096),
        ("host", 1024, 1024, 1024),
    ],
)
def test_other_products_read_nothing_again(target, m, n, k):
    assert bill(target, lambda x, w: x @ w, bf16(m, k), bf16(k, n)).total.reread_bytes == 0


def test_each_wave_reads_its_rows_and_columns():
    """132 tiles of 128 x 256 are 2080 x 2080 results; of a narrow product a wave has all columns."""
    side = math.isqrt(132 * 128 * 256)
    assert reread(H200, 10 * side, 10 * side, 10**9, 10**9) == pytest.approx(2 * 9 * 10**9, rel=0.01)
    assert reread(H200, 100 * side, side // 2, 10**9, 10**8) == pytest.approx(49 * 10**8, rel=0.01)
    assert reread(H200, 10 * side, 10 * side, 10**7, 10**7) == 0


def attention(window: int, platform: str = "cuda"):
    """Of queries [B,T,K,G,H], in the order in which a projection makes them, to keys and values [B,K,T,H]."""

    def read(q, k, v):
        q = jnp.transpose(q, (0, 2, 3, 1, 4))
        return jnp.transpose(flash.flash(q, k, v, scale=0.1, window=window, platform=platform), (0, 3, 1, 2, 4))

    return read


def test_what_attention_reads_again_is_near_what_an_h200_counted():
    """In the same layer, by the kernel of `flash_gpu.py`: 218 MB."""
    q, k = bf16(1, 8192, 8, 4, 128), bf16(1, 8, 8192, 128)
    found = bill("h200", attention(window=0), q, k, k)
    once = 2 * (q.size + 2 * k.size)
    assert found.total.hbm_read_bytes == once < 218e6 / 2
    assert once + found.total.reread_bytes == pytest.approx(218e6, rel=0.1)
    found.check()


@pytest.mark.parametrize(
    ("target", "batch", "length", "window"),
    [
        ("h200", 8, 2048, 0),  # 8 MiB of each sequence: they stay in the cache
        ("h200", 1, 8192, 1024),  # and so does what the queries of a wave see
        ("v5e", 1, 8192, 0),
    ],
)
def test_other_attention_reads_nothing_again(target, batch, length, window):
    q, k = bf16(batch, length, 8, 4, 128), bf16(batch, 8, length, 128)
    platform = targets.chip(target).platform
    assert bill(target, attention(window, platform), q, k, k).total.reread_bytes == 0


def test_the_backward_pass_of_attention_reads_again_too():
    """The gradient of the queries goes over keys and values, that of those over queries: of twice as many bytes and
    more."""
    q, k = bf16(1, 8192, 8, 4, 128), bf16(1, 8, 8192, 128)

    def gradients(q, k, v):
        return jax.grad(lambda *arrays: jnp.sum(attention(window=0)(*arrays), dtype=jnp.float32), (0, 1, 2))(q, k, v)

    kernels: list[Kernel] = []
    itemize_text(hlo("h200", gradients, q, k, k), H200, kernels=kernels)
    waves = [calls.said_waves(kernel.instruction) for kernel in kernels]
    keys, queries = 2 * 2 * k.size, 2 * 2 * q.size + 2 * 4 * 32 * 8192
    assert sorted((w.programs, len(w.rows), w.whole) for w in waves if w) == [
        (8, 128, queries),
        (32, 64, keys),
        (32, 128, keys),
    ]


@pytest.mark.parametrize(("programs", "within"), [(1, 0), (5, 0), (10, 0), (2, 0.05), (12, 0.05)])
@pytest.mark.parametrize("held", [1, 9, 20, 60])
@pytest.mark.parametrize("name", ["causal", "whole", "few"])
def test_waves_read_again_what_a_least_recently_used_cache_does_not_hold(name, held, programs, within):
    """Of five multiprocessors. All programs of a wave go over units from the first on, each over its own share of them.

    To the last unit where a wave is of whole rows or a row of whole waves; else near it.
    """
    lengths = {"causal": range(48, 0, -4), "whole": [48] * 12, "few": [8, 4]}[name]
    chip = replace(H200, multiprocessors=5, l2_bytes=int(held / SHARE))
    cache, read = OrderedDict[tuple[int, int], None](), 0
    starts = [(row, share) for row in range(len(lengths)) for share in range(programs)]
    for first in range(0, len(starts), 5):
        beside = starts[first : first + 5]
        for unit in range(max(lengths)):  # all of a wave are as far as each other
            for share in sorted({share for row, share in beside if unit < lengths[row]}):
                read += (unit, share) not in cache
                cache[unit, share] = None
                cache.move_to_end((unit, share))
                if len(cache) > held * programs:
                    cache.popitem(last=False)
    waves = Waves(programs, tuple(lengths), max(lengths), 1)
    assert (max(lengths) + reread_by_waves(chip, waves)) * programs == pytest.approx(read, rel=within)
    assert reread_by_waves(chip, waves._replace(times=3)) == 3 * reread_by_waves(chip, waves)
    assert reread_by_waves(targets.chip("v5e"), waves) == 0


@pytest.mark.parametrize("said", ["", "x", "[]", "{}", '{"programs": 0, "rows": [1], "whole": 1, "times": 1}'])
def test_waves_that_make_no_sense_are_none(said, monkeypatch):
    (call,) = parse(module('ROOT %x = f32[1] custom-call(), custom_call_target="x"')).entry.instructions
    monkeypatch.setattr(calls, "kernel_metadata", lambda _: {"waves": said})
    assert calls.said_waves(call) is None
    right = '{"programs": 2, "rows": [3, 1], "whole": 3, "times": 1}'
    monkeypatch.setattr(calls, "kernel_metadata", lambda _: {"waves": right})
    assert calls.said_waves(call) == Waves(2, (3, 1), 3, 1)
    for key in ("rows", "whole"):
        garbled = json.loads(right) | {key: "no number"}
        monkeypatch.setattr(calls, "kernel_metadata", lambda _, garbled=garbled: {"waves": json.dumps(garbled)})
        assert calls.said_waves(call) is None


def test_a_bill_says_what_is_read_again():
    found = bill("h200", lambda x, w: x @ w, bf16(8192, 4096), bf16(4096, 4096))
    text = " ".join(render.to_text(found).split())
    assert "read again" in text and "of large products and attention, which no cache holds" in text
    saved = found.to_json()
    for entry in (saved["total"], saved["unattributed"], *saved["rows"]):
        del entry["reread_bytes"]  # as bills were before
    assert Bill.from_json(saved).total.reread_bytes == 0


def test_work_that_only_asks():
    assert Work(requested_bytes=1) and Work(requested_bytes=1) != Work()
