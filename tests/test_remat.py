"""What the backward pass keeps and what it computes again, by the traced program; values are in test_model.py."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxprs_in_params
from stepbill.model import train
from stepbill.model.config import REMAT
from stepbill.model.layers import normal, param, project, wide
from stepbill.model.transformer import Transformer, split
from test_model import CONFIGS, QWEN, create, draw_tokens, jitted, loss_and_gradients


def test_what_is_recomputed_is_what_was_not_kept(monkeypatch, assert_close):
    tokens = draw_tokens(QWEN, 2, 8)
    graph, params = split(create(replace(QWEN, layers="scan")))
    some = loss_and_gradients(graph, params, tokens)
    monkeypatch.setitem(REMAT, "none", jax.checkpoint_policies.everything_saveable)
    jitted.cache_clear()
    assert_close(some, loss_and_gradients(graph, params, tokens))
    jitted.cache_clear()


def equations(jaxpr):
    """Of a jaxpr and of all inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(jaxpr):
    return [equation for equation in equations(jaxpr) if equation.primitive.name == "dot_general"]


@CONFIGS
def test_training_multiplies_no_second_time_and_keeps_no_wide_activation(config):
    config = replace(config, dtype="bfloat16", param_dtype="float32", layers="scan")
    graph, params = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    gradient = jax.grad(lambda params: train.loss(nnx.merge(graph, params), draw_tokens(config, 5, 12)))
    loops = [e for e in jax.make_jaxpr(gradient)(params).jaxpr.eqns if e.primitive.name == "scan"]
    forward, backward = loops[: len(loops) // 2], loops[len(loops) // 2 :][::-1]
    assert len(forward) == len(backward) == len(config.runs)
    for there, back in zip(forward, backward, strict=True):
        assert len(products(back.params["jaxpr"])) == 2 * len(products(there.params["jaxpr"])) > 0
        stack = there.params["length"]  # which is no batch of 5
        kept = [leaf.aval for leaf in there.outvars if leaf.aval.shape[:1] == (stack,)]
        widths = {leaf.shape[-1] for leaf in kept if leaf.dtype == jnp.float32}  # scores, and a router's logits
        assert widths.isdisjoint({config.width, config.mlp_width})
        assert any(leaf.shape[-1] == config.width for leaf in kept)


def test_what_comes_back_to_logits_is_as_narrow_as_the_model(assert_close):
    parameter = param(nnx.Rngs(0), "DV", (16, 13), normal(16), "float32")
    ways = (lambda *of: project(*of, jnp.float32)), wide
    x, slope = (jax.random.normal(jax.random.key(n), (2, 3, width)) for n, width in enumerate((16, 13)))

    def gradient(way, x):
        def product(x, w):
            return way("BTD,DV->BTV", x, nnx.Param(w, axes="DV"))

        return jax.value_and_grad(lambda *of: jnp.sum(product(*of) * slope), (0, 1))(x, parameter[...])

    exact, same = (jax.make_jaxpr(partial(gradient, way))(x) for way in ways)
    assert str(same) == str(exact)
    x = x.astype(jnp.bfloat16)
    (before, slow), (after, fast) = (gradient(way, x) for way in ways)
    assert before == after
    sums = (jnp.abs(slope) @ jnp.abs(parameter[...]).T, jnp.einsum("BTD,BTV->DV", jnp.abs(x), jnp.abs(slope)))
    for mine, theirs, added in zip(fast, slow, sums, strict=True):
        assert mine.dtype == theirs.dtype
        # A cotangent is rounded by at most 2^-8 of itself, and so is either sum.
        mine, theirs = np.float32(mine), np.float32(theirs)
        assert np.all(np.abs(mine - theirs) <= 2**-8 * (added + np.abs(mine) + np.abs(theirs)))
    types = [{v.aval.dtype for v in e.invars} for e in products(jax.make_jaxpr(partial(gradient, wide))(x).jaxpr)]
    assert types and all(found == {jnp.dtype("bfloat16")} for found in types)
