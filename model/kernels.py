"""Products and attention that plain einsums would do wastefully."""

import jax
import jax.numpy as jnp
import numpy as np

from .quantized import einsum

Weights = jax.Array | tuple[jax.Array, jax.Array]  # whole, or (values, scale) of a quantised one


def grouped_matmul(x: jax.Array, w: Weights, experts: jax.Array) -> jax.Array:
    """Blocks of rows, each times one of E matrices: x [M,b,D], w [E,D,F], experts [M] ascending -> [M,b,F].

    A loop over the blocks, in which a matrix is sliced out of the stack: a TPU reads the slice where it lies; a GPU
    copies it first, and the bill says so as the `slice` tax.
    """
    if isinstance(w, tuple):
        values, scale = w

        def product(block: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, expert = block
            return einsum("bD,DF->bF", rows, _row(values, expert), _row(scale, expert))

        return jax.lax.map(product, (x, experts))
    return _grouped(x, w, experts)


def _row(stack: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, number, keepdims=False)


@jax.custom_vjp
def _grouped(x: jax.Array, w: jax.Array, experts: jax.Array) -> jax.Array:
    def product(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, expert = block
        return jnp.einsum("bD,DF->bF", rows, _row(w, expert))

    return jax.lax.map(product, (x, experts))


def _grouped_forward(x: jax.Array, w: jax.Array, experts: jax.Array):
    return _grouped(x, w, experts), (x, w, experts)


def _grouped_backward(saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array):
    """What autodiff makes of the loop adds an array of the size of all E matrices for each block; here each block adds
    to its own matrix."""
    x, w, experts = saved

    def input_gradient(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, expert = block
        return jnp.einsum("bF,DF->bD", rows, _row(w, expert))

    def add(dw: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        rows, slopes, expert = block
        more = jnp.einsum("bD,bF->DF", rows, slopes, preferred_element_type=jnp.float32)
        total = _row(dw, expert) + more.astype(dw.dtype)
        return jax.lax.dynamic_update_index_in_dim(dw, total, expert, 0), None

    dx = jax.lax.map(input_gradient, (dy, experts))
    dw, _ = jax.lax.scan(add, jnp.zeros_like(w), (x, dy, experts))
    return dx, dw, np.zeros(experts.shape, jax.dtypes.float0)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def flash(q: jax.Array, k: jax.Array, v: jax.Array, **kw) -> jax.Array:
    raise NotImplementedError
