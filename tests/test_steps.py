"""One builder for compiling, running and testing: its programs are the model's, alias what they update, and shard."""

import inspect
import re
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import mesh
from jax.experimental import checkify
from jax.sharding import Mesh, PartitionSpec
from stepbill.experiments import steps
from stepbill.model.architectures import get
from stepbill.model.axes import spec
from stepbill.model.config import Experts, Latent, ModelConfig, RopeScaling
from stepbill.model.train import Recipe
from stepbill.profiling import targets

TINY = ModelConfig("tiny", 2, 16, 4, 2, 24, 32, max_context=64, dtype="float32")
DECODERS = [name for name in steps.STEPS if name != "encode"]


def drawn(step, seed=0):
    """What to call a step with, on its mesh: numbers by numpy, and a cache that is full but for what the step writes.
    A program that draws them takes longer to compile than many a step; that it can be had: `real=True`, elsewhere.
    """
    random = np.random.default_rng(seed)

    def draw(name, leaf):
        if leaf.dtype == jnp.int32:
            position = name != "tokens"
            values = step.context - 1 if position else random.integers(0, step.config.vocabulary, leaf.shape)
        else:
            values = np.zeros(leaf.shape) if name == "opt_state" else random.normal(0, 0.3, leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    arguments = zip(step.names, step.arguments, strict=True)
    return tuple(jax.tree.map(partial(draw, name), argument) for name, argument in arguments)


def size_in_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("name", "layers"),
    [("train", "scan"), ("prefill", "unroll"), ("decode", "unroll"), ("decode", "scan"), ("generate", "scan")],
)
def test_what_a_step_updates_is_aliased_and_not_copied(name, layers):
    step = steps.build(replace(TINY, layers=layers), name, batch=2, context=16, count=4)
    compiled, arguments = step.lower().compile(), drawn(step)
    updated = [arguments[i] for i in step.donate]
    # Prefill starts anew at position 0, and so does not take the position that it is given.
    counted = size_in_bytes(updated) - (4 if name == "prefill" else 0)
    assert compiled.memory_analysis().alias_size_in_bytes == counted
    assert "input_output_alias" in compiled.as_text()
    compiled(*arguments)
    large = [leaf for leaf in jax.tree.leaves(updated) if leaf.ndim]
    assert all(leaf.is_deleted() for leaf in large)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[-1 if name == "train" else 0]))


@pytest.mark.parametrize("objective", ["preference", "policy"])
def test_a_step_by_preferences_or_rewards(objective):
    step = steps.build(TINY, "train", batch=4, context=16, real=True, recipe=Recipe(objective=objective))
    assert step.names == ("params", "opt_state", "tokens", "rated") and step.argument_roles["rated"] == "inputs"
    before = jax.tree.map(np.array, step.arguments[0])
    rated = step.arguments[3]._replace(answer=np.ones((4, 16), np.float32))
    if objective == "policy":
        rated = rated._replace(advantage=np.ones((4, 16), np.float32))
    after, _, loss = step.jitted(*step.arguments[:3], rated)
    assert np.isfinite(loss) and not jax.tree.all(jax.tree.map(np.array_equal, before, after))


@pytest.mark.parametrize(
    ("step", "batch", "recipe", "message"),
    [
        ("train", 3, Recipe(objective="preference"), "batch is 3; pairs of answers must be a multiple of 2"),
        ("train", 6, Recipe(objective="preference", accumulate=2), "batch is 6; .* a multiple of 4"),
        ("score", 2, Recipe(objective="policy"), "objective is policy; it must be tokens"),
    ],
)
def test_what_cannot_be_preferred_or_rewarded(step, batch, recipe, message):
    with pytest.raises(ValueError, match=message):
        steps.build(TINY, step, batch=batch, context=16, recipe=recipe)


def test_a_score_lies_on_a_mesh_as_a_prefill_does(assert_close):
    two = mesh("host", data=2)
    scores = []
    for where in (None, two):
        step = steps.build(TINY, "score", batch=2, context=16, real=True, mesh=where)
        scores.append(step.jitted(*step.arguments))
    assert scores[0].shape == (2, 16)
    assert_close(scores[1], scores[0])


@pytest.mark.parametrize("name", DECODERS)
def test_real_and_abstract_arguments_make_one_program(name, monkeypatch):
    monkeypatch.setattr(checkify, "debug_check", lambda *args: None)  # it numbers each check anew
    real, abstract = (steps.build(TINY, name, batch=2, context=16, count=4, real=real) for real in (True, False))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract.arguments))
    assert real.lower().as_text() == abstract.lower().as_text()


