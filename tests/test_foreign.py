"""Programs of other people: named by what their frameworks write, by their arguments, or by the dataflow."""

import gzip
import json
import re
from functools import cache, partial

import equinox as eqx
import foreign
import jax
import jax.numpy as jnp
import pytest
from compiled import ON_ALL, TARGETS, bf16, f32, i32, once, ready
from flax import nnx
from foreign import NO_TRANSFORMERS, STYLES, matmul_flops
from jax.ad_checkpoint import checkpoint_name
from stepbill.experiments import bill as command
from stepbill.model.scopes import COMPONENTS
from stepbill.profiling import Bill, itemize, targets
from stepbill.profiling.names import SOURCES, Names, TableError, check_table
from stepbill.profiling.walk import itemize_text

ON_HOST = "host"
WITHOUT_NAMES = ("numbered", "plain", "scanned", "decode")


@cache
def program(style: str) -> foreign.Program:
    return (STYLES | NO_TRANSFORMERS)[style]()


@cache
def text(style: str, target: str) -> str:
    """Optimised HLO of a program, compiled once for all tests."""

    def compiled() -> str:
        made = program(style)
        return targets.compile(
            jax.jit(made.step, donate_argnums=made.donated), target, *made.arguments, runs=False
        ).text

    ready(target)
    return once(f"foreign-{style}-{target}", compiled)


@cache
def bill(style: str, target: str, named: bool = True) -> Bill:
    written = text(style, target)
    if not named:
        written = re.sub(r", metadata=\{[^{}]*\}", "", written)
        assert "op_name" not in written
    return itemize_text(written, targets.chip(target))


def of_products(found: Bill) -> dict[str, int]:
    components = dict.fromkeys(row.component for row in found.rows)
    matmul = {component: sum(r.work.matmul for r in found.rows if r.component == component) for component in components}
    return {component: flops for component, flops in matmul.items() if flops}


def expected(style: str) -> dict[str, int]:
    if style == "decode":
        return matmul_flops(program(style), queries=1, keys=foreign.S, passes=1)
    flops = matmul_flops(program(style))
    if style == "scanned":  # forward again, but for the last product, whose result is not wanted
        again = {name: n // 3 for name, n in flops.items() if name not in ("mlp/down", "logits")}
        return {name: n + again.get(name, 0) for name, n in flops.items()}
    return flops


# --- every style, on every target ------------------------------------------------------------------------------------


# A GPU and a TPU take turns.
@pytest.mark.parametrize(
    ("style", "target"),
    [(style, target) for n, style in enumerate(STYLES) for target in ("host", ("h200", "v5e")[n % 2])],
)
def test_every_product_is_billed_to_its_component(style, target):
    found = bill(style, target)
    assert of_products(found) == expected(style)
    assert found.unattributed.matmul == 0
    assert found.unattributed.hbm_bytes <= 0.03 * found.total.hbm_bytes


@ON_ALL
@pytest.mark.parametrize("style", WITHOUT_NAMES)
def test_without_any_names_the_dataflow_tells(style, target):
    found = bill(style, target, named=False)
    assert of_products(found) == expected(style)
    assert {row.source for row in found.rows} == {"inferred"}
    assert any(row.component == "embed" for row in found.rows)
    assert found.unattributed.hbm_bytes <= 0.03 * found.total.hbm_bytes


@ON_ALL
@pytest.mark.parametrize("named", [True, False])
def test_an_argument_updated_by_a_slice_in_place_is_a_cache(named, target):
    found = bill("decode", target, named)
    held = 2 * foreign.B * foreign.N * foreign.S * foreign.H * 4
    assert found.total.hbm_read["cache"] >= held
    assert found.group("cache").hbm_read["cache"] == found.total.hbm_read["cache"]
    assert "cache" not in bill("plain", target, named).total.hbm_read


@ON_ALL
def test_what_a_loop_writes_slices_of_and_attends_to_is_a_cache(target):
    made = program("decode")
    params, caches, tokens, _ = made.arguments

    def generate(params, tokens):
        def one(carry, position):
            logits, caches = made.step(params, carry[0], carry[1], position)
            return (caches, jnp.argmax(logits, -1)), None

        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), caches)
        return jax.lax.scan(one, (empty, tokens), jnp.arange(4))[0][1]

    ready(target)
    found = itemize(jax.jit(generate), params, tokens, target=target)
    assert of_products(found) == {component: 4 * n for component, n in expected("decode").items()}
    assert any(row.component == "attention/cache" for row in found.rows)
    if target != "v5e":  # which has it on the chip
        assert found.total.hbm_write["cache"] >= 2 * foreign.B * foreign.N * foreign.S * foreign.H * 4


