"""What factorizations of libraries cost, against the textbook's counts and against a count of what is done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ON_ALL, bill, f32
from jax.lax import linalg

C64 = jax.ShapeDtypeStruct((3, 64, 64), jnp.complex64)


def solve(a, b):
    return linalg.triangular_solve(a, b, left_side=True, lower=True)


# name -> (function, arguments, FLOPs)
COUNTS = {
    "cholesky": (jnp.linalg.cholesky, (f32(3, 64, 64),), 3 * 64**3 / 3),
    "cholesky, complex": (jnp.linalg.cholesky, (C64,), 4 * 3 * 64**3 / 3),
    "lu": (linalg.lu, (f32(64, 64),), 2 / 3 * 64**3),
    "lu, tall": (linalg.lu, (f32(3, 96, 64),), 3 * (96 * 64**2 - 64**3 / 3)),
    "triangular solve": (solve, (f32(64, 64), f32(64, 16)), 64**2 * 16),
    "triangular solve of several": (solve, (f32(3, 64, 64), f32(3, 64, 16)), 3 * 64**2 * 16),
    "qr": (jnp.linalg.qr, (f32(64, 64),), 2 * 4 / 3 * 64**3),
    "qr, tall": (jnp.linalg.qr, (f32(3, 96, 64),), 3 * 2 * (2 * 96 * 64**2 - 2 / 3 * 64**3)),
    "reflections": (linalg.ormqr, (f32(64, 32), f32(32), f32(64, 16)), 4 * 64 * 16 * 32 - 2 * 16 * 32**2),
    "tridiagonal": (linalg.tridiagonal, (f32(64, 64),), 4 / 3 * 64**3),
}
OF_NO_TPU = ("tridiagonal",)


@ON_ALL
@pytest.mark.parametrize("name", COUNTS)
def test_a_factorization_costs_what_textbooks_say(target, name):
    if target == "v5e" and name in OF_NO_TPU:
        return
    function, arguments, flops = COUNTS[name]
    found = bill(target, function, *arguments)
    assert not found.unknown
    found.check()
    # Triangles are cut out and signs turned, too: a few a number. A TPU's compiler makes it of blocks and products.
    beside = 16 * sum(argument.size for argument in arguments)
    most = 12 * flops if target == "v5e" else flops
    assert 0.99 * flops <= found.total.flops <= most + beside


def eliminated(m: int, n: int) -> int:
    """Multiplications, additions and divisions of Gaussian elimination, one by one."""
    return sum((m - k - 1) * (1 + 2 * (n - k - 1)) for k in range(min(m, n)))


def reflected(m: int, n: int, k: int) -> int:
    """Of k Householder reflections, the i-th of m - i rows, to n - i columns: each a product and what it takes off."""
    return sum(4 * (m - i) * (n - i) for i in range(k))


@pytest.mark.parametrize("name", ["lu", "qr"])
@pytest.mark.parametrize(("m", "n"), [(256, 256), (512, 256), (256, 512)])
def test_the_counts_are_those_of_the_algorithms(name, m, n):
    """To their highest powers."""
    function = linalg.lu if name == "lu" else lambda x: jnp.linalg.qr(x, mode="raw")
    found = bill("host", function, f32(m, n)).total.flops
    done = eliminated(m, n) if name == "lu" else reflected(m, n, min(m, n))
    assert found == pytest.approx(done, rel=0.02)


@ON_ALL
def test_what_goes_around_until_it_is_near_enough_is_unknown(target):
    found = bill(target, lambda x: jnp.linalg.eigh(x + x.T), f32(64, 64))
    assert any(one.reason.startswith("no rule for custom call") for one in found.unknown)


def test_the_values_are_those_of_numpy():
    """So that it is these functions that are billed."""
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    q, r = jnp.linalg.qr(x)
    np.testing.assert_allclose(np.asarray(q) @ np.asarray(r), x, atol=1e-5)
