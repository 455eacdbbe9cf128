"""Every architecture has its published number of parameters, and says wrong sizes in one sentence."""

import math
from dataclasses import replace

import jax
import pytest
from flax import nnx
from stepbill.model.architectures import ARCHITECTURES, get
from stepbill.model.axes import AXES
from stepbill.model.transformer import Transformer, logical_axes, split

# As published with the models; ours by hand.
PARAMETERS = {
    "nano": 9_540_480,
    "small": 100_092_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
}


def test_every_architecture_has_a_published_total():
    assert set(PARAMETERS) == set(ARCHITECTURES)


@pytest.mark.parametrize("layers", ["scan", "unroll"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_total_is_exactly_as_published(name, layers):
    config = replace(get(name), layers=layers)
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    _, params = split(model)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert config.parameters == PARAMETERS[name]


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_every_parameter_names_each_of_its_axes(layers):
    config = replace(get("qwen3-0.6b"), layers=layers)
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))
    sizes = {
        **{"L": config.num_layers, "D": config.width, "N": config.num_heads, "K": config.num_kv_heads},
        **{"H": config.head_width, "F": config.mlp_width, "V": config.vocabulary},
    }
    assert set(sizes) <= set(AXES)
    expected = jax.tree.map(lambda letters: tuple(sizes[letter] for letter in letters), logical_axes(model))
    shapes = jax.tree.map(lambda leaf: leaf.shape, split(model)[1])
    assert shapes == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 100, "num_heads": 6, "num_kv_heads": 2, "head_width": 0}, ["width is 100", "num_heads, 6"]),
        ({"num_kv_heads": 4}, ["num_heads is 6", "num_kv_heads, 4"]),
        ({"num_layers": 0}, ["num_layers is 0", "positive"]),
        ({"vocabulary": -5}, ["vocabulary is -5", "positive"]),
        ({"head_width": 63}, ["head_width is 63", "even"]),
        ({"query_block": -1}, ["query_block is -1"]),
        ({"activation": "relu"}, ["activation is 'relu'", "swiglu, geglu"]),
        ({"layers": "loop"}, ["layers is 'loop'", "scan, unroll"]),
        ({"remat": "all"}, ["remat is 'all'", "none, full, dots"]),
        ({"dtype": "int8"}, ["dtype is 'int8'", "bfloat16"]),
    ],
)
def test_a_wrong_config_names_the_field_its_value_and_what_is_right(change, words):
    with pytest.raises(ValueError) as error:
        replace(get("nano"), **change)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match=r"model is 'llama9'.*nano, small, llama2-7b"):
        get("llama9")
