"""The transformer is right: against a slow oracle, against itself, and by the properties that define it."""

import math
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import checkify
from stepbill.model import decode, train
from stepbill.model.cache import KVCache
from stepbill.model.config import REMAT, Experts, Latent, ModelConfig, RopeScaling
from stepbill.model.layers import Span, rope
from stepbill.model.transformer import Transformer, split, unstack
from tolerances import TOLERANCE

LLAMA = ModelConfig("llama", 2, 16, 4, 2, 24, 13, max_context=32, dtype="float32", query_block=0)
QWEN = replace(LLAMA, name="qwen", qk_norm=True, head_width=8, rope_theta=100.0, query_block=4)
GEMMA = replace(
    LLAMA, name="gemma", activation="geglu", tied=True, scale_embedding=True, norm_offset=True, num_kv_heads=1
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    num_layers=3,
    window=3,
    global_every=2,
    post_norms=True,
    attention_softcap=2.0,
    logits_softcap=3.0,
    attention_scale=0.4,
    local_rope_theta=50.0,
    rope_scaling=RopeScaling("linear", 4.0),
)
BIASES = {"qkv_bias": True, "output_bias": True, "mlp_bias": True}
GPT2 = replace(
    LLAMA, name="gpt2", num_kv_heads=4, activation="gelu", norm="layer", positions="learned", tied=True, **BIASES
)
MIXTRAL = replace(LLAMA, name="mixtral", experts=Experts(5, 2, 8), rope_scaling=RopeScaling("llama3", 4.0, 16))
QWEN_MOE = replace(
    QWEN, name="qwen-moe", experts=Experts(4, 2, 8, shared=12, shared_gate=True, router="softmax", dense_layers=1)
)
GPT_OSS = replace(
    LLAMA,
    name="gpt-oss",
    num_layers=3,
    window=4,
    global_every=2,
    sinks=True,
    activation="swiglu_clamped",
    experts=Experts(4, 2, 8, router_bias=True),
    rope_scaling=RopeScaling("yarn", 8.0, 16, 1.0, 4.0, magnitude=1.2, truncate=False),
    **BIASES,
)
_GROUPS = {"groups": 4, "active_groups": 2, "router": "sigmoid", "normalize": True, "scale": 2.5}
DEEPSEEK = replace(
    LLAMA,
    name="deepseek",
    num_kv_heads=4,
    latent=Latent(kv_rank=6, rope_width=4, value_width=5, query_rank=7),
    experts=Experts(8, 2, 8, shared=12, dense_layers=1, **_GROUPS),
)
DENSE = (LLAMA, QWEN, GEMMA, GEMMA2, GPT2)
SPARSE = (MIXTRAL, QWEN_MOE, GPT_OSS, DEEPSEEK)
# Between them these have every kind of part: for what is slow, and of which the oracle has a word on all.
UNLIKE = pytest.mark.parametrize("config", [GEMMA2, GPT_OSS, DEEPSEEK], ids=lambda config: config.name)
CONFIGS = pytest.mark.parametrize("config", [*DENSE, *SPARSE], ids=lambda config: config.name)
LAYERS = pytest.mark.parametrize("layers", ["unroll", "scan"])
MOST_TOKENS = 1024  # that a test asks for
TOKENS = (2, 6)  # sequences and their length: one for all, so that tests of one model share what is compiled


@cache
def jitted(function, graph, static):
    """function(model, *args, **kwargs), jitted over the parameters and arrays: once a model, compiled once a shape.

    Who puts another kernel, policy or mesh in the place of what was traced clears this cache.
    """

    def call(params, args, arrays):
        return function(nnx.merge(graph, params), *args, **arrays, **dict(static))

    return jax.jit(call)


def run(function, model, *args, **kwargs):
    """function(model, *args, **kwargs), as a jitted function does it."""
    graph, params = split(model)
    arrays = {name: value for name, value in kwargs.items() if isinstance(value, jax.Array | np.ndarray)}
    static = tuple((name, value) for name, value in kwargs.items() if name not in arrays)
    return jitted(function, graph, static)(params, args, arrays)


def forward(model, tokens):
    return run(Transformer.__call__, model, tokens)