@ON_ALL
def test_a_cache_is_written_by_the_cache_also_in_a_module_of_attention(target):
    def attend(cache, weight, x, position):
        with jax.named_scope("attention"):
            new = jnp.einsum("bd,dnh->bnh", x, weight)
            cache = jax.lax.dynamic_update_slice(cache, new[:, None], (0, position, 0, 0))
            s = jnp.where(jnp.arange(256) <= position, jnp.einsum("bnh,bsnh->bns", new, cache), -1e9)
            return cache, jnp.einsum("bns,bsnh->bnh", jax.nn.softmax(s), cache)

    ready(target)
    arguments = f32(8, 256, 16, 64), f32(128, 16, 64), f32(8, 128), i32()
    found = itemize(jax.jit(attend, donate_argnums=0), *arguments, target=target)
    assert "attention" not in {row.component for row in found.rows if row.work.hbm_bytes}
    assert of_products(found) == {"attention/qkv": 2 * 8 * 128 * 1024, "attention/core": 4 * 8 * 256 * 1024}
    written = sum(row.work.hbm_write.get("cache", 0) for row in found.rows if row.component == "attention/cache")
    assert 4 * 8 * 1024 <= written <= (4 * 8 * 1024 if target != "host" else 4 * 8 * 1024 * 256)


def test_a_product_with_weights_of_several_parts_is_of_the_largest():
    """A GPU's compiler makes one product of several small ones that read the same: of the router and the experts."""

    def layer(params, x):
        moe = params["moe"]
        return jax.nn.softmax(x @ moe["router"]), x @ moe["shared_experts"]["wi_0"]

    ready("h200")
    params = {"moe": {"router": f32(256, 16), "shared_experts": {"wi_0": f32(256, 240)}}}
    found = itemize(jax.jit(layer), params, f32(128, 256), target="h200")
    assert of_products(found) == {"moe/shared": 2 * 128 * 256 * 256}


def test_a_product_whose_parts_are_added_up_is_one_also_in_another_form():
    """A GPU splits the sum of the way down of few rows over its cores, and turns the parts before it adds them."""

    def block(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    ready("h200")
    params = f32(256, 2048), f32(2048, 256)
    found = itemize(jax.jit(block), params, f32(8, 1, 256), target="h200")
    assert of_products(found) == dict.fromkeys(("mlp/up", "mlp/down"), 2 * 8 * 256 * 2048)


@ON_ALL
def test_only_the_product_with_a_table_of_rows_is_the_logits(target):
    """Not that of what else is embedded, such as the patches of an image beside the words."""

    def model(params, tokens, patches):
        words, patches = params["embedder"]["table"][tokens], patches @ params["embedder"]["input_projection"]
        return jnp.concatenate([patches, words]) @ params["embedder"]["table"].T

    ready(target)
    params = {"embedder": {"table": f32(160, 32), "input_projection": f32(48, 32)}}
    found = itemize(jax.jit(model), params, i32(16), f32(64, 48), target=target)
    assert of_products(found) == {"embed": 2 * 64 * 48 * 32, "logits": 2 * 80 * 32 * 160}


@ON_ALL
def test_the_way_down_of_a_named_way_up_is_told(target):
    """Of Gemma's, whose products are called gating_einsum and linear."""

    def block(params, x):
        with jax.named_scope("mlp"):
            gate, up = jnp.einsum("bd,nfd->nbf", x, params["mlp"]["gating_einsum"])
            return jax.nn.gelu(gate) * up @ params["mlp"]["linear"]

    ready(target)
    params = {"mlp": {"gating_einsum": f32(2, 192, 64), "linear": f32(192, 64)}}
    found = itemize(jax.jit(block), params, f32(128, 64), target=target)
    assert of_products(found) == {"mlp/up": 4 * 128 * 64 * 192, "mlp/down": 2 * 128 * 64 * 192}


@ON_ALL
def test_attention_whose_sum_divides_its_result_is_attention(target):
    """A GPU computes the exponential twice, for the sum and for the product, which then never meet before."""

    def attend(params, x):
        q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in params)
        s = jnp.einsum("btnh,bsnh->bnts", q, k)
        e = jnp.exp(s - s.max(-1, keepdims=True))
        return jnp.einsum("bnts,bsnh->btnh", e, v) / e.sum(-1).transpose(0, 2, 1)[..., None]

    ready(target)
    found = itemize(jax.jit(attend), [f32(128, 8, 64)] * 3, f32(2, 256, 128), target=target)
    products = {"attention/qkv": 3 * 2 * 512 * 128 * 512, "attention/core": 4 * 2 * 256 * 256 * 512}
    assert of_products(found) == products


