"""Encoders of images and sounds: features are those of the `transformers` library; bills are the closed form."""

import json
import math
import re
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ready
from flax import nnx
from stepbill.experiments import steps
from stepbill.experiments.bill import bill_of
from stepbill.model import hugging_face
from stepbill.model.encoder import Encoder
from stepbill.model.encoder_config import ENCODERS, EncoderConfig, Merge
from stepbill.model.hugging_face import Tensor
from stepbill.model.transformer import logical_axes, split
from stepbill.profiling import closed_form, targets
from test_model_bills import assert_sound

# As `transformers` counts them (SigLIP without its pooling head), and Voxtral's by hand.
PARAMETERS = {
    "clip-vit-l": 303_507_456,
    "siglip-so400m": 416_866_032,
    "qwen2-vl-vit": 675_759_104,
    "whisper-large-v3": 636_968_960,
    "voxtral-encoder": 636_968_960 + 5120 * 3072 + 3072 * 3072,
}
SIZES = (3, 32, 4, 4)  # L, D, N, K
SOUNDS: dict[str, Any] = {
    **{"kind": "audio", "channels": 10, "activation": "gelu_exact", "key_bias": False, "max_context": 12},
}
SMALL = {
    config.name: config
    for config in (
        EncoderConfig(
            *("clip", *SIZES, 48),
            **{"activation": "gelu_quick", "patch": 4, "max_context": 17, "class_token": True, "first_norm": True},
        ),
        EncoderConfig("siglip", *SIZES, 48, activation="gelu", patch=4, patch_bias=True, max_context=16),
        EncoderConfig(
            *("qwen2-vl", *SIZES, 128),
            **{"activation": "gelu_quick", "norm_epsilon": 1e-6, "patch": 4, "positions": "rope", "frames": 2},
            **{"merge": Merge(4, 128, 20), "max_context": 64},
        ),
        EncoderConfig("whisper", *SIZES, 48, **SOUNDS),
        EncoderConfig("voxtral", *SIZES, 128, **SOUNDS, merge=Merge(4, 20, 20, bias=False)),
    )
}
CONTEXT = {"qwen2-vl": 24}  # 4 rows of 6 patches


def create(config: EncoderConfig) -> Encoder:
    return Encoder(replace(config, dtype="float32"), nnx.Rngs(0))


def draw(config: EncoderConfig, context: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), config.input_shape(2, context))


# --- against transformers --------------------------------------------------------------------------------------------


def of_block(norms: tuple[str, str], attention: str, out: str, mlp: tuple[str, str]) -> dict[str, Tensor]:
    """Our parameter in a block -> their tensor."""
    table = {
        "attention.wo": Tensor(f"{attention}.{out}.weight", "DNH"),
        "attention.bo": Tensor(f"{attention}.{out}.bias", "D"),
    }
    table |= {
        f"mlp.{ours}": Tensor(f"{name}.weight", axes)
        for ours, name, axes in zip(("up", "down"), mlp, ("FD", "DF"), strict=True)
    }
    table |= {
        f"mlp.b{ours}": Tensor(f"{name}.bias", axes) for ours, name, axes in zip(("up", "down"), mlp, "FD", strict=True)
    }
    for ours, name in zip(("attention", "mlp"), norms, strict=True):
        table |= {f"{ours}.norm.scale": Tensor(f"{name}.weight", "D"), f"{ours}.norm.bias": Tensor(f"{name}.bias", "D")}
    for n, letter in enumerate("qkv"):
        heads = "N" if letter == "q" else "K"
        if out == "proj":  # as one
            part: Any = ("3", 3, n)
            table[f"attention.w{letter}"] = Tensor(f"{attention}.qkv.weight", f"3{heads}HD", part)
            table[f"attention.b{letter}"] = Tensor(f"{attention}.qkv.bias", f"3{heads}H", part)
        else:
            table[f"attention.w{letter}"] = Tensor(f"{attention}.{letter}_proj.weight", f"{heads}HD")
            table[f"attention.b{letter}"] = Tensor(f"{attention}.{letter}_proj.bias", f"{heads}H")
    return table


CLIP = of_block(("layer_norm1", "layer_norm2"), "self_attn", "out_proj", ("mlp.fc1", "mlp.fc2"))
QWEN = of_block(("norm1", "norm2"), "attn", "proj", ("mlp.fc1", "mlp.fc2"))
WHISPER = of_block(("self_attn_layer_norm", "final_layer_norm"), "self_attn", "out_proj", ("fc1", "fc2"))


def layer_norm(ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}.scale": Tensor(f"{theirs}.weight", "D"), f"{ours}.bias": Tensor(f"{theirs}.bias", "D")}


