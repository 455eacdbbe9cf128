"""A bill less its differences is the other's number, and each difference has the reason and the size that it must."""

from dataclasses import replace
from functools import cache

import capture
import jax
import jax.numpy as jnp
import pytest
from compiled import bf16, f32, i32, ready
from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]
from stepbill.experiments import steps
from stepbill.experiments.bill import bill_of
from stepbill.model.config import Experts
from stepbill.profiling import hlo, itemize, reconcile, targets
from stepbill.profiling.bill import Bill, Row, Work
from stepbill.profiling.reconcile import Expected, against_closed_form
from stepbill.profiling.walk import Kernel, itemize_module
from stepbill.profiling.xla_cost import CostModel, Totals

MOE = Experts(4, 2, 128)


def xla_says(text: str) -> tuple[float, float, float]:
    """(flops, transcendentals, bytes accessed) by jaxlib's own analysis of HLO text, by the rules of CPUs and GPUs."""
    costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, _hlo.hlo_module_from_text(text))
    flops, transcendentals, size = (costs.get(key, 0.0) for key in ("flops", "transcendentals", "bytes accessed"))
    return flops, transcendentals, size


def reasons(bill: Bill, quantity: str) -> dict[str, int]:
    """Reason -> amount, having made sure that the bill less all of them is what XLA says."""
    found = {d["reason"]: d["amount"] for d in bill.differences if d["quantity"] == f"xla_{quantity}"}
    assert bill.xla is not None
    total = bill.total.flops if quantity == "flops" else bill.total.hbm_bytes
    assert total - sum(found.values()) == bill.xla[quantity]
    return found


def assert_explained(bill: Bill) -> None:
    assert reasons(bill, "flops")["unexplained"] == reasons(bill, "bytes")["unexplained"] == 0


# --- the model of XLA's analysis against XLA's analysis ------------------------------------------------------------


@pytest.mark.parametrize("name", capture.PROGRAMS)
def test_the_model_counts_what_xla_counts(name):
    """To the last bit, rounding included. What a TPU's compiler says of memory its text does not tell: see below."""
    text = capture.read(name)
    on_tpu = "v5e" in name
    total = CostModel(hlo.parse(text), "tpu" if on_tpu else "cpu").total()
    assert total.rounded[: 2 if on_tpu else 3] == xla_says(text)[: 2 if on_tpu else 3]