@pytest.mark.parametrize(
    ("layers", "paths"),
    [
        ("unroll", ["params['layers'][1]['attention']['wq']", "cache.k[1]", "cache.position", "tokens"]),
        ("scan", ["params['layers'][0][0]['attention']['wq']", "cache.v[0]", "cache.position", "tokens"]),
    ],
)
def test_the_program_says_which_argument_each_parameter_is(layers, paths):
    step = steps.build(replace(TINY, layers=layers), "decode", batch=2, context=16)
    text = step.lower().compile().as_text().replace("\\'", "'")
    named = set(re.findall(r'parameter\(\d+\).*op_name="([^"]+)"', text))
    assert set(paths) <= named
    assert {re.split(r"\W", path)[0] for path in named} >= set(step.argument_roles)


def test_everything_computed_has_a_component():
    """Forward, backward and update, down to the position's increment; index arithmetic of loops and reshapes apart."""
    loops = "while|body|cond|closed_call|checkpoint|remat2|rematted_computation|scan"
    free = re.compile(rf"\b(?:{loops}|broadcast_in_dim|reshape|squeeze|empty2?)\b")
    for name in DECODERS:
        text = steps.build(TINY, name, batch=2, context=16, count=4).lower().as_text(debug_info=True)
        paths = set(re.findall(rf'loc\("(jit\({name}\)/[^"]*)"', text))
        components = r"embed|attention|mlp|final_norm|logits|sampling|loss|optimizer"
        bare = {path for path in paths if not re.search(rf"(?:^|[/(])(?:{components})\b", path)}
        bare = {path for path in bare if not free.search(path)}
        assert not bare, name


TURNING = RopeScaling("yarn", 4.0, 64, 1.0, 4.0, truncate=False)
ROUTED = Experts(8, 2, 12, shared=8, groups=4, active_groups=2, router="sigmoid")
SHORT = Latent(6, 4, 5, 7)
LOCAL = {"window": 4, "global_every": 2}
# What each field is changed to, and what of TINY has to be otherwise before it can make a difference.
CHANGES: dict[str, tuple[object, dict[str, Any]]] = {
    **{"num_layers": (3, {}), "width": (32, {}), "num_heads": (8, {}), "num_kv_heads": (4, {}), "head_width": (8, {})},
    **{"mlp_width": (32, {}), "vocabulary": (33, {}), "activation": ("geglu", {}), "tied": (True, {})},
    **{"norm": ("layer", {}), "norm_offset": (True, {}), "norm_epsilon": (1e-3, {}), "post_norms": (True, {})},
    **{"qk_norm": (True, {}), "qkv_bias": (True, {}), "key_bias": (False, {"qkv_bias": True})},
    **{"output_bias": (True, {}), "mlp_bias": (True, {})},
    **{"scale_embedding": (True, {}), "positions": ("learned", {}), "rope_theta": (500.0, {})},
    **{"rope_scaling": (TURNING, {}), "window": (4, {}), "global_every": (2, {"window": 4})},
    **{"local_rope_theta": (50.0, LOCAL), "attention_scale": (0.3, {}), "attention_softcap": (2.0, {})},
    **{"logits_softcap": (2.0, {}), "sinks": (True, {}), "max_context": (48, {"positions": "learned"})},
    **{"experts": (ROUTED, {}), "latent": (SHORT, {}), "dtype": ("bfloat16", {}), "param_dtype": ("bfloat16", {})},
    **{"weights": ("int8", {}), "activations": ("int8", {"weights": "int8"}), "cache_dtype": ("int8", {})},
    **{"layers": ("scan", {}), "remat": ("full", {}), "query_block": (4, {})},
    **{"attention": ("xla", {"target": "h200", "head_width": 16})},
}
SCALED: dict[str, object] = {
    **{"kind": "llama3", "factor": 2.0, "original_context": 32, "low": 2.0, "high": 8.0},
    **{"magnitude": 1.5, "truncate": True},
}
EXPERTS: dict[str, object] = {
    **{"count": 12, "active": 3, "width": 16, "shared": 16, "shared_gate": True, "dense_layers": 1},
    **{"router": "softmax", "normalize": True, "scale": 2.0, "groups": 2, "active_groups": 1, "router_bias": True},
    **{"balance_loss": 0.1, "z_loss": 0.1, "dispatch": "blocks", "capacity": 1.5},
}
LATENT: dict[str, object] = {"kv_rank": 8, "rope_width": 6, "value_width": 6, "query_rank": 5}


