"""What a kernel does, counted in its code: against a loop over its programs, and against what our own kernels say."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import bf16, bill, f32, hlo, i32
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as mosaic
from jax.experimental.pallas import triton
from jax.experimental.pallas.ops.gpu.attention import mha
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from stepbill.model import kernels, row_norm, vector
from stepbill.model.flash import flash
from stepbill.profiling import calls, kernel_code, kernel_run
from stepbill.profiling.hlo import parse

ABSENT = pytest.mark.parametrize("target", ["h200", "v5e"])
N = 128  # a side of all blocks
PROGRAMS = 4, 3


def params(target):
    return triton.CompilerParams() if target == "h200" else mosaic.CompilerParams()


def multiplied(x, times):
    """x, that many times multiplied by itself."""
    return jax.lax.fori_loop(0, times, lambda _, sums: sums + jnp.dot(x, x), jnp.zeros((N, N), jnp.float32))


def triangle(x, out):
    out[...] = multiplied(x[...], pl.program_id(0) + 1)


def corner(x, out):
    """A loop in a loop, with bounds by both numbers of a program and by the turn of the outer loop."""
    down, across = pl.program_id(0), pl.program_id(1)

    def step(turn, sums):
        return sums + multiplied(x[...], jnp.maximum(turn - across, 0) // 2)

    out[...] = jax.lax.fori_loop(down, 6, step, jnp.zeros((N, N), jnp.float32))


def some(x, out):
    """Not all programs, and not all turns."""
    out[...] = jnp.zeros((N, N), jnp.float32)

    @pl.when(pl.program_id(0) * 3 + pl.program_id(1) > 4)
    def _():
        def step(turn, sums):
            return jax.lax.cond(turn < 3, lambda s: s, lambda s: s + jnp.dot(x[...], x[...]), sums)

        out[...] = jax.lax.fori_loop(0, 7, step, jnp.zeros((N, N), jnp.float32))


def chosen(x, out):
    """A bound that depends on a branch."""
    down = pl.program_id(0)
    times = jnp.where(pl.program_id(1) == 2, 5, jax.lax.cond(down > 1, lambda n: n - 1, lambda n: n + 2, down))
    out[...] = multiplied(x[...], times)


CASES = {
    triangle: lambda down, across: down + 1,
    corner: lambda down, across: sum(max(turn - across, 0) // 2 for turn in range(down, 6)),
    some: lambda down, across: 4 * (down * 3 + across > 4),
    chosen: lambda down, across: 5 if across == 2 else down - 1 if down > 1 else down + 2,
}


def call(
    kernel, target, shape=(PROGRAMS[0] * N, PROGRAMS[1] * N), block=lambda down, across: (down, across), **options
):
    """A kernel of x and a result of blocks [N,N]."""
    square = pl.BlockSpec((N, N), block)
    return pl.pallas_call(
        kernel,
        grid=PROGRAMS,
        in_specs=[square],
        out_specs=pl.BlockSpec((N, N), lambda down, across: (down, across)),
        out_shape=f32(PROGRAMS[0] * N, PROGRAMS[1] * N),
        compiler_params=params(target),
        **options,
    ), f32(*shape)


@ABSENT
@pytest.mark.parametrize("kernel", CASES)
def test_products_are_those_of_a_loop_over_the_programs(kernel, target):
    function, x = call(kernel, target)
    found = bill(target, function, x)
    each = [CASES[kernel](down, across) for down in range(PROGRAMS[0]) for across in range(PROGRAMS[1])]
    assert len(set(each)) > 1
    assert found.total.matmul == sum(each) * 2 * N**3
    assert not found.unknown
    assert sum(found.total.hbm_read.values()) == x.size * 4
    assert sum("own code" in note for note in found.notes) == 1


@ABSENT
def test_more_programs_than_can_be_looked_at_one_by_one(target, monkeypatch):
    """Are all alike, or unknown."""
    monkeypatch.setattr(kernel_run, "MAX_LANES", 2)

    def alike(x, out):
        out[...] = multiplied(x[...], 3)

    function, x = call(alike, target)
    assert bill(target, function, x).total.matmul == 12 * 3 * 2 * N**3
    kernel_code._counted.cache_clear()
    function, x = call(triangle, target)
    (unknown,) = bill(target, function, x).unknown
    assert unknown.reason.endswith("with a loop of which data says how often it turns")
    kernel_code._counted.cache_clear()


@ABSENT
def test_what_data_steers_is_unknown_and_says_why(target):
    def looped(x, out):
        out[...] = multiplied(x[...], x[0, 0].astype(jnp.int32))

    def guarded(x, out):
        out[...] = x[...]

        @pl.when(x[0, 0] > 0)
        def _():
            out[...] = jnp.dot(x[...], x[...])

    for kernel, reason in ((looped, "with a loop of which data says how often it turns"), (guarded, "where data says")):
        function, x = call(kernel, target)
        found = bill(target, function, x)
        assert found.total.matmul == 0
        (unknown,) = found.unknown
        assert reason in unknown.reason


def test_a_condition_on_data_is_no_matter_where_nothing_is_computed():
    def kernel(x, out):
        out[...] = jnp.dot(x[...], x[...])

        @pl.when(jnp.max(x[...]) > 0)
        def _():
            out[...] = jnp.zeros((N, N), jnp.float32)

    function, x = call(kernel, "v5e")
    assert bill("v5e", function, x).total.matmul == 12 * 2 * N**3


def test_elementwise_and_transcendental_flops_are_of_what_floats():
    def kernel(x, out):
        whole = x[...]
        out[...] = jnp.exp(whole) * whole + jnp.max(whole, axis=1)[:, None]

    for target in ("h200", "v5e"):
        function, x = call(kernel, target)
        total = bill(target, function, x).total
        assert total.transcendental == x.size
        assert total.elementwise == pytest.approx(3 * x.size, rel=0.02)


@pytest.mark.parametrize(
    ("block", "shape", "blocks"),
    [
        (lambda down, across: (down, across), (4 * N, 3 * N), 12),
        (lambda down, across: (down, 0), (4 * N, N), 4),  # stays for three programs
        (lambda down, across: (across, 0), (3 * N, N), 12),  # comes back for each row of programs
        (lambda down, across: (0, 0), (N, N), 1),
        (lambda down, across: (jnp.maximum(down - across, 0), 0), (4 * N, N), 1 + 1 + 1 + 2 + 3 - 1 + 3),
        (lambda down, across: (down, 0), (4 * N - 40, N), 4 - 40 / N),  # the last one ends beyond the array
    ],
)
def test_a_tpus_grid_fetches_a_block_when_it_is_another(block, shape, blocks):
    """Counted by hand."""
    function, x = call(triangle, "v5e", shape, block)
    row, before, counted = [], None, 0
    for down in range(PROGRAMS[0]):
        for across in range(PROGRAMS[1]):
            at = tuple(int(n) for n in block(down, across))
            if at != before:
                row.append(at)
                counted += np.prod([min(N, size - n * N) for n, size in zip(at, shape, strict=True)])
            before = at
    assert counted == blocks * N * N or len(row) > 6
    ((_, code, _),) = kernels_of("v5e", function, x)  # XLA brings what is small on chip beforehand
    assert code.reads == (counted,)


def test_a_gpus_kernel_reads_at_most_all_of_an_operand():
    """And no more than its programs ask for."""

    def kernel(x, out):
        row = pl.program_id(0) % 2
        out[...] = jnp.broadcast_to(x[pl.ds(row * N, N)][None], (N, N))

    for length, read in ((2 * N, 2 * N), (1000 * N, 12 * N)):
        function = pl.pallas_call(
            kernel,
            grid=PROGRAMS,
            out_specs=pl.BlockSpec((N, N), lambda down, across: (down, across)),
            out_shape=f32(PROGRAMS[0] * N, PROGRAMS[1] * N),
            compiler_params=params("h200"),
        )
        assert bill("h200", function, f32(length)).total.hbm_read["inputs"] == read * 4


# ---- what kernels say of themselves


def kernels_of(target, function, *arguments):
    """Each kernel of a program: what its code does, and what it says."""
    for instruction in parse(hlo(target, function, *arguments)).instructions.values():
        if instruction.opcode == "custom-call" and (code := kernel_code.counted(instruction)):
            yield instruction, code, calls.cost(instruction)


def attention(target, q, k, v):
    platform = {"h200": "cuda", "v5e": "tpu"}[target]
    return flash(q, k, v, scale=1.0, window=300, causal=True, platform=platform)


def test_our_flash_kernels_do_what_they_say():
    """Forward and backward, over a window: to the last product."""

    def loss(q, k, v):
        return jnp.sum(attention("h200", q, k, v).astype(jnp.float32))

    q, k = bf16(1, 2, 2, 1024, 64), bf16(1, 2, 1024, 64)
    found = [*kernels_of("h200", jax.grad(loss, argnums=(0, 1, 2)), q, k, k)]
    assert len(found) == 3
    for _, code, said in found:
        assert code.flops.matmul == said.flops.matmul > 0


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_rows_norm_does_what_it_says(offset):
    def normed(x, scale):
        return row_norm.normed(x, scale, 1e-6, offset)

    ((_, code, said),) = kernels_of("h200", normed, bf16(1, 1, 512), bf16(512))
    assert code.flops == said.flops


def test_a_single_row_takes_a_matrix_units_sixteen():
    def product(x, w):
        return vector.partial_products(x, [vector.Columns(w)], vector.Tiles(128, 64, 2, 4, 2))

    ((_, code, said),) = kernels_of("h200", product, bf16(512), bf16(512, 1024))
    assert code.flops.matmul == vector.ROWS * said.flops.matmul


@ABSENT
@pytest.mark.parametrize("width", [384, 2880 // 2])
def test_blocks_of_rows_that_meet_matrices_do_what_they_say(target, width):
    """But for the end of a TPU's last block of columns, which is multiplied whole."""
    platform = {"h200": "cuda", "v5e": "tpu"}[target]
    on = kernels.Machine(platform, memory=4 * kernels.MIB)

    def product(x, w, experts):
        return kernels.grouped_matmul(x, kernels.Matrices(w), experts, on=on)

    ((_, code, said),) = kernels_of(target, product, bf16(6, 32, 512), bf16(4, 512, width), i32(6))
    assert 1 <= code.flops.matmul / said.flops.matmul <= (1 if target == "h200" or width % 128 == 0 else 1.07)


