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
    """Invert a lower triangular matrix in place: [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1  C^-1]."""
    if len(lower) <= LEAF:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = len(lower) // 2
    A, B, C = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_lower(A)
    _invert_lower(C)
    B.copy_((C @ (B @ A)).neg_())