@cache
def program(target: str = "", **changes: Any) -> str:
    """The lowered text of a step: of training for what only training knows, else of a prefill."""
    over = mesh(target) if target else None
    changes = {"layers": "unroll"} | changes
    experts: Any = changes.get("experts")
    trains = changes.get("remat") or (experts and (experts.balance_loss or experts.z_loss))
    step = "train" if trains else "prefill"
    return steps.build(replace(TINY, **changes), step, batch=2, context=16, mesh=over).lower().as_text()


@pytest.mark.parametrize("field", [field.name for field in fields(ModelConfig) if field.name != "name"])
def test_every_field_of_the_config_changes_the_program(field):
    value, others = CHANGES[field]
    before: dict[str, Any] = others | ({"remat": "none"} if field == "remat" else {})
    after: dict[str, Any] = others | {field: value}
    assert program(**after) != program(**before)


@pytest.mark.parametrize(
    ("name", "part", "changes"),
    [("rope_scaling", TURNING, SCALED), ("experts", ROUTED, EXPERTS), ("latent", SHORT, LATENT)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_of_its_parts_changes_the_program(name, part, changes):
    assert set(changes) == {field.name for field in fields(part)}
    for field, value in changes.items():
        own = replace(part, dispatch="capacity") if field == "capacity" else part
        trained = {"remat": "none"} if field in ("balance_loss", "z_loss") else {}
        changed = replace(own, **{field: value})
        others: dict[str, Any] = {"head_width": 16} | trained  # pairs enough for RoPE to differ
        assert program(**others | {name: changed}) != program(**others | {name: own}), field


def test_training_on_real_text_lowers_the_loss():
    config = replace(get("nano"), num_layers=1, dtype="float32")
    text = np.frombuffer(inspect.getsource(inspect).encode(), np.uint8)
    step = steps.build(config, "train", batch=4, context=32, real=True, recipe=Recipe(3e-3))
    params, opt_state, _ = step.arguments
    random, losses = np.random.default_rng(0), []
    for _ in range(20):
        rows = [text[start : start + 33] for start in random.integers(0, len(text) - 33, 4)]
        params, opt_state, loss = step.jitted(params, opt_state, jnp.asarray(np.stack(rows), jnp.int32))
        losses.append(float(loss))
    assert 5.0 < losses[0] < 7.0  # ln 256 = 5.5: knows nothing yet
    assert np.mean(losses[-5:]) < 4.0


# ---- over several chips


def mesh_of(data, tensor):
    return Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))


# Key/value heads for all chips; queries that can be split only within a group; too few of everything.
MANY = replace(TINY, num_kv_heads=4, num_heads=8, head_width=4, qk_norm=True)
GROUPS = replace(MANY, num_kv_heads=2)
FEW = replace(MANY, num_kv_heads=1, num_heads=2, tied=True, vocabulary=33)