def test_what_a_loop_saves_for_the_way_back_is_no_cache():
    def loss(weights, x):
        @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("saved"))
        def layer(x, w):
            q, k, v, out = w
            keys, values = (checkpoint_name(x @ one, "saved") for one in (k, v))
            return x + jax.nn.softmax((x @ q) @ keys.T) @ values @ out, None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0] ** 2)

    ready("host")
    found = itemize(jax.jit(jax.grad(loss)), [f32(3, 64, 64)] * 4, f32(96, 64), target="host")
    assert any(row.component == "attention/core" for row in found.rows)
    assert "cache" not in found.total.hbm_read and "cache" not in found.total.hbm_write


@ON_ALL
@pytest.mark.parametrize("scores", [False, True])
def test_what_chooses_the_next_token_is_no_loss(scores, target):
    """In a loop the logits lead to the products of the next token, also by way of their softmax."""
    made = program("decode")
    params, caches, tokens, _ = made.arguments

    def generate(params, caches, tokens):
        def one(carry, position):
            caches, tokens, score = carry
            logits, caches = made.step(params, caches, tokens, position)
            if scores:
                logits = score[:, None] + jax.nn.log_softmax(logits)
            return (caches, jnp.argmax(logits, -1), logits.max(-1)), None

        return jax.lax.scan(one, (caches, tokens, jnp.zeros(foreign.B)), jnp.arange(4))[0]

    ready(target)
    found = itemize(jax.jit(generate, donate_argnums=1), params, caches, tokens, target=target)
    assert of_products(found) == {component: 4 * n for component, n in expected("decode").items()}
    assert found.component("sampling").elementwise > 4 * foreign.B * foreign.V
    assert not found.component("loss") and not found.unattributed.elementwise


@ON_ALL
def test_a_cache_whose_place_is_chosen_with_the_token_is_no_choice(target):
    """Where a sequence that is done stays where it is; each compiler copies the cache to where products want it."""
    heads = foreign.N // 2

    def step(params, caches, state):
        last, done, at = state
        x, turn, written = params["wte"][last], jnp.cos(at)[:, None, None, None], []
        for layer, (k, v) in zip(params["layers"], caches, strict=True):
            q = turn * jnp.einsum("bd,dngh->bngh", x, layer["wq"])
            new_k, new_v = (jnp.einsum("bd,dnh->bnh", x, layer[name])[:, None] for name in ("wk", "wv"))
            k = jax.lax.dynamic_update_slice(k, turn * new_k, (0, at[0], 0, 0))
            v = jax.lax.dynamic_update_slice(v, new_v, (0, at[0], 0, 0))
            written.append((k, v))
            mask = (jnp.arange(foreign.S)[None] <= at[:, None])[:, None, None]
            s = jax.nn.softmax(jnp.where(mask, jnp.einsum("bngh,bsnh->bngs", q, k), -1e9))
            x = x + jnp.einsum("bngs,bsnh,nghd->bd", s, v, layer["wo"])
        token = jnp.argmax(x @ params["lm_head"], -1)
        return written, (token, done | (token == 1), at + ~done)

    narrow, wide = f32(foreign.D, heads, foreign.H), (foreign.D, heads, 2, foreign.H)
    layer = {"wq": f32(*wide), "wk": narrow, "wv": narrow, "wo": f32(*wide[1:], foreign.D)}
    params = {"wte": f32(foreign.V, foreign.D), "layers": [layer], "lm_head": f32(foreign.D, foreign.V)}
    cache = f32(foreign.B, foreign.S, heads, foreign.H)
    state = i32(foreign.B), jax.ShapeDtypeStruct((foreign.B,), bool), i32(foreign.B)
    ready(target)
    found = itemize(jax.jit(step, donate_argnums=(1, 2)), params, [(cache, cache)], state, target=target)
    assert "cache" not in found.component("sampling").hbm_read | found.component("sampling").hbm_write
    assert found.component("attention/cache").hbm_write["cache"] and found.component("sampling").elementwise


