"""One program, compiled for unlike chips, costs the same: what differs has a name and an amount."""

import random
from fractions import Fraction

import pytest
import random_programs
import test_model_bills
from compiled import module, ready
from stepbill.experiments.steps import Step
from stepbill.model.config import Experts, ModelConfig
from stepbill.profiling import closed_form
from stepbill.profiling.bill import Bill
from stepbill.profiling.chips import chip
from stepbill.profiling.flops import flops
from stepbill.profiling.hlo import Module
from stepbill.profiling.walk import itemize_text

EVERYWHERE = ("host", "h200", "v5e", "v5p", "v6e")
# A TPU's compiler takes its time. v6e does what v5p does with experts, its sparse core included; what v5e
# makes of experts, training apart, is in test_experts.py.
COMPILED = {"dense": ("host", "h200", "v5e", "v5p"), "experts": ("host", "h200", "v6e")}
SPARSE = ModelConfig(
    *("sparse", 1, 128, 4, 2, 256, 512), max_context=128, attention="xla", experts=Experts(4, 2, 128, router="softmax")
)
CONFIGS = {"dense": test_model_bills.SMALL, "experts": SPARSE}
SIZES = {"dense": test_model_bills.SIZES, "experts": {"decode": (4, 64), "prefill": (2, 64), "train": (2, 64)}}


def differences(step: Step, bill: Bill) -> dict[str, Fraction]:
    """Why this target executes more matmul FLOPs than the model asks for, each reason with its amount.

    masked: pairs of a query and a key of which one may not see the other, in a product of all with all (the host) or
      in a kernel's blocks; and rows of experts that no token is in, in theirs.
    again: what a rematerialised step, or the compiler by itself, computes a second time.
    flash backward: what kernels for the gradients of attention make that one product of all with all has already:
      of each pair the scores and the gradient of the weights twice (2 (2 H + V) FLOPs), of each query, padded to whole
      blocks, what it read times the gradient of that (2 V).
    """
    config = step.config
    again = sum(row.work.matmul for row in bill.rows if row.phase == "recompute" and row.tax is None)
    found = {"masked": Fraction(bill.tax("masked").matmul), "again": Fraction(again), "flash backward": Fraction(0)}
    if config.attention == "flash" and step.name == "train":
        H, V = closed_form.head_widths(config)
        queries, _ = step.score_blocks.queries
        rows = -(-step.context // queries) * queries if step.score_blocks.padded else step.context
        pairs = step.context * (step.context + 1) // 2
        heads = config.num_layers * step.batch * config.num_heads
        found["flash backward"] = Fraction(heads * (2 * (2 * H + V) * pairs + 2 * V * rows))
    return found


def cloned(program: Module, step: Step) -> Fraction:
    """Another reason: a kernel is cloned for each of its readers, as XLA does with the scores of attention on v6e. Of
    a causal product that the forward pass of a layer makes more than once, what is not masked, past the first.

    Two products of the backward pass have one name, and nothing is cloned there; nor is a layer that is in a loop.
    """
    if step.name == "decode":  # in which no product is causal; and a CPU makes each in parts
        return Fraction(0)
    copies: dict[str, list[int]] = {}
    for one in (i for computation in program.computations.values() for i in computation):
        work = flops(one)
        if "attention/core" in one.op_name and "transpose(" not in one.op_name and work and work.matmul:
            copies.setdefault(one.op_name, []).append(work.matmul)
    layers = 1 if step.name == "train" else step.config.num_layers  # the `bill` of training has a loop over them
    seen = Fraction(step.context + 1, 2 * step.context)
    return sum((seen * sum(made[layers:]) for made in copies.values()), Fraction(0))


@pytest.mark.parametrize("name", ["train", "prefill", "decode"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_our_steps_cost_the_same_on_every_chip(kind, name):
    config, sizes = test_model_bills.laid_out(name, CONFIGS[kind]), SIZES[kind][name]
    needed: dict[str, float] = {}
    for target in COMPILED[kind]:
        bill = test_model_bills.bill(target, name, config=config, sizes=sizes)
        test_model_bills.assert_sound(bill)
        step = test_model_bills.build(target, name, {}, config, sizes)
        needed[target] = float(bill.total.matmul - sum(differences(step, bill).values()))
        needed[target] -= float(cloned(test_model_bills.program(target, name, (), config, sizes), step))
    # A product's masked share is rounded to whole FLOPs.
    assert needed == pytest.approx(
        dict.fromkeys(COMPILED[kind], closed_form.ideal_flops(config, name, *sizes)), rel=1e-6
    )


@pytest.mark.parametrize("seed", [3, 8])
def test_a_random_program_costs_the_same_on_every_chip(seed):
    program = random_programs.draw(random.Random(seed).randrange)
    said = random_programs.counted(*random_programs.function_of(program))
    assert said.inner and not said.outer  # see random_programs.Products
    found = {}
    for target in EVERYWHERE:
        ready(target)
        billed, _ = random_programs.found_and_said(program, target)
        found[target] = sum(billed)
    assert found == dict.fromkeys(EVERYWHERE, said.inner)


def test_handing_work_to_a_sparse_core_costs_nothing_and_its_work_what_it_is():
    """As TPU v5p and v6e scatter: signals around a call. Found in a training step with experts."""
    scatter = """%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p: f32[64], i: s32[8,1], u: f32[8]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %i = s32[8,1]{1,0} parameter(1)
  %u = f32[8]{0} parameter(2)
  ROOT %s = f32[64]{0} scatter(%p, %i, %u), update_window_dims={}, inserted_window_dims={0}, to_apply=%add
}

ENTRY"""
    signal = "custom-call(), custom_call_target="
    text = module(
        "%p = f32[64]{0} parameter(0)",
        "%i = s32[8,1]{1,0} parameter(1)",
        "%u = f32[8]{0} parameter(2)",
        f'%ready = s32[]{{:S(2)}} {signal}"PrepareAsyncCallStart"',
        f'%go = token[] {signal.replace("()", "(%ready)")}"PrepareAsyncCallDone"',
        "%start = ((f32[64]{0}, s32[8,1]{1,0}, f32[8]{0}, token[]), f32[64]{0}) call-start(%p, %i, %u, %go), "
        'async_execution_thread="sparsecore", to_apply=%scattered',
        "ROOT %done = f32[64]{0} call-done(%start)",
        header=", input_output_alias={ {}: (0, {}, may-alias) }",
    ).replace("ENTRY", scatter)
    bill = itemize_text(text, chip("v6e"))
    assert not bill.unknown
    assert bill.total.elementwise == 8
    # The old values, indices and updates; eight new values.
    assert (bill.total.hbm_read_bytes, bill.total.hbm_write_bytes) == (3 * 32, 32)
