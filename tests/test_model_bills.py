"""Bills of our own steps, compiled for every kind of chip, against the closed form."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import jax
import pytest
from compiled import bill as bill_of
from compiled import f32, i32, once, ready
from stepbill.experiments import steps
from stepbill.model import architectures, train
from stepbill.model.config import ModelConfig
from stepbill.profiling import closed_form, targets
from stepbill.profiling.bill import Bill
from stepbill.profiling.hlo import Module, parse
from stepbill.profiling.walk import itemize_module

# Of other chips test_same_everywhere compiles the same steps.
ALL = ("host", "h200", "v5e")
ON_ALL = pytest.mark.parametrize("target", ALL)
SMALL = ModelConfig("small", 2, 128, 4, 2, 256, 512, head_width=64, max_context=1024)
SIZES = {"decode": (4, 256), "generate": (4, 256), "prefill": (2, 256), "train": (2, 128)}  # batch, context
SIZES["score"] = (2, 256)
COUNT = 16  # tokens of a generate step
BLOCK = ("attention/qkv", "attention/core", "attention/out", "mlp/up", "mlp/down")


@cache
def program(
    target: str, step: str, mesh: tuple[tuple[str, int], ...], config: ModelConfig, sizes: tuple[int, int]
) -> Module:
    """One compiled step, shared by all tests and workers of a run, and by configs that come to the same."""
    axes = dict(mesh)
    ready(target, axes.get("data", 1) * axes.get("tensor", 1))
    built = build(target, step, axes, config, sizes)
    fields = [target, step, *map(str, sizes), *(f"{name}{size}" for name, size in mesh)]
    fields += [str(value) for value in vars(built.config).values()]
    digest = hashlib.sha256("-".join(fields).encode()).hexdigest()
    return parse(once(f"{target}-{step}-{digest}", lambda: targets.compile(built.lower(), target, runs=False).text))


def build(target: str, step: str, mesh: Mapping[str, int], config: ModelConfig, sizes: tuple[int, int]) -> steps.Step:
    batch, context = sizes
    over = targets.mesh(target, mesh)
    return steps.build(config, step, batch=batch, context=context, mesh=over, count=COUNT)


def laid_out(step: str, config: ModelConfig) -> ModelConfig:
    """The config that `bill` takes the program of: its layers are not "auto", for what is equal is compiled once."""
    return replace(config, layers="scan" if step == "train" else "unroll")


def bill(
    target: str,
    step: str,
    mesh: Mapping[str, int] | None = None,
    config: ModelConfig = SMALL,
    sizes: tuple[int, int] | None = None,
    **changes,
) -> Bill:
    """The bill of a step of SMALL, or of another config, with some fields changed."""
    config = replace(laid_out(step, config), **changes)
    module = program(target, step, tuple((mesh or {}).items()), config, sizes or SIZES[step])
    built = build(target, step, mesh or {}, config, sizes or SIZES[step])
    return itemize_module(module, targets.chip(target), roles=steps.ROLES, masked=built.masked)


def matmuls(bill: Bill) -> dict[str, int]:
    """FLOPs of matmuls by component, taxes and all phases together."""
    names = {row.component for row in bill.rows if row.work.matmul}
    return {name: bill.component(name).matmul for name in names}


def expected(
    target: str, step: str, config: ModelConfig = SMALL, sizes: tuple[int, int] | None = None, **changes
) -> dict[str, int]:
    """The closed form, of all chips."""
    built = build(target, step, {}, replace(config, **changes), sizes or SIZES[step])
    return closed_form.matmul_flops(built.config, step, built.batch, built.context, blocks=built.score_blocks)


def assert_matmuls(bill: Bill, expected: Mapping[str, int]) -> None:
    """Every component's matmul FLOPs are as expected, and all are somebody's."""
    assert matmuls(bill) == expected
    assert bill.unattributed.matmul == 0


def needed(bill: Bill, side: str, role: str) -> int:
    """Bytes of a role, taxes apart, nobody's included."""
    works = [row.work for row in bill.rows if row.tax is None] + [bill.unattributed]
    return sum((work.hbm_read if side == "read" else work.hbm_write).get(role, 0) for work in works)


def assert_sound(bill: Bill) -> None:
    """What holds of every bill of our own model."""
    bill.check()
    assert not bill.unknown
    assert bill.unattributed.flops <= 0.01 * bill.total.flops
    assert bill.unattributed.hbm_bytes <= 0.03 * bill.total.hbm_bytes
    json.dumps(bill.to_json())


