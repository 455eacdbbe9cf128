"""Every architecture has its published number of parameters, and says wrong sizes in one sentence."""

import json
import math
from dataclasses import replace

import jax
import pytest
from flax import nnx
from stepbill.model.architectures import ARCHITECTURES, get
from stepbill.model.axes import AXES
from stepbill.model.config import Experts, Latent, ModelConfig, RopeScaling
from stepbill.model.transformer import Transformer, logical_axes, split

# As published with the models; ours by hand.
PARAMETERS = {
    "nano": 9_540_480,
    "small": 100_092_672,
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_630_071_296,
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-9b": 9_241_705_984,
    "gemma3-4b": 3_880_099_328,
    "gemma3-27b": 27_009_002_240,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
# Parameters that one token meets, where that is not all of them. The published totals of gpt-oss leave out the input
# embedding, of which a token meets one row; those of the others count it.
ACTIVE = {
    "mixtral-8x7b": 12_879_925_248,
    "mixtral-8x22b": 39_161_468_928,
    "qwen3-30b-a3b": 3_353_032_704,
    "qwen3-235b-a22b": 22_190_763_520,
    "deepseek-v3": 37_552_297_472,
    "gpt-oss-20b": 3_608_307_264 + 201_088 * 2880,
    "gpt-oss-120b": 5_132_849_472 + 201_088 * 2880,
}


def abstract(config):
    return nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0)))


def test_every_architecture_has_a_published_total():
    assert set(PARAMETERS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_totals_are_exactly_as_published(name):
    config = replace(get(name), layers="scan")
    _, params = split(abstract(config))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert config.parameters == PARAMETERS[name]
    assert config.active_parameters == ACTIVE.get(name, PARAMETERS[name])


def test_unrolled_and_scanned_models_have_the_same_parameters():
    for name in ("qwen3-0.6b", "gemma3-4b", "gpt-oss-20b"):
        _, params = split(abstract(replace(get(name), layers="unroll")))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == PARAMETERS[name]


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_every_parameter_names_each_of_its_axes(layers):
    config = replace(get("qwen3-30b-a3b"), layers=layers, num_layers=3)
    model = abstract(config)
    sizes = {
        **{"L": config.num_layers, "D": config.width, "N": config.num_heads, "K": config.num_kv_heads},
        **{"H": config.head_width, "F": config.experts.width, "V": config.vocabulary, "E": config.experts.count},
        "R": config.experts.count,
    }
    assert set(sizes) <= set(AXES)
    expected = jax.tree.map(lambda letters: tuple(sizes[letter] for letter in letters), logical_axes(model))
    shapes = jax.tree.map(lambda leaf: leaf.shape, split(model)[1])
    assert shapes == expected


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("llama3-8b", [(32, 1)]),
        ("gemma2-9b", [(21, 2)]),
        ("gemma3-4b", [(5, 6), (1, 4)]),  # 34 layers: five local, one global, and four local at the end
        ("deepseek-v3", [(3, 1), (58, 1)]),
        ("gpt-oss-20b", [(12, 2)]),
    ],
)
def test_layers_are_repetitions_of_a_pattern(name, runs):
    config = get(name)
    assert [(run.times, len(run.kinds)) for run in config.runs] == runs
    flat = [kind for run in config.runs for _ in range(run.times) for kind in run.kinds]
    assert tuple(flat) == config.kinds


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
        ({"weights": "int5"}, ["weights is 'int5'", "full, int8, int4 or int4:GROUP"]),
        ({"window": -1}, ["window is -1"]),
        ({"norm": "batch"}, ["norm is 'batch'", "rms, layer"]),
        ({"latent": Latent(4, 3, 4)}, ["latent.rope_width is 3", "even"]),
        ({"latent": Latent(4, 4, 4), "window": 8}, ["latent", "window"]),
        ({"experts": Experts(4, 2, 8, dense_layers=6)}, ["experts.dense_layers is 6", "below num_layers"]),
    ],
)
def test_a_wrong_config_names_the_field_its_value_and_what_is_right(change, words):
    with pytest.raises(ValueError) as error:
        replace(get("nano"), **change)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: Experts(4, 5, 8), ["experts.active is 5", "experts.count, 4"]),
        (lambda: Experts(0, 1, 8), ["experts.count is 0", "positive"]),
        (lambda: Experts(8, 2, 8, groups=3), ["experts.groups is 3", "divide experts.count, 8"]),
        (lambda: Experts(8, 2, 8, router="coin"), ["experts.router is 'coin'", "softmax, topk, sigmoid"]),
        (lambda: RopeScaling("ntk", 2.0), ["rope_scaling.kind is 'ntk'", "linear, llama3, yarn"]),
        (lambda: Latent(0, 4, 4), ["latent.kv_rank is 0", "positive"]),
    ],
)
def test_a_wrong_part_names_its_field(part, words):
    with pytest.raises(ValueError) as error:
        part()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["nano", "gemma3-27b", "deepseek-v3", "gpt-oss-120b"])
def test_a_config_comes_back_from_json(name):
    assert ModelConfig.from_json(json.loads(json.dumps(get(name).to_json()))) == get(name)


def test_an_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match=r"model is 'llama9'.*nano, small, gpt2-small"):
        get("llama9")
