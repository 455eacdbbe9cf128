"""Experts and few bits: kernels in interpret mode, every dispatch, rounding; and what their bills say."""

from dataclasses import replace
from functools import cache, partial

import capture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ready
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.experiments import steps
from stepbill.experiments.bill import bill_of
from stepbill.model import decode, kernels, moe, quantized
from stepbill.model.architectures import ARCHITECTURES
from stepbill.model.axes import use_mesh
from stepbill.model.cache import KVCache
from stepbill.model.config import Experts, ModelConfig
from stepbill.model.kernels import Machine, Matrices
from stepbill.model.quantized import Scheme, dequantize, quantize
from stepbill.model.transformer import graph_of, split, unstack
from stepbill.profiling import closed_form, targets
from stepbill.profiling.flops import flops
from stepbill.profiling.hlo import parse
from test_model import MIXTRAL, create, draw_tokens, forward, jitted, loss_and_gradients, run
from test_model_bills import assert_sound, needed

BLOCKS = np.array([0, 0, 2, 3, 3], np.int32)  # of which expert each block of rows is; nobody chose expert 1
MACHINES = pytest.mark.parametrize("platform", ["cuda", "tpu"])


@pytest.fixture(autouse=True)
def anew():
    """Nothing runs that was compiled with other kernels."""
    yield
    jitted.cache_clear()


def drawn(*shape, seed=0, dtype="float32"):
    return np.float32(np.random.default_rng(seed).normal(size=shape)).astype(jnp.dtype(dtype))


# Each as one program: an operation by itself takes as long to compile.
rounded = jax.jit(quantize, static_argnums=(1, 2))
unrounded = jax.jit(dequantize, static_argnums=(2, 3))


def by_hand(x, w, across=False):
    """Each block times its matrix, in float64."""
    letters = "bD,FD->bF" if across else "bD,DF->bF"
    blocks = zip(np.asarray(x, np.float64), BLOCKS, strict=True)
    return np.stack([np.einsum(letters, rows, np.float64(w[expert])) for rows, expert in blocks])


def multiplied(platform, x, values, scale, across):
    """By the interpreted kernel of a machine: each block times its matrix."""
    on = Machine(platform, interpret=True)
    return jax.jit(lambda x, values, scale: kernels.grouped_matmul(x, Matrices(values, scale, across), BLOCKS, on=on))(
        x, values, scale
    )


@MACHINES
@pytest.mark.parametrize("across", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_multiplies_each_block_with_its_matrix(platform, across, rows, dtype, assert_close):
    x, w = drawn(len(BLOCKS), rows, 128, dtype=dtype), drawn(4, 128, 256, seed=1, dtype=dtype)
    w = np.swapaxes(w, 1, 2) if across else w
    assert_close(multiplied(platform, x, w, None, across), by_hand(x, w, across))


@MACHINES
def test_a_kernels_gradients_are_the_loops(platform, assert_close):
    x, w, dy = drawn(len(BLOCKS), 16, 128), drawn(4, 128, 128, seed=1), drawn(len(BLOCKS), 16, 128, seed=2)

    def gradients(on):
        def weighed(x, w):
            return jnp.sum(kernels.grouped_matmul(x, Matrices(w), BLOCKS, on=on) * dy)

        return jax.jit(jax.grad(weighed, (0, 1)))(x, w)

    found = gradients(Machine(platform, interpret=True))
    assert_close(found, gradients(Machine("cpu")))
    assert not found[1][1].any()  # nobody chose it


@MACHINES
@pytest.mark.parametrize("across", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 64)], ids=str)
def test_a_kernel_makes_numbers_of_packed_values(platform, across, rows, scheme, assert_close):
    """int4 meets its scales inside; int8 is multiplied as it is, for one scale of all inputs can wait."""
    x, w = drawn(len(BLOCKS), rows, 128), drawn(4, 128, 256, seed=1)
    values, scale = rounded(np.swapaxes(w, 1, 2) if across else w, (2 if across else 1,), scheme)
    grouped = scale.ndim == 3
    plain = unrounded(values, scale, (2 if across else 1,), "float32") if grouped else values
    made = multiplied(platform, x, values, scale if grouped else None, across)
    assert_close(made, by_hand(x, np.asarray(plain), across))