def test_a_loss_that_changes_the_embedding_is_no_choice_of_a_token():
    """By a bias of the logits, whose gradient is no product, and the norm of all gradients together."""

    def loss(params, tokens):
        table, weight, bias = params
        return foreign.cross_entropy(jnp.tanh(table[tokens]) @ weight + bias[None, None], tokens)

    def one(params, tokens):
        gradients = jax.grad(loss)(params, tokens)
        scale = sum(jnp.sum(g * g) for g in gradients)
        return jax.tree.map(lambda p, g: p - g / scale, params, gradients), None

    params = f32(160, 32), f32(32, 160), f32(160)
    steps = jax.jit(lambda params, tokens: jax.lax.scan(one, params, tokens)[0], donate_argnums=0)
    found = itemize(steps, params, i32(4, 2, 16))
    assert found.component("loss").transcendental and not found.component("sampling")


@pytest.mark.parametrize("target", ["host", "h200"])  # a TPU keeps arrays as small as these in VMEM
def test_weights_and_what_updates_them(target):
    for named in (True, False):
        found = bill("linen", target, named)
        assert found.component("optimizer", "update").hbm_read["optimizer"] > 0
        assert found.component("loss")
    weights = sum(leaf.size * 4 for leaf in jax.tree.leaves(program("linen").arguments[0]))
    written = bill("linen", target).component("optimizer").hbm_write["optimizer"]
    assert written - 2 * weights in (0, 4)  # both moments; and the count of steps, where that is not elsewhere


@ON_ALL
def test_products_of_gradients_are_the_optimizers(target):
    """Muon's, which make the rows of each update orthogonal: also of the embedding, whose gradient is no product."""
    rows, width, hidden, vocabulary = 64, 32, 96, 160

    def loss(params, tokens):
        table, up, down = params
        x = table[tokens]
        return jnp.sum(jnp.square(x + jax.nn.relu(x @ up) @ down))

    def orthogonal(x):
        x = x / jnp.sqrt(jnp.sum(x * x))
        for _ in range(2):
            x = 1.5 * x - 0.5 * (x @ x.T) @ x
        return x

    def step(params, tokens):
        gradients = jax.grad(loss)(params, tokens)
        return jax.tree.map(lambda p, g: p - orthogonal(g), params, gradients)

    shapes = (vocabulary, width), (width, hidden), (hidden, width)
    ready(target)
    found = itemize(jax.jit(step, donate_argnums=0), tuple(f32(*shape) for shape in shapes), i32(rows), target=target)
    assert of_products(found) == {
        "mlp/up": 3 * 2 * rows * width * hidden,
        "mlp/down": 3 * 2 * rows * hidden * width,
        "optimizer": sum(2 * 2 * 2 * first * first * second for first, second in shapes),
    }
    assert {row.phase for row in found.rows if row.component == "optimizer"} == {"update"}


@ON_ALL
@pytest.mark.parametrize("style", ["linen", "haiku", "equinox", "nnx_split", "plain"])
def test_norms_are_told_apart_by_what_they_lead_to(style, target):
    found = bill(style, target)
    for component in ("attention/norm", "mlp/norm", "final_norm"):
        assert found.component(component, "forward").elementwise > 0, component


@ON_ALL
@pytest.mark.parametrize("style", ["nnx_split", "plain"])
def test_the_gradient_of_rows_that_were_looked_up_is_the_embeddings(style, target):
    gradient = bill(style, target).component("embed", "backward")
    assert gradient.elementwise >= foreign.B * foreign.T * foreign.D
    assert target == "v5e" or gradient.hbm_write["gradients"] >= 4 * foreign.V * foreign.D


def test_a_norm_computed_again_is_the_same_norm():
    """Also of queries and keys, which leads to no projection."""

    def rms(x):
        with jax.named_scope("rms_norm"):
            return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    @jax.checkpoint
    def attend(weights, x):
        q, k, v, out = weights
        h = rms(x)
        return x + jax.nn.softmax(rms(h @ q) @ rms(h @ k).T) @ (h @ v) @ out

    def loss(weights, x):
        return jnp.sum(attend(weights, attend(weights, x)) ** 2)

    found = itemize(jax.jit(jax.grad(loss)), [f32(64, 64)] * 4, f32(96, 64))
    again = {row.component: row.work.transcendental for row in found.rows if row.phase == "recompute"}
    assert again["attention/norm"] and again["attention/qkv"] and not again.get("norm")


