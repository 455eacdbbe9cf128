"""Arguments of a step that any framework can make again, bit for bit, on its own device and in seconds.

Weights of billions of parameters need not be drawn, quantised and carried from one process to another to be the same in
both: each is a hash of where it is. The top bits of the hash are a whole number, which times a power of two is a weight
that bfloat16 holds exactly; int8 and int4 hold the number itself. What is multiplied with them sees random numbers of a
width that keeps activations in range, never zeros, which draw less power and so run faster.
"""

import math
import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .steps import Step

# Of weights, in 8 bits and in 4: all have a standard deviation of about 0.018, that of a product over 3000 inputs.
SCALES = {8: 2.0**-12, 4: 2.0**-8}
CACHE_SCALE = 2.0**-6  # of keys and values, in 8 bits: a standard deviation of about 1.2
CHUNK = 1 << 26  # numbers that torch makes at a time, in eight bytes each


def mix(x: Any, wrap: Callable[[Any], Any] = lambda x: x) -> Any:
    """A hash of whole numbers from 0 to 2^32 - 1 into the same range (two rounds of multiply and xor-shift).

    Of any array type that has `^`, `>>` and `*`. wrap: what cuts a product to 32 bits, where the type does not.
    """
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = wrap((x ^ (x >> shift)) * factor)
    return x ^ (x >> 15)


def salt(name: str) -> int:
    """What tells the numbers of one array from those of another."""
    return zlib.crc32(name.encode())


def place(keys: tuple[Any, ...], size: int) -> tuple[str, int]:
    """A parameter's path, with numbers of layers in it -> (its name without, where its numbers begin).

    A layer's parameter and its row in the stack of all layers have the same numbers.
    """
    numbers = [key for key in keys if isinstance(key, int)]
    name = "/".join(key for key in keys if isinstance(key, str))
    if len(numbers) == 1:
        return name, numbers[0] * size
    return "/".join([name, *(str(number) for number in numbers if number)]), 0


def of_jax(name: str, first: int, shape: tuple[int, ...], bits: int) -> Any:
    """The signed numbers of `bits` bits of one array, int32."""
    import jax.numpy as jnp

    start = (salt(name) + first) % 2**32
    return _numbers(jnp.uint32(start), shape, bits)


def _numbers(start: Any, shape: tuple[int, ...], bits: int) -> Any:
    import jax.numpy as jnp

    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return (mix(index + start) >> (32 - bits)).astype(jnp.int32) - 2 ** (bits - 1)


def of_torch(name: str, first: int, shape: tuple[int, ...], bits: int, device: str) -> Any:
    """The same, int8, on a device of torch."""
    import torch

    start, size = salt(name) + first, math.prod(shape)
    out = torch.empty(size, dtype=torch.int8, device=device)
    for begin in range(0, size, CHUNK):
        end = min(begin + CHUNK, size)
        index = torch.arange(start + begin, start + end, dtype=torch.int64, device=device) & 0xFFFFFFFF
        hashed = mix(index, lambda x: x & 0xFFFFFFFF)
        out[begin:end] = (hashed >> (32 - bits)) - 2 ** (bits - 1)
    return out.reshape(shape)


def tokens_of(name: str, shape: tuple[int, ...], vocabulary: int) -> Any:
    """Tokens, int32, the same everywhere: of numpy."""
    import numpy as np

    index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape) + np.uint32(salt(name))
    return (mix(index) % np.uint32(vocabulary)).astype(np.int32)


def arguments(step: "Step") -> tuple[Any, ...]:
    """Arrays for a step that was built with abstract arguments, made on the device in the types that it stores.

    A cache is full but for what the step writes; the optimizer's state is of an update that saw zeros.
    """
    import jax

    return tuple(
        jax.tree.map_with_path(partial(_leaf, step, name), tree)
        for name, tree in zip(step.names, step.arguments, strict=True)
    )


def _leaf(step: "Step", argument: str, path: tuple[Any, ...], leaf: Any) -> Any:
    import jax.numpy as jnp

    keys = tuple(_key(part) for part in path)
    if argument == "tokens":
        return jnp.asarray(tokens_of("tokens", leaf.shape, step.config.vocabulary))
    if argument == "opt_state":
        return jnp.zeros(leaf.shape, leaf.dtype)
    if keys == ("position",):
        return jnp.asarray(step.context - 1 if step.name == "decode" else 0, leaf.dtype)
    stored = jnp.issubdtype(leaf.dtype, jnp.signedinteger)
    if argument == "cache":
        if keys[-1] == "scale":
            return jnp.full(leaf.shape, CACHE_SCALE, leaf.dtype)
        name, first = place(tuple(key for key in keys if key != "values"), math.prod(leaf.shape))
        return _made(f"cache/{name}", first, leaf, 8, 1.0 if stored else CACHE_SCALE)
    bits = 4 if step.config.weights.startswith("int4") else 8
    if keys[-1] == "scale":
        return jnp.full(leaf.shape, 1.0 if str(keys[-2]).endswith("norm") else SCALES[bits], leaf.dtype)
    name, first = place(tuple(key for key in keys if key != "values"), math.prod(leaf.shape))
    bits = bits if stored else 8
    return _made(name, first, leaf, bits, 1.0 if stored else SCALES[bits])


def _key(part: Any) -> Any:
    """A step of a pytree's path as the text or the number that it is."""
    for name in ("key", "idx", "name"):
        if hasattr(part, name):
            return getattr(part, name)
    raise TypeError(f"{part!r} is no step of a path")


def _made(name: str, first: int, leaf: Any, bits: int, scale: float) -> Any:
    import jax.numpy as jnp

    return _maker(leaf.shape, leaf.dtype, bits, scale)(jnp.uint32((salt(name) + first) % 2**32))


@cache
def _maker(shape: tuple[int, ...], dtype: Any, bits: int, scale: float) -> Callable[[Any], Any]:
    """One compiled program for all arrays of a shape."""
    import jax
    import jax.numpy as jnp

    def make(start: Any) -> Any:
        numbers = _numbers(start, shape, bits)
        return numbers.astype(dtype) if scale == 1 else (numbers * jnp.float32(scale)).astype(dtype)

    return jax.jit(make)
