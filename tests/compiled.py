"""Small functions compiled for a target, and their bills: what the tests of the accounting are made of."""

import fcntl
import gzip
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from stepbill.profiling import targets
from stepbill.profiling.bill import Bill
from stepbill.profiling.walk import itemize_text

TARGETS = ("host", "h200", "v5e")
ON_ALL = pytest.mark.parametrize("target", TARGETS)


def ready(target: str, chips: int = 1) -> None:
    """Prepares the target; skips where its extra is not installed, but never in CI, which installs all of them."""
    try:
        targets.prepare(target, chips)
    except targets.MissingExtra as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def f32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def bf16(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.bfloat16)


def i32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def mesh(target: str, **axes: int) -> Mesh:
    """Chips of the target, with the axes `data` and `tensor`."""
    size = axes.get("data", 1) * axes.get("tensor", 1)
    ready(target, size)
    return targets.mesh(target, axes)


def split(array: jax.ShapeDtypeStruct, over: Mesh, *axes: str | None) -> jax.ShapeDtypeStruct:
    """The same array, its dimensions split over these mesh axes."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(over, PartitionSpec(*axes)))


def once(name: str, make: Callable[[], str]) -> str:
    """make(), called by the first of the workers of this run that asks for `name`; the others wait and read it."""
    file = Path(os.environ["STEPBILL_TEST_CACHE"]) / f"{name}.gz"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            file.write_bytes(gzip.compress(make().encode(), compresslevel=1))
    return gzip.decompress(file.read_bytes()).decode()


@cache
def hlo(target: str, function: Any, *arguments: Any, donate: tuple[int, ...] = (), out: Any = None) -> str:
    """Optimised HLO of `function` for one chip of `target`, or for the mesh that its arguments are split over.

    out: the results' sharding.
    """
    ready(target)
    placed = {} if out is None else {"out_shardings": out}
    return targets.compile(jax.jit(function, donate_argnums=donate, **placed), target, *arguments, runs=False).text


def bill(
    target: str, function: Any, *arguments: Any, donate: tuple[int, ...] = (), out: Any = None, **options: Any
) -> Bill:
    """The bill of `function`; options as of `itemize_module`."""
    return itemize_text(hlo(target, function, *arguments, donate=donate, out=out), targets.chip(target), **options)


def module(*lines: str, header: str = "") -> str:
    """HLO text around the lines of an entry computation."""
    body = "\n".join("  " + line for line in lines)
    return f"HloModule m, is_scheduled=true{header}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
