"""Who caused it: names, roles and taxes, on op_names as jax writes them and on compiled programs."""

# ruff: noqa: E501 (op_names and lines of HLO are as long as compilers print them)

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from compiled import ON_ALL, bf16, f32, hlo, i32, module, once, ready
from compiled import bill as bill_of
from jax import lax
from stepbill.model.scopes import COMPONENTS
from stepbill.profiling import targets
from stepbill.profiling.attribution import (
    PERSISTENT,
    ROLES,
    TAXES,
    Blame,
    Dataflow,
    Origin,
    argument_role,
    movement_tax,
    name_blame,
)
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.hlo import Instruction, Module, parse
from stepbill.profiling.names import Names
from stepbill.profiling.walk import itemize_text

NAMED_ROLES = {"params": "weights", "opt_state": "optimizer", "cache": "cache", "tokens": "inputs"}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_name", "component", "phase"),
    [
        ("jit(f)/attention/qkv/dot_general", "attention/qkv", "forward"),
        ("jit(prefill)/mlp/up/jit(silu)/mul", "mlp/up", "forward"),
        ("jit(f)/while/body/closed_call/attention/core/BKGTH,BKSH->BKGTS/dot_general", "attention/core", "forward"),
        ("jit(train)/jvp(logits)/dot_general", "logits", "forward"),
        ("jit(train)/jvp()/while/body/closed_call/mlp/down/dot_general", "mlp/down", "forward"),
        ("jit(train)/transpose(jvp(logits))/dot_general", "logits", "backward"),
        ("jit(train)/transpose(jvp(attention/out))/dot_general", "attention/out", "backward"),
        ("jit(train)/transpose(jvp())/while/body/closed_call/mlp/norm/mul", "mlp/norm", "backward"),
        # A rematerialised forward runs inside the backward's path.
        (
            "jit(train)/transpose(jvp())/while/body/closed_call/checkpoint/rematted_computation/attention/rope/mul",
            "attention/rope",
            "recompute",
        ),
        ("jit(train)/transpose(jvp(checkpoint))/rematted_computation/mlp/up/dot_general", "mlp/up", "recompute"),
        ("jit(f)/vmap(attention/core)/dot_general", "attention/core", "forward"),
        ("jit(f)/vmap(jvp(mlp/up))/mul", "mlp/up", "forward"),
        ("jit(train)/optimizer/mul", "optimizer", "update"),
        ("jit(train)/optimizer/jit(_where)/select_n", "optimizer", "update"),
        # The innermost component counts.
        ("jit(train)/jvp(loss)/logits/dot_general", "logits", "forward"),
        ("jit(f)/vision/attention/core/dot_general", "vision/attention/core", "forward"),
        ("jit(f)/sight/attention/core/dot_general", "attention/core", "forward"),
        # Two sources in one instruction: the first that names one.
        ("jit(f)/mlp/up/mul;jit(f)/mlp/down/add", "mlp/up", "forward"),
        ("jit(f)/broadcast_in_dim;jit(f)/transpose(jvp(mlp/down))/add", "mlp/down", "backward"),
        # Part of a name is not a name, and neither is a group.
        ("jit(f)/attention/qkv_norm/mul", None, "forward"),
        ("jit(f)/myattention/qkv/mul", None, "forward"),
        ("jit(f)/attention/dot_general", None, "forward"),
        # A function's own name is no scope.
        ("jit(embed)/add", None, "forward"),
        ("jit(f)/jit(loss)/mul", None, "forward"),
        ("jit(train)/transpose(jvp())/add_any", None, "backward"),
        ("params['layers']['mlp']['up']", None, "forward"),
        ("", None, "forward"),
    ],
)
def test_names(op_name, component, phase):
    assert name_blame(op_name, Names(COMPONENTS)) == Blame(component, phase)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    "path", ["jit(f)/{}/mul", "jit(f)/jvp({})/mul", "jit(f)/transpose(jvp({}))/mul", "jit(f)/while/body/{}/jit(g)/mul"]
)
def test_every_component_is_found_on_every_kind_of_path(component, path):
    found = name_blame(path.format(component), Names())
    assert found.component == component
    assert found.phase == ("update" if component == "optimizer" else "backward" if "transpose" in path else "forward")


