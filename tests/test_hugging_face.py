"""Checkpoints of every family that the `transformers` library writes give its logits here."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stepbill.model import checkpoint, decode, hugging_face
from stepbill.model.architectures import ARCHITECTURES, get
from stepbill.model.cache import KVCache
from stepbill.model.transformer import graph_of

SMALL = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 16, "rope_theta": 500.0},
}
# family -> (class, config): small, with everything on that the family has, and a window shorter than the sequence.
FAMILIES = {
    "gpt2": ("GPT2", {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama", {**SMALL, "rope_parameters": LLAMA3}),
    "llama with biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 5}),
    "mixtral": ("Mixtral", {**SMALL, "num_local_experts": 5, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**SMALL, "tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**SMALL, "num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**SMALL, "num_experts": 6, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    "gemma": ("Gemma", {**SMALL, "head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2",
        {**SMALL, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
         "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": (
        "Gemma3",
        {**SMALL, "num_hidden_layers": 7, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 24,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
             "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
         }},
    ),
    "gpt_oss": (
        "GptOss",
        {**SMALL, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
         "rope_parameters": {**YARN, "truncate": False}},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8,
         "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4,
         "topk_group": 2, "moe_intermediate_size": 16, "n_shared_experts": 2, "first_k_dense_replace": 1,
         "routed_scaling_factor": 2.5, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
}  # fmt: skip
LENGTH = 14


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """family -> (a folder with its checkpoint, tokens, its logits), made once."""
    if sys.version_info >= (3, 12):
        pytest.skip("the test extra has transformers for Python 3.11 alone")
    import torch
    import transformers

    made = {}

    def of(family):
        if family not in made:
            name, fields = FAMILIES[family]
            fields = dict(fields) | {"attn_implementation": "eager", "use_cache": False}
            kind = name + ("Text" if name == "Gemma3" else "")
            config = getattr(transformers, f"{kind}Config")(**fields)
            head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}{head}")(config).eval()
            with torch.no_grad():
                for parameter in [*model.parameters(), *(b for n, b in model.named_buffers() if "correction" in n)]:
                    noise = torch.randn_like(parameter) * 0.3
                    parameter.copy_(parameter + noise if parameter.ndim < 2 else noise)
            folder = tmp_path_factory.mktemp(family.replace(" ", "-"))
            model.save_pretrained(folder)
            tokens = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                made[family] = folder, jnp.asarray(tokens.numpy(), jnp.int32), model(tokens).logits.numpy()
        return made[family]

    return of


@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, layers, saved):
    folder, tokens, expected = saved(family)
    config, params = checkpoint.read(folder, dtype="float32", layers=layers)
    logits = jax.jit(lambda params: nnx.merge(graph_of(config), params)(tokens))(params)
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_give_them_too(family, saved):
    folder, tokens, expected = saved(family)
    config, params = checkpoint.read(folder, dtype="float32")
    model = nnx.merge(graph_of(config), params)
    logits, cache = jax.jit(partial(decode.prefill, model))(tokens[:, :7], KVCache.init(config, 2, LENGTH))
    np.testing.assert_allclose(logits, expected[:, 6], atol=1e-4)
    step = jax.jit(partial(decode.decode_step, model))
    for t in range(7, LENGTH):
        logits, cache = step(tokens[:, t], cache)
        np.testing.assert_allclose(logits, expected[:, t], atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_checkpoint_in_several_files_is_the_same(family, saved, tmp_path):
    folder, _, _ = saved(family)
    import transformers

    name, _ = FAMILIES[family]
    whole = getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, several = (checkpoint.read(place, dtype="float32")[1] for place in (folder, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, several)


# What the published files of some architectures say.
PUBLISHED = {
    "llama3-405b": {
        **{"model_type": "llama", "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126},
        **{"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-05},
        **{"max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu"},
        "rope_scaling": {
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"},
            "original_max_position_embeddings": 8192,
        },
    },
    "gemma2-9b": {
        **{"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000},
        **{"rms_norm_eps": 1e-06, "max_position_embeddings": 8192, "rope_theta": 10000.0, "sliding_window": 4096},
        **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
        **{"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
    },
    "mixtral-8x7b": {
        **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "rms_norm_eps": 1e-05},
        **{"max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None, "hidden_act": "silu"},
        **{"num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    },
    "deepseek-v3": {
        **{"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "rms_norm_eps": 1e-06},
        **{"max_position_embeddings": 163840, "rope_theta": 10000, "hidden_act": "silu", "attention_bias": False},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048},
        **{"n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4},
        **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "tie_word_embeddings": False},
        "rope_scaling": {
            **{"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
            "original_max_position_embeddings": 4096,
        },
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088},
        **{"rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "rope_theta": 150000, "attention_bias": True},
        **{"sliding_window": 128, "num_local_experts": 32, "num_experts_per_tok": 4, "tie_word_embeddings": False},
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_scaling": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_the_architecture_of_that_name(name):
    assert hugging_face.config_of(PUBLISHED[name], name) == ARCHITECTURES[name]


def test_a_config_is_found_by_its_path(tmp_path):
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(PUBLISHED["gemma2-9b"]))
    for place in (path, path.parent):
        assert get(str(place)).parameters == ARCHITECTURES["gemma2-9b"].parameters
    assert get(str(path)).name == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "rwkv"}, ["model_type is 'rwkv'", "gpt2, llama"]),
        ({"hidden_act": "relu"}, ["hidden_act is 'relu'", "'silu'"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, ["rope_type is 'longrope'", "yarn"]),
        ({"num_key_value_heads": 5}, ["num_heads is 32", "num_kv_heads, 5"]),
        (
            {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
            ["layer_types is", "every n-th"],
        ),
    ],
)
def test_a_config_that_is_not_known_says_what_is_wrong(change, words):
    with pytest.raises(ValueError) as error:
        hugging_face.config_of({**PUBLISHED["mixtral-8x7b"], **change})
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_path_without_a_config_says_so(tmp_path):
    with pytest.raises(ValueError, match="it must be a readable config"):
        get(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="it must be JSON"):
        get(str(tmp_path))
