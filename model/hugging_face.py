"""Hugging Face checkpoints: `config.json` -> ModelConfig, and which of their tensors each of our parameters is.

Families differ in a few names and in how a tensor is cut. A `Tensor` says, for one parameter of ours, what it is
called there and in which order its axes lie, in the letters of `axes.py`; the rest follows from the parameter's own
letters and shape.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import Experts, Latent, ModelConfig, RopeScaling

# --- config.json -----------------------------------------------------------------------------------------------------

_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "gelu"}
# By model type: what its published files leave out, and what is so in all of them.
_GEMMA = {"tied": True, "scale_embedding": True, "norm_offset": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"tied": True, "norm": "layer", "positions": "learned"},
        **{"qkv_bias": True, "output_bias": True, "mlp_bias": True},
    },
    "llama": {},
    "mistral": {},
    "mixtral": {},
    "qwen2": {"qkv_bias": True},
    "qwen2_moe": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True},
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "post_norms": True},
    "gemma3_text": {**_GEMMA, "post_norms": True, "qk_norm": True},
    "gpt_oss": {"sinks": True, "activation": "swiglu_clamped", "mlp_bias": True},
    "deepseek_v3": {},
}


def read_config(path: Path) -> ModelConfig:
    """The config of a `config.json`, or of a folder with one; ValueError or OSError naming the file."""
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"model is '{path}'; it must be a readable config.json ({error.strerror or error})") from None
    except ValueError as error:
        raise ValueError(f"model is '{path}'; it must be JSON, which this is not ({error})") from None
    return config_of(found, file.resolve().parent.name)


def config_of(found: Mapping[str, Any], name: str = "") -> ModelConfig:
    """A parsed `config.json` as our config; ValueError for a family or an option that is not known here."""
    family = found.get("model_type", "")
    if family == "gemma3" and "text_config" in found:
        return config_of({**found["text_config"], "model_type": "gemma3_text"}, name)
    if family not in _FAMILIES:
        raise ValueError(f"model_type is {family!r}; it must be one of {', '.join(_FAMILIES)}")
    of_family = dict(_FAMILIES[family])
    if family == "gpt2":
        return _gpt2(found, name or family, of_family)
    heads = found["num_attention_heads"]
    fields: dict[str, Any] = {
        **of_family,
        "name": name or family,
        "num_layers": found["num_hidden_layers"],
        "width": found["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": found.get("num_key_value_heads") or heads,
        "mlp_width": found["intermediate_size"],
        "vocabulary": found["vocab_size"],
        "head_width": found.get("head_dim") or 0,
        "norm_epsilon": found.get("rms_norm_eps", 1e-6),
        "tied": found.get("tie_word_embeddings", of_family.get("tied", False)),
        "max_context": found.get("max_position_embeddings", 8192),
        "attention_softcap": found.get("attn_logit_softcapping") or 0.0,
        "logits_softcap": found.get("final_logit_softcapping") or 0.0,
    }
    if found.get("attention_bias"):
        fields |= {"qkv_bias": True, "output_bias": True}
    if found.get("mlp_bias"):
        fields["mlp_bias"] = True
    if "activation" not in fields:
        fields["activation"] = _activation(found, family)
    scalar = found.get("query_pre_attn_scalar")
    if family in ("gemma2", "gemma3_text") and scalar and scalar != fields["head_width"]:
        fields["attention_scale"] = float(scalar) ** -0.5
    fields |= _window(found)
    fields |= _rope(found, family)
    fields |= _experts(found, family)
    if family == "deepseek_v3":
        fields |= _latent(found)
    return ModelConfig(**fields)


def _gpt2(found: Mapping[str, Any], name: str, fields: dict[str, Any]) -> ModelConfig:
    if found.get("activation_function", "gelu_new") != "gelu_new":
        raise ValueError(f"activation_function is {found['activation_function']!r}; it must be 'gelu_new'")
    D, N = found["n_embd"], found["n_head"]
    return ModelConfig(
        *(name, found["n_layer"], D, N, N, found.get("n_inner") or 4 * D, found["vocab_size"]),
        activation="gelu",
        norm_epsilon=found.get("layer_norm_epsilon", 1e-5),
        max_context=found.get("n_positions", 1024),
        **fields,
    )


def _activation(found: Mapping[str, Any], family: str) -> str:
    name = found.get("hidden_activation") or found.get("hidden_act") or "silu"
    if family == "gemma" and name == "gelu":
        name = "gelu_pytorch_tanh"  # what the first files say, and never was
    if name not in ("silu", "gelu_pytorch_tanh"):
        raise ValueError(f"hidden_act is {name!r}; it must be 'silu' or 'gelu_pytorch_tanh'")
    return _ACTIVATIONS[name]


def _window(found: Mapping[str, Any]) -> dict[str, Any]:
    """A sliding window: in all layers, or in all but each n-th."""
    window = found.get("sliding_window")
    if not window or found.get("use_sliding_window") is False:
        return {}
    types = found.get("layer_types")
    if types is None:
        every = found.get("sliding_window_pattern") or {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}.get(
            found["model_type"], 0
        )
        return {"window": window, "global_every": every}
    if "sliding_attention" not in types:
        return {}
    every = types.index("full_attention") + 1 if "full_attention" in types else 0
    expected = [every and (n + 1) % every == 0 for n in range(len(types))]
    if [kind == "full_attention" for kind in types] != [bool(e) for e in expected]:
        raise ValueError(f"layer_types is {types}; every n-th layer must be full_attention, and no other")
    return {"window": window, "global_every": every}


def _rope(found: Mapping[str, Any], family: str) -> dict[str, Any]:
    scaling = found.get("rope_parameters") or {
        "rope_theta": found.get("rope_theta", 10_000.0),
        **(found.get("rope_scaling") or {}),
    }
    fields: dict[str, Any] = {}
    if "full_attention" in scaling:  # one for each type of layer
        local = scaling.get("sliding_attention") or {}
        if local.get("rope_theta", scaling["full_attention"].get("rope_theta")) or local:
            fields["local_rope_theta"] = float(local.get("rope_theta", 10_000.0))
        scaling = scaling["full_attention"]
    elif "rope_local_base_freq" in found:
        fields["local_rope_theta"] = float(found["rope_local_base_freq"])
    fields["rope_theta"] = float(scaling.get("rope_theta") or found.get("rope_theta") or 10_000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return fields
    factor, original = float(scaling["factor"]), scaling.get("original_max_position_embeddings")
    if kind == "linear":
        return fields | {"rope_scaling": RopeScaling("linear", factor)}
    if kind == "llama3":
        bounds = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return fields | {"rope_scaling": RopeScaling("llama3", factor, int(original or 8192), *bounds)}
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r}; it must be default, linear, llama3 or yarn")

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    m, everywhere = scaling.get("mscale"), scaling.get("mscale_all_dim")
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = magnitude(m) / magnitude(everywhere) if m and everywhere else magnitude(1.0)
    fields["rope_scaling"] = RopeScaling(
        "yarn",
        factor,
        int(original or found["max_position_embeddings"]),
        float(scaling.get("beta_slow") or 1.0),
        float(scaling.get("beta_fast") or 32.0),
        float(attention),
        scaling.get("truncate", True),
    )
    if family == "deepseek_v3" and everywhere:
        width = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
        fields["attention_scale"] = width**-0.5 * magnitude(everywhere) ** 2
    return fields


def _experts(found: Mapping[str, Any], family: str) -> dict[str, Any]:
    count = next(
        (found[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if found.get(name)), 0
    )
    if not count or family not in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3"):
        return {}
    active, width = found["num_experts_per_tok"], found.get("moe_intermediate_size") or found["intermediate_size"]
    if found.get("mlp_only_layers") or found.get("decoder_sparse_step", 1) != 1:
        raise ValueError("mlp_only_layers or decoder_sparse_step is given; every layer must have experts")
    if family == "mixtral":
        return {"experts": Experts(count, active, width)}
    if family == "gpt_oss":
        return {"experts": Experts(count, active, width, router_bias=True)}
    if family == "deepseek_v3":
        return {
            "experts": Experts(
                *(count, active, width),
                shared=found["n_shared_experts"] * width,
                dense_layers=found["first_k_dense_replace"],
                router="sigmoid",
                normalize=found.get("norm_topk_prob", True),
                scale=float(found["routed_scaling_factor"]),
                groups=found["n_group"],
                active_groups=found["topk_group"],
            )
        }
    shared = found.get("shared_expert_intermediate_size", 0) if family == "qwen2_moe" else 0
    return {
        "experts": Experts(
            *(count, active, width),
            shared=shared,
            shared_gate=bool(shared),
            router="softmax",
            normalize=bool(found.get("norm_topk_prob", False)),
        )
    }


def _latent(found: Mapping[str, Any]) -> dict[str, Any]:
    if not found.get("rope_interleave", True):
        raise ValueError("rope_interleave is False; it must be True, as published")
    return {
        "head_width": found["qk_nope_head_dim"],
        "latent": Latent(
            found["kv_lora_rank"], found["qk_rope_head_dim"], found["v_head_dim"], found.get("q_lora_rank") or 0
        ),
    }


# --- tensors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensor:
    """One parameter of ours in their file.

    name: after the prefix and `layers.{n}.`; `{e}` stands for each expert, if they are apart.
    axes: of their tensor, in our letters, as many as it has once what is fused is split.
    part: (letter, its size, which of it is ours), of an axis that we do not have, or not all of.
    turned: so many last ones of axis `C` or `H` are rotated in pairs (2i, 2i + 1), and here in pairs (i, i + n/2).
    """

    name: str
    axes: str
    part: tuple[str, int, int | slice] | None = None
    turned: int = 0


def tensors(config: ModelConfig, family: str) -> dict[str, Tensor]:
    """Our parameter's path, without `layers.n.`, -> their tensor."""
    if family == "gpt2":
        return _gpt2_tensors()
    table = {
        "embed.table": Tensor("embed_tokens.weight", "VD"),
        "final_norm.scale": Tensor("norm.weight", "D"),
        "unembed": Tensor("lm_head.weight", "VD"),
        "attention.norm.scale": Tensor("input_layernorm.weight", "D"),
        "attention.wq": Tensor("self_attn.q_proj.weight", "NHD"),
        "attention.wk": Tensor("self_attn.k_proj.weight", "KHD"),
        "attention.wv": Tensor("self_attn.v_proj.weight", "KHD"),
        "attention.wo": Tensor("self_attn.o_proj.weight", "DNH"),
        "attention.bq": Tensor("self_attn.q_proj.bias", "NH"),
        "attention.bk": Tensor("self_attn.k_proj.bias", "KH"),
        "attention.bv": Tensor("self_attn.v_proj.bias", "KH"),
        "attention.bo": Tensor("self_attn.o_proj.bias", "D"),
        "attention.q_norm.scale": Tensor("self_attn.q_norm.weight", "H"),
        "attention.k_norm.scale": Tensor("self_attn.k_norm.weight", "H"),
        "attention.sinks": Tensor("self_attn.sinks", "N"),
    }
    for block in ("mlp", "moe"):
        before = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        table[f"{block}.norm.scale"] = Tensor(f"{before}.weight", "D")
        table[f"{block}.post_norm.scale"] = Tensor("post_feedforward_layernorm.weight", "D")
    table["attention.post_norm.scale"] = Tensor("post_attention_layernorm.weight", "D")
    table |= _feed_forward("mlp", "mlp")
    if config.latent:
        table |= _latent_tensors(config.latent, config.head_width)
    if config.experts is None:
        return table
    if family == "gpt_oss":
        return table | _gpt_oss_experts()
    within = "block_sparse_moe" if family == "mixtral" else "mlp"
    table["moe.router"] = Tensor(f"{within}.gate.weight", "RD")
    table["moe.selection_bias"] = Tensor(f"{within}.gate.e_score_correction_bias", "R")
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for ours, theirs in zip(("gate", "up", "down"), names, strict=True):
        table[f"moe.{ours}"] = Tensor(f"{within}.experts.{{e}}.{theirs}.weight", "DF" if ours == "down" else "FD")
    table |= _feed_forward("moe.shared", "mlp.shared_experts" if family == "deepseek_v3" else "mlp.shared_expert")
    return table | {"moe.shared_gate": Tensor("mlp.shared_expert_gate.weight", "1D", ("1", 1, 0))}