def _loss_and_gradients(model, tokens):
    graph, params = split(model)
    return jax.value_and_grad(lambda params: train.loss(nnx.merge(graph, params), tokens))(params)


def loss_and_gradients(graph, params, tokens):
    return run(_loss_and_gradients, nnx.merge(graph, params), tokens)


@cache
def outline(config):
    """A model's static structure, and the shapes of its parameters."""
    return split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))


def create(config, seed=0):
    """A model whose every parameter is drawn, norms too, so that no term is multiplied by one or by zero."""
    graph, abstract = outline(config)
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" and not config.norm_offset else 0.0
        return np.float32(random.normal(mean, 0.3, leaf.shape)).astype(leaf.dtype)

    return nnx.merge(graph, jax.device_put(jax.tree.map_with_path(draw, abstract)))


def graph_of(config):
    return outline(config)[0]


@cache
def _many_tokens(vocabulary, seed):
    with jax.ensure_compile_time_eval():  # some ask while they are traced
        return np.asarray(jax.random.randint(jax.random.key(seed), (MOST_TOKENS,), 0, vocabulary))


def draw_tokens(config, *shape, seed=0):
    """The first of many, which are those that would be drawn for this shape alone: compiled for one shape."""
    return jax.device_put(_many_tokens(config.vocabulary, seed)[: math.prod(shape)].reshape(shape))


def stack_layers(config, params):
    """Parameters of an unrolled model -> those of the scanned one."""
    rows = iter([params["layers"][layer] for layer in sorted(params["layers"])])
    stacks = {}
    for number, run in enumerate(config.runs):
        repetitions = [[next(rows) for _ in run.kinds] for _ in range(run.times)]
        stacks[number] = {
            n: jax.tree.map(lambda *leaves: np.stack(leaves), *(pattern[n] for pattern in repetitions))
            for n in range(len(run.kinds))
        }
    return params | {"layers": stacks}


# ---- the slow oracle: numpy, float64, one head and one position at a time