@pytest.mark.parametrize(
    ("config", "name", "layers"),
    [
        *[(MANY, "train", "scan"), (MANY, "decode", "unroll")],
        *[(GROUPS, "prefill", "unroll"), (GROUPS, "decode", "scan")],
        (FEW, "decode", "unroll"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"N{value.num_heads}K{value.num_kv_heads}",
)
def test_sharded_equals_unsharded(config, name, layers, assert_close):
    config = replace(config, layers=layers)
    batch, context = 2, 8
    alone = steps.build(config, name, batch=batch, context=context)
    apart = steps.build(config, name, batch=batch, context=context, mesh=mesh_of(2, 4))
    expected = jax.tree.map(np.asarray, alone.jitted(*drawn(alone)))
    before = [jax.tree.map(lambda leaf: leaf.sharding, apart.arguments[i]) for i in apart.donate]
    actual = apart.jitted(*drawn(apart))
    after = [part for part in actual if jax.tree.structure(part) in [jax.tree.structure(tree) for tree in before]]
    for was, leaf in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert was.is_equivalent_to(leaf.sharding, leaf.ndim)
    if name == "train":  # AdamW's first update is the sign of the gradient: compare what it is made of
        actual, expected = ((state[0].mu, state[0].nu, loss) for _, state, loss in (actual, expected))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("name", "dispatch", "sizes"),
    [
        ("prefill", "all", {"data": 2, "expert": 4}),
        ("decode", "blocks", {"expert": 2, "tensor": 2}),
        ("train", "capacity", {"data": 2, "expert": 4}),
    ],
    ids=str,
)
def test_chips_with_experts_of_their_own_do_what_one_does(name, dispatch, sizes, assert_close):
    """Where there is room enough on each, so that nothing is dropped."""
    experts = replace(ROUTED, dispatch=dispatch, capacity=8.0, balance_loss=0.1, z_loss=0.1, router_bias=True)
    config = replace(TINY, experts=experts, mlp_bias=True, layers="scan" if name == "train" else "unroll")
    real = name == "train"  # once: what is drawn on a mesh is what is drawn on one chip
    alone, apart = (
        steps.build(config, name, batch=8, context=8, real=real, mesh=on) for on in (None, targets.mesh("host", sizes))
    )
    expected, actual = (
        jax.tree.map(np.asarray, step.jitted(*(step.arguments if real else drawn(step)))) for step in (alone, apart)
    )
    matrices = apart.arguments[0]["layers"][0] if name != "train" else apart.arguments[0]["layers"][0][0]
    up = matrices["moe"]["up"]
    assert up.sharding.shard_shape(up.shape)[-3] == 8 // sizes["expert"]
    if name == "train":
        actual, expected = ((state[0].mu, state[0].nu, loss) for _, state, loss in (actual, expected))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("config", "batch", "words"),
    [
        (TINY, 4, "mesh has expert=4; tiny has no experts"),
        (
            replace(TINY, experts=replace(ROUTED, count=6, groups=1, active_groups=1)),
            4,
            "expert=4; it must divide the 6",
        ),
        (replace(TINY, experts=ROUTED), 6, "batch is 6; data x expert=8 chips of the mesh must divide it"),
    ],
)
def test_a_mesh_that_cannot_share_experts_out_is_an_error(config, batch, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        steps.build(config, "decode", batch=batch, context=8, mesh=targets.mesh("host", {"data": 2, "expert": 4}))


@pytest.mark.parametrize(
    ("axes", "shape", "training", "expected"),
    [
        ("BTD", (8, 5, 16), False, (("data", "expert"), None, None)),
        ("BTD", (2, 5, 16), False, (None, None, None)),
        ("EDF", (8, 16, 12), False, ("expert", None, "tensor")),
        ("LEDF", (3, 8, 16, 12), True, (None, "expert", "data", "tensor")),
        ("DR", (16, 8), False, (None, None)),
    ],
)
def test_experts_and_the_batch_lie_over_the_chips_that_share_experts_out(axes, shape, training, expected):
    mesh = targets.mesh("host", {"data": 2, "expert": 2, "tensor": 2})
    assert spec(axes, shape, mesh, training) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("axes", "shape", "training", "expected"),
    [
        ("BTD", (8, 5, 16), False, ("data", None, None)),
        ("BTF", (8, 5, 16), False, ("data", None, "tensor")),
        ("BTV", (8, 5, 33), False, ("data", None, None)),
        ("BKSH", (8, 4, 5, 16), False, ("data", "tensor", None, None)),
        ("BKGTH", (8, 4, 4, 5, 16), False, ("data", "tensor", None, None, None)),
        ("BKGTH", (8, 2, 4, 5, 16), False, ("data", None, "tensor", None, None)),
        ("BKGTH", (7, 2, 3, 5, 16), False, (None,) * 5),
        ("DNH", (16, 4, 8), False, (None, "tensor", None)),
        ("DNH", (16, 4, 8), True, ("data", "tensor", None)),
        ("LDKH", (3, 16, 2, 8), True, (None, "data", None, None)),
        ("VD", (33, 16), True, (None, "data")),
    ],
)
def test_logical_axes_become_mesh_axes(axes, shape, training, expected):
    assert spec(axes, shape, mesh_of(2, 4), training) == PartitionSpec(*expected)


def test_axes_that_do_not_fit_the_shape_are_an_error():
    with pytest.raises(ValueError, match=r"axes 'BTD' name 3 dimensions; the shape \(2, 3\) has 2"):
        spec("BTD", (2, 3), mesh_of(2, 4))


def test_a_mesh_without_an_axis_does_not_split_along_it():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    assert spec("BTF", (8, 5, 16), mesh) == PartitionSpec(None, None, "tensor")


# ---- wrong arguments


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": "fly"}, ["step is 'fly'", "train, prefill, decode, generate"]),
        ({"batch": 0}, ["batch is 0", "at least 1"]),
        ({"batch": -3}, ["batch is -3", "at least 1"]),
        ({"context": 0}, ["context is 0", "tiny takes 1 to 64"]),
        ({"context": -1}, ["context is -1", "tiny takes 1 to 64"]),
        ({"context": 65}, ["context is 65", "tiny takes 1 to 64"]),
        ({"step": "generate", "count": 17}, ["count is 17", "16 positions"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_right(change, words):
    arguments = {"step": "decode", "batch": 2, "context": 16} | change
    with pytest.raises(ValueError) as error:
        steps.build(TINY, arguments.pop("step"), **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_largest_model_takes_no_memory_to_describe():
    step = steps.build(get("llama3-405b"), "decode", batch=8, context=4096)
    assert size_in_bytes(step.arguments[0]) == 2 * 405_853_388_800
