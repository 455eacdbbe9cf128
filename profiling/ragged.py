"""Products of rows with a matrix for each group of them (`jax.lax.ragged_dot`) where the compiler has none: it
multiplies each row with the matrices of all groups, with zeros for what is not its own. All of that is executed; of E
groups one is asked for.
"""

from collections.abc import Iterator

from .calls import is_matmul_of_library
from .hlo import Instruction

_MOVES = frozenset(("bitcast", "copy", "transpose", "reshape", "get-tuple-element", "convert"))


def groups(dot: Instruction, kernel: Instruction) -> int:
    """How many groups a product masks; 1 where it is of no ragged_dot, or nothing tells.

    The sizes of groups, or where they end, make the mask: an array of whole numbers, as long as both operands are along
    the axis of groups.
    """
    if "ragged_dot" not in dot.op_name or not (dot.opcode == "dot" or is_matmul_of_library(dot)):
        return 1
    left, right = ([*_chain(operand, kernel)] for operand in dot.operands[:2])
    dims = [{n for one in chain if not one.shape.parts for n in one.shape.dims} for chain in (left, right)]
    ends = {
        read.shape.elements
        for chain in (left, right)
        for read in _read(chain[-1], kernel)
        if read.shape.leaves and read.shape.leaves[0].dtype in ("s32", "u32", "s64")
    }
    # Rows, of which there are more, are along both operands in the gradient of the matrices.
    return min((n for n in ends if n > 1 and n in dims[0] and n in dims[1]), default=1)


def _chain(value: Instruction, kernel: Instruction) -> Iterator[Instruction]:
    """A value, what it is moved from, and so on, to what computes it; out of the kernel where it is handed in."""
    yield value
    while True:
        if value.opcode == "parameter" and kernel.is_fusion and value in kernel.called[0].parameters:
            value = kernel.operands[kernel.called[0].parameters.index(value)]
        elif value.opcode in _MOVES or (value.is_fusion and len(value.operands) == 1):
            value = value.operands[0]
        else:
            return
        yield value


def _read(maker: Instruction, kernel: Instruction) -> Iterator[Instruction]:
    """All that it is computed from, as far as its kernel is handed it."""
    if maker.computation is not kernel.computation and kernel.is_fusion:
        yield from kernel.operands
    else:
        yield from maker.operands
