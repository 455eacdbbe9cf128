"""What factorizations cost: LAPACK's on a CPU, cuSOLVER's and cuBLAS's on a GPU, and the blocks of which a TPU's
compiler makes its own. By the customary counts, of multiplications and additions; of complex numbers four times.

Source: Blackford and Dongarra, "Installation guide for LAPACK" (LAPACK Working Note 41, 1999), the highest powers of
its operation counts; Golub and Van Loan, Matrix Computations, 4.2 and 5.2. Eigenvalues and singular values have no
rule: how often their algorithms go around depends on the numbers, so the bill names them as unknown.
"""

import math

from .calls import register
from .flops import NOTHING, Flops
from .hlo import Instruction


def _library(*routines: str, tpu: str = "none") -> str:
    """The custom calls of a routine; by its names for real and complex numbers, and a TPU's."""
    return rf"(cusolver_|lapack_[sdcz])({'|'.join(routines)})_ffi|{tpu}"


def _sizes(call: Instruction, operand: int = 0) -> tuple[int, int, int]:
    """(how many matrices [m,n] an operand holds, m, n)."""
    *batch, m, n = call.operands[operand].shape.dims
    return math.prod(batch), m, n


def _counted(call: Instruction, real: float) -> Flops:
    # A TPU's calls, which have names of their own, take real and imaginary parts one beside the other.
    in_parts = call.custom_call_target[0].isupper() and len(call.operands) == 2
    is_complex = in_parts or call.operands[0].shape.dtype in ("c64", "c128")
    return Flops(elementwise=round(real) * (4 if is_complex else 1))


@register(_library("potrf", tpu=r"Cholesky|InvertDiagBlocks(Lower|Upper)Triangular|CompactWyHelper"))
def _third_of_a_cube(call: Instruction) -> Flops:
    """n^3 / 3 a matrix: Cholesky's factor; the inverse of a triangle; the triangle by which many reflections are one
    (Schreiber and Van Loan, 1989)."""
    count, _, n = _sizes(call)
    return _counted(call, count * n**3 / 3)


@register(_library("getrf", tpu=r"Lu(Real|Complex)?DecompositionBlock"))
def _lu(call: Instruction) -> Flops:
    """2/3 n^3 of a square matrix; of [m,n] with k the less of both, 2 m n k - (m + n) k^2 + 2/3 k^3."""
    count, m, n = _sizes(call)
    k = min(m, n)
    return _counted(call, count * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 / 3))


def _reflections(m: int, n: int, k: int) -> float:
    """Of k of them, each of one row or column less, to [m,n]."""
    return 4 * m * n * k - 2 * (m + n) * k**2 + 4 * k**3 / 3


@register(_library("geqrf", tpu=r"Qr(Real|Complex)?DecompositionBlock"))
def _qr(call: Instruction) -> Flops:
    """4/3 n^3 of a square matrix; 2 m n^2 - 2/3 n^3 of a tall one."""
    count, m, n = _sizes(call)
    return _counted(call, count * _reflections(m, n, min(m, n)))


@register(_library("orgqr", "ungqr"))
def _q(call: Instruction) -> Flops:
    """The orthogonal factor [m,n] of as many reflections as the second operand has scales for."""
    count, m, n = _sizes(call)
    return _counted(call, count * _reflections(m, n, call.operands[1].shape.dims[-1]))


@register(_library("ormqr", "unmqr"))
def _times_q(call: Instruction) -> Flops:
    """k reflections to [m,n], from the left 4 m n k - 2 n k^2, else 4 m n k - 2 m k^2."""
    count, m, n = _sizes(call, 2)
    k = call.operands[1].shape.dims[-1]
    others = n if "left = true" in call.backend_config else m
    return _counted(call, count * (4 * m * n * k - 2 * others * k**2))


@register(_library("sytrd", "hetrd"))
def _tridiagonal(call: Instruction) -> Flops:
    """4/3 n^3."""
    count, _, n = _sizes(call)
    return _counted(call, count * 4 * n**3 / 3)


@register(r"lapack_[sdcz]trsm_ffi|__cublas\$triangularSolve")
def _triangular_solve(call: Instruction) -> Flops:
    """n^2 a right-hand side."""
    return _counted(call, call.operands[1].shape.elements * call.operands[0].shape.dims[-1])


@register("cu_lu_pivots_to_permutation")
def _permutation(call: Instruction) -> Flops:
    """Integers change places."""
    del call
    return NOTHING
