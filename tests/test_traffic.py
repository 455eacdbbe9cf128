"""HBM and link bytes of compiled programs against closed forms: what is read, what is not, and what is a tax."""

# ruff: noqa: E501 (lines of HLO are as long as compilers print them)

from dataclasses import replace
from functools import wraps

import jax
import jax.numpy as jnp
import pytest
from compiled import ON_ALL, bf16, f32, hlo, i32, mesh, module, split
from jax import lax
from jax.sharding import PartitionSpec
from stepbill.profiling import targets
from stepbill.profiling.bill import Bill
from stepbill.profiling.chips import CHIPS, Chip
from stepbill.profiling.hlo import parse
from stepbill.profiling.traffic import accesses, link_bytes, participants
from stepbill.profiling.walk import itemize_text

ROLES = {"w": "weights", "table": "weights", "cache": "cache", "x": "inputs"}


def without_cache(target: str) -> Chip:
    """The chip as if it had no L2: all that kernels ask for is of HBM. (What an L2 serves: test_on_chip.py.)"""
    return replace(targets.chip(target), l2_bytes=None)


def bill(target, function, *arguments, donate=(), out=None, **options) -> Bill:
    """What kernels ask for, the function being inside a component, so that every byte is in a row, not unattributed."""

    @wraps(function)
    def scoped(*inner):
        with jax.named_scope("mlp/up"):
            return function(*inner)

    text = hlo(target, scoped, *arguments, donate=donate, out=out)
    return itemize_text(text, without_cache(target), **{"roles": ROLES} | options)


def read(bill: Bill, role: str, tax: str | None = None) -> int:
    return sum(row.work.hbm_read.get(role, 0) for row in bill.rows if row.tax == tax)


def written(bill: Bill, role: str, tax: str | None = None) -> int:
    return sum(row.work.hbm_write.get(role, 0) for row in bill.rows if row.tax == tax)


def all_of(bill: Bill, role: str) -> int:
    """Bytes of a role, read and written, whatever the tax."""
    return bill.total.hbm_read.get(role, 0) + bill.total.hbm_write.get(role, 0)


# --- what of an operand is read --------------------------------------------------------------------------------------


@ON_ALL
def test_an_embedding_lookup_reads_rows_and_not_the_table(target):
    found = bill(target, lambda table, x: table[x], bf16(200_000, 1024), i32(8))  # 400 MB: too large to prefetch
    assert all_of(found, "weights") == 8 * 1024 * 2
    assert read(found, "weights") == 8 * 1024 * 2


@ON_ALL
def test_a_lookup_inside_a_larger_fusion_too(target):
    def sum_of_squares(table, x):
        return jnp.sum(jnp.tanh(table[x]) ** 2)

    found = bill(target, sum_of_squares, f32(200_000, 512), i32(8))
    assert all_of(found, "weights") == 8 * 512 * 4


@ON_ALL
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_slice_of_an_argument_reads_the_slice(target, kind):
    def part(w, x):
        return jnp.tanh(w[64:192] if kind == "static" else lax.dynamic_slice(w, (x, 0), (128, 512))) + 1.0

    found = bill(target, part, f32(512, 512), i32())
    assert all_of(found, "weights") == 128 * 512 * 4
    assert found.ideal_hbm_bytes == pytest.approx(2 * 128 * 512 * 4, abs=16)


@ON_ALL
def test_two_slices_of_one_argument(target):
    found = bill(target, lambda w: w[:128] * w[384:], f32(512, 512))
    assert all_of(found, "weights") == 2 * 128 * 512 * 4


@ON_ALL
def test_an_operand_used_twice_is_read_once(target):
    found = bill(target, lambda w: w * w + jnp.exp(w), f32(512, 512))
    assert all_of(found, "weights") == 512 * 512 * 4
    assert found.total.hbm_bytes == found.ideal_hbm_bytes == 2 * 512 * 512 * 4


@ON_ALL
def test_stacked_weights_are_read_once_a_stack_and_not_once_a_trip(target):
    def layers(x, w):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

    found = bill(target, layers, bf16(8, 256), bf16(6, 256, 256))
    stack = 6 * 256 * 256 * 2
    assert read(found, "weights") == stack
    if target == "v5e":  # sliced as the matmul reads it
        assert all_of(found, "weights") == stack
    if target == "h200":  # each layer is copied out of the stack, then read
        assert (read(found, "weights", "slice"), written(found, "weights", "slice")) == (stack, stack)