ADD = "%add {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n"
GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}, use_global_device_ids=true"
UNARY = (
    "abs acos acosh asin asinh atanh cbrt ceil cosine cosh erf exponential exponential-minus-one floor log "
    "log-plus-one logistic negate round-nearest-afz round-nearest-even rsqrt sign sine sinh sqrt tan tanh"
).split()
BINARY = "add atan2 divide maximum minimum multiply power remainder subtract".split()
INSTRUCTIONS = {
    **{name: f"f32[8,16]{{1,0}} {name}(%x)" for name in UNARY},
    **{name: f"f32[8,16]{{1,0}} {name}(%x, %y)" for name in BINARY},
    "is-finite": "pred[8,16]{1,0} is-finite(%x)",
    "clamp": "f32[8,16]{1,0} clamp(%x, %y, %x)",
    "convert": "bf16[8,16]{1,0} convert(%x)",
    "bitcast-convert": "s32[8,16]{1,0} bitcast-convert(%x)",
    "reduce-precision": "f32[8,16]{1,0} reduce-precision(%x), exponent_bits=5, mantissa_bits=10",
    "rng": "f32[8,16]{1,0} rng(%zero, %zero), distribution=rng_uniform",
    "rng-bit-generator": "(u64[2]{0}, u32[8,16]{1,0}) rng-bit-generator(%seed), algorithm=rng_default",
    "fft": "c64[8,9]{1,0} fft(%x), fft_type=RFFT, fft_length={16}",
    "triangular-solve": "f32[8,16]{1,0} triangular-solve(%square, %x), left_side=true, lower=true, "
    "transpose_a=NO_TRANSPOSE",
    "cholesky": "f32[8,8]{1,0} cholesky(%square), lower=true",
    "map": "f32[8,16]{1,0} map(%x, %y), dimensions={0,1}, to_apply=%add",
    "reduce": "f32[8]{0} reduce(%x, %zero), dimensions={1}, to_apply=%add",
    "reduce-window": "f32[8,16]{1,0} reduce-window(%x, %zero), window={size=1x4 pad=0_0x3_0}, to_apply=%add",
    "row spread": "f32[8,16]{1,0} reduce-window(%x, %zero), window={size=1x31 pad=0_0x15_15}, to_apply=%add",
    "sort": "f32[8,16]{1,0} sort(%x), dimensions={1}, to_apply=%less",
    "topk": "(f32[8,4]{1,0}, s32[8,4]{1,0}) topk(%x), k=4, largest=true",
    "dot": "f32[8,8]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    "same twice": "f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
    "ragged-dot": "f32[8,4]{1,0} ragged-dot(%x, %experts, %sizes), lhs_contracting_dims={1}, "
    "rhs_contracting_dims={1}, lhs_ragged_dims={0}, rhs_group_dims={0}",
    "slice": "f32[2,16]{1,0} slice(%x), slice={[0:2], [0:16]}",
    "dynamic-slice": "f32[2,16]{1,0} dynamic-slice(%x, %index, %index), dynamic_slice_sizes={2,16}",
    "dynamic-update-slice": "f32[8,16]{1,0} dynamic-update-slice(%x, %row, %index, %index)",
    "gather": "f32[2,16]{1,0} gather(%x, %sizes), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, "
    "index_vector_dim=1, slice_sizes={1,16}",
    "scatter": "f32[8,16]{1,0} scatter(%x, %sizes, %rows), update_window_dims={1}, inserted_window_dims={0}, "
    "scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%add",
    "transpose": "f32[16,8]{1,0} transpose(%x), dimensions={1,0}",
    "transpose that renames": "f32[16,8]{0,1} transpose(%x), dimensions={1,0}",
    "opt-barrier": "f32[8,16]{1,0} opt-barrier(%x)",
    "partition-id": "u32[] partition-id()",
    "tuple": "(f32[8,16]{1,0}, f32[8,16]{1,0}) tuple(%x, %y)",
    "custom-call": '(f32[8,16]{1,0}, f32[]) custom-call(%x), custom_call_target="somebody\'s"',
    "all-gather": f"f32[32,16]{{1,0}} all-gather(%x), dimensions={{0}}, {GROUPS}",
    "all-reduce": f"(f32[8,16]{{1,0}}, f32[8,16]{{1,0}}) all-reduce(%x, %y), to_apply=%add, {GROUPS}",
    "reduce-scatter": f"f32[2,16]{{1,0}} reduce-scatter(%x), dimensions={{0}}, to_apply=%add, {GROUPS}",
    "all-to-all": "(f32[8,16]{1,0}, f32[8,16]{1,0}) all-to-all(%x, %y), channel_id=1, replica_groups={{0,1},{2,3}}",
    "copy-start": "(f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]) copy-start(%x)",
    "slice-start": "((f32[8,16]{1,0}), f32[2,16]{1,0}, u32[]) slice-start(%x), slice={[0:2], [0:16]}",
    "fusion": "f32[8,16]{1,0} fusion(%x, %y, %index), kind=kLoop, calls=%fused",
    "call": "f32[8,16]{1,0} call(%x, %y, %index), to_apply=%fused",
    "conditional": "f32[8,16]{1,0} conditional(%index, %x, %x), branch_computations={%one, %other}",
    "while": "(s32[], f32[8,16]{1,0}) while(%pair), condition=%again, body=%body",
}
MODULE = f"""HloModule m, num_partitions=4, is_scheduled=true

{ADD}
%less {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = pred[] compare(%a, %b), direction=LT
}}

%inner {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %t = f32[8,16]{{1,0}} tanh(%p)
}}

%fused {{
  %p = f32[8,16]{{1,0}} parameter(0)
  %q = f32[8,16]{{1,0}} parameter(1)
  %i = s32[] parameter(2)
  %large = f32[2]{{0}} constant({{1, 2}})
  %b = f32[2,16]{{1,0}} broadcast(%large), dimensions={{0}}
  %part = f32[2,16]{{1,0}} slice(%q), slice={{[0:2], [0:16]}}
  %more = f32[2,16]{{1,0}} dynamic-slice(%q, %i, %i), dynamic_slice_sizes={{2,16}}
  %sum = f32[2,16]{{1,0}} add(%part, %more)
  %all = f32[2,16]{{1,0}} multiply(%sum, %b)
  %nested = f32[8,16]{{1,0}} fusion(%q), kind=kLoop, calls=%inner
  %source = f32[8,16]{{1,0}} add(%p, %nested)
  ROOT %u = f32[8,16]{{1,0}} dynamic-update-slice(%source, %all, %i, %i)
}}

%one {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %t = f32[8,16]{{1,0}} tanh(%p)
}}

%other {{
  %p = f32[8,16]{{1,0}} parameter(0)
  ROOT %t = f32[8,16]{{1,0}} add(%p, %p)
}}

%again {{
  %p = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(9)
  ROOT %s = pred[] compare(%i, %n), direction=LT
}}

%body {{
  %p = (s32[], f32[8,16]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8,16]{{1,0}} get-tuple-element(%p), index=1
  %n = s32[] constant(1)
  %j = s32[] add(%i, %n)
  %w = f32[8,16]{{1,0}} tanh(%v)
  ROOT %r = (s32[], f32[8,16]{{1,0}}) tuple(%j, %w)
}}

ENTRY %main {{
  %x = f32[8,16]{{1,0}} parameter(0)
  %y = f32[8,16]{{1,0}} parameter(1)
  %square = f32[8,8]{{1,0}} parameter(2)
  %experts = f32[2,16,4]{{2,1,0}} parameter(3)
  %sizes = s32[2]{{0}} parameter(4)
  %rows = f32[2,16]{{1,0}} parameter(5)
  %row = f32[1,16]{{1,0}} parameter(6)
  %zero = f32[] constant(0)
  %index = s32[] constant(0)
  %seed = u64[2]{{0}} constant({{1, 2}})
  %pair = (s32[], f32[8,16]{{1,0}}) tuple(%index, %x)
  ROOT %result = RESULT
}}
"""


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_rule_of_the_model_is_xlas(name):
    text = MODULE.replace("RESULT", INSTRUCTIONS[name])
    total = CostModel(hlo.parse(text), "cpu").total()
    assert total.rounded == xla_says(text)
    assert total.exact == total.rounded  # whole numbers this small are not rounded