def test_a_norm_is_told_across_what_has_no_name():
    """Such as the conversions that a CPU, which has no bfloat16, writes between a norm and its product."""

    def loss(weights, x):
        @jax.checkpoint
        def layer(x, pair):
            with jax.named_scope("rms_norm"):
                wide = x.astype(jnp.float32)
                h = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)
            return x + jax.nn.gelu(h @ pair[0]) @ pair[1], None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32) ** 2)

    found = itemize(jax.jit(jax.grad(loss)), (bf16(3, 64, 192), bf16(3, 192, 64)), bf16(96, 64))
    told = {row.phase for row in found.rows if row.component == "mlp/norm" and row.work.elementwise}
    assert told == {"forward", "recompute", "backward"}
    untold = sum(found.component("norm", phase).elementwise for phase in told)
    assert untold < 0.1 * found.component("mlp/norm").elementwise


@ON_ALL
@pytest.mark.parametrize("style", NO_TRANSFORMERS)
@pytest.mark.parametrize("named", [True, False])
def test_nothing_is_invented(style, named, target):
    found = bill(style, target, named)
    components = {row.component for row in found.rows}
    assert not {one for one in components if one.startswith(("attention", "mlp", "moe", "logits", "embed"))}
    assert "cache" not in found.total.hbm_read | found.total.hbm_write


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("style", "sources"),
    [
        ("linen", {"attention/qkv": "synonym", "mlp/down": "inferred", "optimizer": "inferred"}),
        ("haiku", {"attention/qkv": "synonym", "mlp/down": "inferred", "attention/norm": "synonym"}),
        ("classes", {"attention/qkv": "argument", "attention/out": "argument", "mlp/down": "argument"}),
        ("equinox", {"attention/qkv": "argument", "mlp/down": "inferred", "logits": "argument"}),
        ("nnx_split", {"attention/qkv": "argument", "mlp/up": "argument", "attention/core": "inferred"}),
        ("numbered", {"attention/qkv": "inferred", "mlp/up": "inferred", "attention/core": "inferred"}),
    ],
)
def test_a_row_says_what_names_it(style, sources):
    found = bill(style, ON_HOST)
    rows = {row.component: row.source for row in found.rows if row.phase in ("forward", "update") and row.tax is None}
    assert {component: rows[component] for component in sources} == sources
    assert set(rows.values()) <= set(SOURCES)
    note = next(note for note in found.notes if "told apart by" in note)
    assert "the shape of the dataflow" in note
    assert Bill.from_json(json.loads(found.dumps())).rows == found.rows
    assert ("attention/core *" in str(found)) == (rows["attention/core"] == "inferred")


