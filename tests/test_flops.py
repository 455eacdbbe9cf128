"""FLOPs of compiled programs against closed forms, rule by rule. One multiply-add is 2 FLOPs."""

# ruff: noqa: E501 (lines of HLO are as long as compilers print them)

import json
import math
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from compiled import ON_ALL, bf16, bill, f32, hlo, i32, mesh, module, split
from jax import lax
from jax.experimental import pallas
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec
from stepbill.profiling import Cost, calls, register
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.flops import Flops, flops
from stepbill.profiling.hlo import parse
from stepbill.profiling.walk import itemize_text

# --- matmuls, whatever the compiler makes of them --------------------------------------------------------------------


def times(x, w):
    return x @ w


def times_int8(x, w):
    return lax.dot(x, w, preferred_element_type=jnp.int32)


def einsum(expression):
    return lambda x, y: jnp.einsum(expression, x, y)


def s8(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.int8)


MATMULS = {
    "bf16": (times, (bf16(48, 64), bf16(64, 32)), 2 * 48 * 64 * 32),
    "f32": (times, (f32(48, 64), f32(64, 32)), 2 * 48 * 64 * 32),
    "int8": (times_int8, (s8(128, 64), s8(64, 128)), 2 * 128 * 64 * 128),
    "sizes that no tile divides": (times, (bf16(13, 57), bf16(57, 3)), 2 * 13 * 57 * 3),
    "batched": (times, (bf16(5, 48, 64), bf16(5, 64, 32)), 2 * 5 * 48 * 64 * 32),
    "matrix times vector": (times, (bf16(48, 64), bf16(64)), 2 * 48 * 64),
    "vector times matrix": (times, (f32(64), f32(64, 48)), 2 * 48 * 64),
    "two contracted axes": (einsum("abc,cad->bd"), (f32(6, 20, 9), f32(9, 6, 30)), 2 * 6 * 20 * 9 * 30),
    "transposed twice": (einsum("ab,cb->ca"), (f32(20, 30), f32(40, 30)), 2 * 20 * 30 * 40),
    "batch in the middle": (einsum("abc,dbc->bad"), (f32(6, 5, 9), f32(7, 5, 9)), 2 * 6 * 5 * 9 * 7),
    "contraction of length one": (einsum("a,b->ab"), (f32(40), f32(50)), 2 * 40 * 50),
    # Decode attention, one query a head: GPU and TPU write it as a multiply and a reduce.
    "scores, one query": (einsum("bkgh,bksh->bkgs"), (bf16(2, 4, 1, 64), bf16(2, 4, 128, 64)), 2 * 2 * 4 * 128 * 64),
    "scores, grouped": (einsum("bkgh,bksh->bkgs"), (bf16(2, 4, 4, 64), bf16(2, 4, 128, 64)), 2 * 2 * 4 * 4 * 128 * 64),
    "values, one query": (einsum("bkgs,bksh->bkgh"), (bf16(2, 4, 1, 128), bf16(2, 4, 128, 64)), 2 * 2 * 4 * 128 * 64),
    "values, grouped": (einsum("bkgs,bksh->bkgh"), (bf16(2, 4, 4, 128), bf16(2, 4, 128, 64)), 4 * 2 * 2 * 4 * 128 * 64),
}


@ON_ALL
@pytest.mark.parametrize("name", MATMULS)
def test_matmuls(target, name):
    function, arguments, expected = MATMULS[name]
    total = bill(target, function, *arguments).total
    assert total.matmul == expected
    # Nothing else is computed, but for the few sums of a contraction that a GPU splits over its cores.
    assert total.elementwise <= expected // 8 and total.transcendental == 0


# Two vectors, and rows of two matrices: no tile of anything, so the compilers multiply and sum.
@ON_ALL
@pytest.mark.parametrize(("expression", "dims"), [("a,a->", (64,)), ("ab,ab->a", (40, 50)), ("ab,ab->", (2, 5000))])
def test_inner_products(target, expression, dims):
    """On the host in three kernels: a nameless one multiplies, one sums each 32, the last sums the rest."""
    total = bill(target, einsum(expression), f32(*dims), f32(*dims)).total
    assert (total.matmul, total.elementwise) == (2 * math.prod(dims), 0)