# --- reasons, each with its closed form ----------------------------------------------------------------------------


def double(x):
    return x @ x


def scanned(x, weights):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]


def test_a_loop_is_counted_once():
    trips, rows, width = 7, 128, 256
    ready("host")
    bill = itemize(jax.jit(scanned), f32(rows, width), f32(trips, width, width))
    body = 2 * rows * width**2 + rows * width + 1  # the product, tanh and the counter; the condition runs once more
    assert reasons(bill, "flops") == {
        "loop body counted once": (trips - 1) * body + trips,
        "transcendentals counted apart": rows * width,
        "added up in 32-bit floating point": reasons(bill, "flops")["added up in 32-bit floating point"],
        "unexplained": 0,
    }
    assert reasons(bill, "bytes")["unexplained"] == 0


def test_a_gather_is_charged_its_whole_table():
    rows, width, picked = 10_000, 256, 64
    ready("host")
    bill = itemize(jax.jit(lambda table, index: table[index] * 2), f32(rows, width), i32(picked))
    assert reasons(bill, "bytes") == {"gather charged whole": -(rows - picked) * width * 4, "unexplained": 0}


def test_windows_that_are_put_down_in_another_order_are_counted_as_they_lie_then():
    """As where a beam search puts its caches in another order: XLA keeps the last but two of their axes innermost."""
    ready("v5e")
    program = jax.jit(lambda caches, beams: caches[jnp.arange(4)[:, None], beams])
    bill = itemize(program, f32(4, 4, 256, 16, 64), i32(4, 4), target="v5e")
    assert reasons(bill, "bytes")["unexplained"] == 0


def test_an_update_in_place_is_charged_its_whole_buffer():
    rows, width, picked = 10_000, 256, 64
    ready("host")
    program = jax.jit(lambda table, index, more: table.at[index].add(more), donate_argnums=0)
    bill = itemize(program, f32(rows, width), i32(picked), f32(picked, width))
    assert reasons(bill, "bytes") == {
        "update in place charged whole": -2 * (rows - picked) * width * 4,
        "unexplained": 0,
    }


def test_a_slice_that_is_not_looked_for_is_charged_whole():
    """A fusion's parameter that is renamed before it is cut, which XLA does not look behind."""
    text = """HloModule m, is_scheduled=true

%fused {
  %p = f32[64,32]{1,0} parameter(0)
  %renamed = f32[4,16,32]{2,1,0} bitcast(%p)
  %part = f32[1,16,32]{2,1,0} slice(%renamed), slice={[1:2], [0:16], [0:32]}
  ROOT %t = f32[1,16,32]{2,1,0} negate(%part)
}

ENTRY %main {
  %x = f32[64,32]{1,0} parameter(0)
  ROOT %f = f32[1,16,32]{2,1,0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    bill = held_against(text)
    assert reasons(bill, "bytes") == {"slice charged whole": -48 * 32 * 4, "unexplained": 0}


def held_against(text: str, said: Totals | None = None) -> Bill:
    """The bill of HLO text against jaxlib's analysis of it, or against what is said."""
    module, kernels = hlo.parse(text), list[Kernel]()
    bill = itemize_module(module, targets.chip("host"), kernels=kernels)
    flops, _, size = xla_says(text)
    reconcile.against_xla(bill, module, kernels, "cpu", said or Totals(flops, size))
    return bill