def test_a_bill_saved_before_there_were_sources_is_read():
    saved = json.loads(bill("plain", ON_HOST).dumps())
    for row in saved["rows"]:
        del row["source"]
    assert {row.source for row in Bill.from_json(saved).rows} == {"scope"}


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op_name", "component"),
    [
        ("jit(f)/GPT/h_3/attn/c_attn/dot_general", "attention/qkv"),
        ("jit(f)/GPT/h_3/attn/c_proj/dot_general", "attention/out"),
        ("jit(f)/GPT/h_3/mlp/c_fc/dot_general", "mlp/up"),
        ("jit(f)/GPT/h_3/mlp/c_proj/dot_general", "mlp/down"),
        ("jit(f)/GPT/h_3/ln_1/mul", "attention/norm"),
        ("jit(f)/GPT/h_3/ln_2/mul", "mlp/norm"),
        ("jit(f)/model/layers_0/self_attn/q_proj/dot_general", "attention/qkv"),
        ("jit(f)/model/layers_0/self_attn/q_norm/mul", "attention/qkv"),
        ("jit(f)/model/layers_0/self_attn/rotary_emb/mul", "attention/rope"),
        ("jit(f)/model/layers_0/self_attn/o_proj/dot_general", "attention/out"),
        ("jit(f)/model/layers_0/post_attention_layernorm/mul", "mlp/norm"),
        ("jit(f)/model/layers_0/block_sparse_moe/gate/dot_general", "moe/router"),
        ("jit(f)/model/layers_0/block_sparse_moe/experts/w1/dot_general", "moe/experts"),
        ("jit(f)/model/layers_0/mlp/shared_expert/up_proj/dot_general", "moe/shared"),
        ("jit(f)/bert/encoder/layer/0/attention/self/query/dot_general", "attention/qkv"),
        ("jit(f)/bert/encoder/layer/0/attention/output/dense/dot_general", "attention/out"),
        ("jit(f)/t5/DenseReluDense/wi_0/dot_general", "mlp/up"),
        ("jit(f)/t5/DenseReluDense/wo/dot_general", "mlp/down"),
        ("jit(f)/t5/SelfAttention/o/dot_general", "attention/out"),
        ("jit(f)/LM/wte.attend/dot_general", "logits"),
        ("jit(f)/LM/Block_0/FeedForward_0/mul", "mlp"),
        ("jit(f)/LM/Block_0/LayerNorm_0/mul", "norm"),
        ("jit(f)/jit(flash_attention)/dot_general", "attention/core"),
        ("jit(f)/transpose(jvp(LM))/Block_0/MultiHeadDotProductAttention_0/key/dot_general", "attention/qkv"),
        # Gemma's, MaxText's, and those of diffusion models.
        ("jit(f)/Transformer/layer_0/attn/q_einsum/...d,nh->...nh/dot_general", "attention/qkv"),
        ("jit(f)/Transformer/layer_0/attn/attn_vec_einsum/dot_general", "attention/out"),
        ("jit(f)/Transformer/layer_0/mlp/gating_einsum/dot_general", "mlp/up"),
        ("jit(f)/decoder/layers/pre_self_attention_layer_norm/mul", "attention/norm"),
        ("jit(f)/decoder/layers/post_self_attention_layer_norm/mul", "mlp/norm"),
        ("jit(f)/decoder/layers/post_self_attention_norm/mul", "attention/norm"),
        ("jit(f)/decoder/decoder_norm/mul", "final_norm"),
        ("jit(f)/decoder/logitdense/dot_general", "logits"),
        ("jit(f)/moe_layers/self_attention/wkv_b/dot_general", "attention/qkv"),
        ("jit(f)/model/layers_3/self_attn/kv_a_proj_with_mqa/dot_general", "attention/qkv"),
        ("jit(f)/transformer_blocks_0/attn1/to_k/dot_general", "attention/qkv"),
        ("jit(f)/transformer_blocks_0/attn2/to_out_0/dot_general", "attention/out"),
        ("jit(f)/double_blocks_1/img_attn_qkv/dot_general", "attention/qkv"),
        ("jit(f)/vision/patch_embedding/conv_general_dilated", "embed"),
        # A method of a norm is a part of it.
        ("jit(f)/LM/h_0/attention_norm/attention_norm._norm/mul", "attention/norm"),
        ("jit(f)/LM/h_0/ffn_norm/ffn_norm._norm/reduce_sum", "mlp/norm"),
        ("jit(f)/LM/ln_f/ln_f._norm/reduce_sum", "final_norm"),
        ("jit(f)/LM/ln_f/q_proj._norm/reduce_sum", "final_norm"),
        # A class says nothing of which of its layers it is, nor does a number.
        ("jit(f)/LlamaDecoderLayer/Attention/Linear/contract embed -> heads, head_size/dot_general", "attention"),
        ("jit(f)/Block_0/SelfAttention_0/Dense_0/dot_general", "attention"),
        ("jit(f)/block/multi_head_attention/linear/dot_general", "attention/out"),
        ("jit(f)/block/self_attention/linear_2/dot_general", "attention"),
        ("jit(f)/tok/dot_general", None),
        # One of our scopes is the word, but for what a loss runs.
        ("jit(f)/jvp(loss)/LM/attn/q_proj/dot_general", "attention/qkv"),
        ("jit(f)/attention/core/gate_proj/dot_general", "attention/core"),
        ("jit(f)/optimizer/attn/q_proj/mul", "optimizer"),
        # The program's own name, and those of functions that say nothing, say nothing.
        ("jit(attention)/dot_general", None),
        ("jit(f)/jit(norm)/reduce_sum", None),
        ("jit(f)/jit(loss)/mul", None),
        ("jit(f)/Dense_0/dot_general", None),
        ("jit(f)/conv/conv_general_dilated", None),
        ("params['attn']['q_proj']", None),
    ],
)
def test_synonyms(op_name, component):
    found = Names().of_operation(op_name)
    assert (found and found.component) == component


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("params['params']['Block_0']['MultiHeadDotProductAttention_0']['query']['kernel']", "attention/qkv"),
        ("params['transformer/block_0/multi_head_attention/linear']['w']", "attention/out"),
        ("model.layers[3].attn.out_proj.weight", "attention/out"),
        ("state['layers'][0]['attn']['out']['kernel'].value", "attention/out"),
        ("state['layers'][0]['attn']['value']['kernel'].value", "attention/qkv"),
        ("params[0].attn.value", "attention/qkv"),
        ("params['layers']['moe']['gate']", "moe/experts"),
        ("params['layers']['block_sparse_moe']['gate']['kernel']", "moe/router"),
        ("weights['lm_head']", "logits"),
        ("w", None),
        ("params[0][1]", None),
    ],
)
def test_arguments(path, component):
    found = Names().of_argument(path)
    assert (found and found.component) == component