def oracle_logits(config, params, tokens):
    params = jax.tree.map(np.float64, params)
    scaling, m, e = config.rope_scaling, config.latent, config.experts

    def rms(x, scale):
        return x / np.sqrt(np.mean(x**2) + config.norm_epsilon) * (scale + config.norm_offset)

    def norm(x, p):
        return rms(x - x.mean(), p["scale"]) + p["bias"] if config.norm == "layer" else rms(x, p["scale"])

    def frequency(i, half, theta):
        plain = theta ** (-i / half)
        if scaling is None or (theta == config.local_rope_theta):
            return plain
        if scaling.kind == "linear":
            return plain / scaling.factor
        turns = scaling.original_context * plain / (2 * np.pi)
        if scaling.kind == "llama3":
            kept = min(max((turns - scaling.low) / (scaling.high - scaling.low), 0), 1)
        else:
            first, last = (half * np.log(scaling.original_context / (2 * np.pi * n)) / np.log(theta)
                           for n in (scaling.high, scaling.low))  # fmt: skip
            first, last = max(first, 0), min(last, 2 * half - 1)
            kept = 1 - min(max((i - first) / (last - first), 0), 1)
        return plain * kept + plain / scaling.factor * (1 - kept)

    def turn(x, position, theta):
        if config.positions == "learned":
            return x
        turned = np.empty_like(x)
        half = len(x) // 2
        for i in range(half):
            angle = position * frequency(i, half, theta)
            cos, sin = (f(angle) * (scaling.magnitude if scaling else 1) for f in (np.cos, np.sin))
            turned[i] = x[i] * cos - x[i + half] * sin
            turned[i + half] = x[i + half] * cos + x[i] * sin
        return turned

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def feed(x, p, select=lambda array: array):
        def product(x, name):
            return x @ select(p[name]) + (select(p["b" + name]) if config.mlp_bias else 0)

        up = product(x, "up")
        if config.activation == "gelu":
            return product(gelu(up), "down")
        gate = product(x, "gate")
        if config.activation == "swiglu_clamped":
            gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
            return product(gate * sigmoid(1.702 * gate) * (up + 1), "down")
        return product((gate * sigmoid(gate) if config.activation == "swiglu" else gelu(gate)) * up, "down")

    def mixture(x, p):
        logits = x @ p["router"] + (p["router_bias"] if e.router_bias else 0)
        scores = sigmoid(logits) if e.router == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        ranked = scores + p["selection_bias"] if e.router == "sigmoid" else scores
        size = e.count // e.groups
        best = sorted(range(e.groups), key=lambda g: -np.sort(ranked[g * size : (g + 1) * size])[-2:].sum())
        allowed = [i for i in range(e.count) if i // size in best[: e.active_groups]]
        chosen = sorted(allowed, key=lambda i: -ranked[i])[: e.active]
        weights = scores[chosen]
        if e.normalize or e.router == "topk":
            weights = weights / weights.sum()
        out = sum(e.scale * w * feed(x, p, lambda array, i=i: array[i]) for w, i in zip(weights, chosen, strict=True))
        if e.shared:
            out = out + feed(x, p["shared"]) * (sigmoid(x @ p["shared_gate"]) if e.shared_gate else 1)
        return out

    def heads_of(normed, a, t, theta):
        """Queries, keys and values of one position: for each query head its query, key head and value head."""
        if m is None:

            def made(name, head):
                return normed @ a["w" + name][:, head] + (a["b" + name][head] if config.qkv_bias else 0)

            k = [made("k", head) for head in range(config.num_kv_heads)]
            q = [made("q", head) for head in range(config.num_heads)]
            if config.qk_norm:
                k, q = ([rms(x, a[name]["scale"]) for x in xs] for xs, name in ((k, "k_norm"), (q, "q_norm")))
            v = [made("v", head) for head in range(config.num_kv_heads)]
            return [turn(x, t, theta) for x in q], [turn(x, t, theta) for x in k], v
        source = rms(normed @ a["wq_down"], a["q_norm"]["scale"])
        down = normed @ a["wk_down"]
        short = rms(down[: m.kv_rank], a["kv_norm"]["scale"])
        shared = turn(down[m.kv_rank :], t, theta)
        q = [source @ a["wq"][:, head] for head in range(config.num_heads)]
        q = [np.concatenate([x[: config.head_width], turn(x[config.head_width :], t, theta)]) for x in q]
        k = [np.concatenate([short @ a["wk"][:, head], shared]) for head in range(config.num_heads)]
        return q, k, [short @ a["wv"][:, head] for head in range(config.num_heads)]

    def row_logits(row):
        xs = [params["embed"]["table"][token] * (config.width**0.5 if config.scale_embedding else 1) for token in row]
        if config.positions == "learned":
            xs = [x + params["embed"]["positions"][t] for t, x in enumerate(xs)]
        for layer, kind in enumerate(config.kinds):
            p = params["layers"][layer]
            a, thinks = p["attention"], p["moe" if kind.sparse else "mlp"]
            theta = (kind.local and config.local_rope_theta) or config.rope_theta
            keys, values, after = [], [], []
            for t, x in enumerate(xs):
                q, k, v = heads_of(norm(x, a["norm"]), a, t, theta)
                keys.append(k)
                values.append(v)
                first = max(0, t + 1 - config.window) if kind.local else 0
                out = a["bo"].copy() if config.output_bias else np.zeros(config.width)
                for head in range(config.num_heads):
                    group = head // (config.num_heads // len(k))
                    scores = np.array([q[head] @ keys[s][group] for s in range(first, t + 1)]) * config.score_scale
                    if config.attention_softcap:
                        scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
                    weights = np.exp(scores)
                    weights /= weights.sum() + (np.exp(a["sinks"][head]) if config.sinks else 0)
                    out += sum(w * values[first + s][group] for s, w in enumerate(weights)) @ a["wo"][head]
                x = x + (norm(out, a["post_norm"]) if config.post_norms else out)
                normed = norm(x, thinks["norm"])
                out = mixture(normed, thinks) if kind.sparse else feed(normed, thinks)
                after.append(x + (norm(out, thinks["post_norm"]) if config.post_norms else out))
            xs = after
        table = params["embed"]["table"].T if config.tied else params["unembed"]
        logits = np.array([norm(x, params["final_norm"]) @ table for x in xs])
        cap = config.logits_softcap
        return cap * np.tanh(logits / cap) if cap else logits

    return np.array([row_logits(row) for row in np.asarray(tokens)])


def oracle_loss(config, params, tokens):
    logits = oracle_logits(config, params, tokens[:, :-1])
    targets = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return np.mean(np.log(np.exp(logits).sum(-1)) - targets)


@CONFIGS
def test_logits_equal_the_oracles(config, assert_close):
    model, tokens = create(config), draw_tokens(config, *TOKENS)
    assert_close(forward(model, tokens), oracle_logits(config, split(model)[1], tokens))


@CONFIGS
def test_gradients_equal_the_oracles_differences(config, assert_close):
    """Every parameter array, along a random direction, by central differences of the oracle in float64."""
    graph, params = split(create(config))
    tokens = draw_tokens(config, *TOKENS)
    _, gradients = loss_and_gradients(graph, params, tokens)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, params))
    random = np.random.default_rng(0)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = random.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        step = 1e-5
        ahead, behind = (
            oracle_loss(
                config, tree.unflatten([*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]]), tokens
            )
            for sign in (1, -1)
        )
        slope = np.sum(np.float64(gradient) * direction)
        # A bias of keys changes no softmax where positions are learned: its gradient is zero, but for rounding.
        assert abs(slope - (ahead - behind) / (2 * step)) <= 2e-5 * np.linalg.norm(gradient) + 1e-7


