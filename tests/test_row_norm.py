"""RMSNorm of one row: the kernel in interpret mode against NumPy, who takes it, and bills for absent chips."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import mesh
from flax import nnx
from stepbill.model import layers, row_norm
from stepbill.model.axes import use_mesh
from test_model_bills import SMALL, assert_sound, bill, program

EPSILON = 1e-3


def drawn(shape, dtype):
    """x and a scale, and both in float64."""
    rng = np.random.default_rng(0)
    x, scale = (array.astype(jnp.dtype(dtype)) for array in (rng.normal(size=shape) * 3, rng.normal(size=shape[-1])))
    return x, scale, np.float64(x), np.float64(scale)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 4096), (1, 1, 2880), (384,)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_kernel_divides_a_row_by_its_root_mean_square(dtype, shape, offset):
    x, scale, wide, wide_scale = drawn(shape, dtype)
    right = wide / np.sqrt(np.mean(wide**2) + EPSILON) * (wide_scale + offset)
    found = jax.jit(lambda x, scale: row_norm.normed(x, scale, EPSILON, offset, interpret=True))(x, scale)
    assert found.shape == shape and found.dtype == dtype
    np.testing.assert_allclose(np.float64(found), right, rtol=2**-8 if dtype == "bfloat16" else 2e-6)
    again = jax.jit(row_norm.plain)(x, scale, EPSILON, offset)
    np.testing.assert_allclose(np.float64(found), np.float64(again), rtol=2**-7 if dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_its_gradient_is_that_of_the_formula(dtype):
    x, scale, *_ = drawn((1, 1, 2880), dtype)

    def slopes(norm, **options):
        def loss(x, scale):
            return jnp.sum(jnp.sin(norm(x, scale, EPSILON, 1.0, **options).astype(jnp.float32)))

        return jax.jit(jax.grad(loss, (0, 1)))(x, scale)

    found, right = slopes(row_norm.normed, interpret=True), slopes(row_norm.plain)
    for one, other in zip(found, right, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.float64(one), np.float64(other), rtol=2e-2, atol=1e-5)


ROW = replace(SMALL, width=512, layers="unroll", param_dtype="bfloat16")


@pytest.mark.parametrize(
    ("target", "axes", "shape", "changes", "takes"),
    [
        ("h200", {}, (1, 1, 512), {}, True),
        ("h200", {}, (1, 2, 512), {}, False),  # two rows
        ("h200", {}, (1, 1, 256), {"width": 256}, False),
        ("h200", {}, (1, 1, 32768), {"width": 32768}, False),
        ("h200", {}, (1, 1, 512), {"layers": "scan"}, False),
        ("h200", {}, (1, 1, 512), {"dtype": "float64"}, False),
        ("h200", {}, (1, 1, 512), {"norm": "layer"}, False),
        ("h200", {"tensor": 2}, (1, 1, 512), {}, False),
        ("v5e", {}, (1, 1, 512), {}, False),
        ("host", {}, (1, 1, 512), {}, False),
    ],
)
def test_what_it_does_not_take_is_left_to_xla(target, axes, shape, changes, takes):
    config = replace(ROW, **changes)
    with jax.enable_x64(True), use_mesh(mesh(target, **axes)):
        norm = layers.norm(config, nnx.Rngs(0))
        made = jax.make_jaxpr(norm)(jax.ShapeDtypeStruct(shape, config.dtype))
    assert ("pallas_call" in str(made)) == takes


def test_a_decode_step_has_one_kernel_for_each_norm():
    """It reads the row once, and nothing is copied or converted for it; what it computes is billed as of XLA's."""
    sizes, width = (1, 256), ROW.width
    found = bill("h200", "decode", config=ROW, sizes=sizes)
    assert_sound(found)
    for name, norms in {"attention/norm": 2, "mlp/norm": 2, "final_norm": 1}.items():
        work = found.component(name)
        assert (work.elementwise, work.transcendental) == (norms * (4 * width + 2), norms)
        assert work.requested_bytes == norms * 3 * width * 2
    entry = program("h200", "decode", (), ROW, sizes).entry
    kernels = [one for one in entry if "norm/" in one.op_name and one.opcode not in ("bitcast", "parameter")]
    assert [one.opcode for one in kernels] == ["custom-call"] * 5
    for one in kernels:
        readers = [user for user in one.users if user.opcode != "bitcast"]
        assert not {"copy", "convert"} & {each.opcode for each in (*one.operands, *readers)}


def test_a_layer_that_has_it_is_differentiated():
    x = jax.ShapeDtypeStruct((1, 1, 512), "bfloat16")
    with use_mesh(mesh("h200")):
        norm = layers.RMSNorm(ROW, nnx.Rngs(0))
        made = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(norm(x))))(x)
    assert "pallas_call" in str(made) and made.out_avals[0].shape == x.shape