@pytest.mark.parametrize("component", COMPONENTS)
def test_our_own_names_mean_themselves(component):
    assert Names().of_operation(f"jit(f)/{component}/dot_general") == (component, "scope")


# --- a user's own table ----------------------------------------------------------------------------------------------

TABLE = {"mixer/in_map": "attention/qkv", "mixer/*_map": "attention/out", "squash": "my/nonlinearity"}


def strange(params, x):
    with jax.named_scope("mixer"):
        with jax.named_scope("in_map"):
            x = x @ params[0]
        with jax.named_scope("out_map"):
            x = x @ params[1]
    with jax.named_scope("squash"):
        return jax.numpy.tanh(x)


STRANGE = strange, ([f32(32, 64), f32(64, 16)], f32(8, 32))


def test_a_table_goes_before_all_else():
    found = itemize(jax.jit(strange), *STRANGE[1], components=TABLE)
    assert of_products(found) == {"attention/qkv": 2 * 8 * 32 * 64, "attention/out": 2 * 8 * 64 * 16}
    assert found.component("my/nonlinearity").transcendental == 8 * 16
    assert of_products(itemize(jax.jit(strange), *STRANGE[1])) == {}
    again = Names({"attention/core": "mine"})
    assert again.of_operation("jit(f)/attention/core/dot_general") == ("mine", "synonym")
    assert again.of_operation("jit(f)/attention/out/dot_general") == ("attention/out", "scope")


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_a_table_from_a_file(suffix, tmp_path, capsys):
    dump, table = tmp_path / "dump.txt", tmp_path / f"table.{suffix}"
    dump.write_text(jax.jit(strange).lower(*STRANGE[1]).compile().as_text())
    lines = [f'"{pattern}" = "{component}"' for pattern, component in TABLE.items()]
    table.write_text(json.dumps(TABLE) if suffix == "json" else "\n".join(lines))
    assert command.main([f"--hlo={dump}", f"--components={table}", "--format=json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["component"] for row in rows} == {"attention/qkv", "attention/out", "my/nonlinearity"}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "not JSON: "),
        ("[1]", "it must map patterns to components, as in .*"),
        ('{"a b": "mlp"}', "pattern 'a b': it must be names with / between, .*"),
        ('{"a": 3}', "pattern 'a' has component 3; it must be such as mlp/up"),
        ('{"a": "\\u001b[2J"}', r"pattern 'a' has component '\\x1b\[2J'; .*"),
    ],
)
def test_a_wrong_table_is_one_line(written, said, tmp_path, capsys):
    table = tmp_path / "table.json"
    table.write_text(written)
    assert command.main([f"--hlo={table}", f"--components={table}"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert re.match(rf"stepbill: --components={re.escape(str(table))}: {said}", err)


def test_a_table_that_is_not_there_or_has_no_program(tmp_path, capsys):
    missing = tmp_path / "no.json"
    assert command.main([f"--hlo={__file__}", f"--components={missing}"]) == 2
    assert capsys.readouterr().err == f"stepbill: --components={missing}: cannot read it: no such file or directory\n"
    assert command.main(["--model=nano", f"--components={missing}"]) == 2
    assert "given by --hlo" in capsys.readouterr().err
    with pytest.raises(TableError, match="pattern 3"):
        check_table({3: "mlp"})


# --- every form of a program -----------------------------------------------------------------------------------------


def test_every_form_of_a_program_has_the_same_bill(tmp_path):
    step, arguments, donated = program("decode")[:3]
    jitted = jax.jit(step, donate_argnums=donated)
    lowered = jitted.lower(*arguments)
    dumped = tmp_path / "dump"
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(dumped), "xla_dump_hlo_as_text": True})
    written = compiled.as_text() or ""
    plain, packed = tmp_path / "module.txt", tmp_path / "module.txt.gz"
    plain.write_text(written)
    packed.write_bytes(gzip.compress(written.encode()))
    (first, *others) = [
        itemize(jitted, *arguments),
        *map(itemize, (lowered, compiled, written, str(plain), plain, packed, dumped)),
    ]
    assert of_products(first) == expected("decode")
    for other in others:
        assert other.rows == first.rows
        assert (other.unattributed, other.total) == (first.unattributed, first.total)