def _feed_forward(ours: str, theirs: str) -> dict[str, Tensor]:
    return {
        f"{ours}.gate": Tensor(f"{theirs}.gate_proj.weight", "FD"),
        f"{ours}.up": Tensor(f"{theirs}.up_proj.weight", "FD"),
        f"{ours}.down": Tensor(f"{theirs}.down_proj.weight", "DF"),
        f"{ours}.bgate": Tensor(f"{theirs}.gate_proj.bias", "F"),
        f"{ours}.bup": Tensor(f"{theirs}.up_proj.bias", "F"),
        f"{ours}.bdown": Tensor(f"{theirs}.down_proj.bias", "D"),
    }


def _latent_tensors(m: Latent, head_width: int) -> dict[str, Tensor]:
    both = head_width + m.value_width
    query = Tensor("self_attn.q_b_proj.weight", "NHQ", turned=m.rope_width)
    if not m.query_rank:
        query = Tensor("self_attn.q_proj.weight", "NHD", turned=m.rope_width)
    return {
        "attention.wq": query,
        "attention.wq_down": Tensor("self_attn.q_a_proj.weight", "QD"),
        "attention.q_norm.scale": Tensor("self_attn.q_a_layernorm.weight", "Q"),
        "attention.wk_down": Tensor("self_attn.kv_a_proj_with_mqa.weight", "CD", turned=m.rope_width),
        "attention.kv_norm.scale": Tensor("self_attn.kv_a_layernorm.weight", "C"),
        "attention.wk": Tensor("self_attn.kv_b_proj.weight", "NHC", ("H", both, slice(head_width))),
        "attention.wv": Tensor("self_attn.kv_b_proj.weight", "NHC", ("H", both, slice(head_width, both))),
    }