def test_an_operand_that_is_used_twice_counts_twice():
    bill = held_against(MODULE.replace("RESULT", INSTRUCTIONS["same twice"]))
    assert reasons(bill, "bytes")["operand used twice counted twice"] == -8 * 16 * 4


def test_of_a_conditional_each_quantity_is_the_most_of_any_branch():
    """Billed is the first: 128 tangents of 512 B, 512 B written. The second adds 128 numbers to themselves."""
    bill = held_against(MODULE.replace("RESULT", INSTRUCTIONS["conditional"]))
    assert reasons(bill, "flops")["of a conditional, the most of any branch counted"] == -128
    assert reasons(bill, "bytes")["of a conditional, the most of any branch counted"] == -512
    assert_explained(bill)


def test_transcendentals_and_types_have_a_reason_each():
    ready("host")
    bill = itemize(jax.jit(lambda x: jnp.exp(x.astype(jnp.float32))), bf16(64, 128))
    found = reasons(bill, "flops")
    assert found["transcendentals counted apart"] == 64 * 128
    assert found["change of type counted as a FLOP"] == -64 * 128


def test_what_no_reason_explains_is_said():
    text = MODULE.replace("RESULT", INSTRUCTIONS["fusion"])
    flops, _, size = xla_says(text)
    bill = held_against(text, Totals(flops + 5, size - 3))
    assert (reasons(bill, "flops")["unexplained"], reasons(bill, "bytes")["unexplained"]) == (-5, 3)


def test_of_what_cannot_be_followed_all_is_unexplained():
    text = MODULE.replace("RESULT", INSTRUCTIONS["gather"]).replace("slice_sizes={1,16}", "slice_sizes={}")
    module, kernels = hlo.parse(text.replace("f32[2,16]{1,0} gather", "(f32[2,16]) gather-start")), list[Kernel]()
    bill = itemize_module(module, targets.chip("host"), kernels=kernels)
    reconcile.against_xla(bill, module, kernels, "cpu", Totals(1.0, 1.0))
    assert {d["reason"] for d in bill.differences} == {"unexplained"}
    assert any("cannot be followed" in note for note in bill.notes)


def test_of_hlo_text_and_of_a_gpu_that_is_not_there_nothing_is_claimed():
    ready("h200")
    for bill in (itemize(capture.read("train-host")), itemize(jax.jit(double), bf16(64, 64), target="h200")):
        assert bill.xla is None
        assert not any(d["quantity"].startswith("xla_") for d in bill.differences)


def test_a_compiled_program_brings_its_totals():
    ready("host")
    compiled = jax.jit(double).lower(f32(64, 64)).compile()
    bill = itemize(compiled)
    assert bill.xla == {"flops": 2 * 64**3, "bytes": 2 * 64 * 64 * 4}
    assert_explained(bill)


# --- our own steps -------------------------------------------------------------------------------------------------

OWN = {
    "decode": ("decode", {"layers": "unroll"}),
    "decode int8 experts": ("decode", {"layers": "unroll", "weights": "int8", "experts": MOE}),
    "prefill scan": ("prefill", {"layers": "scan", "experts": MOE}),
    "train scan": ("train", {"layers": "scan", "remat": "full"}),
}


@cache
def own(target: str, name: str) -> Bill:
    step, changes = OWN[name]
    ready(target)
    batch, context = capture.SIZES[step]
    built = steps.build(
        replace(capture.TINY, **changes), step, batch=batch, context=context, mesh=targets.mesh(target, {})
    )
    options = built.compiler_options(targets.chip(target).platform)
    return bill_of(built, targets.compile(built.lower(), target, options=options), target)


STEPS = [("v5e", name) for name in OWN] + [("host", "train scan"), ("host", "decode int8 experts")]


@pytest.mark.parametrize(("target", "name"), STEPS)
def test_our_own_steps_are_explained_to_the_last_unit(target, name):
    bill = own(target, name)
    assert_explained(bill)
    assert bill.xla is not None
    vague = sum(abs(amount) for reason, amount in reasons(bill, "bytes").items() if "otherwise" in reason)
    assert vague <= 0.01 * bill.xla["bytes"]


