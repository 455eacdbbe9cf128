"""Training does what its flags say, and ends with the same bits however often it is killed."""

import io
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from orbax import checkpoint as orbax
from stepbill.experiments import flags, generate, perplexity, quantize, run_folder, train
from stepbill.experiments.run_folder import Checkpoints, Log
from stepbill.model import checkpoint
from stepbill.model import train as training
from stepbill.model.train import Recipe
from stepbill.model.transformer import Transformer, logical_axes, split
from stepbill.profiling import closed_form, hlo, render
from stepbill.profiling.calibration import ByteRate, Calibration, MatmulRate, host
from stepbill.profiling.chips import CHIPS
from stepbill.profiling.walk import itemize_module
from test_model import DEEPSEEK, GPT2, GPT_OSS, LLAMA, MIXTRAL, create, draw_tokens, forward, oracle_logits, run
from test_tokenizer import byte_level

TINY = "--num_layers=2 --width=16 --heads=2 --kv_heads=1 --mlp_width=24 --batch=4 --context=16 --warmup=2".split()


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    monkeypatch.setattr("stepbill.profiling.targets.prepare", lambda target: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file to train on."""
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"def f{n}(x):\n    return x + {n * n}\n\n" for n in range(400)))
    return path


@pytest.fixture
def command(text, tmp_path, capsys):
    """command(*flags) -> (exit status, standard output, standard error) of training on that file."""

    def run(*argv):
        status = train.main([f"--out={tmp_path / 'run'}", f"--data={text}", f"--cache={tmp_path}", *TINY, *argv])
        return (status, *capsys.readouterr())

    return run


def asked(*argv: str) -> train.Request:
    return train.request(flags.parse(["--out=x", *argv], train.define))


CLOCKED = {"tokens_per_second", "flops_per_second", "mfu", "step_seconds", "measured_over_predicted"}


def log_of(folder: Path) -> list[dict]:
    """What is logged, without what a clock has measured."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in CLOCKED} for row in rows]


# ---- the step


def stepped(config, recipe, tokens, params=None, teacher=None, rate=1.0, rated=None):
    """-> the parameters before and after a step that subtracts the gradient itself, and the loss."""
    model = create(config)
    graph, start = split(model)
    start = start if params is None else params
    optimizer = optax.sgd(rate)
    step = jax.jit(lambda p, s, t: training.train_step(graph, optimizer, p, s, t, recipe, teacher, rated))
    after, _, loss = step(start, optimizer.init(start), tokens)
    return start, after, loss


@pytest.mark.parametrize(("config", "pieces"), [(LLAMA, 4), (GPT2, 2)], ids=["llama", "gpt2"])
def test_a_batch_in_pieces_is_the_batch(config, pieces, assert_close):
    tokens = draw_tokens(config, 8, 9)
    _, whole, loss = stepped(config, Recipe(), tokens)
    _, some, its_loss = stepped(config, Recipe(accumulate=pieces), tokens)
    assert_close(some, whole)
    assert_close(its_loss, loss)


def test_the_gradients_of_bfloat16_pieces_are_added_in_float32():
    config = replace(LLAMA, dtype="bfloat16", param_dtype="float32")
    start, after, _ = stepped(config, Recipe(accumulate=4), draw_tokens(config, 8, 9))
    assert {leaf.dtype for leaf in jax.tree.leaves((start, after))} == {jnp.dtype("float32")}
    both = zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True)
    steps = [np.asarray(a - b) for a, b in both]
    assert any((step.astype(jnp.bfloat16).astype(np.float32) != step).any() for step in steps)


def test_a_gradient_is_cut_to_its_norm():
    optimizer = training.make_optimizer({"w": "DF"}, Recipe(clip=0.5, weight_decay=0.0))
    params = {"w": jnp.zeros((2, 3))}
    gradients = {"w": jnp.full((2, 3), 7.0)}
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    (mu,) = [leaf for path, leaf in jax.tree.leaves_with_path(state) if "mu" in jax.tree_util.keystr(path)]
    np.testing.assert_allclose(np.linalg.norm(mu), 0.1 * 0.5, rtol=1e-6)  # the first mean is a tenth of it
    free = training.make_optimizer({"w": "DF"}, Recipe(clip=0.0, weight_decay=0.0))
    assert jax.tree.structure(free.init(params)) != jax.tree.structure(state)


def test_the_learning_rate_rises_and_falls_along_a_cosine():
    schedule = Recipe(1e-3, warmup=10, steps=110).schedule
    assert callable(schedule)
    rates = np.array([schedule(step) for step in (0, 5, 10, 35, 60, 110, 500)], np.float64)
    quarter = 1e-4 + 9e-4 * (1 + math.cos(math.pi / 4)) / 2  # of the way down
    np.testing.assert_allclose(rates, [0, 5e-4, 1e-3, quarter, (1e-3 + 1e-4) / 2, 1e-4, 1e-4], rtol=1e-6)
    assert Recipe(1e-3).schedule == 1e-3


MATRICES = {"table", "positions", "unembed", "wq", "wk", "wv", "wo", "gate", "up", "down", "router"}
MATRICES |= {"wq_down", "wk_down", "shared_gate"}