def _gpt_oss_experts() -> dict[str, Tensor]:
    """Gate and up are one tensor, in turns."""
    return {
        "moe.router": Tensor("mlp.router.weight", "RD"),
        "moe.router_bias": Tensor("mlp.router.bias", "R"),
        "moe.gate": Tensor("mlp.experts.gate_up_proj", "EDF2", ("2", 2, 0)),
        "moe.up": Tensor("mlp.experts.gate_up_proj", "EDF2", ("2", 2, 1)),
        "moe.down": Tensor("mlp.experts.down_proj", "EFD"),
        "moe.bgate": Tensor("mlp.experts.gate_up_proj_bias", "EF2", ("2", 2, 0)),
        "moe.bup": Tensor("mlp.experts.gate_up_proj_bias", "EF2", ("2", 2, 1)),
        "moe.bdown": Tensor("mlp.experts.down_proj_bias", "ED"),
    }


def _gpt2_tensors() -> dict[str, Tensor]:
    """Its linear layers are [in, out]; queries, keys and values are one."""
    table = {
        "embed.table": Tensor("wte.weight", "VD"),
        "embed.positions": Tensor("wpe.weight", "XD"),
        "attention.wo": Tensor("attn.c_proj.weight", "NHD"),
        "attention.bo": Tensor("attn.c_proj.bias", "D"),
        "mlp.up": Tensor("mlp.c_fc.weight", "DF"),
        "mlp.bup": Tensor("mlp.c_fc.bias", "F"),
        "mlp.down": Tensor("mlp.c_proj.weight", "FD"),
        "mlp.bdown": Tensor("mlp.c_proj.bias", "D"),
    }
    for which, (name, heads) in enumerate((("q", "N"), ("k", "K"), ("v", "K"))):
        table[f"attention.w{name}"] = Tensor("attn.c_attn.weight", f"D3{heads}H", ("3", 3, which))
        table[f"attention.b{name}"] = Tensor("attn.c_attn.bias", f"3{heads}H", ("3", 3, which))
    for ours, theirs in (("attention.norm", "ln_1"), ("mlp.norm", "ln_2"), ("final_norm", "ln_f")):
        table[f"{ours}.scale"] = Tensor(f"{theirs}.weight", "D")
        table[f"{ours}.bias"] = Tensor(f"{theirs}.bias", "D")
    return table