@MACHINES
@pytest.mark.parametrize("rows", [1, 5, 16, 150])
def test_each_matrix_may_have_rows_of_its_own(platform, rows, assert_close):
    x, w = drawn(3, rows, 64), drawn(3, 64, 128, seed=1)
    made = jax.jit(lambda x, w: kernels.matmul(x, Matrices(w), on=Machine(platform, interpret=True)))(x, w)
    assert_close(made, np.einsum("ERD,EDF->ERF", np.float64(x), np.float64(w)))


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
def test_where_no_kernel_fits_there_is_the_loop(platform, assert_close):
    x, w = drawn(len(BLOCKS), 3, 7), drawn(4, 7, 9, seed=1)
    made = jax.jit(lambda x, w: kernels.grouped_matmul(x, Matrices(w), BLOCKS, on=Machine(platform)))(x, w)
    assert_close(made, by_hand(x, w))


def on_kernels(monkeypatch, platform):
    """Models run on the interpreted kernels of another machine."""
    jitted.cache_clear()
    monkeypatch.setattr(kernels, "machine", lambda: Machine(platform, interpret=True))


WIDE = replace(MIXTRAL, width=32, head_width=8, experts=Experts(5, 2, 48, shared=16, balance_loss=0.1))


@MACHINES
def test_a_model_on_kernels_has_the_loss_and_gradients_of_every_token_through_every_expert(
    platform, monkeypatch, assert_close
):
    every = replace(WIDE, experts=replace(WIDE.experts, dispatch="all"))
    _, params = split(create(every))
    tokens = draw_tokens(every, 2, 12)
    expected = loss_and_gradients(graph_of(every), params, tokens)
    on_kernels(monkeypatch, platform)
    blocks = replace(WIDE, experts=replace(WIDE.experts, dispatch="blocks"))
    assert_close(loss_and_gradients(graph_of(blocks), params, tokens), expected)


@pytest.mark.parametrize(
    ("platform", "weights", "dispatch"),
    [
        *[("cuda", "int4:16", "all"), ("tpu", "int4:16", "blocks"), ("cuda", "int4:16", "capacity")],
        *[("cuda", "full", "blocks"), ("tpu", "full", "blocks"), ("tpu", "int8", "all")],
    ],
)
def test_a_scanned_prompt_reads_the_experts_of_its_layer(platform, weights, dispatch, monkeypatch, assert_close):
    """From a stack of all layers that is not sliced; one by one on kernels as in a row on the loop."""
    experts = replace(WIDE.experts, dispatch=dispatch, capacity=3.0)
    scan = replace(WIDE, layers="scan", weights=weights, experts=experts)
    model = create(scan)
    params, tokens = split(model)[1], draw_tokens(scan, 2, 12)
    in_a_row = replace(scan, layers="unroll")
    whole = nnx.merge(graph_of(in_a_row), unstack(scan, params))
    expected, _ = run(decode.prefill, whole, tokens, KVCache.init(in_a_row, 2, 12))
    on_kernels(monkeypatch, platform)
    actual, _ = jax.jit(decode.prefill)(model, tokens, KVCache.init(scan, 2, 12))
    assert_close(actual, expected)


