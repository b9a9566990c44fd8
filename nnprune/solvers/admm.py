"""The ADMM iterations shared by the pruners ADMM and ALPS: alternate between the best weights and the best mask.

In scaled coordinates (least_squares.py) the loss of B is tr((B - B0)^T A (B - B0)), and D is a copy of B that fulfils the
pattern. With U = V / rho, V the multipliers of B = D, one iteration is

    B = (A + rho 1)^-1 (A B0 + rho (D - U)),    D = P(B + U),    U = U + B - D,

where P keeps the largest entries. With E = (B - B0) / rho the first step solves for a correction, so its product may round its
factors:

    E = (A + rho 1)^-1 (D - U - B0).

One factorisation, at a constant alpha, can serve every rho: that step is then replaced by

    E' = (A + alpha 1)^-1 (D - U - B0 + (alpha / rho - 1) rho_last E),

the same equation with (alpha - rho) B moved to the right-hand side and taken from the last iteration. It has the same fixed point as
the exact step, and converges while rho < 2 alpha.

Letters: O output features (of several linears side by side), I input features.
"""

import torch
from torch import Tensor

from nnprune.kernels.matmul import FastFactor
from nnprune.solvers.mask_projection import Projection

MAX_ITERATIONS = 100_000
"""Upper bound of the iterations of a solver."""


class ADMMIterations:
    """ADMM, starting at B = B0 and U = 0.

    Args:
        B0: the target (I, O), float32, contiguous.
        inverse: (A + alpha 1)^-1, shape (I, I).
        alpha: the shift of `inverse`.
        projection: P.
    """

    def __init__(self, B0: Tensor, inverse: FastFactor, alpha: float, projection: Projection) -> None:
        self.B0 = B0
        self.inverse = inverse
        self.alpha = alpha
        self.projection = projection
        self._total = self.B0.clone()  # B + U, without the part rho E
        self._E = torch.zeros_like(self.B0)
        self._rho: float | None = None  # of the last iteration

    def advance(self, rho: float, sparsity: float | None = None, mask: Tensor | None = None) -> None:
        """One iteration.

        Args:
            rho: its penalty.
            sparsity: of P, if lower than that of the pattern.
            mask: (I, O), float32, ones and zeros: what P keeps, instead of a new choice.
        """
        last = self._rho or rho
        pull, growth = self.alpha / rho - 1, last / rho  # V = rho U does not change with rho
        total = self.total
        mask = self.projection.fast(total.abs(), sparsity) if mask is None else mask
        right = self._E.mul_(last * pull).addcmul_(total, mask)
        U = total.addcmul_(total, mask, value=-1)
        torch.add(self.B0, U, alpha=growth, out=self._total)
        self._E = self.inverse.times(right.sub_(self._total), out=U)
        self._rho = rho

    @property
    def B(self) -> Tensor:
        """The weights (I, O)."""
        return self.B0.add(self._E, alpha=self._rho or 0)

    @property
    def total(self) -> Tensor:
        """B + U, of which P keeps the largest entries."""
        return self._total.add(self._E, alpha=self._rho or 0)
