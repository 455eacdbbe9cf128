"""Which mesh a step fits on: an estimate of what each chip must hold, and the search for the smallest that will do."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..profiling import targets
from . import flags

if TYPE_CHECKING:
    from ..model.config import ModelConfig

MOST_CHIPS = 256
MOST_TENSOR = 8  # beyond one host's fast links, splitting heads and feed-forward costs more than it saves
MOST_TENSOR_AT_ALL = 64  # and is done where nothing else fits

Mesh = dict[str, int]


@dataclass(frozen=True)
class Fit:
    """The smallest mesh found. `needed_bytes` a chip; `confirmed`: by the compiler, and not only by the estimate."""

    mesh: Mesh
    needed_bytes: int
    confirmed: bool


def candidates(
    config: "ModelConfig", step: str, batch: int | None, most_chips: int = MOST_CHIPS
) -> Iterator[list[Mesh]]:
    """Meshes of 1, 2, 4, ... chips, those of one size in a list, best first; then those that leave a host's fast links.

    Training prefers `data`, which splits the optimizer's state for the price of gathering weights; inference prefers
    `tensor`, which splits the weights too. `batch`: over all chips, or None where each data shard gets its own.
    """
    for least, most in ((1, MOST_TENSOR), (2 * MOST_TENSOR, MOST_TENSOR_AT_ALL)):
        for count in _powers(most_chips):
            tensors = [
                tensor
                for tensor in _powers(min(most, count))
                if tensor >= least and config.num_heads % tensor == config.mlp_width % tensor == 0
            ]
            meshes = [
                {"data": count // tensor, "tensor": tensor}
                for tensor in (tensors if step == "train" else reversed(tensors))
                if (step == "train" and batch is None) or (batch or 1) % (count // tensor) == 0
            ]
            if meshes:
                yield [{axis: size for axis, size in mesh.items() if size > 1} for mesh in meshes]


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def argument_bytes(config: "ModelConfig", step: str, batch: int, context: int, mesh: Mesh) -> tuple[int, int]:
    """(bytes of all arguments, bytes of the parameters) on each chip of `mesh`, by the rules of model/axes.py.

    Exact, and without devices: the shapes and the shardings are those that the step is built with.
    """
    from jax.sharding import AbstractMesh

    from . import steps

    abstract = AbstractMesh(tuple(mesh.get(axis, 1) for axis in targets.MESH_AXES), targets.MESH_AXES)
    # Stacked or not, the layers have the same bytes; one scanned block is traced in a moment.
    as_cheap = replace(config, layers="scan", attention="xla")  # neither changes what the arguments are
    built = steps.build(as_cheap, step, batch=batch, context=context, mesh=abstract)  # pyright: ignore[reportArgumentType]

    return held_bytes(built.arguments), held_bytes(built.arguments[built.names.index("params")])


def held_bytes(tree: Any) -> int:
    """Bytes of arrays, real or abstract, on one chip."""
    import jax

    def shape(leaf: Any) -> tuple[int, ...]:
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def estimate(config: "ModelConfig", step: str, batch: int, context: int, mesh: Mesh) -> int:
    """Bytes that each chip must hold: the arguments, and in training the gradients and what is saved for them.

    Meant to be low rather than high, so that no mesh is passed over that would have fitted.
    """
    arguments, parameters = argument_bytes(config, step, batch, context, mesh)
    tensor, rows = mesh.get("tensor", 1), max(1, batch // flags.batch_shards(mesh))
    if step != "train":
        return arguments
    # Bytes a token and layer, in bfloat16: each block's input; the results of products; the probabilities.
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_width
    full = 2 * config.width
    dots = full + 2 * (heads + 2 * config.mlp_width + config.width)
    saved = {"full": full, "dots": dots, "none": dots + 2 * config.num_heads * context}[config.remat]
    return arguments + parameters + config.num_layers * rows * context * saved // tensor


def smallest(
    meshes: Iterable[list[Mesh]],
    estimated: Callable[[Mesh], int],
    compiled: Callable[[Mesh], int | None] | None,
    capacity_bytes: int,
    tries: int = 4,
) -> Fit | None:
    """The first mesh, in the order given, that fits; None if none does.

    Args:
      meshes: of growing size, those of one size in a list, best first.
      estimated: mesh -> bytes a chip, at least. compiled: mesh -> bytes a chip as the compiler says, or None where it
        refused without a number or cannot make that mesh; None instead of a function: the estimate has to do.
      tries: how often to compile, for that takes long. After that the estimate decides, and the result says so.
    """
    for same_size in meshes:
        sized = [(mesh, estimated(mesh)) for mesh in same_size]
        fitting = [(mesh, needed) for mesh, needed in sized if needed <= capacity_bytes]
        # Of one size, the best that may fit, and after it the leanest.
        leanest = sorted(fitting[1:], key=lambda one: one[1])[:1]
        for mesh, needed in [*fitting[:1], *leanest]:
            if compiled is None or tries == 0:
                return Fit(mesh, needed, confirmed=False)
            tries -= 1
            exactly = compiled(mesh)
            if exactly is not None and exactly <= capacity_bytes:
                return Fit(mesh, exactly, confirmed=True)
    return None