@UNLIKE
def test_in_bfloat16_it_is_the_same_model(config, assert_close):
    """Logits against the oracle, gradients against those in float32, of one set of parameters that bfloat16 can hold.

    Of the whole gradient: in bfloat16 one that ought to be zero is not. A token that two experts want equally may go to
    the other one; of these tokens none is near enough.
    """
    tokens = draw_tokens(config, *TOKENS)
    graph, params = split(create(config))
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16).astype(leaf.dtype), params)
    narrow = graph_of(replace(config, dtype="bfloat16"))
    logits, exact = forward(nnx.merge(narrow, params), tokens), oracle_logits(config, params, tokens)
    assert logits.dtype == jnp.float32
    assert_close(logits, exact, "bfloat16")
    # A few roundings of 2^-9 a layer, root mean square over root mean square.
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))
    _, expected = loss_and_gradients(graph, params, tokens)
    _, actual = loss_and_gradients(narrow, params, tokens)
    norm = jax.jit(optax.tree.norm)
    difference = norm(jax.tree.map(lambda a, e: np.asarray(a) - np.asarray(e), actual, expected))
    assert difference <= TOLERANCE["bfloat16"] * norm(expected)


def test_a_stack_of_layers_comes_apart_as_it_was_put_together():
    for config in (LLAMA, GEMMA2, QWEN_MOE, GPT_OSS):
        _, params = split(create(config))
        apart = unstack(config, stack_layers(config, params))
        jax.tree.map(np.testing.assert_array_equal, apart, params)


# ---- one model, several ways to run it


# Layers in a loop differ where they differ among each other or keep something else.
@pytest.mark.parametrize(
    ("config", "layers"),
    [(config, "unroll") for config in (*DENSE, *SPARSE)] + [(config, "scan") for config in (LLAMA, GEMMA2, DEEPSEEK)],
    ids=lambda it: getattr(it, "name", it),
)
def test_prefill_and_decode_equal_the_full_forward(config, layers, assert_close):
    model, tokens = create(replace(config, layers=layers)), draw_tokens(config, *TOKENS)
    full = forward(model, tokens)
    length = tokens.shape[1]
    for prompt in (1, 4) if config in (LLAMA, DEEPSEEK) else (4,):
        logits, cache = run(decode.prefill, model, tokens[:, :prompt], KVCache.init(model.config, 2, length))
        assert_close(logits, full[:, prompt - 1])
        for t in range(prompt, length):
            logits, cache = run(decode.decode_step, model, tokens[:, t], cache)
            assert_close(logits, full[:, t])
        assert int(cache.position) == length


def test_prefill_forgets_what_the_cache_held(assert_close):
    model, tokens = create(LLAMA), draw_tokens(LLAMA, 2, 6)
    prefill, step = (jax.jit(partial(f, model)) for f in (decode.prefill, decode.decode_step))
    fresh = KVCache.init(LLAMA, 2, 10)
    _, used = prefill(draw_tokens(LLAMA, 2, 9, seed=5), fresh)
    (expected, cache), (actual, used) = prefill(tokens, fresh), prefill(tokens, used)
    assert_close(actual, expected)
    assert_close(step(tokens[:, 0], used)[0], step(tokens[:, 0], cache)[0])


