"""What all tests share: strict settings and eight host devices."""

import gc
import os
import shutil
import sys
import tempfile
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported
# No test depends on whether this user has calibrated this machine.
os.environ["STEPBILL_CALIBRATION"] = os.path.join(os.path.dirname(__file__), "no-calibration.json")

import jax
import numpy as np
import pytest
from tolerances import TOLERANCE

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# A jitted call is made for its numbers, which are tiny: nearly all of its time would go into making good machine code.
# jax 0.10 can make it without MLIR, four times as fast, of somewhat other HLO; later versions cannot. What is compiled
# ahead of time, to be read, has its usual HLO, and child processes know nothing of this. The steps of RUNNING are
# compiled ahead of time to be run: a test that reads one of them takes the fixture `read_as_well`.
PLAIN = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
WHOLE = "--xla_cpu_parallel_codegen_split_count=1"  # parts to compile at once, which take a quarter longer altogether
jax.config.update("jax_disable_most_optimizations", True)
RUNNING = ("stepbill.experiments.train", "stepbill.experiments.generate")
FLAGS = f"{os.environ.get('XLA_FLAGS', '')} {WHOLE} {PLAIN}".strip()
with mock.patch.dict(os.environ, XLA_FLAGS=FLAGS):
    jax.jit(lambda x: x + 1)(1)  # XLA reads its flags once, now
if PLAIN:
    _compile = jax.stages.Lowered.compile

    def _as_ever(lowered, compiler_options=None, **kwargs):
        read = sys._getframe(1).f_globals["__name__"] not in RUNNING
        usual = {"xla_cpu_use_fusion_emitters": True} if read and lowered._lowering._platforms == ("cpu",) else {}
        return _compile(lowered, usual | dict(compiler_options or {}) or None, **kwargs)

    jax.stages.Lowered.compile = _as_ever  # pyright: ignore[reportAttributeAccessIssue]

# Tracing makes many small objects, and most of what lives beside them is jax itself: to look through that again and
# again took a seventh of its time.
gc.freeze()
gc.set_threshold(20_000, 20, 20)


def pytest_configure(config):
    """A folder in which the workers of one run share what they have compiled (see compiled.py)."""
    if "STEPBILL_TEST_CACHE" not in os.environ:  # workers inherit it
        os.environ["STEPBILL_TEST_CACHE"] = folder = tempfile.mkdtemp(prefix="stepbill-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["STEPBILL_CACHE"] = os.path.join(os.environ["STEPBILL_TEST_CACHE"], "kept")


@pytest.fixture(autouse=True, scope="module")
def forget():
    """What a module has traced and compiled goes with it: a worker that keeps all grows to several gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def cache():
    """Sweeps of this module compile in this process, for which none has to start, and find what others of this run have
    kept. How they do it in processes of their own: test_sweep.py."""
    from stepbill.experiments.drivers import sweep

    def compiled(points, jobs):
        del jobs
        return ((point, sweep._outcome(point, sweep._compile_and_keep(point))) for point in points)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_compiled", compiled)
        yield


@pytest.fixture
def plain():
    """Environment of a process whose programs are run and not read: they are made as here (see FLAGS)."""
    return {"XLA_FLAGS": FLAGS, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture
def read_as_well(monkeypatch):
    """The steps of RUNNING have their usual HLO, too: this test reads them."""
    monkeypatch.setitem(globals(), "RUNNING", ())


@pytest.fixture
def stepbill(capsys):
    """stepbill(*flags) -> (exit status, standard output, standard error)."""

    from stepbill.experiments import bill

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = bill.main(argv)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def assert_close():
    """assert_close(actual, expected): two pytrees of arrays agree, as far as the type of `actual` can hold them.

    dtype: what `actual` was computed in, where its own type is wider.
    """

    def check(actual, expected, dtype=None):
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for (path, a), e in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
            bound = TOLERANCE.get(dtype or str(a.dtype), 0.0) * max(float(np.max(np.abs(np.float64(e)))), 1e-12)
            np.testing.assert_allclose(
                np.float64(a), np.float64(e), rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path)
            )

    return check