@ON_ALL
def test_a_matmul_reads_and_writes_each_matrix_once(target):
    found = bill(target, lambda x, w: x @ w, f32(512, 512), f32(512, 1024))
    x, w, y = (4 * 512 * n for n in (512, 1024, 1024))
    assert (read(found, "inputs"), read(found, "weights"), written(found, "activations")) == (x, w, y)
    assert found.total.hbm_bytes == found.ideal_hbm_bytes == x + w + y


def test_bfloat16_on_the_host_is_read_once_and_what_is_more_is_a_tax():
    """Compilers and CPUs differ in whether such a product is computed in float32."""
    found = bill("host", lambda x, w: x @ w, bf16(512, 512), bf16(512, 1024))
    weights = 2 * 512 * 1024
    assert read(found, "weights") == weights
    widened = written(found, "weights", "convert"), read(found, "weights", "convert")
    assert widened in ((0, 0), (2 * weights, 2 * weights))
    assert all_of(found, "weights") == weights + sum(widened)


CONVERTED = """%w = bf16[512,1024]{1,0} parameter(0), metadata={op_name="w"}
%x = f32[512,512]{1,0} parameter(1), metadata={op_name="x"}
%wide = f32[512,1024]{1,0} convert(%w), metadata={op_name="jit(f)/mlp/up/dot_general"}
ROOT %y = f32[512,1024]{1,0} dot(%x, %wide), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/mlp/up/dot_general"}"""


def test_weights_written_out_in_another_type_are_a_tax():
    found = itemize_text(module(*CONVERTED.splitlines()), CHIPS["host"], roles=ROLES)
    weights = 2 * 512 * 1024
    assert read(found, "weights") == weights
    assert written(found, "weights", "convert") == read(found, "weights", "convert") == 2 * weights
    assert written(found, "weights") == 0


# --- updates in place ------------------------------------------------------------------------------------------------

WHOLE, POSITION = 2 * 4 * 256 * 64, 2 * 4 * 64


def write(cache, new, position):
    return lax.dynamic_update_slice(cache, new, (0, 0, position, 0))


CACHE = f32(2, 4, 256, 64), f32(2, 4, 1, 64), i32()
NARROW_CACHE = bf16(2, 4, 256, 64), bf16(2, 4, 1, 64), i32()


@ON_ALL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_cache_is_written_one_position(target, dtype):
    found = bill(target, write, *(CACHE if dtype == "float32" else NARROW_CACHE), donate=(0,))
    size = 4 if dtype == "float32" else 2
    assert written(found, "cache") == size * POSITION
    assert read(found, "cache") == 0
    if target == "host" and dtype == "bfloat16":  # there the whole cache may go through float32, which is a tax
        taxed = read(found, "cache", "convert")
        assert taxed == written(found, "cache", "convert") and taxed in (0, size * (WHOLE - POSITION))
    else:
        assert all_of(found, "cache") == size * POSITION
    # The position's new values, and where: read.
    assert found.ideal_hbm_bytes == pytest.approx(2 * size * POSITION, abs=32)


@ON_ALL
def test_a_cache_that_is_not_donated_is_copied_and_that_is_a_tax(target):
    found = bill(target, write, *CACHE)
    size = 4
    assert written(found, "cache") == size * POSITION
    assert written(found, "cache", "layout") == pytest.approx(size * WHOLE, rel=POSITION / WHOLE)
    copied = read(found, "cache") + read(found, "cache", "layout")
    assert copied == pytest.approx(size * WHOLE, rel=POSITION / WHOLE)


@ON_ALL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_result_that_is_not_donated_is_written_even_by_an_ideal_program(target, dtype):
    found = bill(target, write, *(CACHE if dtype == "float32" else NARROW_CACHE))
    assert found.ideal_hbm_bytes >= (4 if dtype == "float32" else 2) * WHOLE


