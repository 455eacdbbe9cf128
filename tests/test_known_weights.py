"""Weights that every framework makes again: equal bit for bit, spread as they should be, laid out as the step wants."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepbill.experiments import known_weights, steps
from stepbill.model import architectures

TINY = replace(
    architectures.get("llama3-8b"),
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    mlp_width=128,
    vocabulary=128,
)


def built(step="decode", **fields):
    step = steps.build(replace(TINY, **fields), step, batch=2, context=32)
    return step, dict(zip(step.names, known_weights.arguments(step), strict=True))


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the test extra has torch for Python 3.11 alone")
@pytest.mark.parametrize("bits", [4, 8])
def test_torch_makes_the_same_numbers(bits, monkeypatch):
    monkeypatch.setattr(known_weights, "CHUNK", 1000)
    # So far on that what is hashed wraps at 32 bits within the array.
    first = 2**32 - known_weights.salt("mlp/up") - 1500
    ours = known_weights.of_jax("mlp/up", first, (40, 8, 16), bits)
    theirs = known_weights.of_torch("mlp/up", first, (40, 8, 16), bits, "cpu")
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_are_spread_evenly(bits):
    numbers = np.asarray(known_weights.of_jax("wq", 0, (1 << 16,), bits))
    counts = np.bincount(numbers + 2 ** (bits - 1), minlength=2**bits)
    expected = len(numbers) / 2**bits
    assert len(counts) == 2**bits and np.all(np.abs(counts - expected) < 6 * expected**0.5)
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.02


def test_whole_numbers_and_their_scale_are_the_weights():
    """bfloat16 holds exactly what int8 times its scale is."""
    _, full = built()
    _, int8 = built(weights="int8")
    whole, stored = full["params"]["layers"][1]["mlp"]["up"], int8["params"]["layers"][1]["mlp"]["up"]
    assert stored["values"].dtype == jnp.int8
    np.testing.assert_array_equal(np.float32(stored["values"]) * np.float32(stored["scale"]), np.float32(whole))


def test_stacked_layers_are_the_same():
    """Training stacks its layers: row 1 is what layer 1 of the unrolled model has."""
    _, unrolled = built()
    _, stacked = built("train")
    for name in ("wq", "wo"):
        np.testing.assert_array_equal(
            np.asarray(stacked["params"]["layers"][0][0]["attention"][name][1]),
            np.float32(unrolled["params"]["layers"][1]["attention"][name]),
        )


@pytest.mark.parametrize("fields", [{}, {"weights": "int8"}, {"weights": "int4:32", "cache_dtype": "int8"}])
def test_they_are_what_the_step_takes_and_it_runs(fields):
    step, made = built(**fields)
    for name, abstract in zip(step.names, step.arguments, strict=True):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), made[name]) == jax.tree.map(
            lambda a: (a.shape, a.dtype), abstract
        )
    logits, cache = step.jitted(*made.values())
    assert int(cache.position) == step.context and np.all(np.isfinite(np.asarray(logits)))
