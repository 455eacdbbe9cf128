"""Products of one row: the kernel in interpret mode against NumPy, and which products it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stepbill.model import vector
from stepbill.model.vector import Columns, Tiles


def drawn(dtype, D, F, group=128, seed=0):
    """A weight [D,F] with every value its type has, and what it stands for, in float64."""
    rng = np.random.default_rng(seed)
    if dtype == "bfloat16":
        values = rng.normal(size=(D, F)).astype(jnp.bfloat16)
        return Columns(jax.device_put(values)), np.asarray(values, np.float64)
    largest = 8 if dtype == "int4" else 128
    integers = rng.integers(-largest, largest, size=(D, F))
    if dtype == "int8":
        return Columns(jax.device_put(integers.astype(np.int8))), np.asarray(integers, np.float64)
    scale = rng.uniform(0.5, 2, size=(D // group, F)).astype(np.float32)
    wide = integers.reshape(D // group, group, F) * scale[:, None].astype(np.float64)
    return Columns(*jax.device_put((integers.astype(jnp.int4), scale))), wide.reshape(D, F)


@partial(jax.jit, static_argnums=2)
def products(x, weights, plan):
    """What the interpreted kernel makes of each weight: its parts, and their sum."""
    return [(part, vector.added(part)) for part in vector.partial_products(x, weights, plan, interpret=True)]


def error(y, known):
    return np.linalg.norm(np.float64(y) - known) / np.linalg.norm(known)


PLANS = [
    Tiles(columns=256, depth=64, splits=2, warps=4, stages=3),
    Tiles(columns=128, depth=32, splits=4, warps=4, stages=3),  # one group of scales a part
    Tiles(columns=512, depth=128, splits=1, warps=8, stages=3),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_the_kernel_multiplies_a_row_with_weights_side_by_side(dtype, plan):
    D = 512
    x = (np.random.default_rng(7).normal(size=D) + 0.5).astype(jnp.bfloat16)
    weights, known = zip(*(drawn(dtype, D, F, seed=F) for F in (1024, 512, 512)), strict=True)
    assert vector.fits(plan, D, list(weights))
    for some in (3, 1):
        parts = products(x, list(weights[:some]), plan)
        for (part, summed), w in zip(parts, known[:some], strict=True):
            assert part.shape == (plan.splits, w.shape[1])
            assert error(summed, np.asarray(x, np.float64) @ w) < 1e-5


@pytest.mark.parametrize("group", [32, 64, 256])
def test_groups_of_other_sizes_have_their_own_scales(group):
    D, plan = 512, Tiles(columns=128, depth=32, splits=2, warps=4, stages=3)
    x = np.random.default_rng(7).normal(size=D).astype(jnp.bfloat16)
    w, known = drawn("int4", D, 512, group)
    assert vector.fits(plan, D, [w])
    of_choice = vector.plan_for(D, [w])
    assert of_choice is not None and of_choice.depth == min(group, 128)
    ((_, summed),) = products(x, [w], plan)
    assert error(summed, np.asarray(x, np.float64) @ known) < 1e-5


def test_a_row_that_outweighs_all_others_leaves_the_rest_their_bits():
    x = np.where(np.arange(512) == 3, 1000, 1).astype(jnp.bfloat16)
    for dtype in ("int4", "int8"):
        w, known = drawn(dtype, 512, 512)
        ((_, summed),) = products(x, [w], PLANS[0])
        assert error(summed, np.asarray(x, np.float64) @ known) < 1e-5


EXPRESSIONS = ["BTD,DNH->BNTH", "BTD,DKH->BKTH", "BTD,DKH->BKTH"]


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_einsums_are_those_of_jax(dtype):
    x = np.random.default_rng(1).normal(size=(1, 1, 2048)).astype(jnp.bfloat16)
    shapes = (2048, 4, 128), (2048, 2, 128), (2048, 2, 128)
    flat, known = zip(*(drawn(dtype, 2048, n * h, seed=seed) for seed, (_, n, h) in enumerate(shapes)), strict=True)

    @jax.jit
    def einsums(x, flat):
        weights = [
            Columns(w.values.reshape(shape), None if w.scale is None else w.scale.reshape(-1, *shape[1:]))
            for w, shape in zip(flat, shapes, strict=True)
        ]
        how = vector.shared(EXPRESSIONS, x, weights)
        assert how is not None
        return vector.einsums(how, x, weights, interpret=True)

    for y, w, shape, expression in zip(einsums(x, flat), known, shapes, EXPRESSIONS, strict=True):
        right = np.einsum(expression, np.float64(x), w.reshape(shape))
        assert y.shape == right.shape and error(y, right) < 2e-4


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
def test_rows_with_an_expert_each(dtype):
    """Three of five, one of them twice; and of a single row."""
    D, F = 2048, 512
    stack, known = zip(*(drawn(dtype, D, F, seed=seed) for seed in range(5)), strict=True)
    w = jax.tree.map(lambda *some: np.stack(some), *stack)
    experts = np.array([4, 0, 2, 0], np.int32)
    x = np.random.default_rng(1).normal(size=(4, D)).astype(jnp.bfloat16)
    for M in (4, 3, 1):
        made = jax.jit(partial(vector.of_experts, asked=min(M, 3), interpret=True))
        found = made(x[:M], w, experts[:M])
        assert found is not None and found.shape == (M, F)
        for row, number, y in zip(x, experts[:M], found, strict=False):
            assert error(y, np.asarray(row, np.float64) @ known[int(number)]) < 2e-4


def test_a_row_of_float32_is_left_to_others():
    """A matrix unit would round it."""
    w = Columns(jax.ShapeDtypeStruct((2048, 2048), jnp.int8))
    expression = ["BTD,DF->BTF"]
    assert vector.shared(expression, jax.ShapeDtypeStruct((1, 1, 2048), jnp.float32), [w]) is None
    assert vector.shared(expression, jax.ShapeDtypeStruct((1, 1, 2048), jnp.bfloat16), [w]) is not None


def test_each_warp_has_words_of_its_own():
    """Less than eight of a row, and several warps would load the same."""
    for dtype, F in (("int4", 4096), ("int4", 151936), ("int4", 4160), ("int8", 2112), ("int8", 4096)):
        scale = jax.ShapeDtypeStruct((4096 // 128, F), jnp.float32) if dtype == "int4" else None
        plan = vector.plan_for(4096, [Columns(jax.ShapeDtypeStruct((4096, F), dtype), scale)])
        assert plan is not None and plan.columns // vector.per_word(dtype) >= 8 * plan.warps


def test_of_weights_in_full_xla_takes_one_alone():
    shape = jax.ShapeDtypeStruct((1, 1, 2048), jnp.bfloat16)
    w = Columns(jax.ShapeDtypeStruct((2048, 4096), jnp.bfloat16))
    assert vector.shared(["BTD,DF->BTF"], shape, [w]) is None
    assert vector.shared(["BTD,DF->BTF"] * 2, shape, [w, w]) is not None


@pytest.mark.parametrize(
    ("expression", "x", "w"),
    [
        ("BTD,DF->BTF", (1, 2, 2048), (2048, 2048)),  # two rows
        ("BTD,VD->BTV", (1, 1, 2048), (2048, 2048)),  # a tied table, which lies the other way
        ("BTD,DF->BTF", (1, 1, 2048), (2048, 2040)),  # a width without a plan
        ("BTD,DF->BTF", (1, 1, 256), (256, 256)),  # too little to be worth a kernel
    ],
)
def test_what_it_does_not_take_is_left_to_others(expression, x, w):
    shapes = jax.ShapeDtypeStruct(x, jnp.bfloat16), Columns(jax.ShapeDtypeStruct(w, jnp.int8))
    assert vector.shared([expression], shapes[0], [shapes[1]]) is None


@pytest.mark.parametrize("dtype", ["int4", "int8", "bfloat16"])
@pytest.mark.parametrize("D", [1024, 2048, 3072, 4096, 5120, 8192, 14336, 28672])
def test_every_plan_fits_and_leaves_little_to_add(dtype, D):
    for F in (1024, 4096, 14336, 128256):
        scale = jax.ShapeDtypeStruct((D // 128, F), jnp.float32) if dtype == "int4" else None
        w = Columns(jax.ShapeDtypeStruct((D, F), dtype), scale)
        plan = vector.plan_for(D, [w])
        if plan is not None:
            assert vector.fits(plan, D, [w])
            assert plan.splits <= vector.MOST