def test_components_of_other_programs():
    names = Names(("encoder", "encoder/attention", "decoder"))
    assert name_blame("jit(f)/encoder/attention/dot_general", names).component == "encoder/attention"
    assert name_blame("jit(f)/encoder/mlp/dot_general", names).component == "encoder"
    assert name_blame("jit(f)/attention/core/dot_general", names).component is None


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("params['layers']['attention']['wq']", "weights"),
        ("opt_state[0].mu['layers']['wq']", "optimizer"),
        ("cache.k", "cache"),
        ("cache.k[3]", "cache"),
        ("tokens", "inputs"),
    ],
)
def test_roles_the_caller_names(path, role):
    assert argument_role(path, NAMED_ROLES) == role


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("params['layers'][0]['wq']", "weights"),
        ("model.layers[0].mlp.up.kernel", "weights"),
        ("state.params['w']", "weights"),
        ("opt_state[0].nu['wq']", "optimizer"),
        ("state.opt_state[0].mu['wq']", "optimizer"),
        ("cache.k", "cache"),
        ("kv['layer_0']", "cache"),
        ("past_key_values[0]", "cache"),
        ("x", None),
        ("tokens", None),
        ("batch['tokens']", None),
    ],
)
def test_roles_nobody_names(path, role):
    assert argument_role(path, {}) == role


def test_a_longer_name_wins_and_a_name_is_whole():
    roles = {"state": "inputs", "state.cache": "cache", "state['p']": "weights"}
    assert argument_role("state.cache.k", roles) == "cache"
    assert argument_role("state['p']['w']", roles) == "weights"
    assert argument_role("state.x", roles) == "inputs"
    assert argument_role("stateful", {"state": "cache"}) is None


def find(module: Module, name: str) -> Instruction:
    return next(i for computation in module.computations.values() for i in computation if i.name == name)


FLOW = """HloModule m, is_scheduled=true, input_output_alias={ {1}: (1, {}, may-alias) }, entry_computation_layout={(f32[4,8]{1,0}, f32[4,8]{1,0})->(f32[8]{0}, f32[4,8]{1,0})}

%body (t: (s32[], f32[4,8], f32[4,8], f32[8])) -> (s32[], f32[4,8], f32[4,8], f32[8]) {
  %t = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %w.in = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %k.in = f32[4,8]{1,0} get-tuple-element(%t), index=2
  %x.in = f32[8]{0} get-tuple-element(%t), index=3
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %row = f32[1,8]{1,0} dynamic-slice(%w.in, %n, %zero), dynamic_slice_sizes={1,8}
  %row.view = f32[8]{0} bitcast(%row)
  %y = f32[8]{0} multiply(%x.in, %row.view), metadata={op_name="jit(f)/while/body/mlp/up/mul"}
  %y.row = f32[1,8]{1,0} bitcast(%y)
  %k.out = f32[4,8]{1,0} dynamic-update-slice(%k.in, %y.row, %n, %zero), metadata={op_name="jit(f)/while/body/attention/cache/dynamic_update_slice"}
  %n.out = s32[] add(%n, %one)
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8]{0}) tuple(%n.out, %w.in, %k.out, %y)
}

%condition (t.1: (s32[], f32[4,8], f32[4,8], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%t.1), index=0
  %four = s32[] constant(4)
  ROOT %less = pred[] compare(%n.1, %four), direction=LT
}

ENTRY %main (w: f32[4,8], k: f32[4,8], x: f32[8]) -> (f32[8], f32[4,8]) {
  %w = f32[4,8]{1,0} parameter(0), metadata={op_name="params"}
  %k = f32[4,8]{1,0} parameter(1), metadata={op_name="cache.k"}
  %x = f32[8]{0} parameter(2), metadata={op_name="tokens"}
  %start = s32[] constant(0)
  %w.copy = f32[4,8]{0,1} copy(%w)
  %w.back = f32[4,8]{1,0} copy(%w.copy)
  %state = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8]{0}) tuple(%start, %w.back, %k, %x)
  %loop = (s32[], f32[4,8]{1,0}, f32[4,8]{1,0}, f32[8]{0}) while(%state), condition=%condition, body=%body
  %x.end = f32[8]{0} get-tuple-element(%loop), index=3
  %k.end = f32[4,8]{1,0} get-tuple-element(%loop), index=2
  ROOT %result = (f32[8]{0}, f32[4,8]{1,0}) tuple(%x.end, %k.end)
}
"""


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("w", Origin("weights")),
        ("w.copy", Origin("weights", "layout")),
        ("w.back", Origin("weights", "layout")),
        ("w.in", Origin("weights", "layout")),
        ("row", Origin("weights", "slice")),
        ("row.view", Origin("weights", "slice")),
        ("k.in", Origin("cache")),
        ("k.out", Origin("cache")),
        ("k.end", Origin("cache")),
        ("start", Origin("constants")),
    ],
)
def test_roles_follow_the_data(name, origin):
    parsed = parse(FLOW)
    assert Dataflow(parsed, NAMED_ROLES).origin(find(parsed, name)) == origin