@ON_ALL
@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_what_a_library_has_jitted_is_billed_as_it_is(library, target):
    """With the modules themselves for arguments, which hold what is no array, and inputs of which there is a shape."""
    ready(target)
    if library == "nnx":
        model = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
        jitted = nnx.jit(lambda model, x: model(x))
    else:
        model = eqx.nn.MLP(64, 32, 128, 1, use_bias=False, use_final_bias=False, key=jax.random.key(0))
        jitted = eqx.filter_jit(lambda model, x: (jax.vmap(model)(x), "no array"))
    found = itemize(jitted, model, f32(8, 64), target=target)
    found.check()
    assert found.total.matmul == 2 * 8 * (64 * 32 if library == "nnx" else 64 * 128 + 128 * 32)
    assert found.total.hbm_read["weights"] >= 4 * (64 * 32 if library == "nnx" else 64 * 128 + 128 * 32)
    assert not found.unknown


FEED_FORWARD = (f32(64, 128), f32(128, 512), f32(1, 512), f32(512, 128), f32(1, 128))


@ON_ALL
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_a_feed_forward_is_found_whatever_a_product_has_taken_in(activation, triton, target):
    """A GPU's libraries add biases and residuals to a product and apply functions to it, of which no operation is left,
    and its kernels sum a long one in parts, as a batch. Costs are the same, and nothing is taken for an optimizer."""
    ready(target)

    def plain(x, a, b, c, d):
        return x + getattr(jax.nn, activation)(jnp.tanh(x) @ a + b) @ c + d

    options = {} if triton or target != "h200" else {"xla_gpu_enable_triton_gemm": False}
    made = targets.compile(jax.jit(plain), target, *FEED_FORWARD, options=options, runs=False)
    found = itemize_text(made.text, targets.chip(target))
    elements, of_activation = 64 * 512, {"gelu": (8, 1), "relu": (1, 0), "silu": (1, 1)}[activation]
    assert of_products(found) == {"mlp/up": 2 * 64 * 128 * 512, "mlp/down": 2 * 64 * 512 * 128}
    assert not any(row.component == "optimizer" for row in found.rows)
    ours = elements * (of_activation[0] + 1) + 2 * 64 * 128
    assert ours <= found.total.elementwise <= ours + 8 * elements  # of parts that are added, and of silu's exponential
    assert found.total.transcendental == elements * of_activation[1] + 64 * 128


@pytest.mark.parametrize("gated", [False, True])
def test_a_feed_forward_is_found_where_its_way_up_is_summed_in_parts(gated):
    """As a GPU does where there are fewer tiles of the result than it can work on at once."""
    ready("h200")

    def plain(x, a, b, c):
        return jax.nn.relu(jnp.tanh(x) @ a) * (jnp.tanh(x) @ b if gated else 1.0) @ c

    arguments = f32(64, 512), f32(512, 128), f32(512, 128), f32(128, 512)
    made = targets.compile(jax.jit(plain), "h200", *arguments, runs=False)
    assert re.search(r"f32\[\d+,64,(128|256)\]\S* dot\(", made.text)
    up = 2 * 64 * 512 * 128
    found = itemize_text(made.text, targets.chip("h200"))
    assert of_products(found) == {"mlp/up": 2 * up if gated else up, "mlp/down": up}


@ON_ALL
def test_a_random_key_is_an_argument_like_others(target):
    ready(target)
    key = jax.random.key(0)
    dropout = jax.jit(lambda x, key: jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0.0))
    bills = [itemize(dropout, f32(64, 64), one, target=target) for one in (key, jax.eval_shape(lambda: key))]
    assert bills[0].total == bills[1].total and bills[0].total.flops > 64 * 64


def test_targets_agree_on_every_component():
    for style in STYLES:
        assert len({json.dumps(of_products(bill(style, target)), sort_keys=True) for target in TARGETS}) == 1