@ON_ALL
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_the_gradient_of_a_matmul_is_two_more(target, dtype):
    gradient = jax.grad(lambda x, w: ((x @ w) ** 2).astype(jnp.float32).sum(), (0, 1))
    total = bill(target, gradient, dtype(48, 64), dtype(64, 32)).total
    assert total.matmul == 3 * 2 * 48 * 64 * 32


@ON_ALL
def test_a_sum_of_squares_is_no_matmul(target):
    total = bill(target, lambda x: jnp.sum(x * x, axis=1), f32(40, 64)).total
    assert total.matmul == 0
    assert 2 * 40 * 64 - 40 <= total.elementwise <= 1.1 * 2 * 40 * 64


@ON_ALL
def test_a_norm_is_no_matmul(target):
    def norm(x, scale):
        return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * scale[None, :]

    gradient = jax.grad(lambda x, scale: jnp.sum(norm(x, scale) ** 3), (0, 1))
    assert bill(target, gradient, f32(40, 64), f32(64)).total.matmul == 0


# --- convolutions ----------------------------------------------------------------------------------------------------


def convolve(strides, padding, spatial, **options):
    numbers = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **options)


CONVOLUTIONS = {
    # 16 in, 8 out, every second: only the first window hangs over an edge, by one.
    "1D, stride 2, padded": (convolve((2,), [(1, 1)], "W"), (f32(2, 16, 8), f32(3, 8, 4)), 2 * 2 * 8 * 4 * (3 * 8 - 1)),
    # SAME with a window of 3: the two edges each lose one, in both dimensions.
    "2D, same": (
        convolve((1, 1), "SAME", "HW"),
        (f32(2, 16, 16, 8), f32(3, 3, 8, 16)),
        2 * 2 * 8 * 16 * (3 * 16 - 2) ** 2,
    ),
    "2D, a channel a group": (
        convolve((1, 1), "VALID", "HW", feature_group_count=8),
        (f32(2, 16, 16, 8), f32(3, 3, 1, 8)),
        2 * 2 * 8 * 14**2 * 9,
    ),
    "2D, dilated window": (
        convolve((1, 1), "VALID", "HW", rhs_dilation=(2, 2)),
        (f32(2, 16, 16, 8), f32(3, 3, 8, 16)),
        2 * 2 * 8 * 16 * 12**2 * 9,
    ),
    # Transposed: 8 elements two apart, padded by 2: every element meets all 3 window positions.
    "1D, dilated input": (
        convolve((1,), [(2, 2)], "W", lhs_dilation=(2,)),
        (f32(2, 8, 8), f32(3, 8, 4)),
        2 * 2 * 8 * 4 * 3 * 8,
    ),
    "patches, as a vision encoder cuts them": (
        convolve((4, 4), "VALID", "HW"),
        (f32(2, 16, 16, 3), f32(4, 4, 3, 32)),
        2 * 2 * 16 * 32 * 48,
    ),
}


@ON_ALL
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_cost_the_pairs_that_meet(target, name):
    function, arguments, expected = CONVOLUTIONS[name]
    total = bill(target, function, *arguments).total
    if target == "host":
        assert total.matmul == expected
    else:
        # A GPU may pad with real zeros first, a TPU cuts space into batches with a halo: both multiply by zeros, and
        # the bill is of what is executed.
        assert expected <= total.matmul <= 3 * expected