# --- matmul FLOPs ----------------------------------------------------------------------------------------------------

PROGRAMS = {
    "decode": ("decode", {"layers": "unroll"}),
    "decode, scanned": ("decode", {"layers": "scan"}),
    "prefill": ("prefill", {"layers": "unroll"}),
    "prefill, scanned": ("prefill", {"layers": "scan"}),
    "prefill without flash attention": ("prefill", {"attention": "xla"}),
    "prefill in blocks of queries": ("prefill", {"attention": "xla", "query_block": 100}),
    "score": ("score", {"layers": "unroll"}),
    "train": ("train", {}),
    "train without flash attention": ("train", {"attention": "xla"}),
    "train, remat dots": ("train", {"remat": "dots"}),
    "train, remat full": ("train", {"remat": "full"}),
    "train, remat full, unrolled": ("train", {"remat": "full", "layers": "unroll"}),
}
# To compile; other targets stand for them.
LONG = {("host", f"train, remat {how}") for how in ("dots", "full, unrolled")}
LONG |= {("host", f"{step} without flash attention") for step in ("prefill", "train")}  # it has none
LONG |= {("h200", "train without flash attention"), ("v5e", "prefill without flash attention")}
LONG |= {("h200", "train, remat dots"), ("v5e", "train, remat full, unrolled"), ("v5e", "prefill in blocks of queries")}


@pytest.mark.parametrize(("target", "name"), [(t, n) for n in PROGRAMS for t in ALL if (t, n) not in LONG])
def test_matmul_flops_are_the_closed_form(target, name):
    step, changes = PROGRAMS[name]
    found = bill(target, step, **changes)
    assert_sound(found)
    assert_matmuls(found, expected(target, step, **changes))


VARIANTS = {
    "tied": {"tied": True, "scale_embedding": True, "norm_offset": True, "activation": "geglu"},
    "norms of queries and keys": {"qk_norm": True, "head_width": 128},
    "one query head a key head": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1},
    "float32": {"dtype": "float32"},
}


@pytest.mark.parametrize(("name", "target"), [("tied", "h200"), *zip(VARIANTS, ("v5e", "h200") * 3, strict=False)])
def test_matmul_flops_of_other_architectures(name, target):
    found = bill(target, "decode", **VARIANTS[name])
    assert_sound(found)
    assert_matmuls(found, expected(target, "decode", **VARIANTS[name]))


@ON_ALL
@pytest.mark.parametrize("step", ["decode", "prefill"])
def test_scanned_and_unrolled_layers_cost_the_same_flops(target, step):
    scanned, unrolled = (bill(target, step, layers=layers) for layers in ("scan", "unroll"))
    assert matmuls(scanned) == matmuls(unrolled)


def test_scanned_and_unrolled_training_cost_the_same_in_every_phase():
    scanned, unrolled = (bill("h200", "train", remat="full", layers=layers) for layers in ("scan", "unroll"))
    assert matmuls(scanned) == matmuls(unrolled)
    for phase in ("forward", "recompute", "backward"):
        for name in BLOCK:
            assert scanned.component(name, phase).matmul == unrolled.component(name, phase).matmul, (name, phase)


@pytest.mark.parametrize(("target", "remat"), [*((target, "full") for target in ALL), ("v5e", "dots")])
def test_rematerialisation_adds_recompute_and_nothing_else(target, remat):
    without, with_it = bill(target, "train"), bill(target, "train", remat=remat)
    forward = expected(target, "prefill", sizes=SIZES["train"])
    for name in (*BLOCK, "logits"):
        assert without.component(name, "recompute").matmul == 0
        again = forward[name] * closed_form.recomputed(replace(SMALL, remat=remat)).get(name, 0)
        assert with_it.component(name, "recompute").matmul == again, name
        for phase in ("forward", "backward"):
            assert with_it.component(name, phase).matmul == without.component(name, phase).matmul, (name, phase)
    assert with_it.ideal_flops == without.ideal_flops


