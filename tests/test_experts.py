"""Experts and few bits: kernels in interpret mode, every dispatch, rounding; and what their bills say."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ready
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.experiments import steps
from stepbill.experiments.bill import bill_of
from stepbill.model import kernels, moe
from stepbill.model.architectures import ARCHITECTURES
from stepbill.model.kernels import Machine, Matrices
from stepbill.model.quantized import Scheme, dequantize, quantize
from stepbill.model.transformer import graph_of, split
from stepbill.profiling import closed_form, targets
from test_model import MIXTRAL, create, draw_tokens, forward, loss_and_gradients
from test_model_bills import assert_sound, needed

BLOCKS = jnp.array([0, 0, 2, 3, 3], jnp.int32)  # of which expert each block of rows is; nobody chose expert 1
MACHINES = pytest.mark.parametrize("platform", ["cuda", "tpu"])


def drawn(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def by_hand(x, w, across=False):
    """Each block times its matrix, in float64."""
    letters = "bD,FD->bF" if across else "bD,DF->bF"
    blocks = zip(np.asarray(x, np.float64), BLOCKS, strict=True)
    return np.stack([np.einsum(letters, rows, np.float64(w[expert])) for rows, expert in blocks])


@MACHINES
@pytest.mark.parametrize("across", [False, True], ids=["in-out", "out-in"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_multiplies_each_block_with_its_matrix(platform, across, rows, dtype, assert_close):
    x, w = drawn(len(BLOCKS), rows, 128, dtype=dtype), drawn(4, 128, 256, seed=1, dtype=dtype)
    w = jnp.swapaxes(w, 1, 2) if across else w
    on = Machine(platform, interpret=True)
    made = kernels.grouped_matmul(x, Matrices(w, across=across), BLOCKS, on=on)
    assert_close(made, by_hand(x, w, across))


@MACHINES
def test_a_kernels_gradients_are_the_loops(platform, assert_close):
    x, w, dy = drawn(len(BLOCKS), 16, 128), drawn(4, 128, 128, seed=1), drawn(len(BLOCKS), 16, 128, seed=2)

    def gradients(on):
        def weighed(x, w):
            return jnp.sum(kernels.grouped_matmul(x, Matrices(w), BLOCKS, on=on) * dy)

        return jax.grad(weighed, (0, 1))(x, w)

    found = gradients(Machine(platform, interpret=True))
    assert_close(found, gradients(Machine("cpu")))
    assert not found[1][1].any()  # nobody chose it


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dispatch", ["blocks", "capacity"])
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
    norm = max(float(jnp.linalg.norm(leaf.ravel())) for leaf in jax.tree.leaves(expected[1]))
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert float(jnp.linalg.norm((a - e).ravel())) <= (1e-5 if dtype == "float32" else 2.0**-5) * norm


def test_what_is_over_capacity_is_dropped():
    config = replace(MIXTRAL, experts=replace(MIXTRAL.experts, dispatch="capacity", capacity=0.1))
    tokens, every = draw_tokens(config, 2, 12), replace(config, experts=replace(config.experts, dispatch="all"))
    _, params = split(create(config))
    from flax import nnx

    dropped, whole = (forward(nnx.merge(graph_of(one), params), tokens) for one in (config, every))
    assert np.isfinite(dropped).all() and not np.allclose(dropped, whole)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_blocks_waste_little_of_a_prompt(name):
    experts = ARCHITECTURES[name].experts
    assert moe.chosen_dispatch(4096, experts) == "blocks"
    assert moe.executed_rows(4096, experts) <= 1.15 * 4096 * experts.active


# --- bills -----------------------------------------------------------------------------------------------------------


def few_layers(name, **changes):
    return replace(ARCHITECTURES[name], num_layers=2, **changes)


def decode_bill(target, config, batch, context):
    """As the command compiles it, options included."""
    ready(target)
    step = steps.build(config, "decode", batch=batch, context=context, mesh=targets.mesh(target, {}))
    options = step.compiler_options(targets.chip(target).platform)
    return bill_of(step, targets.compile(step.lower(), target, options=options), target)


@pytest.mark.parametrize("target", ["h200", "v5e"])
@pytest.mark.parametrize(("name", "batch"), [("mixtral-8x7b", 1), ("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 8)])
def test_decode_reads_the_experts_that_are_chosen_and_no_other(target, name, batch):
    """Of so few tokens some experts are chosen by nobody: no more is read than there can be asked for, and once."""
    config = few_layers(name)
    found = decode_bill(target, config, batch, 512)
    assert_sound(found)
    asked = closed_form.weights_bytes(config, config.parameters, batch, 2)
    assert needed(found, "read", "weights") == pytest.approx(asked, rel=0.01)
    assert found.tax("slice").hbm_bytes == 0
    if batch == 1:  # the active parameters, of whose embedding one row is looked up
        assert asked == 2 * (config.active_parameters - (config.vocabulary - 1) * config.width)


@pytest.mark.parametrize("target", ["h200", "v5e"])
@pytest.mark.parametrize("weights", ["int8", "int4:128"])
@pytest.mark.parametrize("batch", [1, 8])
def test_decode_reads_weights_as_they_are_packed(target, weights, batch):
    config = few_layers("llama3-8b", weights=weights, cache_dtype="int8")
    found = decode_bill(target, config, batch, 4096)
    assert_sound(found)
    packed = closed_form.weights_bytes(config, config.parameters, batch, 2)
    full = closed_form.weights_bytes(replace(config, weights="full"), config.parameters, batch, 2)
    assert packed < (0.52 if weights == "int8" else 0.29) * full
    assert needed(found, "read", "weights") == pytest.approx(packed, rel=0.02)
    assert found.tax("dequantize").hbm_bytes == 0
    read, _ = closed_form.cache_bytes(config, "decode", batch, 4096, 2)
    assert needed(found, "read", "cache") == pytest.approx(read, rel=0.02)


# --- rounding --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([Scheme(8), Scheme(4, 128), Scheme(4, 8)]),
    st.integers(-20, 20),
    st.integers(0, 2**31),
)
def test_what_is_rounded_is_off_by_half_a_scale_at_most(outputs, inputs, scheme, exponent, seed):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(inputs, outputs)) * 2.0**exponent, jnp.float32)
    values, scale = quantize(w, (0,), scheme)
    back = dequantize(values, scale, (0,), "float32")
    each = jnp.broadcast_to(scale, w.shape) if scale.ndim == 1 else jnp.repeat(scale, inputs // len(scale), 0)
    assert np.all(np.abs(np.float64(back) - np.float64(w)) <= 0.5 * np.float64(each) * (1 + 1e-5))
    assert np.abs(np.asarray(values, np.int32)).max() <= scheme.largest
