"""One letter per axis, in every name, einsum and sharding; and which letters a device mesh splits."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import MOVED

AXES = {
    "B": "batch",
    "T": "query positions",
    "S": "key positions",
    "P": "positions of the residual stream, between the sublayers",
    "D": "model width",
    "N": "query heads",
    "G": "query heads of one key/value head (N / K)",
    "K": "key/value heads",
    "H": "head width",
    "F": "feed-forward width",
    "V": "vocabulary",
    "L": "layers, or the repetitions of a pattern of them",
    "E": "experts",
    "R": "experts, as a router has them: all, on every chip",
    "C": "the short vector of latent attention (with the shared rotated key, where both are made)",
    "Q": "the short vector that latent attention makes queries of",
    "X": "positions that have a learned vector",
    "I": "numbers of an image or a sound, or of features, that are made into one position",
    "M": "hidden width of an encoder's merger",
    "O": "width of what that gives to a decoder",
}

# Activations and the cache: the batch over `data` and `expert`; heads, feed-forward and vocabulary over `tensor`. What
# lies between the sublayers has none of these: it is split by position, so that what training saves of each block is
# split too (sequence parallelism, Korthikanti et al., 2022). An all-reduce becomes a reduce-scatter and an all-gather.
# Chips along `expert` share experts out (expert parallelism, Lepikhin et al., 2020), and have all else each for itself.
ACTIVATIONS = {"B": ("data", "expert"), "E": ("expert",), **dict.fromkeys("NKGFVP", ("tensor",))}
# Parameters, their gradients and optimizer state, in training: also a width over `data`, and over `expert` those of no
# expert. Each use gathers it.
TRAINED = ACTIVATIONS | dict.fromkeys("DQC", ("data", "expert"))

_current_mesh: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


def spec(axes: str, shape: tuple[int, ...], mesh: Mesh, training: bool = False) -> PartitionSpec:
    """How an array with these axis letters lies on the mesh.

    A dimension that its mesh axes do not divide is replicated. A mesh axis is used once, by the first letter that it
    divides: where there are fewer key/value heads K than `tensor` chips, the queries "BKGTH" are split along G.
    `training` says that the array is a parameter, a gradient or optimizer state of a training step.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {axes!r} name {len(axes)} dimensions; the shape {shape} has {len(shape)}")
    rules, used = TRAINED if training else ACTIVATIONS, set()
    entries: list[str | tuple[str, ...] | None] = []
    for letter, size in zip(axes, shape, strict=True):
        names = tuple(name for name in rules.get(letter, ()) if mesh.shape.get(name, 1) > 1 and name not in used)
        split = size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append((names if names[1:] else names[0]) if split and names else None)
        used.update(names if split else ())
    return PartitionSpec(*entries)


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Makes `mesh` the one that `shard` splits activations over, for what is traced inside."""
    token = _current_mesh.set(mesh)
    try:
        yield
    finally:
        _current_mesh.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh that activations are split over, if there is one of more than one chip."""
    mesh = _current_mesh.get()
    return None if mesh is None or mesh.size == 1 else mesh


def kernel_mesh() -> Mesh | None:
    """The mesh, even of one chip: a kernel is told by it what it is compiled for."""
    mesh = _current_mesh.get()
    return mesh if isinstance(mesh, Mesh) else None


def platform() -> str:
    """What is compiled for: "cpu", "cuda" or "tpu". Kernels and layouts are chosen by it while a program is traced."""
    mesh = _current_mesh.get()
    name = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else jax.default_backend()
    return {"gpu": "cuda"}.get(name, name)


def device_kind() -> str:
    """The kind of chip that is compiled for, such as "TPU v5 lite"."""
    mesh = _current_mesh.get()
    devices = mesh.devices.flat if isinstance(mesh, Mesh) else jax.devices()
    return devices[0].device_kind


def shard(x: jax.Array, axes: str) -> jax.Array:
    """Constrains an activation, or a weight at its use, to its place on the current mesh; identity without one."""
    mesh = current_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


def gather(x: jax.Array, axes: str, before: str = "") -> jax.Array:
    """`shard` of what lay as the letters `before` say, or as a trained parameter does. It has the name MOVED where it
    came over links, so that it need not come again when the backward pass recomputes something."""
    mesh = current_mesh()
    if mesh is None:
        return x
    was = spec(before or axes, x.shape, mesh, training=not before)
    here = shard(x, axes)
    return here if was == spec(axes, x.shape, mesh) else checkpoint_name(here, MOVED)


def as_it_lies(x: jax.Array, axes: str) -> jax.Array:
    """x, which whoever reads it has to take in the order of its axes.

    A GPU's compiler would rather multiply with keys [S,H] transposed, and where B or K is 1, so that nothing stands
    between, transpose the whole cache for it.
    """

    def ordered(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    mesh = current_mesh()
    if mesh is None:
        return ordered(x)
    place = spec(axes, x.shape, mesh)  # chip by chip, for the constraint itself cannot be split: all would be gathered
    return jax.shard_map(ordered, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)(x)