@pytest.mark.parametrize(
    ("target", "step", "changes"),
    [(target, "decode", {"layers": layers}) for target in ALL for layers in ("scan", "unroll")]
    + [("h200", "prefill", {"layers": "scan"})],
)
def test_twice_the_layers_cost_twice_the_layers(target, step, changes):
    once_, twice = bill(target, step, **changes), bill(target, step, **changes, num_layers=2 * SMALL.num_layers)
    assert_sound(twice)
    for name in BLOCK:
        assert twice.component(name).matmul == 2 * once_.component(name).matmul, name
    assert twice.component("logits").matmul == once_.component("logits").matmul
    assert matmuls(twice) == expected(target, step, num_layers=2 * SMALL.num_layers, **changes)
    if step == "decode":
        for name in ("attention/qkv", "attention/out", "mlp/up", "mlp/down"):
            reads = [sum(r.work.hbm_read.get("weights", 0) for r in b.rows if r.component == name and r.tax is None)
                     for b in (once_, twice)]  # fmt: skip
            assert reads[1] == 2 * reads[0] > 0, name


@pytest.mark.parametrize(
    ("target", "step"), [("host", "prefill"), ("h200", "prefill"), ("host", "train"), ("v5e", "train")]
)
def test_half_of_causal_attention_is_masked_away(target, step):
    found = bill(target, step, attention="xla")
    context = SIZES[step][1]
    core = found.component("attention/core").matmul
    assert found.tax("masked").matmul == pytest.approx(core * (context - 1) / (2 * context), abs=1000)
    assert {row.component for row in found.rows if row.tax == "masked"} == {"attention/core"}
    ideal = closed_form.ideal_flops(SMALL, step, *SIZES[step])
    assert found.ideal_flops == pytest.approx(ideal, rel=1e-6)


def test_a_gpu_reads_the_logits_once_for_the_loss_and_once_for_its_gradient(monkeypatch):
    monkeypatch.setattr(train, "platform", lambda: "cuda")
    bill = bill_of("h200", jax.value_and_grad(train.cross_entropy), f32(2, 256, 32768), i32(2, 256))
    logits = 2 * 256 * 32768 * 4  # more than the L2 holds
    assert 2 * logits <= sum(bill.total.hbm_read.values()) < 2.02 * logits
    assert logits <= sum(bill.total.hbm_write.values()) < 1.02 * logits


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_training_keeps_and_multiplies_in_the_compute_type(target):
    module = program(target, "train", (), replace(SMALL, layers="scan"), SIZES["train"])
    (B, T), D, F = SIZES["train"], SMALL.width, SMALL.mlp_width
    stacks = {leaf.dtype for i in module.instructions.values() for leaf in i.shape.leaves
              if leaf.dims in ((SMALL.num_layers, B, T, D), (SMALL.num_layers, B, T, F))}  # fmt: skip
    assert stacks == {"bf16"}
    back = [
        {operand.shape.dtype for operand in i.operands}
        for i in module.instructions.values()
        if i.opcode in ("dot", "convolution") and "transpose(jvp(logits))" in i.op_name
    ]
    assert len(back) == 2 and all(types == {"bf16"} for types in back)


@ON_ALL
def test_a_loop_of_decode_steps_costs_as_many(target):
    loop, one = bill(target, "generate"), bill(target, "decode")
    assert_sound(loop)
    assert matmuls(loop) == {name: COUNT * flops for name, flops in matmuls(one).items()}
    assert loop.component("sampling").flops > 0
    if target == "h200":
        assert needed(loop, "write", "cache") == pytest.approx(COUNT * needed(one, "write", "cache"), abs=4 * COUNT)


# --- bytes -----------------------------------------------------------------------------------------------------------


@ON_ALL
@pytest.mark.parametrize("changes", [{}, VARIANTS["tied"], {"layers": "scan"}], ids=["untied", "tied", "scan"])
def test_decode_reads_every_weight_once_and_the_cache_once(target, changes):
    config = replace(SMALL, **changes)
    batch, context = SIZES["decode"]
    found = bill(target, "decode", **changes)
    weights = closed_form.weights_bytes(config, config.parameters, batch, 2)
    read, written = closed_form.cache_bytes(config, "decode", batch, context, 2)
    assert needed(found, "read", "weights") == pytest.approx(weights, rel=0.01)
    assert needed(found, "write", "weights") == 0
    assert needed(found, "read", "cache") == pytest.approx(read, rel=0.01)
    if target in ("host", "h200"):  # so small a cache a TPU takes into VMEM, and puts back whole
        assert needed(found, "write", "cache") == pytest.approx(written, rel=0.01)
    # What is more than that has a name.
    for role in ("weights", "cache"):
        total = found.total.hbm_read.get(role, 0) + found.total.hbm_write.get(role, 0)
        taxes = sum(
            row.work.hbm_read.get(role, 0) + row.work.hbm_write.get(role, 0)
            for row in found.rows
            if row.tax is not None
        )
        assert total == needed(found, "read", role) + needed(found, "write", role) + taxes
    assert found.ideal_hbm_bytes == pytest.approx(weights + read + written, rel=0.05)


