"""Bills of random programs: the sum is exact, and matmul FLOPs are those of the jaxpr."""

from collections import Counter

import jax
import jax.numpy as jnp
import pytest
import random_programs
from compiled import ON_ALL, f32, i32, ready
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from random_programs import Products, Program

# What CI has time for; `tests/random_programs.py` is for looking further.
EXAMPLES = {"host": 10, "h200": 6, "v5e": 10}


@st.composite
def programs(draw) -> Program:
    return random_programs.draw(lambda n: draw(st.integers(0, n - 1)))


@ON_ALL
def test_any_program_adds_up_and_costs_what_its_jaxpr_says(target):
    """The same programs on every run, whoever runs it; what fails is not made smaller, which takes a compiler hours."""
    ready(target)
    outcomes = Counter[str]()

    @settings(max_examples=EXAMPLES[target], derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(programs())
    def holds(program: Program) -> None:
        outcomes[random_programs.check(program, target)] += 1

    holds()
    assert outcomes["equal"] > 0.7 * outcomes.total() >= 0.7 * EXAMPLES[target], outcomes


def test_drawn_programs_have_everything_in_them():
    met = Counter[str]()

    @settings(max_examples=200, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(programs())
    def look(program: Program) -> None:
        met.update(random_programs.kinds(program.block))

    look()
    assert met.keys() >= {*random_programs.PLAIN, *random_programs.NESTED}


# --- the count itself ----------------------------------------------------------------------------------------------


def body(x, w):
    return jnp.tanh(x @ w), None


def loop(trips):
    def function(x, w, n):
        return lax.while_loop(lambda s: s[0] < (trips or n), lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]

    return function


PRODUCT = 2 * 4 * 8 * 8


def nested(x, w, n):
    return lax.scan(lambda x, _: (lax.scan(lambda x, _: body(x, w), x, None, 3)[0], None), x, None, 5)[0]


def again(x, w, n):
    """Forward, of which the last product is not needed; then again, and backwards two for each."""
    return jax.grad(lambda w: jnp.sum(jax.checkpoint(lambda w: jnp.sin(jnp.sin(x @ w) @ w))(w)))(w)


COUNTS = {
    "a product": (lambda x, w, n: x @ w, 1),
    "one of which nothing is used": (lambda x, w, n: (x, x @ w)[0], 0),
    "a scan": (lambda x, w, n: lax.scan(body, x, jnp.stack([w, w + 1, w + 2]))[0], 3),
    "a scan in a scan": (nested, 15),
    "a while": (loop(7), 7),
    "a while of unknown trips": (loop(None), 1),
    "branches": (lambda x, w, n: lax.cond(n > 0, lambda x: x @ w @ w, lambda x: x @ w, x), 2),
    "vmap": (lambda x, w, n: jax.vmap(lambda x: x @ w)(jnp.stack([x, x + 1])), 2),
    "grad": (lambda x, w, n: jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w), 2),
    "grad of remat": (again, 2 + 3),
    "jit": (lambda x, w, n: jax.jit(lambda x: x @ w)(x), 1),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_count_of_a_jaxpr(name):
    function, products = COUNTS[name]
    assert random_programs.counted(function, [f32(4, 8), f32(8, 8), i32()]) == Products(products * PRODUCT, 0)


def test_outer_products_are_counted_apart():
    assert random_programs.counted(lambda x, y: x @ y, [f32(4, 1), f32(1, 8)]) == Products(0, 2 * 4 * 8)
