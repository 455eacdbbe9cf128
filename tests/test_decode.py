"""The decode loop: how tokens are drawn, where rows stop, prompts of different lengths, prompts in pieces."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from stepbill.model import decode
from stepbill.model.cache import KVCache
from stepbill.model.decode import NO_TOKEN, Sampling
from stepbill.model.transformer import graph_of, split
from test_model import DEEPSEEK, GEMMA2, GPT2, GPT_OSS, LLAMA, create, draw_tokens, forward, run

# ---- how a token is drawn


def oracle_probabilities(logits, sampling):
    """One row [V], token by token in float64: what each is drawn with."""
    wide = np.float64(logits) / sampling.temperature
    ranked = sorted(range(len(wide)), key=lambda token: (-wide[token], token))
    ranked = ranked[: sampling.top_k or len(ranked)]

    def normalised(tokens):
        weights = {token: np.exp(wide[token] - wide[ranked[0]]) for token in tokens}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    probabilities, nucleus, mass = normalised(ranked), [], 0.0
    for token in ranked:
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
        nucleus.append(token)
        mass += probabilities[token]
    probabilities = normalised(nucleus)
    least = sampling.min_p * probabilities[ranked[0]]
    probabilities = normalised([token for token in nucleus if probabilities[token] >= least])
    return np.array([probabilities.get(token, 0.0) for token in range(len(wide))])


def probabilities_of(logits, sampling):
    """[B,V]: what each token is drawn with."""
    kept, tokens = sampling.candidates(logits)
    kept = jax.nn.softmax(kept, -1)
    if tokens is None:
        return kept
    return jnp.zeros_like(logits).at[jnp.arange(len(logits))[:, None], tokens].set(kept)


SAMPLINGS = [
    Sampling(0.7),
    Sampling(1.0, top_k=3),
    Sampling(1.3, top_p=0.8),
    Sampling(1.0, min_p=0.15),
    Sampling(1.0, top_k=4, top_p=0.7),
    Sampling(2.0, top_k=6, top_p=0.9, min_p=0.4),
]
SAMPLED = pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)


@SAMPLED
def test_a_tokens_probability_is_the_oracles(sampling, assert_close):
    logits = 2 * jax.random.normal(jax.random.key(1), (5, 9))
    expected = np.array([oracle_probabilities(row, sampling) for row in np.asarray(logits)])
    assert (expected == 0).any() == (sampling != Sampling(0.7))
    assert_close(jax.jit(probabilities_of, static_argnums=1)(logits, sampling), expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=12),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, 14),
    st.sampled_from([1e-30, 0.123, 0.456, 0.987, 1.0]),
    st.sampled_from([0.0, 0.0123, 0.456, 1.0]),
)
def test_whatever_is_asked_for_the_probabilities_are_the_oracles(eighths, temperature, top_k, top_p, min_p):
    """Equal logits, more asked for than there is, and restrictions that leave a single token are all among these."""
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = np.array([eighths], np.float32) / 8
    actual = probabilities_of(jnp.asarray(logits), sampling)[0]
    np.testing.assert_allclose(actual, oracle_probabilities(logits[0], sampling), atol=2e-5)


@SAMPLED
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling):
    logits = jnp.log(jnp.array([[0.3, 0.05, 0.2, 0.02, 0.25, 0.08, 0.1]]))
    keys = jax.random.split(jax.random.key(0), 8000)
    drawn = jax.jit(jax.vmap(lambda key: decode.sample(logits, sampling, key)[0]))(keys)
    expected = oracle_probabilities(np.asarray(logits)[0], sampling)
    frequencies = np.bincount(drawn, minlength=7) / len(keys)
    assert (frequencies[expected == 0] == 0).all()
    np.testing.assert_array_less(np.abs(frequencies - expected), 5 * np.sqrt(expected / len(keys)) + 1e-9)


sample = jax.jit(decode.sample, static_argnums=1)  # not operation by operation, each compiled by itself


def test_greedy_takes_the_likeliest_whatever_else_is_asked_for():
    logits = jax.random.normal(jax.random.key(1), (50, 9))
    for sampling in (0.0, Sampling(), Sampling(0.0, 3, 0.5, 0.2), Sampling(1.0, top_k=1), Sampling(1.0, min_p=1.0)):
        np.testing.assert_array_equal(sample(logits, sampling, jax.random.key(0)), np.argmax(logits, -1))


@pytest.mark.parametrize("sampling", [SAMPLINGS[-1], 0.0], ids=str)
def test_where_logits_are_no_numbers_no_token_is_drawn(sampling):
    logits = np.array([[np.nan] * 4, [0.0, 1.0, 2.0, 9.0]], np.float32)
    nobody, somebody = np.asarray(sample(logits, sampling, jax.random.key(0)))
    assert nobody == NO_TOKEN and somebody >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be positive, or 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; it must be positive, or 0"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be between 0 and 1"),
        ({"min_p": 2.0}, "min_p is 2.0"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


def test_the_seed_decides_what_is_written():
    model, prompt = create(LLAMA), draw_tokens(LLAMA, 2, 3)
    sampling = Sampling(2.0, top_p=0.95)

    def written(seed):
        return run(decode.generate, model, prompt, count=12, sampling=sampling, key=jax.random.key(seed))

    np.testing.assert_array_equal(written(1), written(1))
    assert (written(1) != written(2)).any()


def test_a_loop_in_pieces_draws_what_it_draws_in_one():
    model, prompt = create(LLAMA), draw_tokens(LLAMA, 2, 3)
    sampling, keys = Sampling(1.5, top_k=9), jax.random.split(jax.random.key(4), 10)
    _, cache = run(decode.prefill, model, prompt[:, :2], KVCache.init(LLAMA, 2, 12))

    def loop(tokens, cache, keys):
        return run(decode.decode, model, tokens, cache, count=len(keys), sampling=sampling, key=keys)

    whole, _ = loop(prompt[:, 2], cache, keys)
    first, cache = loop(prompt[:, 2], cache, keys[:5])
    second, _ = loop(first[:, -1], cache, keys[5:])
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), whole)
    with pytest.raises(ValueError, match=r"key is of shape \(10,\); it must be one key, or 9"):
        decode.decode(model, prompt[:, 2], KVCache.init(LLAMA, 2, 12), 9, key=keys)


# ---- where rows stop


def until_stop(written, stop):
    """What a row that stops there has instead."""
    rows = np.array(written)
    for row in rows:
        found = np.flatnonzero(np.isin(row, stop))
        if len(found):
            row[found[0] + 1 :] = NO_TOKEN
    return rows


@pytest.mark.parametrize(("layers", "sampling"), [("unroll", 0.0), ("scan", Sampling(2.0))], ids=str)
def test_a_row_that_has_stopped_is_given_no_token_and_others_go_on(layers, sampling):
    model, prompt = create(replace(LLAMA, layers=layers)), draw_tokens(LLAMA, 3, 3)
    free = np.asarray(run(decode.generate, model, prompt, count=14, sampling=sampling))
    assert free.min() >= 0
    stops = [(int(free[0, 4]),), (int(free[1, 0]), int(free[2, 7])), (LLAMA.vocabulary,)]
    for stop in stops:
        written = run(decode.generate, model, prompt, count=14, sampling=sampling, stop=stop)
        np.testing.assert_array_equal(written, until_stop(free, stop))
    cut = [until_stop(free, stop) for stop in stops]
    assert (cut[0] < 0).any() and (cut[1] < 0).any() and not (cut[2] < 0).any()


def test_the_loop_ends_with_the_last_row():
    model, prompt = create(LLAMA), draw_tokens(LLAMA, 2, 3)
    logits, cache = run(decode.prefill, model, prompt, KVCache.init(LLAMA, 2, 24))
    first = decode.sample(logits, 0.0, jax.random.key(0))
    free, _ = run(decode.decode, model, first, cache, count=20)
    stop = (int(free[0, 2]), int(free[1, 5]))
    expected = until_stop(jnp.concatenate([first[:, None], free], axis=1), stop)[:, 1:]
    steps = int((expected != NO_TOKEN).any(0).sum())
    assert 0 < steps < 20
    written, after = run(decode.decode, model, first, cache, count=20, stop=stop)
    np.testing.assert_array_equal(written, expected)
    assert int(after.position) == 3 + steps
    again, same = run(decode.decode, model, written[:, steps], after, count=4, stop=stop)
    assert (again == NO_TOKEN).all() and int(same.position) == int(after.position)


def test_without_stop_tokens_the_trip_count_is_known():
    model, prompt = create(LLAMA), draw_tokens(LLAMA, 2, 3)
    graph, params = split(model)

    def text(**options):
        loop = jax.jit(lambda params: decode.generate(nnx.merge(graph, params), prompt, 6, **options))
        return str(loop.lower(params).compile().as_text())

    assert '"known_trip_count":{"n":"5"}' in text()
    assert "known_trip_count" not in text(stop=(3,))


# ---- prompts of different lengths


def test_prompts_are_padded_on_the_left():
    tokens, start = decode.pad_left([[1, 2, 3], [4], [5, 6]])
    np.testing.assert_array_equal(tokens, [[1, 2, 3], [0, 0, 4], [0, 5, 6]])
    np.testing.assert_array_equal(start, [0, 2, 1])
    assert tokens.dtype == start.dtype == jnp.int32
    with pytest.raises(ValueError, match="there must be at least one"):
        decode.pad_left([])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        decode.pad_left([[1], []])


LENGTHS = (7, 2)
# One of each way to say where a token is and of each kind of cache.
KINDS = pytest.mark.parametrize("config", [GEMMA2, GPT2, GPT_OSS, DEEPSEEK], ids=lambda config: config.name)


def prompts_of(config):
    return [np.asarray(draw_tokens(config, n, seed=n)).tolist() for n in LENGTHS]


def continued(model, tokens, start=None, count=8):
    """The logits after each prompt, and the `count` likeliest tokens, each after those before."""
    logits, cache = decode.prefill(model, tokens, KVCache.init(model.config, len(tokens), 14), start)
    first = jnp.argmax(logits, -1).astype(jnp.int32)
    rest, _ = decode.decode(model, first, cache, count - 1)
    return logits, jnp.concatenate([first[:, None], rest], axis=1)


@KINDS
def test_each_row_of_a_batch_is_written_as_it_is_alone(config, assert_close):
    model, prompts = create(config), prompts_of(config)
    logits, written = run(continued, model, *decode.pad_left(prompts))
    for row, prompt in enumerate(prompts):
        alone = run(continued, model, jnp.asarray([prompt]))
        assert_close((logits[row : row + 1], written[row : row + 1]), alone)


@pytest.mark.parametrize("config", [GEMMA2, DEEPSEEK], ids=lambda config: config.name)
def test_what_pads_a_row_changes_nothing(config):
    model = create(replace(config, layers="scan"))
    tokens, start = decode.pad_left(prompts_of(config))
    others = jnp.where(jnp.arange(tokens.shape[1])[None] < start[:, None], 5, tokens)
    assert (others != tokens).any()
    for chunk in (0, 3):
        results = [run(decode.generate, model, x, count=8, start=start, chunk=chunk) for x in (tokens, others)]
        np.testing.assert_array_equal(*results)


def test_a_prompt_without_padding_forgets_that_of_the_one_before(assert_close):
    model = create(LLAMA)
    tokens, start = decode.pad_left(prompts_of(LLAMA))
    fresh = KVCache.init(LLAMA, len(LENGTHS), 9)
    _, used = run(decode.prefill, model, tokens, fresh, start)
    assert_close(*(run(decode.prefill, model, tokens, cache) for cache in (used, fresh)))


# ---- prompts in pieces


PIECES = [(config, 5) for config in (GPT2, GPT_OSS, DEEPSEEK)] + [(GEMMA2, chunk) for chunk in (1, 3, 5, 11, 20)]


@pytest.mark.parametrize(("config", "chunk"), PIECES, ids=lambda value: getattr(value, "name", str(value)))
def test_a_prompt_in_pieces_gives_the_same_logits_and_cache(config, chunk, assert_close):
    """Pieces longer and shorter than a window, that fill the prompt and that do not, and a piece longer than it."""
    model, tokens = create(config), draw_tokens(config, 2, 11)
    cache = KVCache.init(config, 2, 14)
    whole = run(decode.prefill, model, tokens, cache)
    assert_close(run(decode.prefill, model, tokens, cache, chunk=chunk), whole)


@pytest.mark.parametrize("config", [GEMMA2, DEEPSEEK], ids=lambda config: config.name)
def test_padded_prompts_in_pieces_are_continued_as_in_one(config):
    model = create(replace(config, layers="scan"))
    tokens, start = decode.pad_left([np.asarray(draw_tokens(config, n, seed=n)).tolist() for n in (11, 2, 6)])
    whole, pieces = (run(decode.generate, model, tokens, count=8, start=start, chunk=chunk) for chunk in (0, 4))
    np.testing.assert_array_equal(pieces, whole)


# A value of a cache in int8 is off by at most half of a 127th of its position's and head's largest. Through these
# models, whose scores are large, that moves logits by a few percent of their root mean square.
INT8_CACHE = 0.05


@KINDS
def test_a_cache_in_int8_gives_nearly_the_same_logits(config):
    """In decode, and in a prompt read in pieces, which reads the first ones back from the cache; not in one piece."""
    graph, params = split(create(config))
    tokens = draw_tokens(config, 2, 12)
    exact = np.asarray(forward(nnx.merge(graph, params), tokens))
    rounded = nnx.merge(graph_of(replace(config, cache_dtype="int8")), params)
    cache = KVCache.init(rounded.config, 2, 12)
    whole, filled = run(decode.prefill, rounded, tokens[:, :11], cache)
    pieces, _ = run(decode.prefill, rounded, tokens[:, :11], cache, chunk=4)
    after, _ = run(decode.decode_step, rounded, tokens[:, 11], filled)
    np.testing.assert_allclose(whole, exact[:, 10], atol=1e-4 * np.abs(exact).max())
    for actual, expected in ((pieces, exact[:, 10]), (after, exact[:, 11])):
        assert 0 < np.sqrt(np.mean((actual - expected) ** 2)) < INT8_CACHE * np.sqrt(np.mean(exact**2))


def test_a_prompt_in_pieces_needs_memory_for_a_piece():
    config = replace(LLAMA, max_context=2048, mlp_width=256)
    graph, params = split(create(config))
    tokens, cache = draw_tokens(config, 1, 1024), KVCache.init(config, 1, 1024)

    def temporaries(chunk):
        read = jax.jit(
            lambda params, tokens, cache: decode.prefill(nnx.merge(graph, params), tokens, cache, None, chunk)
        )
        memory = read.lower(params, tokens, cache).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(64) * 8 < temporaries(0)


def test_a_chunk_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="chunk is -1; it must be positive, or 0"):
        decode.prefill(create(LLAMA), draw_tokens(LLAMA, 1, 4), KVCache.init(LLAMA, 1, 4), chunk=-1)