def test_a_buffer_is_one_however_often_it_is_renamed():
    parsed = parse(FLOW)
    flow = Dataflow(parsed, NAMED_ROLES)
    node = {name: flow.node(find(parsed, name)) for name in ("w", "w.back", "w.in", "k", "k.in", "k.out", "k.end", "y")}
    assert node["k"] == node["k.in"] == node["k.out"] == node["k.end"]
    assert node["w.back"] == node["w.in"] != node["w"]
    assert len({node["k"], node["w"], node["w.in"], node["y"]}) == 4
    assert flow.node(parsed.entry.root, 1) == node["k"]


def test_the_nameless_inherits_from_its_consumer():
    parsed = parse(FLOW)
    flow = Dataflow(parsed, NAMED_ROLES)
    assert flow.blame(find(parsed, "row")).component == "mlp/up"
    found = itemize_text(FLOW, CHIPS["h200"], roles=NAMED_ROLES)
    assert found.unattributed.hbm_bytes <= 4 * 4 * 5  # the counter
    assert found.component("attention/cache").hbm_write["cache"] == 4 * 8 * 4
    assert found.tax("slice").hbm_write == {"weights": 4 * 8 * 4}


# --- taxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "tax"),
    [
        ("ROOT %y = f32[64,32]{0,1} copy(%x)", "layout"),
        ("ROOT %y = f32[32,64]{1,0} transpose(%x), dimensions={1,0}", "layout"),
        ("ROOT %y = f32[1,32]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,32}", "slice"),
        ("ROOT %y = bf16[64,32]{1,0} convert(%x)", "convert"),
        ("ROOT %y = f32[64,32]{1,0} convert(%b)", "convert"),
        ("ROOT %y = f32[64,32]{1,0} convert(%q)", "dequantize"),
        ("ROOT %y = bf16[64,32]{1,0} convert(%q)", "dequantize"),
        # Work, and what is not a tax.
        ("ROOT %y = f32[64,32]{1,0} negate(%x)", None),
        ("ROOT %y = s32[64,32]{1,0} convert(%x)", None),
        ("ROOT %y = f32[64,32]{1,0:S(1)} copy(%x)", None),  # from HBM to VMEM: how a chip reads
        ("ROOT %y = f32[128,32]{1,0} concatenate(%x, %x), dimensions={0}", None),
        ("ROOT %y = f32[64,32]{1,0} add(%x, %x)", None),
        ("ROOT %y = f32[8,32]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,32}", None),
    ],
)
def test_taxes_of_single_instructions(lines, tax):
    text = module(
        "%x = f32[64,32]{1,0} parameter(0)",
        "%b = bf16[64,32]{1,0} parameter(1)",
        "%q = s8[64,32]{1,0} parameter(2)",
        "%i = s32[] parameter(3)",
        lines,
    )
    assert movement_tax(parse(text).entry.root) == tax
    assert tax is None or tax in TAXES