# Dimension by dimension against counting by hand, in lines that TPU's compiler writes for batched products: the window
# walks over a dilated operand so that each output position meets exactly one batch element.
@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "expected"),
    [
        ("f32[8,48,64]", "f32[8,64,32]", "f32[8,48,32]", "window={size=8 stride=7 pad=0_0 lhs_dilate=8}, dim_labels=0bf_0io->0bf", 2 * 8 * 48 * 64 * 32),
        ("f32[48,64]", "f32[64,32]", "f32[48,32]", "dim_labels=bf_io->bf", 2 * 48 * 64 * 32),
        ("f32[64,48]", "f32[32,64]", "f32[32,48]", "dim_labels=fb_oi->fb", 2 * 48 * 64 * 32),
        ("f32[1,6,1]", "f32[3,1,1]", "f32[1,6,1]", "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (3 * 6 - 2)),
        ("f32[1,6,1]", "f32[3,1,1]", "f32[1,6,1]", "window={size=3 pad=1_1 rhs_reversal=1}, dim_labels=b0f_0io->b0f", 2 * (3 * 6 - 2)),
        ("f32[1,6,1]", "f32[3,1,1]", "f32[1,8,1]", "window={size=3 pad=2_2}, dim_labels=b0f_0io->b0f", 2 * 3 * 6),
        # Padding may be negative: it cuts.
        ("f32[1,6,1]", "f32[3,1,1]", "f32[1,2,1]", "window={size=3 pad=-1_-1}, dim_labels=b0f_0io->b0f", 2 * 3 * 2),
    ],
)  # fmt: skip
def test_convolution_lines(lhs, rhs, out, attributes, expected):
    text = module(
        f"%x = {lhs} parameter(0)", f"%w = {rhs} parameter(1)", f"ROOT %c = {out} convolution(%x, %w), {attributes}"
    )
    assert flops(parse(text).entry.root) == Flops(expected, precision="f32")


# --- loops and branches ----------------------------------------------------------------------------------------------

X, W = f32(8, 64), f32(64, 64)
ONCE = 2 * 8 * 64 * 64  # of x @ w
TANH = 8 * 64


def test_host_scan_is_written_as_a_loop():
    assert " while(" in hlo("host", scan(7), X, W)


def scan(length):
    return lambda x, w: lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=length)[0]


def nested(outer, inner):
    return lambda x, w: lax.scan(lambda c, _: (scan(inner)(c, w), None), x, length=outer)[0]


def counted(start, test, step):
    """A while loop over a counter."""
    return lambda x, w: lax.while_loop(
        lambda s: test(s[0]), lambda s: (step(s[0]), jnp.tanh(s[1] @ w)), (jnp.int32(start), x)
    )[1]


LOOPS = {
    "scan": (scan(7), 7),
    "nested": (nested(3, 5), 15),
    "fori_loop from 3": (lambda x, w: lax.fori_loop(3, 11, lambda _, c: jnp.tanh(c @ w), x), 8),
    "by two, not reaching the end": (counted(0, lambda n: n < 11, lambda n: n + 2), 6),
    "by two, through the end": (counted(0, lambda n: n <= 10, lambda n: n + 2), 6),
    "downwards": (counted(12, lambda n: n >= 2, lambda n: n - 3), 4),
    "downwards to a strict bound": (counted(12, lambda n: n > 0, lambda n: n - 3), 4),
    "bound first": (counted(1, lambda n: n.dtype.type(9) > n, lambda n: n + 1), 8),
    "until equal": (counted(0, lambda n: n != 5, lambda n: n + 1), 5),
}


@ON_ALL
@pytest.mark.parametrize("name", LOOPS)
def test_loops_run_as_often_as_they_say(target, name):
    function, trips = LOOPS[name]
    found = bill(target, function, X, W)
    assert found.total.matmul == trips * ONCE
    assert found.total.transcendental == trips * TANH
    assert not found.unknown


@ON_ALL
def test_the_condition_of_a_loop_runs_once_more_than_its_body(target):
    """A comparison before each trip and at the end; an addition and 512 tanh a trip. (A TPU fetches the first trip's
    operands beforehand and computes with what is left of an index.)"""
    found = bill(target, counted(0, lambda n: n < 11, lambda n: n + 2), X, W)
    assert found.total.elementwise == 6 + 7


@ON_ALL
@pytest.mark.parametrize("gradient", [False, True])
def test_a_scan_over_stacked_weights(target, gradient):
    def loss(x, w):
        return jnp.sum(lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0])

    found = bill(target, jax.grad(loss, (0, 1)) if gradient else loss, X, f32(6, 64, 64))
    assert found.total.matmul == 6 * ONCE * (3 if gradient else 1)


UNCOUNTED = {
    "until a value is reached": (lambda x, w: lax.while_loop(lambda c: c.sum() < 9, lambda c: jnp.tanh(c @ w), x), (X, W)),
    "as often as an argument says": (lambda x, w, n: lax.fori_loop(0, n, lambda _, c: jnp.tanh(c @ w), x), (X, W, i32())),
}  # fmt: skip