@LAYERS
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_decode_loop_equals_step_by_step(layers, temperature):
    model, prompt = create(replace(LLAMA, layers=layers)), draw_tokens(LLAMA, 2, 3)
    _, cache = jax.jit(partial(decode.prefill, model))(prompt[:, :2], KVCache.init(model.config, 2, 12))
    step = jax.jit(partial(decode.decode_step, model))
    key = jax.random.key(3)
    written, after = jax.jit(lambda tokens, cache: decode.decode(model, tokens, cache, 9, temperature, key))(
        prompt[:, 2], cache
    )
    tokens, one_by_one = prompt[:, 2], []
    for step_key in jax.random.split(key, 9):
        logits, cache = step(tokens, cache)
        tokens = decode.sample(logits, temperature, step_key)
        one_by_one.append(tokens)
    np.testing.assert_array_equal(written, jnp.stack(one_by_one, axis=1))
    assert int(after.position) == int(cache.position) == 11


def test_generate_writes_what_the_full_forward_finds_likeliest():
    model, tokens = create(LLAMA), draw_tokens(LLAMA, 2, 3)
    written = jax.jit(lambda prompt: decode.generate(model, prompt, 6))(tokens)
    everything = jnp.concatenate([tokens, written], axis=1)
    np.testing.assert_array_equal(written, jnp.argmax(forward(model, everything)[:, 2:-1], -1))


def test_temperature_draws_from_the_softmax():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: decode.sample(logits, 2.0, key)[0])(keys)
    expected = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, expected, atol=0.03)


@UNLIKE
def test_scan_equals_unroll_in_values_and_gradients(config, assert_close):
    tokens = draw_tokens(config, *TOKENS)
    graph, params = split(create(replace(config, layers="unroll")))
    scanned = graph_of(replace(config, layers="scan"))
    unrolled = loss_and_gradients(graph, params, tokens)
    stacked = loss_and_gradients(scanned, stack_layers(config, params), tokens)
    expected = stack_layers(config, unrolled[1])
    if config is GPT2:  # softmax takes out a bias that all keys share; what is left of its gradient is rounding
        for gradients in (stacked[1], expected):
            assert np.abs(gradients["layers"][0][0]["attention"].pop("bk")).max() < 1e-6
    assert_close(stacked[0], unrolled[0])
    assert_close(stacked[1], expected)


def test_scan_and_unroll_start_from_the_same_parameters(assert_close):
    unrolled, stacked = (split(Transformer(replace(LLAMA, layers=way), nnx.Rngs(7)))[1] for way in ("unroll", "scan"))
    assert_close(stacked, stack_layers(LLAMA, unrolled))


@LAYERS
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(layers, remat, assert_close):
    tokens = draw_tokens(LLAMA, *TOKENS)
    graph, params = split(create(replace(LLAMA, layers=layers)))
    again = graph_of(replace(LLAMA, layers=layers, remat=remat))
    assert_close(loss_and_gradients(again, params, tokens), loss_and_gradients(graph, params, tokens))


@pytest.mark.parametrize("block", [0, 1, 3, 8, 100])
def test_query_blocks_change_no_value(block, assert_close):
    graph, params = split(create(replace(LLAMA, query_block=0)))
    blocked = graph_of(replace(LLAMA, query_block=block))
    tokens = draw_tokens(LLAMA, *TOKENS)
    assert_close(loss_and_gradients(blocked, params, tokens), loss_and_gradients(graph, params, tokens))


# ---- what makes it a causal transformer


@UNLIKE
def test_no_logit_depends_on_a_later_token(config):
    """By gradient: of the logits at t, with respect to the embedded input at each position."""
    graph, params = split(create(replace(config, layers="scan")))

    def logits(x):
        model = nnx.merge(graph, params)
        model.embed = Fixed(x, model.embed.table)
        return jnp.square(model(jnp.zeros((1, 6), jnp.int32))[0]).sum(-1)

    slopes = jax.jit(jax.jacrev(logits))(jax.random.normal(jax.random.key(0), (1, 6, config.width)))
    np.testing.assert_array_equal((slopes[:, 0] != 0).any(-1), np.tri(6, dtype=bool))


