"""Flash attention: values and gradients against `attend`, step by step on the CPU; bills, compiled for absent chips."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import bf16
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from stepbill.experiments import steps
from stepbill.model import flash
from stepbill.model.attention import Sight, attend
from stepbill.model.axes import use_mesh
from stepbill.model.config import Latent, ModelConfig
from stepbill.model.transformer import graph_of, split
from stepbill.profiling import closed_form
from test_model import create, draw_tokens, loss_and_gradients
from test_model_bills import assert_sound, bill, build, expected, program

KERNELS = pytest.mark.parametrize("platform", ["cuda", "tpu"])


# ---- the kernels, interpreted, against the oracle


def draw(B, K, G, T, H, V, dtype="float32", sinks=False):
    """(q, k, v and maybe sinks; what the values are weighted with)."""
    random = np.random.default_rng(0)
    shapes = [(B, K, G, T, H), (B, K, T, H), (B, K, T, V), (B, K, G, T, V), (K, G)]
    *arrays, weights, logits = (random.normal(size=shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return ((*arrays, logits) if sinks else tuple(arrays)), weights


def oracle(q, k, v, *, sinks=None, scale, window=0, causal=True, softcap=0.0):
    positions = jnp.arange(q.shape[3])
    sight = Sight(positions, positions, window, None, fresh=True, causal=causal)
    return attend((q,), (k,), v, sight, scale, softcap, sinks)


def value_and_gradients(attention, arrays, weights, **options):
    """The values, and the gradients of all arrays of their sum times `weights`."""

    def weighted(*arrays):
        sinks = arrays[3] if len(arrays) == 4 else None
        out = attention(*arrays[:3], sinks=sinks, scale=arrays[0].shape[-1] ** -0.5, **options)
        return jnp.sum(out * weights, dtype=jnp.float32), out

    (_, out), gradients = jax.jit(jax.value_and_grad(weighted, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, gradients


@cache
def known(*shape, dtype="float32", sinks=False, **options):
    """What is drawn, the values of it by the oracle, and the gradients: once for all platforms."""
    arrays, weights = draw(*shape, dtype=dtype, sinks=sinks)
    return arrays, weights, value_and_gradients(oracle, arrays, weights, **options)


CASES = {
    "groups, no whole number of blocks": ((2, 2, 3, 150, 32, 32), {}),
    "five blocks": ((1, 1, 1, 600, 16, 16), {}),
    "a window, soft-capped, with sinks": ((1, 1, 3, 150, 16, 16), {"window": 20, "softcap": 2.0, "sinks": True}),
    "a window of more than a block": ((1, 1, 1, 600, 16, 16), {"window": 200}),
    "latent widths": ((1, 2, 1, 40, 48, 32), {}),
    "two positions": ((2, 1, 2, 2, 16, 16), {}),
    "both ways, no whole number of blocks": ((1, 2, 2, 150, 24, 20), {"causal": False}),
    "both ways, soft-capped": ((1, 1, 1, 128, 16, 16), {"causal": False, "softcap": 2.0}),
}
HALF = ("groups, no whole number of blocks", "a window, soft-capped, with sinks")


@pytest.mark.parametrize(
    ("platform", "case", "dtype"),
    [(platform, case, "float32") for platform in ("cuda", "tpu") for case in CASES]
    + [("cuda", HALF[0], "bfloat16"), ("tpu", HALF[1], "bfloat16")],
)
def test_values_and_gradients_are_the_oracles(platform, case, dtype, assert_close):
    shape, options = CASES[case]
    arrays, weights, expected = known(*shape, dtype=dtype, **options)
    options = {name: value for name, value in options.items() if name != "sinks"}
    actual = value_and_gradients(flash.flash, arrays, weights, platform=platform, interpret=True, **options)
    assert actual[0].dtype == dtype
    assert_close(actual, expected)


@KERNELS
@pytest.mark.parametrize(("K", "G"), [(4, 1), (2, 4), (3, 1)], ids=["by K", "by G", "neither"])
def test_chips_of_a_mesh_share_heads_and_batch(platform, K, G, assert_close):
    arrays, weights, expected = known(2, K, G, 40, 16, 16, sinks=True)
    with use_mesh(Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))):
        actual = value_and_gradients(flash.flash, arrays, weights, platform=platform, interpret=True)
    assert_close(actual, expected)


LLAMA = ModelConfig("llama", 2, 32, 4, 2, 24, 13, head_width=16, max_context=64, dtype="float32", query_block=0)
MODELS = {
    "llama": LLAMA,
    "gpt-oss": replace(LLAMA, window=4, global_every=2, sinks=True, attention_softcap=2.0),
    "deepseek": replace(LLAMA, num_kv_heads=4, latent=Latent(6, 16, 16, 7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_with_it_as_without(name, assert_close):
    """Scanned, with rematerialisation."""
    config = replace(MODELS[name], layers="scan", remat="full")
    _, params = split(create(config))
    tokens = draw_tokens(config, 2, 20)
    with_it, without = (
        loss_and_gradients(graph_of(replace(config, attention=way)), params, tokens) for way in ("flash", "xla")
    )
    assert_close(with_it, without)


# ---- when it is chosen


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_is_chosen_where_there_is_a_kernel(platform):
    assert flash.chosen(LLAMA, 20, platform) == "flash"
    assert flash.chosen(LLAMA, 20, "cpu") == "xla"
    assert flash.chosen(LLAMA, 1, platform) == "xla"
    assert flash.chosen(replace(LLAMA, attention="xla"), 20, platform) == "xla"
    assert flash.chosen(replace(LLAMA, dtype="float64"), 20, platform) == "xla"


@pytest.mark.parametrize(
    ("changes", "platform", "right"),
    [
        ({"dtype": "float64"}, "cuda", "its kernels take bfloat16, float16, float32, not float64"),
        ({"dtype": "float16"}, "tpu", "its kernels take bfloat16, float32, not float16"),
        ({"head_width": 512}, "cuda", "its kernels take keys with values of at most 2048 bytes, not 4096"),
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_xlas_or_an_error(changes, platform, right):
    config = replace(LLAMA, num_kv_heads=4, **changes)
    assert flash.chosen(config, 20, platform) == "xla"
    with pytest.raises(ValueError, match=f"attention is flash; {right}: it must be xla or auto"):
        flash.chosen(replace(config, attention="flash"), 20, platform)


@pytest.mark.parametrize(
    ("changes", "platform", "right"),
    [
        ({}, "cpu", "cuDNN is for NVIDIA's GPUs"),
        ({}, "tpu", "cuDNN is for NVIDIA's GPUs"),
        ({"dtype": "float32"}, "cuda", "cuDNN takes bfloat16 and float16, not float32"),
        ({"head_width": 256}, "cuda", "cuDNN takes keys and values of one width, a multiple of 8 and at most 128"),
        ({"attention_softcap": 50.0}, "cuda", "cuDNN is asked for no windows, sinks or soft-caps here"),
        ({"sinks": True}, "cuda", "cuDNN is asked for no windows, sinks or soft-caps here"),
        ({"window": 8}, "cuda", "cuDNN is asked for no windows, sinks or soft-caps here"),
    ],
    ids=str,
)
def test_cudnn_takes_only_what_it_is_asked_for(changes, platform, right):
    config = replace(LLAMA, **({"dtype": "bfloat16", "attention": "cudnn"} | changes))
    assert flash.chosen(replace(LLAMA, dtype="bfloat16", attention="cudnn"), 20, "cuda") == "cudnn"
    with pytest.raises(ValueError, match=f"attention is cudnn; {right}: it must be xla or auto"):
        flash.chosen(config, 20, platform)


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_given_what_it_wants_and_gives_what_is_wanted(causal, monkeypatch, assert_close):
    """By the same function of jax, of which XLA can do the computing: the heads, their order, the gradients."""
    asked, by = [], jax.nn.dot_product_attention

    def instead(*arrays, implementation, **options):
        asked.append(implementation)
        return by(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    arrays, weights = draw(2, 2, 3, 20, 16, 16)

    def by_cudnn(*arrays, sinks, **options):
        assert sinks is None
        return flash.by_cudnn(*arrays, **options)

    ours, theirs = (value_and_gradients(one, arrays, weights, causal=causal) for one in (by_cudnn, oracle))
    assert_close(ours, theirs)
    assert set(asked) == {"cudnn"}


def test_where_cudnn_is_not_installed_the_bill_says_how_to_get_it(stepbill, monkeypatch):
    def missing(*arrays, **options):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    flags = "--model=llama3-8b", "--num_layers=1", "--step=prefill", "--context=128", "--attention=cudnn"
    status, _, error = stepbill(*flags, "--target=h200")
    assert status == 2 and "--attention=cudnn: cuDNN not found. It is in pip's nvidia-cudnn-cu13" in error


def test_a_kernel_that_is_asked_for_is_one_of_the_target(stepbill):
    flags = "--model=nano", "--step=prefill", "--context=128", "--target=h200", "--attention=flash", "--format=json"
    status, out, error = stepbill(*flags)
    assert status == 0, error
    assert json.loads(out)["program"]["attention"] == "flash"


@pytest.mark.parametrize("step", ["decode", "generate"])
def test_a_step_that_reads_a_cache_says_xla(step):
    assert steps.build(replace(LLAMA, attention="flash"), step, batch=1, context=20, count=4).config.attention == "xla"


# ---- what it executes


@pytest.mark.parametrize("length", [1, 7, 16, 50])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 60])
@pytest.mark.parametrize("block", [(1, 1), (4, 4), (8, 4), (4, 16)], ids=str)
def test_blocks_that_are_met_are_those_in_which_a_query_sees_a_key(length, window, block):
    queries, keys = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = (keys <= queries) & (keys > queries - (window or length))
    met = {(q // block[0], k // block[1]) for q, k in np.argwhere(seen)}
    pairs = len(met) * block[0] * block[1]
    blocks = flash.Blocks(*block)
    assert blocks.met(length, window) == pairs
    for first in range(0, length, block[0]):
        assert blocks.keys_met(first, length, window) == block[1] * sum(q == first // block[0] for q, _ in met)
        assert blocks.keys_met(first, length, 0, causal=False) == -(-length // block[1]) * block[1]
    for first in range(0, length, block[1]):
        assert blocks.queries_met(first, length, window) == block[0] * sum(k == first // block[1] for _, k in met)
        assert blocks.queries_met(first, length, 0, causal=False) == -(-length // block[0]) * block[0]
    whole = -(-length // block[0]) * -(-length // block[1]) * block[0] * block[1]
    assert blocks.met(length, 0, causal=False) == whole
    kinds = replace(LLAMA, num_layers=1, window=window, attention="flash", max_context=length)
    flops = closed_form.matmul_flops(kinds, "prefill", 1, length, blocks=closed_form.Blocks(block))
    assert flops["attention/core"] == 4 * LLAMA.num_heads * LLAMA.head_width * pairs


# No length of whole blocks on either chip; of several; and scores of far more elements than all else.
LENGTH = 1088
SMALL = ModelConfig("small", 2, 64, 2, 1, 128, 256, head_width=32, max_context=LENGTH)
BILLED = {
    "prefill": ("prefill", {"window": 300, "global_every": 2, "sinks": True, "attention_softcap": 20.0}),
    "prefill, latent": ("prefill", {"num_kv_heads": 2, "latent": Latent(32, 16, 48)}),
    "train": ("train", {"window": 300, "global_every": 2, "sinks": True, "attention_softcap": 20.0}),
    "train, heads that are filled up": ("train", {"head_width": 24}),
}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name in BILLED
        for target in ("h200", "v5e")
        if (name, target) != ("train, heads that are filled up", "v5e")
    ],
)
def test_its_bill(name, target):
    """FLOPs to the last one, and bytes of what goes in and comes out; scores are nowhere."""
    step, changes = BILLED[name]
    config = replace(SMALL, **changes)
    layers = "scan" if step == "train" else "unroll"
    found = bill(target, step, config=config, sizes=(1, LENGTH))
    assert_sound(found)
    built = build(target, step, {}, config, (1, LENGTH))
    assert built.config.attention == "flash"
    assert found.component("attention/core").matmul == expected(target, step, config, (1, LENGTH))["attention/core"]
    H, V = flash.widths(config)
    heads, window, padded = config.num_heads, config.window or LENGTH, {"h200": LENGTH, "v5e": 1152}[target]
    seen = sum(min(t + 1, window if kind.local else LENGTH) for kind in config.kinds for t in range(LENGTH))
    wanted, passes = 2 * heads * seen * (H + V), 1
    if step == "train":
        filled = V + -V % flash.WIDTHS.get({"h200": "cuda"}.get(target, ""), 1)
        wanted += 2 * heads * (seen * (4 * H + 3 * V) + config.num_layers * padded * filled)
        passes = 3
    core = found.component("attention/core")
    assert core.matmul - found.tax("masked").matmul == pytest.approx(wanted, abs=100)

    scores = heads * LENGTH * LENGTH
    module = program(target, step, (), replace(config, layers=layers), (1, LENGTH))
    named = [i for c in module.computations.values() for i in c if "attention/core" in i.op_name]
    assert named and max(leaf.elements for i in named for leaf in i.shape.leaves) < scores / 4
    assert core.hbm_bytes < passes * config.num_layers * 4 * scores / 4
    if (target, name) == ("h200", "prefill"):
        elements = LENGTH * (H + V) * (heads + config.num_kv_heads)
        assert core.requested_bytes == pytest.approx(config.num_layers * elements * 2, rel=0.01)


@pytest.mark.parametrize(
    ("mask", "sides", "met"),
    [
        (masks.FullMask((1024, 1024)), (256, 256), 1024 * 1024),
        (masks.CausalMask((1024, 1024)), (256, 128), 256 * (256 + 512 + 768 + 1024)),
        (masks.CausalMask((1024, 1024)), (128, 512), 4 * 128 * (512 + 1024)),
        (masks.LocalMask((1024, 1024), (200, 0), 0), (256, 256), 256 * 256 * (1 + 3 * 2)),
    ],
    ids=["full", "causal, wide", "causal, high", "local"],
)
def test_splash_attention_of_others_is_billed_by_the_blocks_it_meets(mask, sides, met):
    """As a program calls it that knows nothing of the model here: two products forward, seven backward."""
    heads, H = 2, 64
    kernel: Any = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(*sides, None, *sides, None, *sides),  # pyright: ignore[reportCallIssue]
    )

    def gradients(q, k, v):
        return jax.grad(lambda *arrays: jnp.sum(kernel(*arrays), dtype=jnp.float32), (0, 1, 2))(q, k, v)

    found = compiled.bill("v5e", gradients, bf16(heads, 1024, H), bf16(1, 1024, H), bf16(1, 1024, H))
    assert not found.unknown
    assert found.total.matmul == heads * 2 * met * 9 * H