SOUND = layer_norm("final_norm", "layer_norm") | {
    "positions": Tensor("embed_positions.weight", "XD"),
    "embed.near": Tensor("conv1.weight", "DC3"),
    "embed.far": Tensor("conv2.weight", "DC3"),
    "embed.bnear": Tensor("conv1.bias", "D"),
    "embed.bfar": Tensor("conv2.bias", "D"),
}
# family -> (where its blocks are, of each block, of the rest); a patch is [D, colours, (frames,) rows, columns].
THEIRS: dict[str, tuple[str, dict[str, Tensor], dict[str, Tensor]]] = {
    "clip": (
        "encoder.layers",
        CLIP,
        {
            "embed.patch": Tensor("embeddings.patch_embedding.weight", "DCpq"),
            "embed.first": Tensor("embeddings.class_embedding", "D"),
            "positions": Tensor("embeddings.position_embedding.weight", "XD"),
            **layer_norm("first_norm", "pre_layrnorm"),
            **layer_norm("final_norm", "post_layernorm"),
        },
    ),
    "siglip": (
        "encoder.layers",
        CLIP,
        {
            "embed.patch": Tensor("embeddings.patch_embedding.weight", "DCpq"),
            "embed.bias": Tensor("embeddings.patch_embedding.bias", "D"),
            "positions": Tensor("embeddings.position_embedding.weight", "XD"),
            **layer_norm("final_norm", "post_layernorm"),
        },
    ),
    "qwen2-vl": (
        "blocks",
        QWEN,
        {
            "embed.patch": Tensor("patch_embed.proj.weight", "DCtpq"),
            **layer_norm("final_norm", "merger.ln_q"),
            **{
                f"merge.{ours}": Tensor(f"merger.mlp.{n}.weight", axes)
                for ours, n, axes in (("up", 0, "MI"), ("down", 2, "OM"))
            },
            **{
                f"merge.b{ours}": Tensor(f"merger.mlp.{n}.bias", axes)
                for ours, n, axes in (("up", 0, "M"), ("down", 2, "O"))
            },
        },
    ),
    "whisper": ("layers", WHISPER, SOUND),
    "voxtral": (
        "layers",
        WHISPER,
        SOUND | {"merge.up": Tensor("linear_1.weight", "MI"), "merge.down": Tensor("linear_2.weight", "OM")},
    ),
}