@ON_ALL
@pytest.mark.parametrize("name", UNCOUNTED)
def test_a_loop_of_unknown_length_is_billed_once_and_said_so(target, name):
    function, arguments = UNCOUNTED[name]
    found = bill(target, function, *arguments)
    assert found.total.matmul == ONCE
    (unknown,) = found.unknown
    assert "trip count not known" in unknown.reason and "one trip" in unknown.reason


@ON_ALL
@pytest.mark.parametrize("costly_first", [False, True])
def test_the_costliest_branch_is_billed_and_said_so(target, costly_first):
    def costly(x, w):
        return jnp.tanh(x @ w) @ w

    def cheap(x, w):
        return x * w[0, 0]

    branches = (costly, cheap) if costly_first else (cheap, costly)
    found = bill(target, lambda n, x, w: lax.switch(n, branches, x, w), i32(), X, W)
    assert found.total.matmul == 2 * ONCE
    (unknown,) = found.unknown
    # The cheap one scales x; the costly one is two matmuls and a tanh.
    least, most = f"{8 * 64:,}", f"{2 * ONCE + TANH:,}"
    chosen = 0 if costly_first else 1
    assert unknown.reason == f"2 branches of {least} to {most} FLOPs: the costliest, number {chosen}, is billed"


# --- all the rest: within what a sensible program may take -----------------------------------------------------------


@ON_ALL
def test_softmax(target):
    total = bill(target, jax.nn.softmax, f32(64, 128)).total
    n = 64 * 128
    assert total.matmul == 0
    assert n <= total.transcendental <= 2 * n  # computed twice, where that is cheaper than to keep it
    assert 4 * n - 128 <= total.elementwise <= 6 * n  # maximum, subtract, sum, divide


@ON_ALL
def test_a_long_softmax_does_not_explode(target):
    """TPU writes the maximum of a row, at each element of the row, as a window of 2n-1: executed as one reduction."""
    n = 8 * 4096
    total = bill(target, lambda x: jax.nn.softmax(x * 2), bf16(8, 4096)).total
    assert n <= total.transcendental <= 2 * n
    assert 4 * n <= total.elementwise <= 9 * n


@ON_ALL
@pytest.mark.parametrize(
    ("name", "function"),
    [("tanh", jnp.tanh), ("log", jnp.log), ("sin", jnp.sin), ("rsqrt", lax.rsqrt), ("erf", lax.erf)],
)
def test_transcendental(target, name, function):
    del name
    total = bill(target, function, f32(64, 128)).total
    assert total.flops - total.elementwise == total.transcendental
    if total.transcendental:  # else the compiler wrote its polynomial out
        assert total.transcendental == 64 * 128
    else:
        assert total.elementwise >= 5 * 64 * 128


@ON_ALL
def test_elementwise(target):
    total = bill(target, lambda x, y: jnp.maximum(x * y + x, 0.0), f32(64, 128), f32(64, 128)).total
    assert (total.matmul, total.elementwise, total.transcendental) == (0, 3 * 64 * 128, 0)


@ON_ALL
@pytest.mark.parametrize(("axis", "sums"), [(0, 100), (1, 60), (None, 1)])
def test_sum(target, axis, sums):
    total = bill(target, lambda x: x.sum(axis), f32(60, 100)).total
    assert total.matmul == total.transcendental == 0
    assert 6000 - sums <= total.elementwise <= 1.2 * 6000


def bits(key):
    return jax.random.bits(jax.random.wrap_key_data(key, impl="rbg"), (64, 128))


def threefry(key):
    return jax.random.bits(jax.random.wrap_key_data(key, impl="threefry2x32"), (64, 128))


def u32(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.uint32)


def add_rows(x, i, u):
    return x.at[i].add(u)