@pytest.mark.parametrize("layers", ["unroll", "scan"])
@pytest.mark.parametrize("config", [LLAMA, GPT2, GPT_OSS, DEEPSEEK], ids=lambda config: config.name)
def test_matrices_decay_and_nothing_else(config, layers):
    model = nnx.eval_shape(lambda: Transformer(replace(config, layers=layers), nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), split(model)[1])
    optimizer = training.make_optimizer(logical_axes(model), Recipe(0.5, weight_decay=0.2))
    updates = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])(params)
    for path, update in jax.tree.leaves_with_path(updates):
        expected = -0.5 * 0.2 if path[-1].key in MATRICES else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


# ---- distillation


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.25, 3.0)])
def test_the_distillation_loss_is_that_of_a_slow_oracle(share, temperature, assert_close):
    student, teacher = replace(LLAMA, num_layers=1), replace(LLAMA, width=32, head_width=0)
    recipe = Recipe(distill=share, temperature=temperature)
    tokens = draw_tokens(student, 2, 6)
    graph, theirs = split(create(teacher))
    wanted = np.asarray(forward(nnx.merge(graph, theirs), tokens[:, :-1]), np.float64)
    model_graph, params = split(create(student))

    said = np.asarray(forward(nnx.merge(model_graph, params), tokens[:, :-1]), np.float64)
    right = np.asarray(tokens[:, 1:])

    def divergence():
        """KL(teacher || student) of probabilities softened by T, times T squared, position by position in float64."""
        total = 0.0
        for b, t in np.ndindex(wanted.shape[:2]):
            p, q = (np.exp(x[b, t] / temperature) for x in (wanted, said))
            p, q = p / p.sum(), q / q.sum()
            total += sum(p[v] * (math.log(p[v]) - math.log(q[v])) for v in range(len(p)))
        return temperature**2 * total / math.prod(wanted.shape[:2])

    def entropy():
        each = [math.log(np.exp(said[b, t]).sum()) - said[b, t, right[b, t]] for b, t in np.ndindex(said.shape[:2])]
        return sum(each) / len(each)

    total, alone = jax.jit(
        lambda ours, theirs: training.losses(nnx.merge(model_graph, ours), tokens, nnx.merge(graph, theirs), recipe)
    )(params, theirs)
    np.testing.assert_allclose(alone, entropy(), rtol=1e-5)
    np.testing.assert_allclose(total, share * divergence() + (1 - share) * entropy(), rtol=1e-5)

    # Its gradient: that of each logit in closed form, taken back through the model.
    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    count = math.prod(said.shape[:2])
    hard = softmax(said) - np.eye(said.shape[-1])[right]
    soft = temperature * (softmax(said / temperature) - softmax(wanted / temperature))
    slope = jnp.asarray((share * soft + (1 - share) * hard) / count, jnp.float32)
    _, back = jax.vjp(jax.jit(lambda p: nnx.merge(model_graph, p)(tokens[:, :-1])), params)
    start, after, loss = stepped(student, recipe, tokens, params, (graph, theirs))
    np.testing.assert_allclose(loss, alone, rtol=1e-6)  # what is reported is the cross-entropy with the data
    assert_close(jax.tree.map(lambda p, g: np.asarray(p) - np.asarray(g), start, back(slope)[0]), after)


def test_nothing_flows_back_into_the_teacher():
    graph, params = split(create(LLAMA))
    teacher_graph, theirs = split(create(replace(LLAMA, num_layers=1)))
    recipe, tokens = Recipe(distill=0.5), draw_tokens(LLAMA, 2, 5)

    def loss(theirs):
        return training.losses(nnx.merge(graph, params), tokens, nnx.merge(teacher_graph, theirs), recipe)[0]

    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(theirs)))


# --- preferences and rewards -----------------------------------------------------------------------------------------

RATE = {"preference": training.preference, "policy": training.policy}


def draw_rated(objective, said, seed=1):
    """Answers that begin at different places, and others' log-probabilities near [B,T] of the model, to be clipped now
    and then."""
    random, (B, T) = np.random.default_rng(seed), said.shape
    answer = np.float32(np.arange(T)[None] >= random.integers(0, T - 1, size=(B, 1)))
    reference, behaviour = (np.float32(random.normal(said, 0.3)) for _ in range(2))
    if objective == "preference":
        return training.Rated(answer, reference)
    return training.Rated(answer, reference, behaviour, np.float32(random.normal(size=(B, 1)) * np.ones(T)))


def rated_by_hand(objective, said, rated, near, ratio):
    """The loss of log-probabilities [B,T], token by token in float64."""
    rated = jax.tree.map(np.float64, rated)
    (B, T), each = said.shape, []
    if objective == "preference":
        for b in range(0, B, 2):
            chosen, rejected = (
                sum((said[r, t] - rated.reference[r, t]) * rated.answer[r, t] for t in range(T)) for r in (b, b + 1)
            )
            each.append(math.log(1 + math.exp(-near * (chosen - rejected))))
        return sum(each) / len(each)
    for b in range(B):
        total = 0.0
        for t in np.flatnonzero(rated.answer[b]):
            change, A = math.exp(said[b, t] - rated.behaviour[b, t]), rated.advantage[b, t]
            away = rated.reference[b, t] - said[b, t]
            total += near * (math.exp(away) - away - 1) - min(change * A, min(max(change, 1 - ratio), 1 + ratio) * A)
        each.append(total / sum(rated.answer[b]))
    return sum(each) / B