@pytest.mark.parametrize(("dispatch", "dtype"), [("blocks", "float32"), ("capacity", "bfloat16")])
def test_however_tokens_meet_experts_the_model_is_the_same(dispatch, dtype, assert_close):
    """With room enough nothing is dropped: values and gradients are those of every token through every expert."""
    experts = replace(MIXTRAL.experts, capacity=8.0, balance_loss=0.1, z_loss=0.1)
    config = replace(MIXTRAL, dtype=dtype, experts=experts)
    every, some = (replace(config, experts=replace(experts, dispatch=name)) for name in ("all", dispatch))
    _, params = split(create(every))
    tokens = draw_tokens(config, 2, 12)
    expected = loss_and_gradients(graph_of(every), params, tokens)
    actual = loss_and_gradients(graph_of(some), params, tokens)
    assert_close(actual[0], expected[0], dtype)
    norm = max(np.linalg.norm(np.float64(leaf).ravel()) for leaf in jax.tree.leaves(expected[1]))
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        apart = np.linalg.norm((np.float64(a) - np.float64(e)).ravel())
        assert apart <= (1e-5 if dtype == "float32" else 2.0**-5) * norm


def test_what_is_over_capacity_is_dropped():
    config = replace(MIXTRAL, experts=replace(MIXTRAL.experts, dispatch="capacity", capacity=0.1))
    tokens, every = draw_tokens(config, 2, 12), replace(config, experts=replace(config.experts, dispatch="all"))
    _, params = split(create(config))
    dropped, whole = (forward(nnx.merge(graph_of(one), params), tokens) for one in (config, every))
    assert np.isfinite(dropped).all() and not np.allclose(dropped, whole)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_blocks_waste_little_of_a_prompt(name):
    experts = ARCHITECTURES[name].experts
    assert moe.chosen_dispatch(4096, experts) == "blocks"
    assert moe.executed_rows(4096, experts) <= 1.15 * 4096 * experts.active


EINSUMS = {
    "BTD,DNH->BNTH": ((2, 3, 64), (64, 4, 16), (0,)),
    "BNTH,NHD->BTD": ((2, 4, 3, 32), (4, 32, 64), (0, 1)),
    "BTD,VD->BTV": ((2, 3, 64), (48, 64), (1,)),
    "EbD,EDF->EbF": ((3, 5, 64), (3, 64, 32), (1,)),
}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("scheme", [Scheme(8), Scheme(4, 32)], ids=str)
@pytest.mark.parametrize("expression", EINSUMS)
def test_a_product_with_packed_weights_is_that_with_what_they_stand_for(
    platform, scheme, expression, monkeypatch, assert_close
):
    """As each target has it made: a product a group and their sum, or, on a GPU and along the last axis, a kernel."""
    of_x, of_w, contracted = EINSUMS[expression]
    x, w = drawn(*of_x), drawn(*of_w, seed=1)
    values, scale = rounded(w, contracted, scheme)
    expected = np.einsum(expression, np.float64(x), np.float64(unrounded(values, scale, contracted, "float32")))
    monkeypatch.setattr(quantized, "platform", lambda: platform)
    on_kernels(monkeypatch, platform)
    assert_close(jax.jit(lambda *arrays: quantized.einsum(expression, *arrays))(x, values, scale), expected)


def test_rounded_activations_are_off_by_what_both_scales_allow():
    """|xw - x'w'| <= sum of |x| s_w / 2 + |w| s_x / 2 + s_x s_w / 4, summed exactly."""
    x, w = drawn(3, 7, 64), drawn(64, 32, seed=1)
    values, scale = rounded(w, (0,), Scheme(8))
    _, of_row = jax.jit(quantized.quantize_rows, static_argnums=1)(x, (2,))
    product = jax.jit(partial(quantized.einsum, "BTD,DF->BTF", activations="int8"))
    made = np.float64(product(x, values, scale))
    half_w, half_x = np.asarray(scale, np.float64) / 2, np.asarray(of_row, np.float64)[..., None] / 2
    bound = np.abs(np.float64(x)).sum(-1)[..., None] * half_w + np.abs(np.float64(w)).sum(0) * half_x
    error = np.abs(made - np.einsum("BTD,DF->BTF", np.asarray(x, np.float64), np.asarray(w, np.float64)))
    assert np.all(error <= bound + 64 * half_w * half_x + 1e-4)
    assert error.max() > 1e-3  # they are rounded