REST = {
    "sort": (jnp.sort, (f32(64, 128),), (64 * 128, 64 * 128 * 7**2)),
    "top_k": (lambda x: lax.top_k(x, 8), (f32(64, 1024),), (64 * 1024, 64 * 1024 * 10**2)),
    "argmax": (lambda x: jnp.argmax(x, -1), (f32(64, 1000),), (64_000 - 64, 64_000 * 10)),
    "random bits, the machine's way": (bits, (u32(4),), (64 * 128, 64 * 128 * 50)),
    "random bits, threefry": (threefry, (u32(2),), (20 * 64 * 128, 400 * 64 * 128)),
    # TPU multiplies by the transform's matrix.
    "fft": (jnp.fft.fft, (jax.ShapeDtypeStruct((4, 64), jnp.complex64),), (5 * 4 * 64 * 6, 8 * 4 * 64 * 64 * 2)),
    # Partial sums in blocks: up to 128 an element on TPU, n log2 n on the others; never n squared.
    "cumsum": (lambda x: jnp.cumsum(x, 1), (f32(4, 1000),), (4000 - 4, 4000 * 128)),
    "add to rows": (add_rows, (f32(100, 64), i32(10), f32(10, 64)), (10 * 64, 10 * 64 * 2)),
    "cholesky": (jnp.linalg.cholesky, (f32(64, 64),), (64**3 // 3 // 2, 64**3 * 4)),
}


@ON_ALL
@pytest.mark.parametrize("name", REST)
def test_the_rest_is_within_bounds(target, name):
    function, arguments, (least, most) = REST[name]
    found = bill(target, function, *arguments)
    assert least <= found.total.flops <= most or found.unknown


@ON_ALL
@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("a reshape", lambda x: x.reshape(128, 64), (f32(64, 128),)),
        ("a transpose", lambda x: x.T, (f32(64, 128),)),
        ("a slice", lambda x: x[3:17], (f32(64, 128),)),
        ("a change of type", lambda x: x.astype(jnp.bfloat16), (f32(64, 128),)),
    ],
)
def test_moving_data_computes_nothing(target, name, function, arguments):
    del name
    total = bill(target, function, *arguments).total
    assert (total.matmul, total.transcendental) == (0, 0)
    assert total.elementwise <= 16  # of an index


@ON_ALL
def test_a_join_is_moving_data(target):
    total = bill(target, lambda x, y: jnp.concatenate([x, y]), f32(64, 128), f32(3, 128)).total
    # TPU's compiler pads both with -inf and takes the larger: that is computed.
    assert total.elementwise <= (67 * 128 if target == "v5e" else 16)
    assert total.matmul == total.transcendental == 0


# --- custom calls ----------------------------------------------------------------------------------------------------

CALL = """%x = bf16[64,128]{1,0} parameter(0)
%w = bf16[128,32]{1,0} parameter(1)
ROOT %call.1 = f32[64,32]{1,0} custom-call(%x, %w), custom_call_target="TARGET", metadata={op_name="jit(f)/mlp/up/call"}
"""
TOUCHED = 64 * 128 * 2 + 128 * 32 * 2 + 64 * 32 * 4


def call(target, config=""):
    lines = CALL.replace("TARGET", target).splitlines()
    lines[-1] += f", backend_config={config}" if config else ""
    return module(*lines)


def test_a_call_without_a_rule_is_unknown_but_its_bytes_are_billed():
    found = itemize_text(call("my_kernel"), CHIPS["h200"])
    assert found.total.flops == 0
    (unknown,) = found.unknown
    assert unknown.instruction == "call.1"
    assert unknown.reason == "no rule for custom call my_kernel"
    assert unknown.hbm_bytes_at_least == TOUCHED == found.component("mlp/up").hbm_bytes


@pytest.fixture
def own_rules():
    """What a test registers is gone after it."""
    before = list(calls.CALLS)
    yield
    calls.CALLS[:] = before


def test_a_rule_of_ones_own(own_rules):
    @register(r"my_\w+")
    def mine(call):
        x, w = (operand.shape for operand in call.operands)
        return Flops(matmul=2 * x.elements * w.dims[-1])

    found = itemize_text(call("my_kernel"), CHIPS["h200"])
    assert found.component("mlp/up").matmul == found.total.matmul == 2 * 64 * 128 * 32
    assert not found.unknown