@pytest.mark.parametrize(
    ("inside", "tax"),
    [
        (["ROOT %y = f32[32,64]{1,0} transpose(%p), dimensions={1,0}"], "layout"),
        (["%v = f32[2048]{0} bitcast(%p)", "ROOT %y = f32[2048]{0} copy(%v)"], "layout"),
        (
            [
                "%s = f32[1,32]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,32}",
                "ROOT %y = f32[32]{0} bitcast(%s)",
            ],
            "slice",
        ),
        (
            [
                "%s = f32[1,32]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,32}",
                "ROOT %y = f32[32,1]{1,0} transpose(%s), dimensions={1,0}",
            ],
            "slice",
        ),
        (["ROOT %y = bf16[64,32]{1,0} convert(%p)"], "convert"),
        (
            ["%c = bf16[64,32]{1,0} convert(%p)", "ROOT %y = bf16[32,64]{1,0} transpose(%c), dimensions={1,0}"],
            "convert",
        ),
        (
            [
                "%c = f32[64,32]{1,0} convert(%q)",
                "%s = f32[64,32]{1,0} broadcast(%r), dimensions={1}",
                "%m = f32[64,32]{1,0} multiply(%c, %s)",
                "ROOT %y = bf16[64,32]{1,0} convert(%m)",
            ],
            "dequantize",
        ),
        # The index of a slice may be computed: scalars are no work.
        (
            [
                "%two = s32[] constant(2)",
                "%m = s32[] multiply(%n, %two)",
                "%s = f32[1,32]{1,0} dynamic-slice(%p, %m, %m), dynamic_slice_sizes={1,32}",
                "ROOT %y = f32[32]{0} bitcast(%s)",
            ],
            "slice",
        ),
        (["%c = f32[64,32]{1,0} negate(%p)", "ROOT %y = bf16[64,32]{1,0} convert(%c)"], None),
        (
            [
                "%s = f32[1,32]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,32}",
                "ROOT %y = f32[1,32]{1,0} exponential(%s)",
            ],
            None,
        ),
    ],
)
def test_taxes_of_fusions(inside, tax):
    body = "\n".join("  " + line for line in inside)
    result = inside[-1].split(" = ")[1].split(" ")[0]
    text = f"""HloModule m, is_scheduled=true

%fused (p: f32[64,32], n: s32[], q: s8[64,32], r: f32[32]) -> f32[] {{
  %p = f32[64,32]{{1,0}} parameter(0)
  %n = s32[] parameter(1)
{"  %q = s8[64,32]{1,0} parameter(2)" if "%q" in body else ""}
{"  %r = f32[32]{0} parameter(3)" if "%r" in body else ""}
{body}
}}

ENTRY %main (x: f32[64,32], i: s32[], a: s8[64,32], b: f32[32]) -> f32[] {{
  %x = f32[64,32]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %a = s8[64,32]{{1,0}} parameter(2)
  %b = f32[32]{{0}} parameter(3)
  ROOT %f = {result} fusion(%x, %i, %a, %b), kind=kLoop, calls=%fused
}}
"""
    assert movement_tax(parse(text).entry.root) == tax


# --- compiled programs -----------------------------------------------------------------------------------------------


def two_layers(params, tokens):
    """Enough of a transformer: an embedding, a scan over stacked weights, a loss; every part in its scope."""
    with jax.named_scope("embed"):
        x = params["table"][tokens]

    def layer(x, w):
        with jax.named_scope("mlp/up"):
            hidden = jnp.tanh(x @ w["up"])
        with jax.named_scope("mlp/down"):
            return x + hidden @ w["down"], None

    x, _ = lax.scan(jax.checkpoint(layer), x, params["layers"])
    with jax.named_scope("logits"):
        logits = x @ params["table"].T
    with jax.named_scope("loss"):
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))


L, B, D, F, V = 3, 64, 256, 512, 1024
PARAMS = {"table": f32(V, D), "layers": {"up": f32(L, D, F), "down": f32(L, F, D)}}
OPTIMIZER = optax.adam(1e-3)


def train(params, opt_state, tokens):
    gradients = jax.grad(two_layers)(params, tokens)
    with jax.named_scope("optimizer"):
        updates, opt_state = OPTIMIZER.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


STATE = jax.eval_shape(OPTIMIZER.init, PARAMS)
NUMBERS = V * D + 2 * L * D * F


def train_bill(target, chip=None):
    ready(target)

    def text():
        return targets.compile(jax.jit(train, donate_argnums=(0, 1)), target, PARAMS, STATE, i32(B), runs=False).text

    return itemize_text(once(f"two-layers-{target}", text), chip or targets.chip(target), roles=NAMED_ROLES)


@ON_ALL
def test_phases_of_a_train_step(target):
    found = train_bill(target)
    once = 2 * B * D * F * L
    assert found.component("mlp/up", "forward").matmul == once
    assert found.component("mlp/up", "recompute").matmul == once
    assert found.component("mlp/up", "backward").matmul == 2 * once
    assert found.component("mlp/down", "forward").matmul == once
    assert found.component("mlp/down", "recompute").matmul == 0  # nothing needs the sum again
    assert found.component("mlp/down", "backward").matmul == 2 * once
    assert found.component("logits", "forward").matmul == 2 * B * D * V
    assert found.component("logits", "backward").matmul == 2 * 2 * B * D * V
    assert found.unattributed.matmul == 0
    assert {row.phase for row in found.rows if row.component == "optimizer"} == {"update"}
    assert found.unattributed.flops <= 0.01 * found.total.flops


