"""Roofline seconds against arithmetic done by hand, and dollars from them."""

import pytest
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.price import dollars, dollars_per_million_tokens, tokens_per_second
from stepbill.profiling.roofline import kernel_picoseconds

H200, V5E, V4, HOST = CHIPS["h200"], CHIPS["v5e"], CHIPS["v4"], CHIPS["host"]


@pytest.mark.parametrize(
    ("matmuls", "other", "hbm", "link", "picoseconds", "bound"),
    [
        ({"bf16": 989 * 10**12}, 0, 0, 0, 10**12, "compute"),
        ({"bf16": 989 * 10**12, "int8": 1979 * 10**12}, 0, 0, 0, 2 * 10**12, "compute"),  # one after the other
        ({"bf16": 989 * 10**12}, 67 * 10**12 * 3, 0, 0, 3 * 10**12, "compute"),  # beside each other
        ({"bf16": 1}, 1, 48 * 10**11, 0, 10**12, "hbm"),
        ({"bf16": 1}, 1, 1, 45 * 10**10, 10**12, "link"),
        ({}, 0, 1, 0, 1, "hbm"),  # rounded up to a whole picosecond: no work is free
        ({}, 0, 0, 0, 0, "latency"),
        ({"bf16": 0}, 0, 0, 0, 0, "latency"),
    ],
)
def test_the_longest_of_compute_hbm_and_link(matmuls, other, hbm, link, picoseconds, bound):
    assert kernel_picoseconds(H200, matmuls, other, hbm, link) == (picoseconds, bound)


def test_exact_where_floats_would_not_be():
    assert kernel_picoseconds(H200, {}, 0, 4_800_000_000_000 * 10**9 + 1, 0) == (10**21 + 1, "hbm")


@pytest.mark.parametrize("work", [({"bf16": 1}, 0, 0, 0), ({}, 1, 0, 0), ({}, 0, 1, 0), ({}, 0, 0, 1)])
def test_no_peak_no_time(work):
    assert kernel_picoseconds(HOST, *work) == (None, None)


def test_no_work_takes_no_time_even_on_an_unknown_chip():
    assert kernel_picoseconds(HOST, {}, 0, 0, 0) == (0, "latency")


def test_classes_without_units_of_their_own():
    assert kernel_picoseconds(V5E, {"f32": 197}, 0, 0, 0) == (1, "compute")  # one bf16 pass
    assert kernel_picoseconds(V5E, {"fp8": 197 * 10**3}, 0, 0, 0) == (1000, "compute")  # widened to bf16
    assert kernel_picoseconds(H200, {"f64": 1}, 0, 0, 0) == (None, None)


def test_an_unknown_vector_peak_leaves_a_lower_bound():
    assert "vector" not in V4.peak_flops
    assert kernel_picoseconds(V4, {}, 10**15, 1_200, 0) == (1000, "hbm")


def test_dollars():
    assert dollars(H200, 8, 3600) == pytest.approx(8 * 3.50)
    # 64 tokens in 10 ms on one chip: 6400 tokens/s, 1e6 tokens in 156.25 s.
    assert tokens_per_second(0.010, 64) == pytest.approx(6400)
    assert dollars_per_million_tokens(H200, 1, 0.010, 64) == pytest.approx(3.50 / 3600 * 156.25)
    assert dollars_per_million_tokens(H200, 8, 0.010, 64) == pytest.approx(8 * 3.50 / 3600 * 156.25)


def test_unknown_stays_unknown():
    assert tokens_per_second(None, 64) is None and tokens_per_second(0, 64) is None
    assert dollars(HOST, 1, 1.0) is None and dollars(H200, 1, None) is None
    assert dollars_per_million_tokens(HOST, 1, 1.0, 64) is None
    assert dollars_per_million_tokens(H200, 1, 1.0, 0) is None