# ---- and others


def test_jaxs_kernel_for_gpus_skips_what_a_mask_hides():
    """4 H products for each pair of a query and a key, in blocks up to the diagonal."""
    B, T, heads, H = 1, 512, 2, 64
    found = bill("h200", partial(mha, segment_ids=None, causal=True), *[bf16(B, T, heads, H)] * 3)
    blocks = T // N
    assert found.total.matmul == 4 * H * heads * B * N * N * blocks * (blocks + 1) // 2
    assert not found.unknown


@pytest.mark.parametrize("causal", [False, True])
def test_a_kernel_of_mosaics_for_gpus_is_counted_by_warpgroups(causal):
    """jax's attention for Hopper: two warpgroups of 64 queries each, and a third that only copies."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    B, T, heads, H = 1, 512, 2, 64
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=64, max_concurrent_steps=2, causal=causal)
    q = jax.ShapeDtypeStruct((B, T, heads, H), jnp.float16)
    found = bill("h200", partial(attention_mgpu.attention, config=config), q, q, q)
    blocks = sum(row + 1 if causal else T // 64 for row in range(T // 64))  # each goes as far as its own queries see
    assert found.total.matmul == 4 * H * heads * B * 64 * 64 * blocks
    assert found.total.transcendental >= heads * B * 64 * 64 * blocks
    assert not found.unknown


def test_an_authors_estimate_is_billed_and_held_against_the_code():
    """jax's kernel for TPUs says what all pairs would take, where a causal mask hides half of them."""
    found = bill("v5e", partial(flash_attention, causal=True), *[bf16(1, 2, 512, 64)] * 3)
    (note,) = [note for note in found.notes if "estimates" in note]
    said, does = (int(word.replace(",", "")) for word in note.split() if word.replace(",", "").isdigit())
    assert found.total.matmul == said > 1.5 * does > 0


def test_code_that_cannot_be_read_is_unknown_and_says_so():
    config = json.dumps({"custom_call_config": {"body": "TUzvUg=="}})
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x = f32[8]{{0}} parameter(0)
  ROOT %k = f32[8]{{0}} custom-call(f32[8]{{0}} %x), custom_call_target="tpu_custom_call", backend_config={config}
}}
"""
    (instruction,) = [i for i in parse(text).instructions.values() if i.opcode == "custom-call"]
    with pytest.raises(kernel_code.Unreadable, match="does not read"):
        kernel_code.counted(instruction)
    assert calls.cost(instruction) is None
    assert "does not read" in calls.unknown(instruction)