def test_the_example_of_the_documentation(own_rules):
    """Half of the keys and values are read, and all of the queries, once; by a kernel whose target all Triton's share."""
    example = [line for line in (calls.__doc__ or "").splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(example)), {})
    lines = [
        "%q = bf16[8,64]{1,0} parameter(0)",
        "%k = bf16[8,512,64]{2,1,0} parameter(1)",
        "%v = bf16[8,512,64]{2,1,0} parameter(2)",
        'ROOT %o = bf16[8,64]{1,0} custom-call(%q, %k, %v), custom_call_target="__gpu$xla.gpu.triton", '
        'metadata={op_name="jit(f)/attention/core/NAME"}',
    ]
    found, other = (
        itemize_text(module(*lines).replace("NAME", name), CHIPS["h200"]) for name in ("flash_decode", "another")
    )
    assert found.component("attention/core").matmul == 4 * 8 * 64 * 512
    assert found.total.hbm_bytes == 2 * (2 * 8 * 64 + 8 * 512 * 64)
    assert not found.unknown and other.unknown and not other.total.flops


def test_a_rule_that_speaks_of_other_operands_than_there_are_is_not_believed(own_rules):
    register("my_kernel")(lambda call: Cost(Flops(7), reads=[1, 2, 3]))
    found = itemize_text(call("my_kernel"), CHIPS["h200"])
    assert found.total.hbm_bytes == TOUCHED and not found.total.flops
    assert any("3 reads of 2 operands" in unknown.reason for unknown in found.unknown)


def test_a_rule_may_leave_a_call_to_those_before_it(own_rules):
    register("__cublas.*")(lambda call: None)
    assert itemize_text(call("__cublas$gemm"), CHIPS["h200"]).total.matmul == 2 * 64 * 128 * 32


def test_an_author_who_does_not_know_is_not_believed():
    found = itemize_text(
        call("tpu_custom_call", '{"cost_estimate":{"flops":"-1","transcendentals":"0"}}'), CHIPS["v5e"]
    )
    (unknown,) = found.unknown
    assert unknown.reason == "no rule for custom call tpu_custom_call, the kernel call" and found.total.flops == 0


def test_the_rule_registered_last_wins(own_rules):
    register("__cublas.*")(lambda call: Flops(7))
    assert itemize_text(call("__cublas$gemm"), CHIPS["h200"]).total.matmul == 7


@pytest.mark.parametrize(
    "config",
    [
        '{"custom_call_config":{"body":"TUzvUg==","cost_estimate":{"flops":"1000","transcendentals":"30","bytes_accessed":"5"},"needs_layout_passes":true}}',
        '{"cost_estimate":{"flops":1000,"transcendentals":30,"bytes_accessed":5},"ir":"module"}',
    ],
)  # fmt: skip
def test_an_author_may_estimate(config):
    found = itemize_text(call("tpu_custom_call", config), CHIPS["v5e"])
    assert (found.total.matmul, found.total.transcendental) == (1000, 30)
    assert not found.unknown


def test_a_pallas_kernel_says_what_it_costs():
    """As Pallas itself prints it for a TPU."""
    estimate = pallas.CostEstimate(flops=123_456, bytes_accessed=789, transcendentals=12)

    def kernel(x, y):
        y[...] = x[...] * 2.0

    def double(x):
        return pallas.pallas_call(kernel, out_shape=x, cost_estimate=estimate, name="double")(x)

    found = bill("v5e", double, f32(128, 128))
    assert (found.total.matmul, found.total.transcendental) == (123_456, 12)
    assert found.total.hbm_bytes == 2 * 4 * 128 * 128
    assert not found.unknown


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_pallas_kernel_says_what_it_reads(target):
    """Of one operand a sixth, another twice; as Pallas prints it over several lines for a TPU, and escaped for a GPU.
    And what it computes without products."""
    over = mesh(target)
    estimate = {"flops": 123_456, "transcendentals": 12, "bytes_accessed": 789}
    said = {"cost_estimate": json.dumps(estimate | {"elementwise": 34}), "operand_reads": f"{8 * 128},{2 * 8 * 128}"}

    def kernel(x, z, y):
        y[...] = x[0] + z[...]

    def pick(x, z):
        options: dict[str, Any] = {"compiler_params": triton.CompilerParams()}
        if target == "v5e":
            options = {"cost_estimate": pallas.CostEstimate(**estimate)}
        return pallas.pallas_call(kernel, out_shape=f32(8, 128), name="pick", metadata=said, **options)(x, z)

    def on_each(x, z):
        here = PartitionSpec()
        return jax.shard_map(pick, mesh=over, in_specs=here, out_specs=here, check_vma=False)(x, z)

    roles = {"x": "weights", "z": "inputs"}
    found = bill(target, on_each, split(f32(6, 8, 128), over), split(f32(8, 128), over), roles=roles)
    assert (found.total.matmul, found.total.elementwise, found.total.transcendental) == (123_456, 34, 12)
    assert found.total.hbm_read == {"weights": 8 * 128 * 4, "inputs": 2 * 8 * 128 * 4}
    assert found.total.hbm_write == {"activations": 8 * 128 * 4}
    assert not found.unknown


