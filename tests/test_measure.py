"""Steps that are run again and again to be timed, and what they leave for the next run."""

from collections.abc import Iterator

import numpy as np
import pytest
from stepbill.experiments import measure, steps
from stepbill.model.config import ModelConfig
from stepbill.profiling import targets


@pytest.mark.parametrize("name", ["train", "generate"])
def test_what_a_step_donates_comes_from_the_step_before(name):
    least = ModelConfig("least", 1, 32, 2, 1, 32, 64, max_context=64)
    built = steps.build(least, name, batch=1, context=16, real=True, count=2)
    compiled = targets.compile(built.lower(), "host").compiled
    runner = measure.Runner(built, compiled)
    if name == "train":
        runner.seconds(3)
        assert int(next(iter(_counts(runner.arguments[1])))) == 3
    else:
        before = int(built.arguments[2].position)
        runner.seconds(3)
        assert int(runner.arguments[2].position) == before == 14


def test_a_step_is_timed_in_a_loop_of_many_and_goes_on_where_it_was(monkeypatch):
    """As a GPU's is; the cache is donated to the loop, and what it leaves is the step's."""
    monkeypatch.setattr(measure, "_is_timed_in_a_loop", lambda step, platform: step.name == "decode")
    least = ModelConfig("least", 1, 32, 2, 1, 32, 64, max_context=64)
    programs = measure.Programs(steps.build(least, "decode", batch=1, context=48), "host")
    programs.compile()
    assert programs.loop is not None and programs.traced is programs.first and programs.needed_bytes > 0
    built = steps.build(least, "decode", batch=1, context=48, real=True)
    before = np.asarray(built.arguments[2].k[0])
    found = measure.measure(built, "host", None, programs=programs, repeats=3)
    assert len(found.untraced_seconds) == 3 and min(found.untraced_seconds) > 0
    assert "32 steps in one loop" in found.how and found.traced is None and found.traced_seconds == ()
    cache = found.step.arguments[2]
    assert int(cache.position) == 47
    after = np.asarray(cache.k[0])
    assert (after[:, :, :16] == before[:, :, :16]).all() and after[:, :, 16:].any()  # 32 of 48 places are written
    logits, _ = measure.Runner(found.step, programs.first.compiled).first()
    assert np.isfinite(logits).all()


def test_a_step_that_is_timed_in_a_loop_is_only_traced_itself():
    """By the program whose kernels have names."""
    least = ModelConfig("least", 1, 32, 2, 1, 32, 64, max_context=64)
    decode = steps.build(least, "decode", batch=1, context=48)
    named = measure.NAMED_KERNELS.items()
    assert named <= measure.options(decode, "cuda").items() and not named <= measure.options(decode, "cpu").items()
    prompt = steps.build(least, "prefill", batch=1, context=48)
    assert measure.options(prompt, "cuda") == prompt.compiler_options("cuda")


def test_a_long_step_is_compiled_once_as_it_is_traced():
    large = ModelConfig("large", 2, 2048, 16, 8, 8192, 32_000)
    for name, batch, is_long in (("train", 16, True), ("train", 1, False), ("prefill", 16, False)):
        built = steps.build(large, name, batch=batch, context=2048)
        named = measure.NAMED_KERNELS.items() <= measure.options(built, "cuda").items()
        assert named == is_long
        assert measure.options(built, "cpu") == built.compiler_options("cpu")


def _counts(opt_state) -> Iterator[int]:
    """The counters of an optimizer's state."""
    import jax

    for path, leaf in jax.tree.leaves_with_path(opt_state):
        if "count" in jax.tree_util.keystr(path):
            yield int(leaf)