@pytest.mark.parametrize("name", [name for name in capture.PROGRAMS if "v5e" not in name])
def test_captured_steps_are_explained_to_the_last_unit(name):
    """Those for an H200 by the rules that a GPU which is there goes by; sharded ones as well."""
    text, target = capture.read(name), name.split("-")[1]
    module, kernels = hlo.parse(text), list[Kernel]()
    bill = itemize_module(module, targets.chip(target), kernels=kernels)
    flops, _, size = xla_says(text)
    reconcile.against_xla(bill, module, kernels, targets.chip(target).platform, Totals(flops, size))
    assert_explained(bill)


@pytest.mark.parametrize(("remade", "reason"), [(0, "unexplained"), (5, "run again by the compiler, to save memory")])
def test_what_the_closed_form_does_not_have_is_remade_or_unexplained(remade, reason):
    bill = Bill({}, [Row("mlp/up", "forward", None, Work(matmul=105))], Work(), [], Work(matmul=105))
    bill.remade_flops = remade
    against_closed_form(bill, Expected({"mlp/up": 100}, 100))
    assert {"quantity": "matmul_flops", "amount": 5, "reason": f"mlp/up: {reason}"} in bill.differences
    assert {"quantity": "ideal_flops", "amount": 5, "reason": reason} in bill.differences


def test_what_one_component_lacks_and_another_has_is_moved():
    rows = [Row("attention/qkv", "forward", None, Work(matmul=7)), Row("mlp/up", "forward", None, Work(matmul=3))]
    bill = Bill({}, rows, Work(), [], Work(matmul=10))
    against_closed_form(bill, Expected({"attention/qkv": 5, "mlp/up": 5}, 10))
    assert bill.differences == [
        {"quantity": "matmul_flops", "amount": 2, "reason": "attention/qkv: billed to another component"},
        {"quantity": "matmul_flops", "amount": -2, "reason": "mlp/up: billed to another component"},
    ]


def test_the_masked_half_and_what_is_run_again_explain_the_useful_flops():
    """A causal mask over T positions, of which a CPU computes all T x T: T (T - 1) / 2 of them for nothing."""
    bill = own("host", "train scan")
    config, (batch, context) = capture.TINY, capture.SIZES["train"]
    found = {d["reason"]: d["amount"] for d in bill.differences if d["quantity"] == "ideal_flops"}
    one = 2 * batch * config.num_heads * config.head_width * config.num_layers * 2  # of a pair of positions: QK and PV
    rows = bill.component("attention/core")
    assert bill.closed_form is not None
    assert bill.total.matmul - sum(found.values()) == bill.closed_form["ideal_flops"]
    assert found["attention/core: causal half masked"] == rows.matmul * (context - 1) // (2 * context)
    assert rows.matmul % (one * context**2) == 0
    assert found["run again in the backward pass, as the model asks"] > 0
    assert "unexplained" not in found


def test_what_chips_cannot_share_is_a_reason():
    """Two key/value heads on four chips: keys, values and the router are made on each, which the closed form says."""
    mesh, (batch, context) = {"tensor": 4}, (2, 128)
    ready("v5e", 4)
    config = replace(capture.TINY, num_heads=8, num_kv_heads=2, experts=MOE)
    built = steps.build(config, "prefill", batch=batch, context=context, mesh=targets.mesh("v5e", mesh))
    bill = bill_of(built, targets.compile(built.lower(), "v5e"), "v5e", mesh)
    found = {(d["quantity"], d["reason"]): d["amount"] for d in bill.differences}
    D, K, H, L = config.width, config.num_kv_heads, config.head_width, config.num_layers
    again = 3 * 2 * batch * context * D * L // 4  # three other chips do, for each output, what one of four would
    assert found["matmul_flops", "attention/qkv: not split over tensor=4"] == again * 2 * K * H
    assert found["matmul_flops", "moe/router: not split over tensor=4"] == again * MOE.count
    assert found["ideal_flops", "not split over tensor=4"] == again * (2 * K * H + MOE.count)
    products = [reason for quantity, reason in found if quantity in ("matmul_flops", "ideal_flops")]
    assert not any("unexplained" in reason for reason in products)
    written = batch * context * 2 * K * H * 2 * L  # bf16
    assert found["cache_write_bytes", "not split over tensor=4"] == written - written // 4
