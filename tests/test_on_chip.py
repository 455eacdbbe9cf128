"""What the L2 cache of a GPU is taken to serve, in closed form."""

import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, bill, f32, module
from stepbill.profiling import render, targets
from stepbill.profiling.bill import Bill, Work
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.on_chip import Cache, Touch, capacity
from stepbill.profiling.walk import itemize_text

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


def test_work_that_only_asks():
    assert Work(requested_bytes=1) and Work(requested_bytes=1) != Work()
