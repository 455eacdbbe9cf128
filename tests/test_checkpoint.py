"""What is written is what is read, quantised or not; what is broken is named."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stepbill.experiments import quantize as quantize_program
from stepbill.model import checkpoint, quantized
from stepbill.model.config import ModelConfig
from stepbill.model.transformer import Transformer, graph_of, split
from test_model import DEEPSEEK, GEMMA2, GPT_OSS, LLAMA, MIXTRAL, create, draw_tokens, stack_layers

CONFIGS = pytest.mark.parametrize("config", [LLAMA, GEMMA2, MIXTRAL, GPT_OSS, DEEPSEEK], ids=lambda c: c.name)


QUANTISED = [(LLAMA, "int8"), (GEMMA2, "int4:8"), (MIXTRAL, "int4:8"), (GPT_OSS, "int8"), (DEEPSEEK, "int4:8")]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda leaf: leaf.dtype, a) == jax.tree.map(lambda leaf: leaf.dtype, b)


@CONFIGS
@pytest.mark.parametrize("written", ["unroll", "scan"])
@pytest.mark.parametrize("read", ["unroll", "scan"])
def test_a_checkpoint_comes_back_bit_for_bit(config, written, read, tmp_path):
    params = split(create(replace(config, layers="unroll")))[1]
    stacked = stack_layers(config, params)
    checkpoint.write(tmp_path, replace(config, layers=written), stacked if written == "scan" else params)
    found, back = checkpoint.read(tmp_path, layers=read)
    assert_same(back, stacked if read == "scan" else params)
    assert replace(found, layers="auto", param_dtype="auto") == replace(config, layers="auto", param_dtype="auto")


@pytest.mark.parametrize(("config", "weights"), QUANTISED, ids=lambda value: getattr(value, "name", value))
def test_a_quantised_checkpoint_comes_back_bit_for_bit(config, weights, tmp_path):
    checkpoint.write(tmp_path / "full", config, split(create(config))[1])
    found, params = checkpoint.read(tmp_path / "full", weights=weights)
    assert found.weights == weights
    shapes = split(nnx.eval_shape(lambda: Transformer(found, nnx.Rngs(0))))[1]
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    checkpoint.write(tmp_path / "small", found, params)
    again, back = checkpoint.read(tmp_path / "small")
    assert_same(back, params)
    assert again.weights == weights
    logits = jax.jit(lambda params: nnx.merge(graph_of(again), params)(draw_tokens(config, 2, 5)))(back)
    assert jnp.isfinite(logits).all()


@partial(jax.jit, static_argnums=(1, 2))
def back_and_forth(leaf, axes, scheme):
    """What is left of a weight that is quantised."""
    return quantized.dequantize(*quantized.quantize(leaf, axes, scheme), axes, leaf.dtype)


@pytest.mark.parametrize("layers", ["unroll", "scan"])
def test_a_quantised_model_says_what_its_dequantised_weights_say(layers, tmp_path, assert_close):
    config = replace(LLAMA, layers=layers)
    params = split(create(replace(config, layers="unroll")))[1]
    checkpoint.write(tmp_path, replace(config, layers="unroll"), params)
    tokens = draw_tokens(config, 2, 7)
    for weights in ("int8", "int4:8"):
        scheme = quantized.Scheme.parse(weights)
        small, few = checkpoint.read(tmp_path, weights=weights, layers=layers)

        def rounded(path, leaf, scheme=scheme):
            contracted = {"wq": (0,), "wk": (0,), "wv": (0,), "wo": (0, 1), "gate": (0,), "up": (0,), "down": (0,)}
            axes = (contracted | {"unembed": (0,)}).get(path[-1].key)
            return leaf if axes is None else back_and_forth(leaf, axes, scheme)

        whole = jax.tree.map_with_path(rounded, params)
        wide = graph_of(replace(config, layers="unroll"))
        expected = jax.jit(lambda p, wide=wide: nnx.merge(wide, p)(tokens))(whole)
        assert_close(jax.jit(lambda p, small=small: nnx.merge(graph_of(small), p)(tokens))(few), expected)


def test_int4_is_half_a_byte_on_disk(tmp_path):
    config = ModelConfig("wide", 2, 128, 4, 2, 256, 64, max_context=32, dtype="float32")
    checkpoint.write(tmp_path / "full", config, split(create(config))[1])
    sizes = quantize_program.quantize(tmp_path / "full", "int4:32", tmp_path / "small")
    matrices = config.parameters - 64 * 128 - 5 * 128  # the embedding and the norms stay as they are
    assert sizes[1] == pytest.approx(matrices * (0.5 + 4 / 32) + (64 + 5) * 128 * 4, abs=8000)  # the header


@pytest.fixture
def folder(tmp_path):
    checkpoint.write(tmp_path, LLAMA, split(create(LLAMA))[1])
    return tmp_path


def test_a_file_that_is_cut_off_says_so(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors: cut off"):
            checkpoint.read(folder)


@pytest.mark.parametrize("content", [b"PK\x03\x04" + bytes(60), (8).to_bytes(8, "little") + b"\x80abcdefg", b"{}" * 40])
def test_a_file_that_is_no_safetensors_says_so(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        checkpoint.read(folder)


def test_a_missing_tensor_is_named(folder):
    other = replace(LLAMA, qk_norm=True)
    (folder / "model.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(ValueError, match="there is no tensor layers/0/attention/k_norm/scale"):
        checkpoint.read(folder)


def test_a_wrong_shape_is_named(folder):
    other = replace(LLAMA, mlp_width=25)
    (folder / "model.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(ValueError, match=r"layers/0/mlp/down has shape \[24, 16\]; it must be \[25, 16\]"):
        checkpoint.read(folder)


def test_what_is_quantised_is_not_quantised_again(folder, tmp_path):
    found, params = checkpoint.read(folder, weights="int8")
    checkpoint.write(tmp_path / "small", found, params)
    with pytest.raises(ValueError, match="quantised already, to int8"):
        checkpoint.read(tmp_path / "small", weights="int4:128")


def test_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        checkpoint.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--out=x --weights=int8", "--checkpoint: it needs a value, a folder"),
        ("--checkpoint=/no/such --out=x --weights=int8", "--checkpoint=/no/such: /no/such: there is no such folder"),
        ("--checkpoint=x --out=x", "--weights=bf16: it must be int8, int4 or int4:GROUP"),
    ],
)
def test_wrong_flags_end_in_one_line(argv, line, capsys):
    assert quantize_program.main(argv.split()) == 2
    assert capsys.readouterr().err == f"stepbill: {line}\n"
