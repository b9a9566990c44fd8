"""Factorisations of a hessian, in float32 and with few copies of it: at I = 16384 each takes 1 GiB.

Letters: I input features.
"""

import torch
from torch import Tensor

from nnprune.checks import is_set

LEAF = 128
"""Rows up to which a triangular matrix is inverted by substitution."""


def cholesky_(matrix: Tensor, upper: bool = False) -> tuple[Tensor, bool]:
    """L (I, I), lower triangular with L L^T = A, or `upper` L^T, and whether the factorisation failed, which `checks.deferring` puts off.

    Args:
        matrix: A (I, I), symmetric, float32; overwritten.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    factor, _ = torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, info))
    return factor, is_set(info != 0)


def factor_of_inverse(hessian: Tensor) -> tuple[Tensor, bool]:
    """U (I, I), upper triangular with H^-1 = U^T U, and whether the factorisation failed.

    With rows and columns in reverse order H = L L^T. Hence H = R R^T, where R is L reversed and upper triangular, and U = R^-1.
    That is half the work of inverting H and factorising the inverse.

    Args:
        hessian: H (I, I), symmetric, float32; overwritten.
    """
    hessian.copy_(hessian.flip(0, 1))  # so that no third matrix is alive during the factorisation
    lower, failed = cholesky_(hessian)
    if failed:
        return lower, True
    _invert_lower(lower)
    return lower.flip(0, 1), False


def _invert_lower(lower: Tensor) -> None:
    """Invert a lower triangular matrix in place: [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1  C^-1], from small blocks on the diagonal to
    large ones. Those of one size are a batch: few operations fill a device that many small ones would not."""
    width = len(lower)
    while width > LEAF and width % 2 == 0:
        width //= 2
    leaves = _blocks(lower, width, width)
    identity = torch.eye(width, dtype=lower.dtype, device=lower.device)
    leaves.copy_(torch.linalg.solve_triangular(leaves, identity.expand_as(leaves), upper=False))
    while width < len(lower):
        A, B, C = (_blocks(lower, width, 2 * width, *place) for place in ((0, 0), (1, 0), (1, 1)))
        B.copy_((C @ (B @ A)).neg_())
        width *= 2


def _blocks(matrix: Tensor, width: int, step: int, row: int = 0, column: int = 0) -> Tensor:
    """A view (number, width, width) of blocks of a matrix (I, I): `row` and `column`, in units of `width`, behind each `step`-th
    entry of the diagonal."""
    rows, columns = matrix.stride()
    start = matrix.storage_offset() + width * (row * rows + column * columns)
    return matrix.as_strided((len(matrix) // step, width, width), (step * (rows + columns), rows, columns), start)