@ON_ALL
def test_a_cache_carried_through_a_loop_is_updated_in_place(target):
    """A decode loop: every trip reads all of the cache and writes one position of it."""

    def steps(cache, x):
        def step(carry, n):
            cache, x = carry
            cache = lax.dynamic_update_slice(cache, x[None], (n, 0))
            return (cache, jnp.tanh(cache.T @ (cache @ x))), None

        return lax.scan(step, (cache, x), jnp.arange(5, dtype=jnp.int32))[0]

    found = bill(target, steps, f32(4096, 512), f32(512), donate=(0,))
    whole, position = 4096 * 512 * 4, 512 * 4
    if target != "v5e":
        assert written(found, "cache") == 5 * position
        assert 5 <= read(found, "cache") / whole <= 10  # once a trip; twice where two kernels read it
    else:  # carried in VMEM: in once, out once
        assert written(found, "cache") <= 5 * position + 2 * whole


@ON_ALL
def test_a_scatter_into_a_donated_table_touches_its_rows(target):
    found = bill(target, lambda table, x, u: table.at[x].add(u), f32(50_000, 512), i32(8), f32(8, 512), donate=(0,))
    rows = 8 * 512 * 4
    assert written(found, "weights") == rows
    assert read(found, "weights") == rows


# --- memories, layouts, types ----------------------------------------------------------------------------------------


def test_a_prefetch_into_vmem_is_the_one_read():
    arguments = bf16(512, 512), bf16(512, 1024)
    text = hlo("v5e", lambda x, w: jnp.tanh(x @ w), *arguments)
    assert "copy-start" in text and "S(1)" in text  # else there is nothing to see
    found = bill("v5e", lambda x, w: jnp.tanh(x @ w), *arguments)
    assert found.total.hbm_bytes == found.ideal_hbm_bytes == 2 * (512 * 512 + 2 * 512 * 1024)


PREFETCH = """%w = f32[512,512]{1,0:T(8,128)} parameter(0), metadata={op_name="w"}
%x = f32[512,512]{1,0:T(8,128)} parameter(1), metadata={op_name="x"}
%copy-start = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w), cross_program_prefetch_index=0
%copy-done = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%copy-start)
%y = f32[512,512]{1,0:T(8,128)} convolution(%x, %copy-done), dim_labels=bf_io->bf, metadata={op_name="jit(f)/mlp/up/dot_general"}
%copy-start.1 = (f32[512,512]{1,0:T(8,128)S(1)}, f32[512,512]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w), cross_program_prefetch_index=0
%copy-done.1 = f32[512,512]{1,0:T(8,128)S(1)} copy-done(%copy-start.1)
ROOT %z = f32[512,512]{1,0:T(8,128)} negate(%y), metadata={op_name="jit(f)/mlp/up/neg"}"""


def test_the_next_runs_prefetch_is_not_billed_twice():
    """TPU fetches the first weight at the end of the run before: both copies are in the text, and one runs."""
    found = itemize_text(module(*PREFETCH.splitlines()), CHIPS["v5e"], roles=ROLES)
    size = 512 * 512 * 4
    assert found.total.hbm_read == {"weights": size, "inputs": size, "activations": size}
    assert found.total.hbm_write == {"activations": 2 * size}
    assert not found.unattributed


def test_slices_prefetched_asynchronously():
    lines = """%w = f32[8,512]{1,0:T(8,128)} parameter(0), metadata={op_name="w"}
%slice-start = ((f32[8,512]{1,0:T(8,128)}), f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%w), slice={[0:8], [0:128]}
%slice-done = f32[8,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
ROOT %z = f32[8,128]{1,0:T(8,128)S(1)} negate(%slice-done), metadata={op_name="jit(f)/mlp/up/neg"}"""
    found = itemize_text(module(*lines.splitlines()), CHIPS["v5e"], roles=ROLES)
    assert (found.total.hbm_read, found.total.hbm_write) == ({"weights": 8 * 128 * 4}, {})