@ON_ALL
def test_prefill_writes_the_cache_once(target):
    found = bill(target, "prefill")
    _, written = closed_form.cache_bytes(SMALL, "prefill", *SIZES["prefill"], 2)
    assert needed(found, "write", "cache") == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize(("target", "batch", "context"), [("h200", 8, 4096), ("v5e", 8, 4096), ("h200", 64, 8192)])
def test_decode_of_a_real_width_moves_little_more_than_it_must(target, batch, context):
    """llama3-8b, two of its layers: the bill that the model's decode was built by. The full depth is in the README."""
    llama = replace(architectures.get("llama3-8b"), num_layers=2)
    found = bill(target, "decode", config=llama, sizes=(batch, context))
    assert_sound(found)
    assert matmuls(found) == expected(target, "decode", llama, (batch, context))
    assert found.efficiency is not None and 1.0 <= found.efficiency <= 1.10
    weights = closed_form.weights_bytes(llama, llama.parameters, batch, 2)
    read, written = closed_form.cache_bytes(llama, "decode", batch, context, 2)
    assert needed(found, "read", "weights") == pytest.approx(weights, rel=0.01)
    assert needed(found, "read", "cache") == pytest.approx(read, rel=0.01)
    assert needed(found, "write", "cache") == pytest.approx(written, rel=0.01)
    assert found.ideal_hbm_bytes == pytest.approx(weights + read + written, rel=0.01)


# --- many chips ------------------------------------------------------------------------------------------------------

MESH = {"data": 2, "tensor": 4}
SHARDED = replace(SMALL, num_heads=8, num_kv_heads=4, head_width=32, vocabulary=1024)


@pytest.mark.parametrize(
    ("target", "step"),
    [
        (target, step)
        for target in ALL
        for step in ("decode", "prefill", "train")
        if (target, step) not in (("host", "train"), ("h200", "train"), ("v5e", "prefill"))  # to compile
    ],
)
def test_chips_share_the_work(target, step):
    changes = {"remat": "full"} if step == "train" else {}
    found = bill(target, step, MESH, config=SHARDED, sizes=(8, SIZES[step][1]), **changes)
    assert_sound(found)
    whole = expected(target, step, SHARDED, (8, SIZES[step][1]), **changes)
    assert_matmuls(found, {name: flops // 8 for name, flops in whole.items()})
    assert found.total.link_bytes > 0


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_decode_over_tensor_sums_twice_a_layer(target):
    """Megatron's two all-reduces a layer, of x [B,1,D], and what little the embedding needs."""
    batch, context = 8, 256
    found = bill(target, "decode", {"tensor": 4}, config=SHARDED, sizes=(batch, context))
    assert_sound(found)
    x = batch * SHARDED.width
    for name in ("attention/out", "mlp/down"):
        sent = found.component(name).link_bytes
        least = SHARDED.num_layers * 2 * (x * 2) * 3 // 4
        # In bfloat16, or in float32 where the compiler sums before it narrows.
        assert sent in (least, 2 * least), name
    assert found.total.link_bytes <= 8 * SHARDED.num_layers * x * 2 + 10 * x * 4
    weights = closed_form.weights_bytes(SHARDED, SHARDED.parameters, batch, 2)
    # Each chip looks up its quarter of the table, and so small a quarter a TPU takes into VMEM whole; norms are on all.
    quarter = SHARDED.vocabulary * SHARDED.width * 2 // 4
    assert weights / 4 <= needed(found, "read", "weights") <= 1.01 * weights / 4 + (target != "h200") * quarter


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_training_over_data_gathers_weights_and_scatters_gradients(target):
    """FSDP: each weight is gathered for the forward and for the recomputed pass, each gradient reduced once."""
    found = bill(target, "train", {"data": 4}, config=SHARDED, sizes=(8, 128), remat="full")
    assert_sound(found)
    block = SHARDED.parameters - 2 * SHARDED.vocabulary * SHARDED.width
    gathered = 2 * block * 2 * 3 // 4  # bfloat16
    scattered = block * 2 * 3 // 4
    blocks = sum(found.component(name).link_bytes for name in ("attention", "mlp"))
    assert blocks >= 0.9 * (gathered + scattered)
    assert blocks <= 4 * (gathered + scattered)  # float32, or all-reduce for reduce-scatter