def test_blocks_of_rounded_activations_are_the_same_products(assert_close):
    x, w = drawn(len(BLOCKS), 16, 64), drawn(4, 64, 32, seed=1)
    values, scale = map(np.asarray, rounded(w, (1,), Scheme(8)))
    made = jax.jit(partial(quantized.grouped_matmul, activations="int8"))(x, values, scale, BLOCKS)
    block = jax.jit(partial(quantized.einsum, "bD,DF->bF", activations="int8"))
    for rows, expert, product in zip(x, BLOCKS, np.asarray(made), strict=True):
        assert_close(product, np.asarray(block(rows, values[expert], scale[expert])))


@pytest.mark.parametrize("tokens", [[[7]], [[0, 127, 128], [299, 172, 171]]])
def test_rows_of_a_table_on_its_side_are_those_of_any(tokens, monkeypatch):
    tokens = np.array(tokens)
    packed = rounded(drawn(300, 32), (1,), Scheme(4, 8))
    monkeypatch.setattr(quantized, "platform", lambda: "tpu")
    for taken, table in zip(jax.jit(lambda *it: quantized.rows_of(*it, tokens))(*packed), packed, strict=True):
        np.testing.assert_array_equal(taken, np.asarray(table)[tokens])


@pytest.mark.parametrize(
    ("dispatch", "weights"), [("all", "full"), ("all", "int4:32"), ("blocks", "int8"), ("blocks", "int4:32")]
)
def test_experts_on_many_chips_are_those_of_one(dispatch, weights, assert_close):
    """Also where a group of int4 inputs is on two chips: 48 of them in groups of 16, on two."""
    config = replace(WIDE, weights=weights, experts=replace(WIDE.experts, dispatch=dispatch))
    model, tokens = create(config), draw_tokens(config, 4, 6)
    expected = forward(model, tokens)
    jitted.cache_clear()
    with use_mesh(targets.mesh("host", {"data": 2, "tensor": 2})):
        assert_close(forward(model, tokens), expected)


def test_a_chip_takes_the_assignments_of_its_own_experts_while_there_is_room():
    """Four tokens, two experts each, of which this chip has two (2: of another chip), in blocks of two rows."""
    experts = np.asarray([[0, 2], [1, 0], [2, 2], [0, 1]], np.int32)
    rows = jax.jit(lambda experts: moe.in_blocks(experts, 2, 2, most=5))(experts)
    # Expert 0 has three assignments, so two blocks; expert 1 two, so one: of tokens 0, 1, 3 and 1, 3. 4 is nobody.
    np.testing.assert_array_equal(rows.experts, [0, 0, 1])
    np.testing.assert_array_equal(rows.source, [0, 1, 3, 4, 1, 3])
    np.testing.assert_array_equal(rows.place, [[0, 6], [4, 1], [6, 6], [2, 5]])
    tight = jax.jit(lambda experts: moe.in_blocks(experts, 2, 2, most=3))(experts)  # two blocks: expert 1 finds no room
    np.testing.assert_array_equal(tight.source, [0, 1, 3, 4])
    place = np.asarray(tight.place)
    assert all(place[where] >= 4 for where in ((0, 1), (1, 0), (3, 1)))
    np.testing.assert_array_equal(place[[0, 1, 3], [0, 1, 0]], [0, 1, 2])