def oracle_scores(config, params, tokens):
    logits = oracle_logits(config, params, tokens[:, :-1])
    target = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return target - np.log(np.exp(logits).sum(-1))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_log_probabilities_and_their_gradient_are_an_oracles(platform, monkeypatch):
    monkeypatch.setattr(training, "platform", lambda: platform)
    random = np.random.default_rng(0)
    logits = random.normal(0, 20, (2, 3, 50)).astype(np.float32)
    logits[0, 1] += 300
    logits[1, :, 7:20] = -np.inf  # tokens that cannot come
    targets = random.integers(0, 7, (2, 3))
    each = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities = each / each.sum(-1, keepdims=True)
    is_target = np.arange(50) == targets[..., None]
    said, back = jax.vjp(lambda x: training.log_probabilities(x, jnp.asarray(targets)), jnp.asarray(logits))
    np.testing.assert_allclose(said, np.log(probabilities[is_target]).reshape(2, 3), rtol=1e-5, atol=1e-5)
    cotangent = random.normal(size=(2, 3)).astype(np.float32)
    np.testing.assert_allclose(back(cotangent)[0], cotangent[..., None] * (is_target - probabilities), atol=3e-5)


@pytest.mark.parametrize("objective", RATE)
def test_the_loss_and_its_gradient_are_those_by_hand(objective):
    recipe, tokens = Recipe(objective=objective, near=0.3, ratio=0.25), draw_tokens(LLAMA, 4, 7)
    graph, params = split(create(LLAMA))
    rated = draw_rated(objective, oracle_scores(LLAMA, params, tokens))

    def by_hand(params):
        return rated_by_hand(objective, oracle_scores(LLAMA, params, tokens), rated, 0.3, 0.25)

    def loss(params):
        return training.losses(nnx.merge(graph, params), tokens, recipe=recipe, rated=rated)[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, by_hand(jax.tree.map(np.float64, params)), rtol=1e-5)
    leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, params))
    random = np.random.default_rng(0)
    for i, gradient in enumerate(jax.tree.leaves(gradients)):
        direction = random.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (
            by_hand(tree.unflatten([*leaves[:i], leaves[i] + by * direction, *leaves[i + 1 :]])) for by in (1e-5, -1e-5)
        )
        slope = np.sum(np.float64(gradient) * direction)
        assert abs(slope - (ahead - behind) / 2e-5) <= 2e-5 * np.linalg.norm(gradient) + 1e-7


def test_losses_that_can_be_told_beforehand():
    said = jnp.log(jnp.asarray([[0.5, 0.25], [0.1, 0.2]]))
    all_of_it = np.ones((2, 2), np.float32)
    undecided = training.Rated(all_of_it, said)
    assert training.preference(said, undecided, Recipe()) == pytest.approx(math.log(2))
    # The reference was as likely to write the second: 0.5 x 0.25 over 0.1 x 0.2 is 6.25, of which near = 0.5 makes 2.5.
    even = training.Rated(all_of_it, jnp.zeros((2, 2)))
    assert training.preference(said, even, Recipe(near=0.5)) == pytest.approx(math.log(1 + 1 / 2.5))
    # As likely as it was when it was written: the mean advantage; twice as likely: no more than a fifth better.
    rated = training.Rated(all_of_it, said, said, np.array([[3, 3], [1, 1]], np.float32))
    assert training.policy(said, rated, Recipe()) == pytest.approx(-2)
    assert training.policy(said + math.log(2), rated, Recipe(near=0)) == pytest.approx(-2 * 1.2)
    worse = rated._replace(advantage=-rated.advantage)  # and twice as likely where it is worse counts in full
    assert training.policy(said + math.log(2), worse, Recipe(near=0)) == pytest.approx(2 * 2)
    half = rated._replace(answer=np.array([[1, 0], [0, 0]], np.float32))  # one answer of one token, and one of none
    assert training.policy(said, half, Recipe()) == pytest.approx(-3 / 2)


@pytest.mark.parametrize("objective", RATE)
def test_rated_batches_in_pieces_are_the_batch(objective, assert_close):
    tokens, rated = draw_tokens(LLAMA, 4, 7), draw_rated(objective, np.full((4, 6), -2.5))
    (_, whole, loss), (_, some, its_loss) = (
        stepped(LLAMA, Recipe(objective=objective, accumulate=n), tokens, rated=rated) for n in (1, 2)
    )
    assert_close(some, whole)
    assert_close(its_loss, loss)


def test_scores_are_the_oracles(assert_close):
    tokens = draw_tokens(LLAMA, 2, 7)
    model = create(LLAMA)
    scores = run(training.score, model, tokens)
    assert_close(scores, oracle_scores(LLAMA, split(model)[1], tokens))
    assert run(training.loss, model, tokens) == pytest.approx(-float(np.mean(scores)))