def fitted(array: np.ndarray, tensor: Tensor, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    """Their tensor as our parameter with these axes and this shape; ValueError where the sizes do not agree."""
    sizes = dict(zip(axes, shape, strict=True))
    if tensor.part is not None:
        sizes[tensor.part[0]] = tensor.part[1]
    split = [sizes[letter] for letter in tensor.axes]
    if not _refines(split, array.shape):
        raise ValueError(f"shape is {list(array.shape)}; it must be {split}, some of them as one")
    array, letters = array.reshape(split), tensor.axes
    if tensor.part is not None:
        letter, _, which = tensor.part
        array = array[(slice(None),) * letters.index(letter) + (which,)]
        letters = letters.replace(letter, "") if isinstance(which, int) else letters
    if tensor.turned:
        axis = letters.index("H" if "H" in letters else "C")
        kept = np.arange(array.shape[axis] - tensor.turned)
        turned = len(kept) + np.arange(tensor.turned).reshape(-1, 2).T.reshape(-1)
        array = np.take(array, np.concatenate([kept, turned]), axis=axis)
    return array.transpose([letters.index(letter) for letter in axes])


def _refines(split: list[int], shape: tuple[int, ...]) -> bool:
    """Whether joining neighbours in `split` can give `shape`."""
    rest = iter(split)
    for size in shape:
        product = next(rest, 0)
        while 0 < product < size:
            product *= next(rest, 0)
        if product != size:
            return False
    return all(size == 1 for size in rest)