def test_room_for_what_a_chip_may_get():
    e = Experts(8, 2, 16, dispatch="blocks", capacity=1.5)
    assert [moe.room(64, e, chips) for chips in (1, 2, 4)] == [128, 96, 48]
    assert moe.room(64, replace(e, capacity=9.0), 4) == 128  # more than all there never are
    assert moe.executed_rows(64, replace(e, dispatch="all"), 4) == 64 * 2
    assert moe.executed_rows(64, replace(e, dispatch="capacity"), 4) == 2 * (64 * 2 * 1.5 // 8)
    assert moe.executed_rows(64, e, 4) == moe.most_blocks(48, 2, moe.block_rows(64, e)) * moe.block_rows(64, e)


@pytest.mark.parametrize("dispatch", ["all", "blocks"])
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_the_bill_of_experts_that_are_shared_out(target, dispatch):
    """What each of four chips reads, computes and sends: of every token its activations and choices to three others,
    and back what its experts say of theirs."""
    ready(target, 4)
    batch, chips = 64, 4
    config = replace(capture.TINY, experts=Experts(8, 2, 128, dispatch=dispatch))
    step = steps.build(config, "decode", batch=batch, context=128, mesh=targets.mesh(target, {"expert": chips}))
    found = bill_of(step, targets.compile(step.lower(), target), target, {"expert": chips})
    assert_sound(found)
    D, L, k = config.width, config.num_layers, 2
    others = (chips - 1) * (batch // chips)
    sent = found.component(
        "moe/dispatch"
    ).link_bytes  # bfloat16, int32, and weights: float32, or rounded before they go
    assert sent in [L * others * (2 * D + k * (4 + each)) for each in (2, 4)]
    # XLA of jax 0.10 makes an all-reduce of so small a reduce-scatter for a TPU, which sends twice the bytes.
    back = L * others * 2 * D
    assert found.component("moe/combine").link_bytes in ([back, 2 * back] if target == "v5e" else [back])
    each = 2 * 3 * D * 128  # FLOPs of a row: gate, up and down
    assert found.component("moe/experts").matmul == L * each * moe.executed_rows(batch, config.experts, chips)
    assert not any("unexplained" in d["reason"] for d in found.differences if d["quantity"] == "matmul_flops")
    own = L * 3 * D * 128 * 2 * 8 // chips
    assert found.component("moe/experts").hbm_read["weights"] == pytest.approx(own, rel=0.01)


@pytest.mark.parametrize("target", ["host", "h200", "v5e"])
def test_int4_in_a_kernel_is_split_over_chips_by_its_letters(target):
    """Each of four chips reads a quarter of the packed values, and what each has summed is summed."""
    config = ModelConfig("m", 1, 256, 4, 4, 512, 512, dtype="bfloat16", weights="int4:64", tied=True)
    ready(target, 4)
    step = steps.build(config, "decode", batch=2, context=64, mesh=targets.mesh(target, {"tensor": 4}))
    found = bill_of(step, targets.compile(step.lower(), target), target, {"tensor": 4})
    assert_sound(found)
    if target == "h200":
        assert needed(found, "read", "weights") == pytest.approx(
            closed_form.weights_bytes(config, config.parameters, 2, 2) / 4, rel=0.1
        )


# --- bills -----------------------------------------------------------------------------------------------------------


@cache
def built(target, config, name, batch, context):
    """The step, and what it is compiled to: as the command does it, options included."""
    ready(target)
    step = steps.build(config, name, batch=batch, context=context, mesh=targets.mesh(target, {}))
    options = step.compiler_options(targets.chip(target).platform)
    return step, targets.compile(step.lower(), target, options=options)


def a_bill(target, config, name, batch, context):
    return bill_of(*built(target, config, name, batch, context), target)


@pytest.mark.parametrize(
    ("target", "name", "batch"),
    [
        ("h200", "mixtral-8x7b", 1),
        ("v5e", "qwen3-30b-a3b", 1),
        ("h200", "qwen3-30b-a3b", 8),
        ("v5e", "qwen3-30b-a3b", 8),
    ],
)
def test_decode_reads_the_experts_that_are_chosen_and_no_other(target, name, batch):
    """Of so few tokens some experts are chosen by nobody: no more is read than there can be asked for, and once."""
    config = replace(ARCHITECTURES[name], num_layers=1)
    found = a_bill(target, config, "decode", batch, 512)
    assert_sound(found)
    asked = closed_form.weights_bytes(config, config.parameters, batch, 2)
    assert needed(found, "read", "weights") == pytest.approx(asked, rel=0.01)
    assert found.tax("slice").hbm_bytes == 0
    if batch == 1:  # the active parameters, of whose embedding one row is looked up
        assert asked == 2 * (config.active_parameters - (config.vocabulary - 1) * config.width)


@pytest.mark.parametrize(
    ("target", "weights", "batch"),
    [("h200", "int8", 8), ("v5e", "int8", 8), ("h200", "int4:128", 1), ("h200", "int4:128", 8), ("v5e", "int4:128", 1)],
)
def test_decode_reads_weights_as_they_are_packed(target, weights, batch):
    config = replace(ARCHITECTURES["llama3-8b"], num_layers=1, weights=weights, cache_dtype="int8")
    found = a_bill(target, config, "decode", batch, 4096)
    assert_sound(found)
    packed = closed_form.weights_bytes(config, config.parameters, batch, 2)
    full = closed_form.weights_bytes(replace(config, weights="full"), config.parameters, batch, 2)
    assert packed < (0.52 if weights == "int8" else 0.29) * full
    assert needed(found, "read", "weights") == pytest.approx(packed, rel=0.02)
    assert found.tax("dequantize").hbm_bytes == 0
    read, _ = closed_form.cache_bytes(config, "decode", batch, 4096, 2)
    assert needed(found, "read", "cache") == pytest.approx(read, rel=0.02)


def copied(bill):
    """Bytes of experts that are sliced out of a stack."""
    rows = (row for row in bill.rows if row.component == "moe/experts" and row.tax == "slice")
    return sum(row.work.hbm_bytes for row in rows)


SPARSE = ModelConfig(
    *("sparse", 2, 256, 4, 2, 512, 512),
    max_context=256,
    attention="xla",
    experts=Experts(8, 2, 128, shared=128, shared_gate=True, dense_layers=1, router="softmax"),
)


@pytest.mark.parametrize(
    ("target", "name", "batch", "changes"),
    [
        (target, *step)
        for target in ("host", "h200", "v5e")
        for step in (
            ("decode", 2, {}),
            ("decode", 8, {"weights": "int4:64"}),
            ("prefill", 2, {"layers": "scan"}),
            ("prefill", 2, {"weights": "int8", "activations": "int8", "layers": "unroll"}),
        )
    ],  # trained: test_same_everywhere.py, of TPUs for v6e
    ids=str,
)
def test_experts_cost_the_closed_form_and_are_read_as_they_lie(target, name, batch, changes):
    config = replace(SPARSE, **changes)
    found = a_bill(target, config, name, batch, 128)
    assert_sound(found)
    assert [one for one in found.differences if one["quantity"] == "matmul_flops"] == []
    about = found.program["experts"]
    assert about["dispatch"] == ("all" if name == "decode" and batch == 8 else "blocks")
    assert about["executed_flops"] == pytest.approx(about["executed_over_routed"] * about["routed_flops"], rel=1e-3)
    if target == "host":
        return
    assert copied(found) <= 1e-3 * found.component("moe/experts").hbm_bytes
    assert found.tax("dequantize").hbm_bytes == 0
    assert about["routed_bytes"] == closed_form.experts_bytes(config, batch * (1 if name == "decode" else 128), 2)
    assert about["read_over_routed"] == pytest.approx(1, rel=0.02)


# On v5e, which takes 40 s for so long a prompt, a smaller one: see the closed form above.
@pytest.mark.parametrize(("target", "name"), [("h200", "mixtral-8x7b"), ("h200", "qwen3-30b-a3b")])
def test_a_prompt_meets_the_experts_once_and_computes_little_more(target, name):
    """A layer of it, at the width and context that the choice of kernels was made for."""
    config = replace(ARCHITECTURES[name], num_layers=1, vocabulary=1024)
    found = a_bill(target, config, "prefill", 1, 4096)
    assert_sound(found)
    assert [one for one in found.differences if one["quantity"] == "matmul_flops"] == []
    about = found.program["experts"]
    assert 1 < about["executed_over_routed"] <= 1.15
    assert about["read_over_routed"] == pytest.approx(1, rel=0.01)
    assert copied(found) <= 1e-3 * found.component("moe/experts").hbm_bytes


@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_a_prompt_may_multiply_integers(target):
    """Every product with packed weights, and none other."""
    config = replace(SPARSE, weights="int8", activations="int8", layers="unroll")
    step, compilation = built(target, config, "prefill", 2, 128)
    module = parse(compilation.text)
    by_type: dict[str, int] = {}
    for computation in module.computations.values():
        for instruction in computation:
            work = flops(instruction)
            if work is not None and work.matmul:
                by_type[work.precision] = by_type.get(work.precision, 0) + work.matmul
    costs = closed_form.matmul_flops(config, "prefill", 2, 128, step.expert_rows)
    whole = ("attention/core", "moe/router", "logits")  # logits of one position a sequence; not worth rounding it
    gate = 2 * 2 * 128 * config.width  # of the shared expert
    assert by_type["int8"] == sum(costs.values()) - sum(costs[name] for name in whole) - gate
    assert sum(by_type.values()) == sum(costs.values())


@pytest.mark.parametrize(
    ("target", "name", "weights"),
    [
        ("v5e", "mixtral-8x7b", "int8"),
        ("h200", "mixtral-8x7b", "int4"),
        ("h200", "qwen3-30b-a3b", "int4"),
        ("v5e", "qwen3-30b-a3b", "int4"),
        ("h200", "gpt-oss-20b", "int4"),
        # The table of tokens is a weight, too, and its inputs are the last axis.
        ("h200", "gemma-2b", "int4"),
        ("v5e", "gemma-2b", "int4"),
    ],
)
def test_decode_reads_packed_experts_and_tables_as_they_are(target, name, weights):
    config = replace(ARCHITECTURES[name], num_layers=1, weights=weights)
    found = a_bill(target, config, "decode", 1, 512)
    assert_sound(found)
    packed = closed_form.weights_bytes(config, config.parameters, 1, 2)
    assert needed(found, "read", "weights") == pytest.approx(packed, rel=0.01)
    moved = sum(row.work.hbm_read.get("weights", 0) + row.work.hbm_write.get("weights", 0)
                for row in found.rows if row.tax not in (None, "padding"))  # fmt: skip
    assert moved <= 0.01 * packed


# --- rounding --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 4]),  # few shapes, for each is compiled
    st.sampled_from([1, 7, 8, 24, 40]),
    st.sampled_from([Scheme(8), Scheme(4, 128), Scheme(4, 8)]),
    st.integers(-20, 20),
    st.integers(0, 2**31),
)
def test_what_is_rounded_is_off_by_half_a_scale_at_most(outputs, inputs, scheme, exponent, seed):
    w = np.float32(np.random.default_rng(seed).normal(size=(inputs, outputs)) * 2.0**exponent)
    values, scale = rounded(w, (0,), scheme)
    back = unrounded(values, scale, (0,), "float32")
    scale = np.asarray(scale)
    each = np.broadcast_to(scale, w.shape) if scale.ndim == 1 else np.repeat(scale, inputs // len(scale), 0)
    assert np.all(np.abs(np.float64(back) - np.float64(w)) <= 0.5 * np.float64(each) * (1 + 1e-5))
    assert np.abs(np.asarray(values, np.int32)).max() <= scheme.largest