def theirs(family: str, config: EncoderConfig, inputs: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(tensors by name, features) of a random model of the library."""
    import torch
    import transformers
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.voxtral import modeling_voxtral

    torch.manual_seed(0)
    L, D, N, F = config.num_layers, config.width, config.num_heads, config.mlp_width
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": N,
             "patch_size": 4, "image_size": 16, "attn_implementation": "eager"}  # fmt: skip
    sound = {"d_model": D, "encoder_layers": L, "encoder_attention_heads": N, "encoder_ffn_dim": F, "num_mel_bins": 10,
             "max_source_positions": 12, "attn_implementation": "eager"}  # fmt: skip
    x = torch.tensor(inputs)
    parts: list[Any] = []
    if family == "clip":
        parts = [transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes))]
    elif family == "siglip":
        own = transformers.SiglipVisionConfig(**sizes, vision_use_head=False, layer_norm_eps=config.norm_epsilon)
        parts = [transformers.SiglipVisionModel(own)]
    elif family == "qwen2-vl":
        about: Any = Qwen2VLVisionConfig(depth=L, embed_dim=D, num_heads=N, mlp_ratio=4, hidden_size=20, patch_size=4)
        about._attn_implementation = "eager"
        parts = [modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(about)]
    elif family == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        parts = [WhisperEncoder(transformers.WhisperConfig(**sound))]
    else:
        both: Any = transformers.VoxtralConfig(
            audio_config={**sound, "hidden_size": D, "intermediate_size": 4 * D, "num_hidden_layers": L,
                          "num_attention_heads": N},
            text_config={"hidden_size": 20, "num_attention_heads": 4},
        )  # fmt: skip
        both.audio_config._attn_implementation = "eager"
        parts = [modeling_voxtral.VoxtralEncoder(both.audio_config), modeling_voxtral.VoxtralMultiModalProjector(both)]
    with torch.no_grad():
        for part in parts:
            part.eval()
            for parameter in part.parameters():
                noise = torch.randn_like(parameter) * 0.3
                parameter.copy_(parameter + noise if parameter.ndim < 2 else noise)
        encoder = parts[0]
        if config.kind == "audio":
            features = encoder(x.transpose(1, 2)).last_hidden_state
            if len(parts) > 1:
                features = parts[1](features.reshape(2, 3, 4 * D))
        elif family == "qwen2-vl":
            # Patches [image, rows, columns, colours, frames, p, q], squares of four together.
            rows, columns = config.grid(24)
            cut = x.reshape(2, 2, rows // 2, 2, 4, columns // 2, 2, 4, 3).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
            features = encoder(cut.reshape(48, -1), torch.tensor([[1, rows, columns]] * 2)).pooler_output
            features = features.reshape(2, 6, 20)
        else:
            features = encoder(pixel_values=x[:, 0].permute(0, 3, 1, 2)).last_hidden_state
            if family == "clip":  # which norms the class token alone
                features = encoder.post_layernorm(features)
    found = {name: array.numpy() for part in parts for name, array in part.state_dict().items()}
    return found, features.numpy()


def fit(tensors: dict[str, np.ndarray], family: str, config: EncoderConfig) -> dict[str, Any]:
    """Their tensors as our parameters."""
    blocks, of_each, rest = THEIRS[family]
    model = nnx.eval_shape(lambda: create(config))
    letters = dict(jax.tree.leaves_with_path(logical_axes(model)))

    def one(path: Any, leaf: Any) -> jax.Array:
        name = ".".join(str(key.key) for key in path)
        tensor = rest.get(name)
        if tensor is None:
            _, n, ours = name.split(".", 2)
            tensor = of_each[ours]
            tensor = replace(tensor, name=f"{blocks}.{n}.{tensor.name}")
        array, axes = tensors[tensor.name], letters[path]
        if axes == "ID":  # in the order in which we have them: colours last, and of a window the frames first
            array = np.moveaxis(array, 1, -1)
            return jnp.asarray(array.reshape(array.shape[0], -1).T)
        return jnp.asarray(hugging_face.fitted(array, tensor, axes, leaf.shape))

    return jax.tree.map_with_path(one, split(model)[1])


@pytest.mark.parametrize(("family", "layers"), [*((family, "unroll") for family in SMALL), ("qwen2-vl", "scan")])
def test_features_are_those_of_transformers(family, layers):
    if sys.version_info >= (3, 12):
        pytest.skip("the test extra has transformers for Python 3.11 alone")
    config = SMALL[family]
    context = CONTEXT.get(family) or config.max_context
    inputs = draw(config, context)
    tensors, expected = theirs(family, config, np.asarray(inputs))
    params = fit(tensors, family, config)
    if layers == "scan":
        config = replace(config, layers="scan")
        stack = jax.tree.map(lambda *all_layers: jnp.stack(all_layers), *params["layers"].values())
        params = params | {"layers": {0: {0: stack}}}
    graph, own = split(nnx.eval_shape(lambda: create(config)))
    assert jax.tree.structure(own) == jax.tree.structure(params)
    features = jax.jit(lambda params: nnx.merge(graph, params)(inputs))(params)
    assert features.shape == (2, config.tokens(context), expected.shape[-1])
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ENCODERS, *SMALL])
def test_parameter_totals_are_exact(name):
    config = replace(ENCODERS.get(name) or SMALL[name], layers="scan")
    _, params = split(nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(0))))
    counted = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert config.parameters == config.active_parameters == counted == PARAMETERS.get(name, counted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "smell"}, "kind is 'smell'; it must be one of vision, audio"),
        ({"patch": 0}, "patch is 0; it must be positive"),
        ({"max_context": 18, "merge": Merge(4, 8, 8)}, "makes one token of 4 positions, which must divide it"),
        ({"positions": "rope"}, "positions is 'rope'; it must be 'learned' with class_token"),
    ],
)
def test_a_wrong_config_names_the_field_its_value_and_what_is_right(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL["clip"], **change)


def test_patches_lie_as_near_to_a_square_as_they_come():
    qwen = ENCODERS["qwen2-vl-vit"]
    assert [qwen.grid(context) for context in (4, 24, 4096, 4 * 7)] == [(2, 2), (4, 6), (64, 64), (2, 14)]
    assert qwen.input_shape(3, 24) == (3, 2, 4 * 14, 6 * 14, 3)
    assert ENCODERS["clip-vit-l"].grid(577) == (24, 24)
    assert ENCODERS["voxtral-encoder"].input_shape(2, 1500) == (2, 3000, 128)


@pytest.mark.parametrize("family", ["clip", "voxtral"])
def test_everything_computed_has_a_component(family):
    """Reshapes and index arithmetic of loops apart; and real and abstract arguments make one program."""
    config = replace(SMALL[family], layers="scan")
    real, abstract = (steps.build(config, "encode", batch=2, context=config.max_context, real=x) for x in (True, False))
    assert real.lower().as_text() == abstract.lower().as_text()
    text = abstract.lower().as_text(debug_info=True)
    paths = set(re.findall(r'loc\("(jit\(encode\)/[^"]*)"', text))
    free = re.compile(r"\b(?:while|body|cond|closed_call|scan|broadcast_in_dim|reshape|squeeze)\b")
    named = {path for path in paths if f"/{config.kind}/" in path}
    assert named and all(free.search(path) for path in paths - named)


# --- bills -----------------------------------------------------------------------------------------------------------

BILLED = {
    "vision": EncoderConfig(
        *("vision", 2, 96, 4, 4, 192),  # heads of 24, which a GPU's kernel fills up
        **{"activation": "gelu", "positions": "rope", "patch": 8, "frames": 2, "merge": Merge(4, 256, 128)},
        max_context=4096,
    ),
    "audio": EncoderConfig(
        *("audio", 2, 128, 4, 4, 256), kind="audio", channels=16, activation="gelu_exact", max_context=152
    ),
}


@pytest.mark.parametrize(
    ("target", "name"), [("host", "vision"), ("h200", "vision"), ("h200", "audio"), ("v5e", "audio")]
)
def test_its_bill_is_the_closed_form(target, name):
    config, batch, context = BILLED[name], 2, 152
    ready(target)
    built = steps.build(config, "encode", batch=batch, context=context, mesh=targets.mesh(target, {}))
    found = bill_of(built, targets.compile(built.lower(), target), target)
    assert_sound(found)
    L, D, F, T = 2, config.width, config.mlp_width, context
    rows = {"h200": 256, "v5e": 256}.get(target, T)  # whole blocks of 128 or 256 queries, and of 64 or 256 keys
    keys = {"h200": 192, "v5e": 256}.get(target, T)
    filled = 128 if target == "h200" else D  # 4 heads of 32
    wanted = {
        "embed": {"vision": 2 * T * 2 * 8 * 8 * 3 * D, "audio": 2 * 2 * T * 3 * 16 * D + 2 * T * 3 * D * D}[name],
        "attention/qkv": L * 2 * T * 3 * D * D,
        "attention/core": L * 4 * rows * keys * filled,
        "attention/out": L * 2 * T * D * D,
        "mlp/up": L * 2 * T * D * F,
        "mlp/down": L * 2 * T * D * F,
    }
    if name == "vision":
        wanted["merge"] = 2 * T // 4 * (4 * D * 256 + 256 * 128)
    flops = {row.component for row in found.rows if row.work.matmul}
    assert {one: found.component(one).matmul for one in flops} == {
        f"{name}/{part}": batch * amount for part, amount in wanted.items()
    }
    wanted["attention/core"] = L * 4 * T * T * D
    assert found.ideal_flops == batch * sum(wanted.values())
    assert found.total.matmul - found.tax("masked").matmul == pytest.approx(found.ideal_flops, rel=1e-6)
    assert found.group("attention").matmul == found.component(f"{name}/attention").matmul
    assert found.group("mlp").matmul == found.component(f"{name}/mlp").matmul
    if target == "h200":
        assert found.total.hbm_read["weights"] == pytest.approx(2 * config.parameters, rel=0.02)


def test_a_mesh_shares_it_by_heads_and_by_positions():
    config = BILLED["vision"]
    ready("h200", 2)
    built = steps.build(config, "encode", batch=2, context=152, mesh=targets.mesh("h200", {"tensor": 2}))
    found = bill_of(built, targets.compile(built.lower(), "h200"), "h200", {"tensor": 2})
    whole = closed_form.encoder_flops(config, 2, 152)
    for part in ("embed", "attention/qkv", "mlp/up", "mlp/down", "merge"):
        assert found.component(f"vision/{part}").matmul == whole[f"vision/{part}"] // 2
    assert not [one for one in found.differences if one["reason"] == "unexplained" and "flops" in one["quantity"]]


def test_the_command_encodes(stepbill, monkeypatch):
    monkeypatch.setitem(ENCODERS, "ear", replace(BILLED["audio"], name="ear"))
    status, out, err = stepbill("--model=ear", "--step=encode", "--batch=2", "--measure", "--format=json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["program"]["context"] == 152 and min(said["measured"]["untraced_seconds"]) > 0
    assert said["reconcile"]["closed_form"]["matmul_flops"] == said["total"]["flops"]["matmul"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--model=clip-vit-l", "--step=decode: of clip-vit-l it must be encode"),
        ("--model=nano --step=encode", "--step=encode: of nano it must be train, prefill, decode"),
        ("--model=clip-vit-l --step=encode --context=100", "--context=100: clip-vit-l takes 577 positions, always"),
        ("--model=qwen2-vl-vit --step=encode --context=6", "--context=6: qwen2-vl-vit makes one token of 4 positions"),
    ],
)
def test_wrong_flags_end_in_one_line(stepbill, argv, said):
    status, out, err = stepbill(*argv.split())
    assert (status, out) == (2, "") and err.startswith(f"stepbill: {said}") and err.count("\n") == 1


def test_encoders_are_listed(stepbill):
    _, out, _ = stepbill("--list")
    assert set(ENCODERS) <= {line.split()[0] for line in out.splitlines() if line.split()}
