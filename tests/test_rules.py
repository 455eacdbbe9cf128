"""Rules for what is newer or rarer than a matmul: each compiled for every target that takes it, beside its closed form.

Where a target refuses a program, the test says which, and why. What nobody here can compile (a SparseCore's calls) is
read from a line of text.
"""

# ruff: noqa: E501 (lines of HLO are as long as compilers print them)

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from compiled import ON_ALL, bf16, f32, hlo, i32, mesh, module, split
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from stepbill.profiling import targets
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.flops import Flops, flops
from stepbill.profiling.hlo import parse
from stepbill.profiling.targets import CompileError
from stepbill.profiling.walk import itemize_text
from test_traffic import all_of, bill, read, written

NEW = jax.__version_info__ >= (0, 12)


def arrays(dtype):
    return lambda *dims: jax.ShapeDtypeStruct(dims, dtype)


e4m3, e5m2, scales = arrays(jnp.float8_e4m3fn), arrays(jnp.float8_e5m2), arrays(jnp.float8_e8m0fnu)
s4, s8, u32, c64 = arrays(jnp.int4), arrays(jnp.int8), arrays(jnp.uint32), arrays(jnp.complex64)
e2m1 = arrays(jnp.float4_e2m1fn)

# --- narrow matmuls --------------------------------------------------------------------------------------------------

M, K, N = 128, 256, 512


def dot(out):
    return lambda x, w: lax.dot(x, w, preferred_element_type=out)


NARROW = {  # function, type of x, type of w, bits of a weight
    "e4m3": (dot(jnp.float32), e4m3, e4m3, 8),
    "e5m2 by e4m3": (dot(jnp.float32), e5m2, e4m3, 8),
    "e4m3 to bfloat16": (dot(jnp.bfloat16), e4m3, e4m3, 8),
    "int4": (dot(jnp.int32), s4, s4, 4),
    "int8 by int4": (lambda x, w: dot(jnp.int32)(x, w.astype(jnp.int8)), s8, s4, 4),
    "bfloat16 by int4": (lambda x, w: x @ w.astype(jnp.bfloat16), bf16, s4, 4),
}


@ON_ALL
@pytest.mark.parametrize("name", NARROW)
def test_narrow_matmuls(target, name):
    function, left, right, bits = NARROW[name]
    arguments = left(M, K), right(K, N)
    if target == "host" and name == "int4":
        with pytest.raises(CompileError, match="does not support custom element sizes"):
            hlo(target, function, *arguments)
        return
    found = bill(target, function, *arguments)
    assert found.total.matmul == 2 * M * K * N
    assert read(found, "weights") == K * N * bits // 8  # what is more, where they are widened first, is a tax
    if target == "v5e":
        assert all_of(found, "weights") == K * N * bits // 8
    assert not found.unknown


# A scale for every 32 (e8m0) or 16 (e4m3) values along K; both sides are [B, rows, K].
SCALED = {"mxfp8": (e4m3, scales, 32, 8), "nvfp4": (e2m1, e4m3, 16, 4)}