@ON_ALL
def test_roles_of_a_train_step(target):
    found = train_bill(target, replace(targets.chip(target), l2_bytes=None))  # a cache would serve some of it
    update = found.component("optimizer")
    size = 4 * NUMBERS
    # Adam: two moments in, two out; the parameters in and out; the gradient in.
    assert update.hbm_write["optimizer"] == pytest.approx(2 * size, rel=0.01)
    assert update.hbm_write["weights"] == pytest.approx(size, rel=0.01)
    if target == "h200":
        assert update.hbm_read["optimizer"] == pytest.approx(2 * size, rel=0.01)
        assert update.hbm_read["weights"] == pytest.approx(size, rel=0.01)
        assert update.hbm_read["gradients"] == pytest.approx(size, rel=0.01)
    elif target == "host":  # where two kernels read the moments, one for the state and one for the parameters
        assert 2 * size * 0.99 <= update.hbm_read["optimizer"] <= 4 * size * 1.01
    else:  # v5e: what the backward pass left in VMEM is not read again
        assert update.hbm_read["optimizer"] == pytest.approx(2 * size, rel=0.01)
        assert update.hbm_read["weights"] <= size * 1.01
    outside = [row for row in found.rows if row.component != "optimizer"]
    assert sum(row.work.hbm_read.get("optimizer", 0) for row in outside) <= 0.01 * size
    assert sum(row.work.hbm_write.get("gradients", 0) for row in outside) > 0 or target == "v5e"
    for row in found.rows:
        assert set(row.work.hbm_read) | set(row.work.hbm_write) <= set(ROLES)


@ON_ALL
def test_gradients_are_written_by_the_backward_pass_alone(target):
    for row in train_bill(target).rows:
        if row.phase in ("forward", "recompute"):
            assert not row.work.hbm_write.get("gradients", 0), row


@ON_ALL
def test_a_donated_argument_keeps_its_role_to_the_end(target):
    def step(cache, params, tokens):
        with jax.named_scope("attention/cache"):
            cache = lax.dynamic_update_slice(cache, params[tokens][None], (tokens, 0))
        with jax.named_scope("attention/core"):
            return cache, jnp.tanh(cache @ params[0])

    found = bill_of(target, step, f32(1024, 512), f32(8, 512), i32(), donate=(0,), roles=NAMED_ROLES)
    assert found.component("attention/cache").hbm_write["cache"] == 512 * 4
    assert found.component("attention/core").hbm_read["cache"] == 1024 * 512 * 4
    cache = found.group("cache")
    assert cache.hbm_read["cache"] + cache.hbm_write["cache"] == 512 * 4 + 1024 * 512 * 4
    assert not found.group("attention").hbm_read.get("cache")


@ON_ALL
def test_one_fusion_may_serve_two_components(target):
    def f(params, tokens):
        with jax.named_scope("mlp/up"):
            x = jnp.tanh(tokens)
        with jax.named_scope("mlp/down"):
            return x * params

    found = bill_of(target, f, f32(512, 512), f32(512, 512), roles=NAMED_ROLES)
    n = 512 * 512
    up, down = found.component("mlp/up"), found.component("mlp/down")
    assert up.flops - down.flops >= 0 and down.elementwise == n
    assert down.hbm_read == {"weights": 4 * n}
    assert up.hbm_read == {"inputs": 4 * n}
    assert down.hbm_write == {"activations": 4 * n}
    assert not found.unattributed


def test_persistent_roles_are_roles():
    assert set(ROLES) >= PERSISTENT


def test_scan_of_stacked_weights_keeps_the_role_of_the_stack():
    text = hlo(
        "h200",
        lambda params, tokens: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), tokens, params)[0],
        bf16(4, 128, 128),
        bf16(8, 128),
    )
    total = itemize_text(text, CHIPS["h200"], roles=NAMED_ROLES).total
    assert total.hbm_read["weights"] >= 4 * 128 * 128 * 2
    assert total.hbm_read.get("activations", 0) < 4 * 128 * 128 * 2