@pytest.mark.parametrize("said", ["1,2,3", "1,x", "1"])
def test_what_a_kernel_says_of_other_operands_than_it_has_is_not_believed(said):
    config = f'{{name = "k", serialized_metadata = "{{\\22operand_reads\\22: \\22{said}\\22}}"}}'
    found = itemize_text(call("__gpu$xla.gpu.triton", config), CHIPS["h200"])
    assert found.total.hbm_bytes == TOUCHED


@pytest.mark.parametrize("target", ["__gpu$xla.gpu.triton", "mosaic_gpu_v2"])
def test_pallas_kernels_for_a_gpu_carry_no_estimate(target):
    found = itemize_text(call(target, '{name = "double", num_stages = 3 : i32, grid_x = 1 : i32}'), CHIPS["h200"])
    (unknown,) = found.unknown
    assert unknown.reason == f"no rule for custom call {target}, the kernel double"
    assert unknown.hbm_bytes_at_least == TOUCHED == found.total.hbm_bytes


GEMM = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["%d"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}'


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # cuBLAS: the product, then workspace.
        (["%x = bf16[64,128]{1,0} parameter(0)", "%w = bf16[128,32]{1,0} parameter(1)",
          'ROOT %g = (bf16[64,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
          'backend_config={"operation_queue_id":"0","gemm_backend_config":{"alpha_real":1,"beta":0,' + GEMM % 1 + ',"epilogue":"DEFAULT"}}'],
         Flops(2 * 64 * 128 * 32)),
        # cuBLASLt with the left side transposed, a bias, and an activation fused in.
        (["%x = f32[128,64]{1,0} parameter(0)", "%w = f32[128,32]{1,0} parameter(1)", "%b = f32[32]{0} parameter(2)",
          'ROOT %g = (f32[64,32]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %b), custom_call_target="__cublas$lt$matmul", '
          'backend_config={"gemm_backend_config":{"alpha_real":1,' + GEMM % 0 + ',"epilogue":"BIAS_RELU"}}'],
         Flops(2 * 64 * 128 * 32, 2 * 64 * 32, precision="f32")),
        # Another array added, a bias, and an activation by tanh.
        (["%x = f32[128,64]{1,0} parameter(0)", "%w = f32[128,32]{1,0} parameter(1)", "%b = f32[32]{0} parameter(2)",
          "%c = f32[64,32]{1,0} parameter(3)",
          'ROOT %g = (f32[64,32]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %c, %b), custom_call_target="__cublas$lt$matmul", '
          'backend_config={"gemm_backend_config":{"alpha_real":1,"beta":1,' + GEMM % 0 + ',"epilogue":"BIAS_GELU"}}'],
         Flops(2 * 64 * 128 * 32, 10 * 64 * 32, 64 * 32, precision="f32")),
        # A convolution 1 x 1 of cuDNN's, with a bias and an activation.
        (["%x = f32[8,4,4,16]{3,2,1,0} parameter(0)", "%w = f32[32,1,1,16]{3,2,1,0} parameter(1)", "%b = f32[32]{0} parameter(2)",
          'ROOT %g = (f32[8,4,4,32]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w, %b), custom_call_target="__cudnn$convBiasActivationForward", '
          'window={size=1x1}, dim_labels=b01f_o01i->b01f, backend_config={"cudnn_conv_backend_config":{"activation_mode":"kRelu",'
          '"conv_result_scale":1,"side_input_scale":0,"leakyrelu_alpha":0}}'],
         Flops(2 * 8 * 4 * 4 * 16 * 32, 2 * 8 * 4 * 4 * 32, precision="f32")),
        (["%x = f8e4m3fn[64,128]{1,0} parameter(0)", "%w = f8e4m3fn[32,128]{1,0} parameter(1)", "%s = f32[] parameter(2)",
          'ROOT %g = (bf16[64,32]{1,0}, s8[33554432]{0}) custom-call(%x, %w, %s), custom_call_target="__cublas$lt$matmul$f8", '
          'backend_config={"gemm_backend_config":{"alpha_real":1,' + GEMM % 1 + ',"epilogue":"DEFAULT"}}'],
         Flops(2 * 64 * 128 * 32, precision="fp8")),
        # Batched: the batch is in the result.
        (["%x = bf16[5,64,128]{2,1,0} parameter(0)", "%w = bf16[5,128,32]{2,1,0} parameter(1)",
          'ROOT %g = (bf16[5,64,32]{2,1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", '
          'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],'
          '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'],
         Flops(5 * 2 * 64 * 128 * 32)),
        # oneDNN, on x86 hosts.
        (["%x = f32[64,128]{1,0} parameter(0)", "%w = f32[128,32]{1,0} parameter(1)",
          'ROOT %g = f32[64,32]{1,0} custom-call(%x, %w), custom_call_target="__onednn$matmul", '
          'backend_config={"outer_dimension_partitions":[],"onednn_matmul_config":{"weights_prepacked":false,"transpose_a":false,"transpose_b":false}}'],
         Flops(2 * 64 * 128 * 32, precision="f32")),
        (["%x = f32[128,64]{1,0} parameter(0)", "%w = f32[128,32]{1,0} parameter(1)",
          'ROOT %g = (f32[64,32]{1,0}, u8[64]{0}) custom-call(%x, %w), custom_call_target="__onednn$matmul", '
          'backend_config={"onednn_matmul_config":{"transpose_a":true,"transpose_b":false}}'],
         Flops(2 * 64 * 128 * 32, precision="f32")),
        # cuDNN attention, B 2, T = S = 512, N 8, H 64: all of T x S, and half of it under a causal mask.
        (["%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)", "%k = bf16[2,512,8,64]{3,2,1,0} parameter(1)",
          'ROOT %a = (bf16[2,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", '
          'backend_config={"cudnn_fmha_backend_config":{"algorithm":{"algo_id":"0"},"fmha_scale":0.125,'
          '"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","512","512"]},"mask_type":"NO_MASK"}}'],
         Flops(4 * 2 * 8 * 512 * 512 * 64, transcendental=2 * 8 * 512 * 512)),
        (["%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)", "%k = bf16[2,512,8,64]{3,2,1,0} parameter(1)",
          'ROOT %a = (bf16[2,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", '
          'backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","512","512"]},'
          '"mask_type":"CAUSAL"}}'],
         Flops(2 * 2 * 8 * 512 * 512 * 64, transcendental=2 * 8 * 512 * 512)),
        (["%q = bf16[2,512,8,64]{3,2,1,0} parameter(0)", "%k = bf16[2,512,8,64]{3,2,1,0} parameter(1)",
          'ROOT %a = (bf16[2,8,512,64]{3,1,2,0}, bf16[2,8,512,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), '
          'custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config":'
          '{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","512","512"]},"mask_type":"NO_MASK"}}'],
         Flops(10 * 2 * 8 * 512 * 512 * 64, transcendental=2 * 8 * 512 * 512)),
        # ConcatBitcast and friends are names, not work.
        (["%x = bf16[64,128]{1,0} parameter(0)", 'ROOT %c = bf16[64,128]{1,0} custom-call(%x), custom_call_target="ConcatBitcast"'],
         Flops()),
    ],
)  # fmt: skip
def test_library_calls(lines, expected):
    found = flops(parse(module(*lines)).entry.root)
    assert found is not None
    assert found[:3] == expected[:3]
    assert not expected.matmul or found.precision == expected.precision


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[40,32]{1,0} ragged-dot(%x, %e, %n), lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}", 2 * 40 * 64 * 32),
    ],
)  # fmt: skip
def test_ragged_dot_runs_every_row_once(line, expected):
    text = module(
        "%x = f32[40,64]{1,0} parameter(0)",
        "%e = f32[4,64,32]{2,1,0} parameter(1)",
        "%n = s32[4]{0} parameter(2)",
        "ROOT %d = " + line,
    )
    assert flops(parse(text).entry.root) == Flops(expected, precision="f32")