class Fixed(nnx.Module):
    """Stands in for Embed, to differentiate with respect to what it gives."""

    def __init__(self, x, table):
        self.x, self.table = nnx.data(x), table

    def __call__(self, tokens, span):
        return self.x


@pytest.mark.parametrize("width", [2, 8, 64])
def test_rope_sees_only_the_distance(width, assert_close):
    config = replace(LLAMA, head_width=width)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, width))

    def score(query_position, key_position):
        turned = (rope(x, Span.of(config, at, 1, False).turns[0]) for x, at in ((q, query_position), (k, key_position)))
        return jnp.vdot(*turned)

    for distance in (0, 1, 17):
        assert_close(score(distance + 900, 900), score(distance, 0))
    assert abs(score(5, 0) - score(0, 5)) > 1e-3


def test_grouped_queries_equal_repeated_heads(assert_close):
    graph, params = split(create(replace(LLAMA, num_kv_heads=2)))
    repeated = graph_of(replace(LLAMA, num_kv_heads=4))
    tokens = draw_tokens(LLAMA, 2, 8)
    expected = forward(nnx.merge(graph, params), tokens)
    for block in params["layers"].values():
        for name in ("wk", "wv"):
            block["attention"][name] = jnp.repeat(block["attention"][name], 2, axis=1)
    assert_close(forward(nnx.merge(repeated, params), tokens), expected)


def test_a_token_outside_of_the_vocabulary_is_not_taken_for_another():
    logits = forward(create(LLAMA), jnp.array([[1, LLAMA.vocabulary], [1, 2]]))
    assert jnp.isnan(logits[0, 1]).all() and jnp.isfinite(logits[1]).all()


# ---- past the end of the cache


def full_cache(layers):
    config = replace(LLAMA, layers=layers)
    return create(config), KVCache.init(config, 2, 4).at(4)


@LAYERS
def test_a_step_past_the_end_is_an_error(layers):
    model, cache = full_cache(layers)
    with pytest.raises(ValueError, match="position is 4; 1 more do not fit a cache of 4"):
        decode.decode_step(model, jnp.zeros(2, jnp.int32), cache)


@LAYERS
def test_a_jitted_step_past_the_end_gives_nan_and_stays_so(layers):
    model, cache = full_cache(layers)
    step = jax.jit(partial(decode.decode_step, model))
    for _ in range(2):
        logits, cache = step(jnp.zeros(2, jnp.int32), cache)
        assert jnp.isnan(logits).all()


def test_a_jitted_loop_past_the_end_writes_no_token():
    model, _ = full_cache("unroll")
    cache = KVCache.init(LLAMA, 2, 4).at(2)
    written, _ = jax.jit(lambda tokens, cache: decode.decode(model, tokens, cache, 4))(jnp.zeros(2, jnp.int32), cache)
    assert (written[:, :2] >= 0).all() and (written[:, 2:] == -1).all()


def test_checkify_turns_a_write_past_the_end_into_an_error():
    model, cache = full_cache("unroll")
    checked = jax.jit(checkify.checkify(partial(decode.decode_step, model)))
    error, _ = checked(jnp.zeros(2, jnp.int32), cache)
    assert "do not fit a cache of 4 positions" in error.get()
    error, _ = checked(jnp.zeros(2, jnp.int32), cache.at(3))
    assert error.get() is None


def test_what_can_never_fit_is_refused_before_it_runs():
    model, cache = full_cache("unroll")
    with pytest.raises(ValueError, match="the prompt has 5 tokens; the cache has room for 4"):
        jax.jit(partial(decode.prefill, model))(jnp.zeros((2, 5), jnp.int32), cache)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        jax.jit(lambda tokens, cache: decode.decode(model, tokens, cache, 5))(jnp.zeros(2, jnp.int32), cache)
    with pytest.raises(ValueError, match="context is 33; llama takes 1 to 32"):
        decode.generate(model, jnp.zeros((1, 30), jnp.int32), 4)
    with pytest.raises(ValueError, match="batch is 0"):
        KVCache.init(LLAMA, 0, 4)