def test_a_tile_is_moved_whole_and_what_it_adds_is_the_padding_tax():
    found = bill("v5e", lambda w: jnp.tanh(w), f32(5, 130))
    logical, padded = 5 * 130 * 4, 8 * 256 * 4
    assert (read(found, "weights"), read(found, "weights", "padding")) == (logical, padded - logical)
    assert (written(found, "activations"), written(found, "activations", "padding")) == (logical, padded - logical)
    assert found.ideal_hbm_bytes == 2 * logical


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("s4[512,512]{1,0:E(4)}", 512 * 512 // 2),
        ("u4[512,512]{1,0:E(4)}", 512 * 512 // 2),
        ("s4[512,512]{1,0:T(8,128)(8,1)E(4)}", 512 * 512 // 2),
        ("s4[5,130]{1,0:T(8,128)(8,1)E(4)}", 8 * 256 // 2),
        ("s2[512,512]{1,0:E(2)}", 512 * 512 // 4),
        ("s8[512,512]{1,0}", 512 * 512),
        ("f8e4m3fn[512,512]{1,0}", 512 * 512),
        ("pred[512,512]{1,0}", 512 * 512),
        ("c64[512,512]{1,0}", 512 * 512 * 8),
        ("f32[512,512]{1,0:T(8,128)S(1)}", 0),
    ],
)
def test_bytes_by_type_and_memory(shape, expected):
    text = module(f"%w = {shape} parameter(0)", "ROOT %y = f32[1]{0:S(1)} my-opcode(%w)")
    assert sum(access.bytes + access.padding for access in accesses(parse(text).entry.root)) == expected


FUSED = """HloModule m, is_scheduled=true

%inner (p: s8[64,512], s: f32[512]) -> bf16[64,512] {
  %p = s8[64,512]{1,0} parameter(0)
  %s = f32[512]{0} parameter(1)
  %wide = f32[64,512]{1,0} convert(%p)
  %scales = f32[64,512]{1,0} broadcast(%s), dimensions={1}
  %scaled = f32[64,512]{1,0} multiply(%wide, %scales)
  ROOT %narrow = bf16[64,512]{1,0} convert(%scaled)
}

ENTRY %main (w: s8[64,512], scale: f32[512], x: bf16[512,64]) -> bf16[64,64] {
  %w = s8[64,512]{1,0} parameter(0), metadata={op_name="w"}
  %scale = f32[512]{0} parameter(1), metadata={op_name="w_scale"}
  %x = bf16[512,64]{1,0} parameter(2), metadata={op_name="x"}
  %wide.1 = bf16[64,512]{1,0} fusion(%w, %scale), kind=kLoop, calls=%inner, metadata={op_name="jit(f)/mlp/up/mul"}
  ROOT %y = bf16[64,64]{1,0} dot(%wide.1, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/mlp/up/dot_general"}
}
"""


def test_dequantised_weights_that_are_written_out_are_a_tax_and_not_weights():
    found = itemize_text(FUSED, without_cache("h200"), roles=ROLES)
    assert read(found, "weights") == 64 * 512 + 512 * 4
    assert written(found, "weights", "dequantize") == read(found, "weights", "dequantize") == 64 * 512 * 2
    assert written(found, "weights") == 0


# --- what no kernel runs for ----------------------------------------------------------------------------------------

FREE = """%x = f32[64,128]{1,0} parameter(0)
%y = f32[64,128]{1,0} parameter(1)
%t = (f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%x, %y)
%token = token[] after-all()
"""


@pytest.mark.parametrize(
    "line",
    [
        "(f32[64,128]{1,0}, f32[64,128]{1,0}) tuple(%x, %y)",
        "f32[64,128]{1,0} get-tuple-element(%t), index=1",
        "f32[128,64]{1,0} bitcast(%x)",
        "f32[128,64]{1,0} reshape(%x)",
        "f32[64,128]{1,0} parameter(2)",
        "f32[2]{0} constant({1, 2})",
        "token[] after-all(%token)",
        "f32[64,128]{1,0} opt-barrier(%x)",
        'f32[128,128]{1,0} custom-call(%x, %y), custom_call_target="ConcatBitcast"',
        'f32[64,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"',
    ],
)
def test_naming_and_allocating_moves_nothing(line):
    assert accesses(parse(module(*FREE.splitlines(), "ROOT %z = " + line)).entry.root) == []


ASYNC = """HloModule m, is_scheduled=true

%wrapped (p: f32[64,128]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  ROOT %n = f32[64,128]{1,0} negate(%p)
}

ENTRY %main (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0), metadata={op_name="x"}
  %start = ((f32[64,128]{1,0}), f32[64,128]{1,0}, u32[]) async-start(%x), calls=%wrapped
  %update = ((f32[64,128]{1,0}), f32[64,128]{1,0}, u32[]) async-update(%start)
  ROOT %done = f32[64,128]{1,0} async-done(%update)
}
"""


def test_an_asynchronous_computation_is_billed_once():
    total = itemize_text(ASYNC, CHIPS["v5e"], roles=ROLES).total
    assert (total.hbm_read, total.hbm_write) == ({"inputs": 64 * 128 * 4}, {"activations": 64 * 128 * 4})
    assert total.elementwise == 64 * 128


# A slice of a stack, and a write into one, begun and ended apart, as TPU's compiler prints them.
PIECES = """%stack = f32[4,512,1024]{2,1,0:T(8,128)} parameter(0), metadata={op_name="w"}
%piece = f32[1,512,1024]{2,1,0:T(8,128)} parameter(1), metadata={op_name="x"}
%n = s32[]{:T(128)S(6)} parameter(2)
START
"""


@pytest.mark.parametrize(
    ("start", "read", "write"),
    [
        ("%s = ((f32[4,512,1024]{2,1,0:T(8,128)}, s32[]{:S(6)}, s32[]{:S(6)}, s32[]{:S(6)}), f32[1,512,1024]{2,1,0:T(8,128)}, u32[]{:S(2)}) "
         "dynamic-slice-start(%stack, %n, %n, %n), dynamic_slice_sizes={1,512,1024}", "weights", "weights"),
        ("%s = ((f32[4,512,1024]{2,1,0:T(8,128)}, f32[1,512,1024]{2,1,0:T(8,128)}, s32[]{:S(6)}, s32[]{:S(6)}, s32[]{:S(6)}), "
         "f32[4,512,1024]{2,1,0:T(8,128)}, u32[]{:S(2)}) dynamic-update-slice-start(%stack, %piece, %n, %n, %n)", "inputs", "weights"),
    ],
)  # fmt: skip
def test_slices_and_updates_begun_and_ended_apart_move_a_piece(start, read, write):
    shape = "f32[1,512,1024]" if "dynamic-slice-start" in start else "f32[4,512,1024]"
    done = f"ROOT %d = {shape}{{2,1,0:T(8,128)}} dynamic-slice-done(%s)"
    donated = ", input_output_alias={ {}: (0, {}, may-alias) }"
    text = module(*PIECES.replace("START", start).splitlines(), done, header=donated)
    total = itemize_text(text, CHIPS["v5e"], roles=ROLES).total
    assert (total.hbm_read, total.hbm_write) == ({read: 512 * 1024 * 4}, {write: 512 * 1024 * 4})


FUSION = """HloModule m, is_scheduled=true

%fused (a: f32[64,256], b: f32[64,256]) -> RESULT {
  %a = f32[64,256]{1,0} parameter(0)
  %b = f32[64,256]{1,0} parameter(1)
  LINES
  ROOT %r = RESULT tuple(PARTS)
}

ENTRY %main (x: f32[64,256], w: f32[64,256]) -> RESULT {
  %x = f32[64,256]{1,0} parameter(0), metadata={op_name="x"}
  %w = f32[64,256]{1,0} parameter(1), metadata={op_name="params['w']"}
  ROOT %f = RESULT fusion(%x, %w), kind=kLoop, calls=%fused
}"""


SUM = ["%sum = f32[64,256]{1,0} add(%a, %b)"]
LAST = [
    *SUM,
    "%power = f32[64,256]{1,0} exponential(%sum)",
    "%last = f32[1,256]{1,0} slice(%power), slice={[63:64], [0:256]}",
]
FIRST = ["%first = f32[2,256]{1,0} slice(%sum), slice={[0:2], [0:256]}"]
LENT = ["%rounded = bf16[64,256]{1,0} convert(%a)", "%lent = f32[64,256]{1,0} bitcast(%b)"]


@pytest.mark.parametrize(
    ("lines", "parts", "shapes", "rows"),
    [
        (LAST, "%last", "f32[1,256]{1,0}", (1, 1)),  # nothing else is computed
        (LAST + FIRST, "%last, %first", "f32[1,256]{1,0}, f32[2,256]{1,0}", (3, 3)),
        (LAST, "%last, %sum", "f32[1,256]{1,0}, f32[64,256]{1,0}", (64, 64)),
        (LENT, "%rounded, %lent", "bf16[64,256]{1,0}, f32[64,256]{1,0}", (64, 0)),  # one converted, one handed through
    ],
)
def test_of_what_a_fusion_computes_it_reads_what_somebody_asks_for(lines, parts, shapes, rows):
    text = FUSION.replace("LINES", "\n  ".join(lines)).replace("RESULT", f"({shapes})").replace("PARTS", parts)
    total = itemize_text(text, without_cache("h200"), roles=ROLES).total
    expected = {role: count * 256 * 4 for role, count in zip(("inputs", "weights"), rows, strict=True) if count}
    assert total.hbm_read == expected


GROUPED = """%q = bf16[2,512,8,64]{3,2,1,0} parameter(0), metadata={op_name="x"}
%k = bf16[2,512,2,64]{3,2,1,0} parameter(1), metadata={op_name="cache.k"}
%v = bf16[2,512,2,64]{3,2,1,0} parameter(2), metadata={op_name="cache.v"}
ROOT %a = (bf16[2,8,512,64]{3,1,2,0}, f32[2,8,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","512","512"]},"mask_type":"CAUSAL"}}"""


def test_fused_attention_moves_queries_keys_values_results_and_statistics_once():
    """Of keys and values the K heads that there are, and nothing of T x S."""
    total = itemize_text(module(*GROUPED.splitlines()), CHIPS["h200"], roles=ROLES).total
    q, k = 2 * 512 * 8 * 64 * 2, 2 * 512 * 2 * 64 * 2
    assert total.hbm_read == {"inputs": q, "cache": 2 * k}
    assert total.hbm_write_bytes == q + 2 * 8 * 512 * 4


def test_room_to_work_in_is_not_a_result():
    """cuBLAS is offered 32 MiB for any product, and this one took an H200 5.5 us: it cannot have written them."""
    lines = """%x = bf16[1,2048]{1,0} parameter(0), metadata={op_name="x"}
%w = bf16[2048,2048]{1,0} parameter(1), metadata={op_name="params['w']"}
ROOT %y = (bf16[1,2048]{1,0}, s8[33554432]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul\""""
    total = itemize_text(module(*lines.splitlines()), CHIPS["h200"], roles=ROLES).total
    assert total.hbm_write_bytes == 2048 * 2 == total.requested_bytes - 2048 * 2 - 2048 * 2048 * 2
    # A result of bytes is one.
    rounded = lines.replace("bf16[1,2048]{1,0}, s8[33554432]{0}", "bf16[1,2048]{1,0}, s8[1,2048]{1,0}")
    assert itemize_text(module(*rounded.splitlines()), CHIPS["h200"]).total.hbm_write_bytes == 2048 * 3


# --- links -----------------------------------------------------------------------------------------------------------


def ring(n):
    return [(chip, (chip + 1) % n) for chip in range(n)]


# name -> (function of a local block, how the result lies, bytes sent by a chip for a local block of one byte)
COLLECTIVES = {
    "all-reduce": (lambda n: lambda x: lax.psum(x, "tensor"), (), lambda n: 2 * (n - 1) / n),
    "all-gather": (lambda n: lambda x: lax.all_gather(x, "tensor", tiled=True), (), lambda n: n - 1),
    "reduce-scatter": (lambda n: lambda x: lax.psum_scatter(x, "tensor", tiled=True), ("tensor",), lambda n: (n - 1) / n),
    "all-to-all": (lambda n: lambda x: lax.all_to_all(x, "tensor", 0, 1, tiled=True), (None, "tensor"), lambda n: (n - 1) / n),
    "permute": (lambda n: lambda x: lax.ppermute(x, "tensor", ring(n)), ("tensor",), lambda n: 1),
}  # fmt: skip


@ON_ALL
@pytest.mark.parametrize("chips", [4, 8])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_collectives_cost_what_a_ring_sends(target, chips, name):
    function, out, cost = COLLECTIVES[name]
    over = mesh(target, tensor=chips)
    sharded = jax.shard_map(
        function(chips), mesh=over, in_specs=PartitionSpec("tensor"), out_specs=PartitionSpec(*out), check_vma=False
    )
    block = 64 * 1024 * 4
    found = bill(target, sharded, split(f32(64 * chips, 1024), over, "tensor"))
    assert found.total.link_bytes == found.component("mlp/up").link_bytes == round(block * cost(chips))
    # What is sent is read as well, and that is another number. (A GPU copies what it reduces in place, first.)
    assert found.total.hbm_read["inputs"] in ((block, 2 * block) if name == "all-reduce" else (block,))
    assert not found.unknown


@ON_ALL
def test_a_collective_over_one_axis_of_two(target):
    over = mesh(target, data=2, tensor=4)
    axes = PartitionSpec("data", "tensor")
    for axis, n in (("data", 2), ("tensor", 4)):
        sharded = jax.shard_map(
            lambda x, a=axis: lax.psum(x, a), mesh=over, in_specs=axes, out_specs=axes, check_vma=False
        )
        found = bill(target, sharded, split(f32(128, 4096), over, "data", "tensor"))
        assert found.total.link_bytes == 2 * 64 * 1024 * 4 * (n - 1) // n


@ON_ALL
def test_a_matmul_split_along_its_contraction_is_summed_over_the_links(target):
    """Megatron's second matmul, as the partitioner writes it: an all-reduce of the product."""
    over = mesh(target, tensor=4)
    x, w = split(f32(64, 4096), over, None, "tensor"), split(f32(4096, 1024), over, "tensor", None)
    found = bill(target, lambda x, w: x @ w, x, w, out=split(f32(64, 1024), over).sharding)
    assert found.total.matmul == 2 * 64 * 4096 * 1024 // 4
    assert found.total.link_bytes == 2 * 64 * 1024 * 4 * 3 // 4
    assert read(found, "weights") == 4096 * 1024 * 4 // 4


@pytest.mark.parametrize(
    ("groups", "partitions", "expected"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 8, 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 8, 2),
        ("[2,4]<=[8]", 8, 4),
        ("[4,2]<=[2,4]T(1,0)", 8, 2),
        ("[2,2]<=[4]T(1,0)", 4, 2),
        ("mesh['data'=2,'tensor'=4] {'tensor'}", 8, 4),
        ("mesh['data'=2,'tensor'=4] {'data'}", 8, 2),
        ("mesh['axis_0'=4,'axis_1'=1] {'axis_0'}", 4, 4),
        ("mesh['data'=2,'tensor'=4] {'data','tensor'}", 8, 8),
        ("{}", 8, 8),
    ],
)
def test_replica_groups_in_every_form(groups, partitions, expected):
    line = (
        f"ROOT %g = f32[{64 * expected}]{{0}} all-gather(%x), channel_id=1, replica_groups={groups}, dimensions={{0}}, "
        'use_global_device_ids=true, metadata={op_name="jit(f)/mlp/up/all_gather"}'
    )
    gather = parse(module("%x = f32[64]{0} parameter(0)", line)).entry.root
    assert participants(gather, partitions) == expected
    assert link_bytes(gather, partitions) == 64 * 4 * (expected - 1)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # The shard is the operand; of a start, the result holds both.
        ("(f32[64]{0}, f32[256]{0}) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 3 * 256),
        ("f32[64]{0} all-reduce-start(%x), replica_groups={{0,1,2,3}}", 2 * 192),
        ("((f32[64]{0}), f32[16]{0}) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 192),
        ("(f32[64]{0}, f32[64]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}", 256),
        # A group of one sends nothing.
        ("f32[64]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3}}", 0),
        ("f32[64]{0} negate(%x)", 0),
    ],
)  # fmt: skip
def test_links_of_single_lines(line, expected):
    text = module("%x = f32[64]{0} parameter(0)", "ROOT %y = " + line)
    assert link_bytes(parse(text).entry.root, 4) == expected