def test_a_student_learns_from_a_teacher(command, tmp_path):
    config = replace(LLAMA, vocabulary=256)
    checkpoint.write(tmp_path / "teacher", config, split(create(config))[1])
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    flags = ("--steps=3", f"--teacher={tmp_path / 'teacher'}", "--num_layers=1", "--accumulate=2", "--distill=0.9")
    status, _, err = command(*flags, "--temperature=3")
    assert status == 0, err
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["recipe"]["distill"] == 0.9 and about["recipe"]["temperature"] == 3
    assert about["teacher"] == str(tmp_path / "teacher")
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "tokenizer", "words"),
    [
        ({"vocabulary": 300}, False, "its vocabulary is 300, the student's 256"),
        ({"vocabulary": 256, "max_context": 8}, False, "it takes 1 to 8 positions, and --context=16"),
        ({"vocabulary": 256}, True, "its tokens are others than the student's: give --tokenizer="),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(command, tmp_path, change, tokenizer, words):
    config = replace(LLAMA, **change)
    checkpoint.write(tmp_path / "teacher", config, split(create(config))[1])
    if tokenizer:
        byte_level().save(str(tmp_path / "teacher" / "tokenizer.json"))
    status, _, err = command(f"--teacher={tmp_path / 'teacher'}")
    assert status == 2 and len(err.splitlines()) == 1 and err.startswith("stepbill: --teacher=") and words in err
    assert command(f"--teacher={tmp_path / 'nowhere'}")[2].endswith("there is no such folder\n")


# ---- a run


def test_a_run_from_text_to_text(command, tmp_path, text, capsys):
    """Train, then generate from, quantise and measure what was trained."""
    status, out, err = command("--steps=6", "--evaluate_every=2", "--checkpoint_every=3", "--learning_rate=0.01")
    assert status == 0
    rows, said = log_of(tmp_path / "run"), json.loads(out)
    assert [row["step"] for row in rows] == [2, 4, 6] and [row["tokens"] for row in rows] == [128, 256, 384]
    assert rows[-1]["perplexity"] == math.exp(rows[-1]["held_out_loss"]) < rows[0]["perplexity"]
    assert rows[-1]["bits_per_byte"] == pytest.approx(rows[-1]["held_out_loss"] / math.log(2))
    assert said["step"] == 6 and said["perplexity"] == rows[-1]["perplexity"]
    assert said["mfu"] is None and said["flops_per_second"] > 0
    peaks, *lines = err.splitlines()
    assert peaks == (
        "no peaks known for this host, so no prediction of a step: run python -m stepbill.experiments.calibrate"
    )
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4", "step 6"]
    assert said["predicted_step_seconds"] is None and said["measured_over_predicted"] is None
    assert said["step_seconds"] == pytest.approx(4 * 16 / said["tokens_per_second"])
    assert err.count("GFLOP/s (MFU unknown)") == 3
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["3", "6"]

    model = tmp_path / "run" / "model"
    of = (f"--checkpoint={model}", f"--data={text}", f"--cache={tmp_path}", "--context=16", "--format=json")
    assert perplexity.main([*of, "--weights=int8", "--weights=int4:8", "--dtype=f32"]) == 0
    plain, int8, int4 = json.loads(capsys.readouterr().out)["rows"]
    assert plain["perplexity"] == pytest.approx(rows[-1]["perplexity"], rel=1e-5)  # of the same text: all of it
    assert (plain["change"], int8["weights"], int4["weights"]) == (0, "int8", "int4:8")
    assert 0 < abs(int8["change"]) < abs(int4["change"]) < 0.1
    assert perplexity.main([*of, "--cache_dtype=int8", "--dtype=f32"]) == 0
    plain, rounded = json.loads(capsys.readouterr().out)["rows"]
    assert rounded["cache"] == "int8" and 0 < abs(rounded["change"]) < 0.01

    assert quantize.main([f"--checkpoint={model}", "--weights=int4:8", f"--out={tmp_path / 'small'}"]) == 0
    assert perplexity.main([f"--checkpoint={tmp_path / 'small'}", *of[1:], "--dtype=f32"]) == 0
    (stored,) = json.loads(capsys.readouterr().out.partition("\n")[2])["rows"]
    assert stored["weights"] == "int4:8" and stored["perplexity"] == pytest.approx(int4["perplexity"], rel=1e-5)

    assert generate.main([f"--checkpoint={model}", "--prompt=def f", "--tokens=5"]) == 0
    assert capsys.readouterr().out.startswith("def f")


def test_a_cache_that_rounds_nothing_changes_no_loss(text, tmp_path, assert_close):
    config = replace(LLAMA, vocabulary=256)
    corpus = train.read_corpus(str(text), tmp_path, train._tokenizer(None), config)
    params = split(create(config))[1]
    plain, cached = (
        train.evaluator(config, corpus, batch=4, context=16, count=2, cached=cached)(params) for cached in (False, True)
    )
    assert_close(np.float32(cached["held_out_loss"]), np.float32(plain["held_out_loss"]))


def test_a_tokenizer_goes_with_the_model(command, tmp_path):
    byte_level().save(str(tmp_path / "some.json"))
    flags = (f"--tokenizer={tmp_path / 'some.json'}", "--steps=2", "--context=8")
    status, out, err = command(*flags, "--vocabulary=304")
    assert status == 0, err
    found = json.loads((tmp_path / "run" / "model" / "tokenizer.json").read_text())
    assert found["model"] == json.loads((tmp_path / "some.json").read_text())["model"]
    row = json.loads(out)
    tokens_a_byte = row["bits_per_byte"] / (row["held_out_loss"] / math.log(2))
    assert 0.2 < tokens_a_byte < 0.9  # fewer tokens than bytes
    status, out, err = command(*flags, f"--out={tmp_path / 'other'}", "--vocabulary=200")
    assert status == 2 and "--vocabulary=200: the tokenizer has 298 tokens" in err


def test_experts_are_trained_to_be_in_balance(command, tmp_path):
    config = {
        **{"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 64},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = [flag for flag in TINY if flag.startswith(("--batch", "--context"))]
    argv = (f"--model={tmp_path / 'config.json'}", *sizes)
    assert asked(*argv).config.experts.balance_loss == 0.01
    assert asked(*argv, "--balance_loss=0.5").config.experts.balance_loss == 0.5
    out = [f"--out={tmp_path / 'moe'}", f"--data={tmp_path / '*/text.py'}", f"--cache={tmp_path}"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "text.py").write_text("x = 1\n" * 500)
    assert train.main([*argv, *out, "--steps=4", "--balance_loss=1", "--evaluate_every=2"]) == 0
    first, last = log_of(tmp_path / "moe")
    assert last["loss"] < first["loss"]
    assert checkpoint.read(tmp_path / "moe" / "model")[0].experts.balance_loss == 1


def test_the_balance_loss_is_part_of_what_is_minimised_and_not_of_what_is_reported():
    tokens, losses = draw_tokens(MIXTRAL, 2, 9), []
    for weight in (0.0, 0.3):
        config = replace(MIXTRAL, experts=replace(MIXTRAL.experts, balance_loss=weight))
        losses.append([float(x) for x in jax.jit(training.losses)(create(config), tokens)])
    (total, alone), (more, same) = losses
    assert alone == same == total and 0.3 < more - same < 0.3 * MIXTRAL.experts.count


@pytest.mark.parametrize(
    ("flag", "field", "value"),
    [
        ("--attention=flash", "attention", "flash"),
        ("--layers=unroll", "layers", "unroll"),
        ("--remat=dots", "remat", "dots"),
        ("--dtype=bf16", "dtype", "bfloat16"),
        ("--num_layers=3", "num_layers", 3),
    ],
)
def test_flags_of_the_model_reach_the_step(flag, field, value):
    request = asked(flag)
    assert getattr(request.config, field) == value and request.config.param_dtype == "float32"
    assert getattr(asked().config, field) != value


@pytest.fixture(scope="module")
def program(text, tmp_path_factory):
    """program(*flags) -> what is compiled of them, traced once."""
    folder = tmp_path_factory.mktemp("program")

    @cache
    def lowered(*flags):
        request = asked(*TINY, *flags, f"--data={text}", f"--cache={folder}")
        return train.prepare(replace(request, out=folder)).step.lower().as_text()

    return lowered


@pytest.mark.parametrize("flag", ["--layers=unroll", "--remat=full", "--dtype=bf16"])
def test_how_the_model_runs_changes_the_program_that_is_compiled(flag, program):
    assert program(flag) != program()


def test_rates_are_held_against_the_peak_of_the_chip(monkeypatch):
    def peak(name, dtype):
        monkeypatch.setattr("stepbill.profiling.targets.here", lambda: name)
        return train._peak(dtype)

    assert peak("h200", "bfloat16") == 989 * 10**12 and peak("h200", "float32") == 494.5e12  # TF32
    assert peak("v5e", "float32") == peak("v5e", "bfloat16") == 197 * 10**12  # f32 goes through in passes of bf16
    assert peak("host", "bfloat16") is None
    monkeypatch.setattr("time.perf_counter", lambda: 14.0)
    pace = train.Pace(tokens=100, flops=10**12, peak=10**13, predicted_seconds=0.4, since=4, started=10.0)
    rates = pace.at(12)
    assert rates == {
        **{"tokens_per_second": 200.0, "flops_per_second": 2e12, "mfu": 0.2, "step_seconds": 0.5},
        **{"predicted_step_seconds": 0.4, "measured_over_predicted": 1.25},
    }
    text = "200 tokens/s, 2,000.0 GFLOP/s (MFU 20.0%), 500 ms a step"
    assert train._rates(rates) == text + ", 1.25 times the predicted 400 ms"
    blind = replace(pace, peak=None, predicted_seconds=None).at(12)
    assert blind["mfu"] is blind["predicted_step_seconds"] is blind["measured_over_predicted"] is None
    assert train._rates(blind) == text.replace("20.0%", "unknown")


def test_a_terminal_shows_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with train._screen(8) as (show, report):
        show("loss 1.234", 4)
        report("step 4: loss 1.234")
    err = capsys.readouterr().err
    assert "4/8" in err and "loss 1.234" in err and "step 4: loss 1.234" in err
    monkeypatch.delenv("FORCE_COLOR")
    with train._screen(8) as (show, report):
        show("loss 1.234", 4)
        report("step 4: loss 1.234")
    assert capsys.readouterr().err == "step 4: loss 1.234\n"


def test_a_step_is_held_against_what_its_bill_predicts(read_as_well, command, text, tmp_path, monkeypatch):
    rates = [MatmulRate("f32", m, 64, 64, 10**9) for m in (1, 64)]
    moved = (ByteRate(1 << 12, 1 << 20, 10**8),)
    now = Calibration(host(), "0", "2026-01-01", "by hand", tuple(rates), moved, moved, 10**9, 10**8, 1e-6, 1e-4)
    (tmp_path / "calibration.json").write_text(json.dumps(now.to_json()))
    monkeypatch.setenv("STEPBILL_CALIBRATION", str(tmp_path / "calibration.json"))
    status, _, err = command("--steps=4", "--evaluate_every=2", f"--logdir={tmp_path / 'board'}")
    assert status == 0 and "no peaks" not in err
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    request = asked(*TINY, "--steps=4", f"--data={text}", f"--cache={tmp_path}")
    step = train.prepare(replace(request, out=tmp_path)).step
    compiled = step.lower().compile()
    bill = itemize_module(hlo.parse(compiled.as_text()), CHIPS["host"], calibration=now)
    predicted = bill.total.predicted_picoseconds / 10**12
    useful = closed_form.ideal_flops(step.config, "train", 4, 16)
    assert predicted > 1e-4  # the launches alone take longer
    for row in rows:
        assert row["predicted_step_seconds"] == predicted
        assert row["measured_over_predicted"] == row["step_seconds"] / predicted
        assert row["mfu"] == row["flops_per_second"] / 10**9
        assert row["flops_per_second"] * row["step_seconds"] == pytest.approx(useful)
        assert f"{row['measured_over_predicted']:.2f} times the predicted {render.seconds(predicted)}" in err
    shown = {}
    for path in (tmp_path / "board").iterdir():
        for event in events(path):
            shown |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert shown == {
        (row["step"], name): float(np.float32(value)) for row in rows for name, value in row.items() if name != "step"
    }
    (tmp_path / "calibration.json").write_text("{}")
    status, _, err = command("--steps=4")
    assert status == 2 and err == f"stepbill: {tmp_path / 'calibration.json'}: it is no calibration of a machine\n"


def test_tensorboard_reads_what_is_logged(tmp_path):
    with Log(tmp_path, 0, tmp_path / "board") as log:
        log(5, {"loss": 2.5, "mfu": None})
        log(9, {"loss": 1.5, "mfu": 0.25})
    with Log(tmp_path, 5, tmp_path / "board") as log:  # killed before step 9 was kept
        log(9, {"loss": 1.25, "mfu": 0.25})
    assert log_of(tmp_path) == [{"step": 5, "loss": 2.5}, {"step": 9, "loss": 1.25}]
    shown = {}
    for path in sorted((tmp_path / "board").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in events(path):
            if event.HasField("session_log"):  # what was shown from here on is void
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            shown |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert shown == {(5, "loss"): 2.5, (9, "loss"): 1.25, (9, "mfu"): 0.25}


def test_runs_that_log_to_one_folder_do_not_void_each_other(tmp_path):
    for out, done, loss in (("a/nano", 0, 3.0), ("b/nano", 0, 2.0), ("c", 0, 1.0), ("a/nano", 1, 0.5)):
        (tmp_path / out).mkdir(parents=True, exist_ok=True)
        with Log(tmp_path / out, done, tmp_path / "board") as log:
            log(done + 1, {"loss": loss})
    shown = {
        folder.name: {
            event.step: value.simple_value
            for path in folder.glob("events.*")
            for event in events(path)
            for value in event.summary.value
        }
        for folder in [tmp_path / "board", *(tmp_path / "board").glob("*/")]
    }
    assert shown == {"board": {1: 3.0, 2: 0.5}, "nano": {1: 2.0}, "c": {1: 1.0}}


def events(path):
    """The records of an event file: the length and its checksum, the data and its checksum."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    file = io.BytesIO(path.read_bytes())
    while header := file.read(12):
        (size,) = struct.unpack("<Q", header[:8])
        yield Event.FromString(file.read(size))
        file.read(4)


# ---- what goes wrong


def test_a_loss_that_is_no_number_stops_it(command, tmp_path):
    status, out, err = command("--learning_rate=1e38", "--steps=9", "--checkpoint_every=2", "--clip=0", "--warmup=2")
    assert status == 1 and out == ""
    last = tmp_path / "run" / "checkpoints" / "2"
    assert err.endswith(f"stepbill: the loss is nan at step 4; the last good checkpoint is of step 2: {last}\n")
    assert [path.name for path in last.parent.iterdir()] == ["2"]
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of the learning rate itself
def test_parameters_that_are_no_numbers_are_not_kept(command, tmp_path):
    flags = ("--learning_rate=1e39", "--steps=9", "--checkpoint_every=1", "--clip=0", "--warmup=0")
    status, _, err = command(*flags)
    assert status == 1
    assert err.endswith("step 1 has made parameters that are no numbers; there is no checkpoint from before it\n")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_poisoned_checkpoint_is_not_gone_on_from(command, text, tmp_path):
    request = asked(*TINY, f"--data={text}", f"--cache={tmp_path}")
    state = train._first_state(train.prepare(replace(request, out=tmp_path)).step, 0)
    poisoned = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan) if leaf.ndim > 1 else leaf, state)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        checkpoints.save(2, state)
        with pytest.raises(run_folder.Stopped, match="step 4 has made parameters that are no numbers"):
            checkpoints.save(4, poisoned)
        checkpoints._manager.save(4, args=checkpoints._orbax.args.StandardSave(poisoned))
    status, out, err = command("--steps=6")
    assert status == 1 and out == ""
    assert "the checkpoint of step 4 has numbers that are none; the last good checkpoint is of step 2" in err


def test_a_folder_that_cannot_be_written_is_named_before_training(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_first_state", lambda *_: pytest.fail("it has begun"))
    (tmp_path / "file").write_text("")
    for flag in ("out", "logdir"):
        for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
            status, out, err = command(f"--{flag}={folder}")
            assert status == 2 and out == "" and len(err.splitlines()) == 1
            assert err.startswith(f"stepbill: --{flag}={folder}: cannot write there: ")
    status, _, err = command(f"--cache={tmp_path / 'file'}")
    assert status == 2 and len(err.splitlines()) == 1 and f"--cache={tmp_path / 'file'}: " in err


def test_a_disk_that_is_too_full_is_named_before_training(command, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_first_state", lambda *_: pytest.fail("it has begun"))
    parameters = asked(*TINY).config.parameters
    needed = 4 * (3 * (3 * parameters) + parameters)  # three states of parameters and two means; the model
    real = shutil.disk_usage(tmp_path)

    def with_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=free))

    with_free(needed - 1)
    status, out, err = command()
    assert status == 2 and out == "" and len(err.splitlines()) == 1
    assert "2 checkpoints and the model need " in err and " GB are free" in err
    with_free(int(needed * 1.01))
    with pytest.raises(BaseException, match="it has begun"):
        command()


def test_a_checkpoint_that_cannot_be_written_stops_it(command, tmp_path, monkeypatch):
    save = orbax.CheckpointManager.save

    def save_until_the_disk_is_full(self, step, **kw):
        if step == 4:
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing:\nNo space left on device")
        return save(self, step, **kw)

    monkeypatch.setattr(orbax.CheckpointManager, "save", save_until_the_disk_is_full)
    status, out, err = command("--steps=6", "--checkpoint_every=2")
    _, told = err.splitlines()  # that there are no peaks, and why it stopped
    assert status == 1 and out == "" and told.startswith("stepbill: ")
    assert "a checkpoint could not be written by step 4: RESOURCE_EXHAUSTED: Failed writing: No space left" in err
    assert err.endswith(f"; the last good checkpoint is of step 2: {tmp_path / 'run' / 'checkpoints' / '2'}\n")


def test_a_folder_is_of_one_run(command, tmp_path):
    assert command("--steps=1")[0] == 0
    for flag, words in (
        ("--seed=1", "whose seed is 0, and not 1"),
        ("--learning_rate=0.5", "whose recipe.learning_rate is 0.001, and not 0.5"),
        ("--mlp_width=16", "whose config.mlp_width is 24, and not 16"),
    ):
        status, _, err = command("--steps=1", flag)
        assert status == 2 and err.startswith(f"stepbill: --out={tmp_path / 'run'}: ") and words in err
    (tmp_path / "other.py").write_text("y = 2\n" * 300)
    assert "whose corpus is " in command("--steps=1", f"--data={tmp_path / 'other.py'}")[2]
    with run_folder.alone(tmp_path / "run"):
        status, _, err = command("--steps=1")
    assert status == 2 and "another process is training there" in err
    assert command("--steps=1")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--checkpoint: it needs a value, a folder with a model"),
        ("--checkpoint=DIR/nowhere", "--checkpoint=DIR/nowhere: DIR/nowhere: there is no such folder"),
        ("--checkpoint=DIR", "--checkpoint=DIR: "),
        ("--checkpoint=DIR/llama --context=64", "--context=64: llama takes 1 to 32 positions"),
        ("--checkpoint=DIR/llama --context=16", "--vocabulary=13: the tokenizer has 256 tokens"),
        ("--checkpoint=DIR/llama --weights=int3", "--weights=int3: it must be bf16, int8, int4 or int4:GROUP"),
    ],
)
def test_what_cannot_be_measured_is_named(argv, message, tmp_path, capsys):
    checkpoint.write(tmp_path / "llama", LLAMA, split(create(LLAMA))[1])
    argv, message = (part.replace("DIR", str(tmp_path)) for part in (argv, message))
    assert perplexity.main([*argv.split(), f"--cache={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "--out: it needs a value"),
        ("--out=x --batch=6 --accumulate=4", "--accumulate=4: it must divide --batch, 6"),
        ("--out=x --context=100000", "--context=100000: nano takes 1 to "),
        ("--out=x --distill=0.5", "--distill=0.5: it goes with --teacher"),
        ("--out=x --teacher=y --distill=2", "--distill=2.0: it must be at least 0 and at most 1"),
        ("--out=x --activations=int8", "--activations=int8: in training no weights are int8"),
        ("--out=x --balance_loss=1", "--balance_loss=1.0: nano has no experts"),
        ("--out=x --model=nanno", "--model=nanno"),
        ("--out=DIR --attention=flash", "--attention=flash: a CPU has no kernel for it"),
        ("--out=x --remat=some", "--remat=some"),
        ("--out=DIR --data=DIR/nothing*", "nothing*: it must match at least one file"),
        ("--out=DIR --data=DIR/short", "it has 10 bytes, too little"),
        ("--out=DIR --data=DIR/text", "--context=256: the held-out text has 20 tokens, less than one window of 257"),
        ("--out=DIR --tokenizer=DIR/text", "--tokenizer=DIR/text: DIR/text: no tokenizer: "),
        ("--out=DIR --tokenizer=DIR/nowhere", "there is no such file"),
    ],
)
def test_wrong_input_is_one_line(argv, message, tmp_path, capsys):
    (tmp_path / "short").write_text("x" * 10)
    (tmp_path / "text").write_text("x" * 1000)
    argv, message = (part.replace("DIR", str(tmp_path)) for part in (argv, message))
    assert train.main([*argv.split(), f"--cache={tmp_path / 'cache'}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and message in err


# ---- being killed

DRIVER = '''
import json, os, signal, sys, threading
from pathlib import Path
import flax.nnx, jax, optax, orbax.checkpoint, safetensors.numpy
from stepbill.experiments import run_folder, steps, train

out, argv = Path(sys.argv[2]), sys.argv[3:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(step):
    """While this step is under way."""
    add = train.Losses.add
    train.Losses.add = lambda self, number, loss: die() if number == step else add(self, number, loss)

def while_a_checkpoint_is_written(step):
    """As soon as its folder is there under another name."""
    def watch():
        while not any((out / "checkpoints").glob(f"{step}.*")):
            pass
        die()
    threading.Thread(target=watch, daemon=True).start()

def in_a_line_of_the_log(step):
    """When half of it is written."""
    log = run_folder.Log.__call__
    def half(self, number, figures):
        if number == step:
            with (out / "log.jsonl").open("a") as file:
                file.write('{"step": %d, "los' % step)
            die()
        log(self, number, figures)
    run_folder.Log.__call__ = half

def before_the_model_is_in_its_place(_):
    replace = os.replace
    os.replace = lambda new, old: die() if str(old).endswith("model.safetensors") else replace(new, old)

def never(_):
    pass

for name, step in json.loads(sys.argv[1]):
    child = os.fork()  # jax has not started yet
    if not child:
        globals()[name](step)
        os._exit(train.main([f"--out={out if name != 'never' else out.with_name('whole')}", *argv]))
    _, status = os.waitpid(child, 0)
    kept = sorted(path.name for path in (out / "checkpoints").iterdir()) if name != "never" else []
    print(json.dumps([[name, step], os.WTERMSIG(status) or os.WEXITSTATUS(status), kept]), flush=True)
'''
MOMENTS = {
    ("never", 0): [],
    ("at_step", 2): [],
    ("while_a_checkpoint_is_written", 3): ["3.orbax-checkpoint-tmp"],
    ("in_a_line_of_the_log", 8): ["3"],  # and 6, if it was written by then
    ("while_a_checkpoint_is_written", 12): ["12.orbax-checkpoint-tmp", "6", "9"],
    ("before_the_model_is_in_its_place", 0): ["12", "9"],
}


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(plain, text, tmp_path):
    argv = [f"--data={text}", f"--cache={tmp_path}", *TINY, "--steps=12", "--checkpoint_every=3"]
    argv += ["--evaluate_every=4", "--accumulate=2", "--dtype=bf16"]
    out = tmp_path / "killed"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | plain
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    python = (sys.executable, "-c", DRIVER, json.dumps(list(MOMENTS)), str(out), *argv)
    ran = subprocess.run(python, capture_output=True, text=True, env=environment | compiled, timeout=300)
    assert ran.returncode == 0, ran.stderr
    said = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert [tuple(moment) for moment, _, _ in said] == list(MOMENTS)
    for (name, step), status, kept in said:
        assert status == (0 if name == "never" else signal.SIGKILL), (name, ran.stderr)
        assert set(kept) - {"6", "6.orbax-checkpoint-tmp"} == set(MOMENTS[name, step]) - {"6"}, name
    # The same command again, to the end.
    command = [sys.executable, "-m", "stepbill.experiments.train", f"--out={out}", *argv]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ran.returncode == 0, ran.stderr
    whole = tmp_path / "whole"
    for name in ("model.safetensors", "model.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes(), name
    assert [row["step"] for row in log_of(out)] == [4, 8, 12]
    assert log_of(out) == log_of(whole)
    assert (out / "run.json").read_text() == (whole / "run.json").read_text()
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"9", "12"}
