"""The transformer is right: against a slow oracle, against itself, and by the properties that define it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify
from stepbill.model import decode, train
from stepbill.model.cache import KVCache
from stepbill.model.config import REMAT, ModelConfig
from stepbill.model.layers import Span, rope
from stepbill.model.transformer import Transformer, split

LLAMA = ModelConfig("llama", 2, 16, 4, 2, 24, 13, max_context=32, dtype="float32", query_block=0)
QWEN = replace(LLAMA, name="qwen", qk_norm=True, head_width=8, rope_theta=100.0, query_block=4)
GEMMA = replace(
    LLAMA, name="gemma", activation="geglu", tied=True, scale_embedding=True, norm_offset=True, num_kv_heads=1
)
CONFIGS = pytest.mark.parametrize("config", [LLAMA, QWEN, GEMMA], ids=lambda config: config.name)
LAYERS = pytest.mark.parametrize("layers", ["unroll", "scan"])
pytestmark = pytest.mark.usefixtures("compile_quickly")


def forward(model, tokens):
    graph, params = split(model)
    return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))(params, tokens)


def loss_and_gradients(graph, params, tokens):
    return jax.jit(jax.value_and_grad(lambda params: train.loss(nnx.merge(graph, params), tokens)))(params)


def create(config, seed=0):
    """A model whose every parameter is drawn, norms too, so that no term is multiplied by one or by zero."""
    graph, abstract = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def draw(path, leaf):
        mean = 1.0 if path[-1].key == "scale" and not config.norm_offset else 0.0
        return jnp.asarray(random.normal(mean, 0.3, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(draw, abstract))


def graph_of(config):
    return split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))[0]


def draw_tokens(config, *shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, config.vocabulary)


def stack_layers(params):
    """Parameters of an unrolled model -> those of the scanned one."""
    rows = [params["layers"][layer] for layer in sorted(params["layers"])]
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)}


# ---- the slow oracle: numpy, float64, one head and one position at a time


def oracle_logits(config, params, tokens):
    params = jax.tree.map(np.float64, params)

    def norm(x, scale):
        factor = scale + 1 if config.norm_offset else scale
        return x / np.sqrt(np.mean(x**2) + config.norm_epsilon) * factor

    def turn(x, position):
        turned = np.empty_like(x)
        half = len(x) // 2
        for i in range(half):
            angle = position * config.rope_theta ** (-i / half)
            turned[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            turned[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return turned

    def gate(x):
        if config.activation == "swiglu":
            return x / (1 + np.exp(-x))
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def row_logits(row):
        xs = [params["embed"]["table"][token] * (config.width**0.5 if config.scale_embedding else 1) for token in row]
        for layer in range(config.num_layers):
            p = params["layers"][layer]
            a, m = p["attention"], p["mlp"]
            keys, values, after = [], [], []
            for t, x in enumerate(xs):
                normed = norm(x, a["norm"]["scale"])
                k = [normed @ a["wk"][:, head] for head in range(config.num_kv_heads)]
                if config.qk_norm:
                    k = [norm(head, a["k_norm"]["scale"]) for head in k]
                keys.append([turn(head, t) for head in k])
                values.append([normed @ a["wv"][:, head] for head in range(config.num_kv_heads)])
                for head in range(config.num_heads):
                    q = normed @ a["wq"][:, head]
                    q = turn(norm(q, a["q_norm"]["scale"]) if config.qk_norm else q, t)
                    group = head // (config.num_heads // config.num_kv_heads)
                    weights = np.exp([q @ keys[s][group] / np.sqrt(config.head_width) for s in range(t + 1)])
                    read = sum(w * values[s][group] for s, w in enumerate(weights / weights.sum()))
                    x = x + read @ a["wo"][head]
                normed = norm(x, m["norm"]["scale"])
                after.append(x + (gate(normed @ m["gate"]) * (normed @ m["up"])) @ m["down"])
            xs = after
        table = params["embed"]["table"].T if config.tied else params["unembed"]
        return [norm(x, params["final_norm"]["scale"]) @ table for x in xs]

    return np.array([row_logits(row) for row in np.asarray(tokens)])


def oracle_loss(config, params, tokens):
    logits = oracle_logits(config, params, tokens[:, :-1])
    targets = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return np.mean(np.log(np.exp(logits).sum(-1)) - targets)


@CONFIGS
def test_logits_equal_the_oracles(config, assert_close):
    model, tokens = create(config), draw_tokens(config, 2, 7)
    assert_close(forward(model, tokens), oracle_logits(config, split(model)[1], tokens))


@CONFIGS
def test_gradients_equal_the_oracles_differences(config, assert_close):
    """Every parameter array, along a random direction, by central differences of the oracle in float64."""
    graph, params = split(create(config))
    tokens = draw_tokens(config, 2, 6)
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
        assert abs(slope - (ahead - behind) / (2 * step)) <= 2e-5 * np.linalg.norm(gradient)


# ---- one model, several ways to run it


@CONFIGS
@LAYERS
@pytest.mark.parametrize("prompt", [1, 6])
def test_prefill_and_decode_equal_the_full_forward(config, layers, prompt, assert_close):
    model, tokens = create(replace(config, layers=layers)), draw_tokens(config, 2, 8)
    full = forward(model, tokens)
    logits, cache = jax.jit(partial(decode.prefill, model))(tokens[:, :prompt], KVCache.init(model.config, 2, 8))
    assert_close(logits, full[:, prompt - 1])
    step = jax.jit(partial(decode.decode_step, model))
    for t in range(prompt, 8):
        logits, cache = step(tokens[:, t], cache)
        assert_close(logits, full[:, t])
    assert int(cache.position) == 8


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


@CONFIGS
def test_scan_equals_unroll_in_values_and_gradients(config, assert_close):
    tokens = draw_tokens(config, 2, 8)
    graph, params = split(create(replace(config, layers="unroll")))
    scanned = graph_of(replace(config, layers="scan"))
    unrolled = loss_and_gradients(graph, params, tokens)
    stacked = loss_and_gradients(scanned, stack_layers(params), tokens)
    assert_close(stacked[0], unrolled[0])
    assert_close(stacked[1], stack_layers(unrolled[1]))


def test_scan_and_unroll_start_from_the_same_parameters(assert_close):
    unrolled, stacked = (split(Transformer(replace(LLAMA, layers=way), nnx.Rngs(7)))[1] for way in ("unroll", "scan"))
    assert_close(stacked, stack_layers(unrolled))


@LAYERS
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_no_gradient(layers, remat, assert_close):
    tokens = draw_tokens(LLAMA, 2, 8)
    graph, params = split(create(replace(LLAMA, layers=layers)))
    again = graph_of(replace(LLAMA, layers=layers, remat=remat))
    assert_close(loss_and_gradients(again, params, tokens), loss_and_gradients(graph, params, tokens))


@pytest.mark.parametrize("block", [0, 1, 3, 8, 100])
def test_query_blocks_change_no_value(block, assert_close):
    graph, params = split(create(replace(LLAMA, query_block=0)))
    blocked = graph_of(replace(LLAMA, query_block=block))
    tokens = draw_tokens(LLAMA, 2, 8)
    assert_close(loss_and_gradients(blocked, params, tokens), loss_and_gradients(graph, params, tokens))


@CONFIGS
def test_bfloat16_stays_near_float32(config):
    graph, params = split(create(config))
    half = graph_of(replace(config, dtype="bfloat16"))
    tokens = draw_tokens(config, 2, 8)
    logits, exact = forward(nnx.merge(half, params), tokens), forward(nnx.merge(graph, params), tokens)
    assert logits.dtype == jnp.float32
    # A few roundings of 2^-9 a layer, root mean square over root mean square.
    assert np.sqrt(np.mean((logits - exact) ** 2)) < 0.02 * np.sqrt(np.mean(exact**2))


# ---- what makes it a causal transformer


@LAYERS
@CONFIGS
def test_no_logit_depends_on_a_later_token(config, layers):
    """By gradient: of the logits at t, with respect to the embedded input at each position."""
    graph, params = split(create(replace(config, layers=layers)))

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

    def __call__(self, tokens):
        return self.x


@pytest.mark.parametrize("width", [2, 8, 64])
def test_rope_sees_only_the_distance(width, assert_close):
    config = replace(LLAMA, head_width=width)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, width))

    def score(query_position, key_position):
        turned = (rope(x, Span.of(config, at, 1, False)) for x, at in ((q, query_position), (k, key_position)))
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