def scaled(x, w, x_scale, w_scale):
    return jax.nn.scaled_matmul(x, w, x_scale, w_scale, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("target", ["host", "h200", "b200", "v5e"])
@pytest.mark.parametrize("name", SCALED)
def test_block_scaled_matmuls(target, name):
    values, scale, block, bits = SCALED[name]
    sides = values(1, M, K), values(1, N, K), scale(1, M, K // block), scale(1, N, K // block)
    if target in ("host", "v5e") and not NEW:
        with pytest.raises(NotImplementedError, match="'scaled_matmul' not found for platform"):
            hlo(target, scaled, *sides)
        return
    found = bill(target, scaled, *sides)
    assert found.total.matmul == 2 * M * K * N
    assert not found.unknown
    stored = (M + N) * K * bits // 8 + (M + N) * K // block
    if target == "b200" and not NEW:  # cuDNN's kernel: values as they are; both scales copied into its order first
        assert "__cudnn$blockScaledDot" in hlo(target, scaled, *sides)
        assert found.total.elementwise == 0
        assert found.total.hbm_bytes == stored + 2 * (M + N) * K // block + M * N * 4
    else:  # written out: each value times its scale, and on a GPU a sum over the parts of a split contraction
        parts = found.total.elementwise - (M + N) * K
        assert parts % (M * N) == 0 and parts // (M * N) in ((0,) if target in ("host", "v5e") else (0, 2, 4, 8))
    if target == "v5e":  # in one kernel
        assert found.total.hbm_bytes - padding(found) == stored + M * N * 4


def padding(found):
    return found.tax("padding").hbm_bytes


# Single lines: the call in both of its names, and the peak that bounds it.
@pytest.mark.parametrize(
    ("called", "dtype", "peak"),
    [
        ("__op$block_scaled_dot", "f8e4m3fn", "fp8"),
        ("__cudnn$blockScaledDot", "f8e5m2", "fp8"),
        ("__cudnn$blockScaledDot", "f4e2m1fn", "fp4"),
    ],
)
def test_block_scaled_lines(called, dtype, peak):
    text = module(
        f"%x = {dtype}[2,128,256]{{2,1,0}} parameter(0)",
        f"%w = {dtype}[2,512,256]{{2,1,0}} parameter(1)",
        "%s = f8e8m0fnu[2,128,8]{2,1,0} parameter(2)",
        "%t = f8e8m0fnu[2,512,8]{2,1,0} parameter(3)",
        f'ROOT %d = (f32[2,128,512]{{2,1,0}}, u8[0]{{0}}) custom-call(%x, %w, %s, %t), custom_call_target="{called}"',
    )
    assert flops(parse(text).entry.root) == Flops(2 * 2 * 128 * 512 * 256, precision=peak)


def test_four_bits_are_twice_as_fast_where_there_are_units_for_them():
    lines = [
        "%x = f4e2m1fn[4096,4096]{1,0} parameter(0)",
        "%w = f4e2m1fn[4096,4096]{1,0} parameter(1)",
        "ROOT %d = f32[4096,4096]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    ]
    of = {name: itemize_text(module(*lines), CHIPS[name]).total for name in ("b200", "h200", "a100")}
    for name, peak in (("b200", 9000e12), ("h200", 1979e12), ("a100", 312e12)):  # fp4; widened to fp8; to bf16
        assert of[name].seconds == pytest.approx(2 * 4096**3 / peak, abs=1e-12)


# --- grouped matmuls -------------------------------------------------------------------------------------------------

ROWS, D, F, E = 64, 128, 32, 4
ROUTED = 2 * ROWS * D * F


@ON_ALL
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_ragged_dot_routed_and_executed(target, dtype):
    """Every row has one group. A TPU's kernel runs that; the others multiply every row with all E matrices."""
    run = ROUTED if target == "v5e" else E * ROUTED
    behind = Fraction(run - ROUTED, run)
    found = bill(target, lax.ragged_dot, dtype(ROWS, D), dtype(E, D, F), i32(E), masked={"mlp/up": behind})
    assert found.total.matmul == run
    assert found.total.matmul - found.tax("masked").matmul == found.ideal_flops == ROUTED
    assert not found.unknown


@pytest.mark.parametrize("sizes", [(64, 128, 32, 4), (512, 256, 1024, 8)])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_what_a_gpus_ragged_dot_masks_is_told_by_the_program(dtype, sizes):
    """Forward and both gradients; also where the product is summed in parts, and rows are looked up."""
    rows, D, F, E = sizes

    def loss(x, w, n, order):
        return jnp.sum(lax.ragged_dot(x[order], w, n).astype(jnp.float32) ** 2)

    found = bill("h200", jax.grad(loss, (0, 1)), dtype(rows, D), dtype(E, D, F), i32(E), i32(rows))
    routed = 3 * 2 * rows * D * F
    assert found.total.matmul == E * routed
    assert found.total.matmul - found.tax("masked").matmul == found.ideal_flops == routed


@ON_ALL
def test_the_gradient_of_ragged_dot(target):
    def loss(x, w, n):
        return jnp.sum(lax.ragged_dot(x, w, n).astype(jnp.float32) ** 2)

    found = bill(target, jax.grad(loss, (0, 1)), bf16(ROWS, D), bf16(E, D, F), i32(E))
    # Before jax 0.12 a TPU makes the weights' gradients with all groups masked.
    products = {"v5e": 3 if NEW else 2 + E}.get(target, 3 * E)
    assert found.total.matmul == products * ROUTED
    assert not found.unknown


@ON_ALL
def test_a_matmul_for_each_group(target):
    found = bill(target, lambda x, w: jnp.einsum("ecd,edf->ecf", x, w), bf16(E, 16, D), bf16(E, D, F))
    assert found.total.matmul == 2 * E * 16 * D * F
    assert read(found, "weights") == E * D * F * 2


@pytest.mark.parametrize(
    ("out", "attributes", "groups", "expected"),
    [
        # Rows in groups; each contraction in groups, so that each group has a result of its own; a batch in groups.
        ("f32[40,32]", "lhs_contracting_dims={1}, rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}", 4, 2 * 40 * 64 * 32),
        ("f32[4,64,32]", "lhs_contracting_dims={0}, rhs_contracting_dims={0}, lhs_ragged_dims={0}", 4, 2 * 40 * 64 * 32),
    ],
)  # fmt: skip
def test_ragged_dot_lines(out, attributes, groups, expected):
    rhs = f"f32[{groups},64,32]" if out == "f32[40,32]" else "f32[40,32]"
    text = module(
        "%x = f32[40,64]{1,0} parameter(0)",
        f"%w = {rhs} parameter(1)",
        f"%n = s32[{groups}]{{0}} parameter(2)",
        f"ROOT %d = {out} ragged-dot(%x, %w, %n), {attributes}",
    )
    assert flops(parse(text).entry.root) == Flops(expected, precision="f32")


# --- sorting ---------------------------------------------------------------------------------------------------------


@ON_ALL
@pytest.mark.parametrize(("dims", "depth"), [((64, 128), 7), ((100,), 7), ((1 << 12,), 12)])
def test_sorting_is_n_log_n(target, dims, depth):
    found = bill(target, jnp.sort, f32(*dims))
    assert found.total.elementwise == math.prod(dims) * depth
    assert found.total.matmul == found.total.transcendental == 0 and not found.unknown


@ON_ALL
def test_the_largest_k_are_found_in_one_pass(target):
    found = bill(target, lambda x: lax.top_k(x, 8), f32(64, 1024))
    assert found.total.elementwise == 64 * 1024
    assert found.total.hbm_read["inputs"] == 64 * 1024 * 4 and len(found.total.hbm_read) == 1
    assert found.total.hbm_write_bytes - padding(found) == 2 * 64 * 8 * 4  # values and where they were
    assert not found.unknown


@ON_ALL
def test_the_largest_k_nearly(target):
    n = 64 * 8192

    def best(x):
        return lax.approx_max_k(x, 8)

    found = bill(target, best, f32(64, 8192))
    sorted_whole = target != "v5e" and " sort(" in hlo(target, best, f32(64, 8192))
    # A TPU keeps the best of 256 bins and sorts those; a GPU since jax 0.12 sorts all.
    bins = 64 * 256 * 8 if target == "v5e" else 0
    assert sorted_whole == (target == "h200" and NEW)
    assert found.total.elementwise == (13 * n if sorted_whole else n + bins)
    assert found.total.hbm_read["inputs"] == n * 4 and not found.unknown


# --- random numbers --------------------------------------------------------------------------------------------------

NUMBERS = 64 * 128


def bits(generator):
    return lambda key: jax.random.bits(jax.random.wrap_key_data(key, impl=generator), (64, 128))


@ON_ALL
def test_threefry_is_written_out(target):
    """Threefry-2x32 (Salmon et al., SC 2011) of each number's index: 20 rounds of an addition, a rotation (two shifts
    and an or) and an exclusive or, 5 times two keys added, two at the start; both halves joined by an exclusive or."""
    least = 20 * 5 + 5 * 2 + 2 + 1
    found = bill(target, bits("threefry2x32"), u32(2))
    assert found.total.matmul == found.total.transcendental == 0 and not found.unknown
    # The index is split in two and counted up. A CPU cuts the rounds into kernels that begin with those before again.
    assert least * NUMBERS <= found.total.elementwise <= (2 if target == "host" else 1.1) * least * NUMBERS
    tiles = 2 * 512  # of two scalars
    assert found.total.hbm_write_bytes >= 4 * NUMBERS
    assert found.total.hbm_write_bytes <= 4 * NUMBERS + tiles or target == "host"


@ON_ALL
def test_the_machines_own_generator(target):
    """A TPU's is hardware, one a number. Elsewhere Philox-4x32 (ibid.): ten rounds a block of four numbers, each two
    products, both halves of them, and four exclusive ors; and two keys added a round, for all blocks at once."""
    found = bill(target, bits("rbg"), u32(4))
    each = 1 if target == "v5e" else 10 * (2 * 2 + 4) / 4
    assert each * NUMBERS <= found.total.elementwise <= 1.2 * each * NUMBERS
    assert not found.unknown


@ON_ALL
def test_normal_numbers_take_a_logarithm_and_a_root(target):
    def normal(key):
        return jax.random.normal(jax.random.wrap_key_data(key, impl="threefry2x32"), (64, 128))

    found = bill(target, normal, u32(2))
    assert found.total.transcendental == 2 * NUMBERS  # of the inverse error function: log1p and sqrt
    assert not found.unknown


# --- gathers and scatters --------------------------------------------------------------------------------------------

V, WIDTH, LOOKED_UP = 50_000, 512, 8
TABLE, ROWS_OF_IT = V * WIDTH * 4, LOOKED_UP * WIDTH * 4


@ON_ALL
@pytest.mark.parametrize("combine", ["add", "set"])
def test_a_scatter_into_a_donated_table_touches_its_rows(target, combine):
    def scatter(table, x, u):
        return getattr(table.at[x], combine)(u)

    found = bill(target, scatter, f32(V, WIDTH), i32(LOOKED_UP), f32(LOOKED_UP, WIDTH), donate=(0,))
    assert written(found, "weights") == all_of(found, "weights") - read(found, "weights") == ROWS_OF_IT
    # Where they are replaced the old ones are not needed; a TPU's compiler combines all the same.
    assert read(found, "weights") == (0 if combine == "set" and target != "v5e" else ROWS_OF_IT)
    additions = found.total.elementwise - (LOOKED_UP * WIDTH if combine == "add" else 0)
    assert 0 <= additions <= 3 * LOOKED_UP  # of negative indices


@ON_ALL
def test_the_gradient_of_a_lookup_writes_the_table_once_and_its_rows(target):
    """There is no table to add to: zeros are made, all of it, and the rows added to them in place."""
    found = bill(
        target, jax.grad(lambda w, x, g: jnp.sum(w[x] * g)), f32(V, WIDTH), i32(LOOKED_UP), f32(LOOKED_UP, WIDTH)
    )
    indices = 64  # of the rows, which a CPU writes out
    assert 0 <= found.total.hbm_write_bytes - (TABLE + ROWS_OF_IT) <= indices
    assert (
        0 <= found.total.hbm_read_bytes - padding(found) - 2 * ROWS_OF_IT <= 2 * indices
    )  # the rows and what is added
    assert LOOKED_UP * WIDTH <= found.total.elementwise <= LOOKED_UP * (WIDTH + 3)
    assert found.ideal_hbm_bytes - TABLE <= ROWS_OF_IT + indices


# --- Fourier transforms ----------------------------------------------------------------------------------------------


@ON_ALL
@pytest.mark.parametrize(
    ("name", "points", "function", "argument", "real"),
    [
        ("fft", 64, jnp.fft.fft, c64(4, 64), 1),
        ("fft of no power of two", 100, jnp.fft.fft, c64(4, 100), 1),
        ("rfft", 64, jnp.fft.rfft, f32(4, 64), 2),
        ("irfft", 128, jnp.fft.irfft, c64(4, 65), 2),
    ],
)
def test_fourier_transforms(target, name, points, function, argument, real):
    found = bill(target, function, argument)
    if target != "v5e":
        assert found.total.elementwise == round(5 * 4 * points * math.log2(points)) // real
        assert found.total.matmul == 0
    else:  # a product with the transform's matrix, of complex numbers, and so three of real ones (Gauss)
        assert found.total.matmul == 3 * 2 * 4 * points * points
        assert found.total.transcendental >= points  # the matrix is made on the fly
    assert not found.unknown


def test_complex_numbers_are_copied_into_halves_on_a_tpu():
    """It computes with real and imaginary parts apart. 268 MB each: too large for VMEM."""
    found = bill("v5e", lambda x: jnp.sum(x.real * x.imag), c64(8192, 8192))
    whole = 8192 * 8192 * 8
    # Each copy reads its half, and is written; then both are read.
    assert (found.total.hbm_read_bytes, found.total.hbm_write_bytes) == (2 * whole, whole + 4)


# --- cumulative sums, pools ------------------------------------------------------------------------------------------


def in_blocks(n, block):
    """Additions of n prefix sums in blocks: within each block, of the blocks' sums, and both joined."""
    if n <= block:
        return n * (n + 1) // 2  # a window of n that ends at each element: 1 + 2 + ... + n pairs
    blocks = -(-n // block)
    return blocks * block * (block + 1) // 2 + in_blocks(blocks, block) + blocks * block


@ON_ALL
@pytest.mark.parametrize("n", [1000, 1 << 14])
def test_cumulative_sums_grow_with_n_and_not_with_its_square(target, n):
    found = bill(target, lambda x: jnp.cumsum(x, 1), f32(4, n))
    expected = 4 * in_blocks(n, 128 if target == "v5e" else 16)
    # Long ones on a GPU: the sums within the blocks are made again where they are joined.
    again = 2 if target == "h200" and n > 16**3 else 1
    assert expected <= found.total.elementwise <= 1.01 * again * expected
    assert found.total.elementwise < 4 * n * 70
    assert not found.unknown


@ON_ALL
def test_a_cumulative_logsumexp_takes_an_exponential_and_a_logarithm_a_pair(target):
    sums = bill(target, lambda x: jnp.cumsum(x, 1), f32(4, 140)).total
    found = bill(target, lambda x: lax.cumlogsumexp(x, axis=1), f32(4, 140)).total
    assert found.transcendental == pytest.approx(2 * sums.elementwise, rel=0.01)


POOL = {"window_dimensions": (1, 3, 3, 1), "window_strides": (1, 2, 2, 1)}


def largest(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, padding="SAME", **POOL)


@ON_ALL
def test_pooling_compares_what_lies_inside(target):
    """3 x 3 windows, two apart, over 16 x 16: the last of each row and column hangs over by one."""
    found = bill(target, largest, f32(2, 16, 16, 8))
    assert found.total.elementwise == 2 * 8 * (3 * 8 - 1) ** 2
    assert not found.unknown


def test_the_gradient_of_pooling_selects_and_scatters():
    """On a TPU; elsewhere it is a reduction that carries positions."""
    gradient = jax.grad(lambda x, g: jnp.sum(largest(x) * g))
    pairs, outputs = 2 * 8 * (3 * 8 - 1) ** 2, 2 * 8 * 8 * 8
    found = bill("v5e", gradient, f32(2, 16, 16, 8), f32(2, 8, 8, 8))
    assert "select-and-scatter" in hlo("v5e", gradient, f32(2, 16, 16, 8), f32(2, 8, 8, 8))
    assert found.total.elementwise == pairs + outputs


# --- convolutions of many kinds --------------------------------------------------------------------------------------


def same(x, w, **options):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


ONE = 2 * 2 * 8 * 16 * (3 * 16 - 2) ** 2  # of two images of 16 x 16, 8 features to 16, 3 x 3
CONVOLUTIONS = {
    "a kernel for each of three batches": (jax.vmap(same), (f32(3, 2, 16, 16, 8), f32(3, 3, 3, 8, 16)), 3 * ONE),
    "batch in groups": (lambda x, w: same(x, w, batch_group_count=2), (f32(4, 16, 16, 8), f32(3, 3, 8, 16)), ONE),
    "features in groups": (lambda x, w: same(x, w, feature_group_count=2), (f32(2, 16, 16, 8), f32(3, 3, 4, 16)), ONE // 2),
}  # fmt: skip


@ON_ALL
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_batched_and_grouped_convolutions(target, name):
    function, arguments, expected = CONVOLUTIONS[name]
    found = bill(target, function, *arguments)
    assert found.total.matmul == expected
    assert not found.unknown


@ON_ALL
def test_a_convolutions_gradients_are_two_more(target):
    found = bill(target, jax.grad(lambda x, w: jnp.sum(same(x, w) ** 2), (0, 1)), f32(2, 16, 16, 8), f32(3, 3, 8, 16))
    # A TPU cuts the two rows of 16 into 16 batches of three columns: 16 x 3 windows of all 3, where 2 x (3 x 16 - 2) would do.
    halo = Fraction(16 * 3 * 3, 2 * (3 * 16 - 2)) if target == "v5e" else 1
    assert found.total.matmul == 3 * ONE * halo
    assert not found.unknown


# cuDNN's backward calls say the forward convolution's window: 6 positions, three wide, padded; stride one or two.
@pytest.mark.parametrize(("stride", "out", "pairs"), [(1, 6, 3 * 6 - 2), (2, 3, 3 * 3 - 1)])
@pytest.mark.parametrize("kind", ["Forward", "BiasActivationForward", "BackwardInput", "BackwardFilter"])
def test_cudnn_convolution_lines(kind, stride, out, pairs):
    image, kernel, result = "f32[2,6,8]", "f32[4,3,8]", f"f32[2,{out},4]"
    operands = {"BackwardInput": (result, kernel, image), "BackwardFilter": (image, result, kernel)}
    x, w, y = operands.get(kind, (image, kernel, result))
    text = module(
        f"%x = {x} parameter(0)",
        f"%w = {w} parameter(1)",
        f"ROOT %c = ({y}, u8[0]{{0}}) custom-call(%x, %w), window={{size=3 stride={stride} pad=1_1}}, dim_labels=b0f_o0i->b0f, "
        f'custom_call_target="__cudnn$conv{kind}"',
    )
    assert flops(parse(text).entry.root) == Flops(2 * 2 * 8 * 4 * pairs, precision="f32")


# --- the host's memory -----------------------------------------------------------------------------------------------

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
MOVED = 512 * 1024 * 4


@ON_ALL
def test_a_result_put_into_the_hosts_memory_goes_over_the_hosts_link(target):
    found = bill(target, lambda x: jax.device_put(jnp.tanh(x), HOST), f32(512, 1024))
    if target == "host":  # it is there
        assert (found.total.host_link_bytes, found.total.hbm_bytes) == (0, 2 * MOVED)
        return
    assert found.total.host_link_bytes == found.component("mlp/up").host_link_bytes + found.unattributed.host_link_bytes
    assert found.total.host_link_bytes == MOVED
    assert found.total.link_bytes == 0  # those are to other chips
    # Read, made, and read again to be sent; nothing of it is a tax, and the least is to read it.
    assert (found.total.hbm_read_bytes, found.total.hbm_write_bytes) == (2 * MOVED, MOVED)
    assert found.ideal_hbm_bytes == MOVED
    assert {row.tax for row in found.rows} == {None}


def test_there_and_back():
    def away(x):
        return jax.device_put(jax.device_put(jnp.tanh(x), HOST), DEVICE) + 1.0

    assert bill("v5e", away, f32(512, 1024)).total.host_link_bytes == 2 * MOVED
    assert bill("h200", away, f32(512, 1024)).total.host_link_bytes == 0  # its compiler sees through it


LAYERS = 4


def offloaded(x, w):
    """The gradient of four layers whose results wait in the host's memory."""
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["h"], offload_src="device", offload_dst="pinned_host"
    )

    def layer(c, w):
        return jnp.sin(checkpoint_name(jnp.tanh(c @ w), "h")), None

    def loss(x, w):
        return jnp.sum(lax.scan(jax.checkpoint(layer, policy=policy), x, w)[0])

    return jax.grad(loss, (0, 1))(x, w)


@ON_ALL
def test_offloaded_activations_go_out_and_come_back_a_layer_at_a_time(target):
    found = bill(target, offloaded, f32(512, 1024), f32(LAYERS, 1024, 1024))
    assert found.total.host_link_bytes == (0 if target == "host" else 2 * LAYERS * MOVED)
    assert not found.tax("slice").host_link_bytes and not found.tax("layout").host_link_bytes
    assert not found.unknown


def calls_back(x):
    return jax.pure_callback(lambda x: x, x, x) + 1.0


def looks_at(x):
    jax.debug.callback(lambda x: None, jnp.tanh(x))
    return x + 1.0


@ON_ALL
@pytest.mark.parametrize(("program", "ways"), [(calls_back, 2), (looks_at, 1)])
def test_what_python_is_given_and_gives_goes_over_the_hosts_link(target, program, ways):
    """And not to other chips. What Python does with it is in no text, which the bill says of a call that waits for it."""
    found = bill(target, program, f32(512, 1024))
    found.check()
    assert found.total.host_link_bytes == pytest.approx(0 if target == "host" else ways * MOVED, abs=4)
    assert found.total.link_bytes == 0
    if program is calls_back:  # read to be given and written when it comes back, read and written to add one
        assert found.total.requested_bytes == 4 * MOVED
    waits = [] if target == "v5e" else ["calls back into Python: what that does and takes is in no text"]
    assert [one.reason for one in found.unknown] == waits


def test_a_program_that_prints_is_lowered_for_many_gpus_that_are_not_there():
    """jax has to be told what a "gpu" is, only there, and its compiler not to keep what nobody will call."""

    def program(x):
        jax.debug.print("{}", jnp.sum(x))
        return x + 1.0

    x = split(f32(512, 1024), mesh("h200", data=4), "data")
    lowered = targets.lower(jax.jit(program), "h200", x)
    callbacks = list(lowered._lowering.compile_args["host_callbacks"])
    compilation = targets.compile(lowered, "h200", runs=False)
    assert compilation.chips == 4 and "_python_gpu_callback" in compilation.text
    assert callbacks and lowered._lowering.compile_args["host_callbacks"] == callbacks


OFFLOAD = """%x = f32[1024,1024]{1,0} parameter(0), metadata={op_name="x"}
%out = (f32[1024,1024]{1,0:S(5)}, f32[1024,1024]{1,0}, u32[]) copy-start(%x)
ROOT %done = f32[1024,1024]{1,0:S(5)} copy-done(%out)"""


def test_the_hosts_link_takes_its_time_where_its_speed_is_known():
    moved = 4 << 20
    h200, v5e = (itemize_text(module(*OFFLOAD.splitlines()), CHIPS[name]).total for name in ("h200", "v5e"))
    assert h200.host_link_bytes == v5e.host_link_bytes == h200.hbm_bytes == moved
    assert h200.seconds == pytest.approx(moved / 128e9, abs=1e-12)  # PCIe 5.0
    assert v5e.seconds == pytest.approx(moved / 819e9, abs=1e-12)  # not known: its HBM bounds it


# --- SparseCores, and all that nobody has a rule for -----------------------------------------------------------------

SPARSE = """%rows = s32[64]{0} parameter(0)
%ids = s32[4096]{0} parameter(1)
%table = f32[100000,32]{1,0} parameter(2), metadata={op_name="table"}
ROOT %looked.1 = f32[512,32]{1,0} custom-call(%rows, %ids, %table), custom_call_target="SparseDenseMatmulWithMinibatchingOp", metadata={op_name="jit(f)/embed/sparse"}"""


def test_a_sparse_cores_call_is_unknown_with_its_operands_as_the_lower_bound():
    """The target of jax-tpu-embedding. Which rows it reads is not in the text: what is billed is the table, once."""
    found = itemize_text(module(*SPARSE.splitlines()), CHIPS["v5p"])
    touched = 64 * 4 + 4096 * 4 + 100_000 * 32 * 4 + 512 * 32 * 4
    (unknown,) = found.unknown
    assert unknown.reason == "no rule for custom call SparseDenseMatmulWithMinibatchingOp"
    assert unknown.hbm_bytes_at_least == touched == found.component("embed").hbm_bytes == found.total.hbm_bytes
    assert found.total.flops == 0
