"""The layer-wise least-squares problem in scaled coordinates: what ADMM, ALPS and the refit solve.

A linear with target weight W0 is to become a sparse W of small  tr((W - W0) H (W - W0)^T) + lambda ||(W - W0) a||^2, with the
hessian H = E[x x^T]. Scale the inputs to unit norm, a_i = sqrt(H_ii), and let B = (W a)^T and A = H / (a a^T) + lambda 1. The loss is
then tr((B - B0)^T A (B - B0)). A has a constant diagonal, so magnitudes of B can be compared, and conjugate gradients need no other
preconditioner. The ridge lambda pulls towards W0, not towards zero.

Lambda is relative to each input, so it does not protect the weights of inputs that calibration hardly activates. Shrinkage does:
with H + s m 1 in place of H, m the mean of its diagonal, the loss is an estimate for text that activates them more (the target of
Ledoit and Wolf 2004, doi:10.1016/S0047-259X(03)00096-4; SparseGPT's damping has the same form).

Letters: O output features (of several linears side by side), I input features. Float32 throughout.
"""

import torch
from torch import Tensor

from nnprune.solvers.cholesky import cholesky_
from nnprune.solvers.conjugate_gradients import Solution, conjugate_gradients
from nnprune.statistics import InputStatistic

MIN_SQUARED_NORM = 1e-8
"""Lower bound of an input's squared norm, as a fraction of the mean. A dead input then adds next to nothing to the loss, and the
ridge keeps the target's weights."""


class ScaledProblem:
    """The quadratic form of linears that receive the same input.

    Args:
        statistic: their hessian.
        damping: lambda, a fraction of the diagonal of the scaled hessian, which is 1.
        name: one of the linears, for error messages.
        shrinkage: s.

    Attributes:
        A: (I, I), symmetric, diagonal 1 + lambda; of a dead input lambda.
        scale: a (I,).
    """

    def __init__(self, statistic: InputStatistic, damping: float, name: str, shrinkage: float = 0.0) -> None:
        self.name = name
        self.num_tokens = statistic.num_tokens
        self.A = statistic.mean()
        self.A.diagonal().add_(shrinkage * self.A.diagonal().mean())
        norms = self.A.diagonal().clone()
        mean = norms.mean()
        least = (mean.double() * MIN_SQUARED_NORM).float()
        norms.clamp_(min=least.masked_fill_(mean == 0, 1))  # all inputs are dead
        self.scale = norms.sqrt()
        self.A.div_(self.scale[:, None]).div_(self.scale)
        self.A.diagonal().add_(damping)

    @classmethod
    def of(cls, statistic: InputStatistic, damping: float, name: str, shrinkage: float = 0.0) -> "ScaledProblem":
        """The problem, built once for each statistic, damping and shrinkage."""
        return statistic.memo((cls, damping, shrinkage), lambda: cls(statistic, damping, name, shrinkage))

    def scale_(self, weight_IO: Tensor) -> Tensor:
        """B (I, O) of a weight (I, O), float32, in place."""
        return weight_IO.mul_(self.scale[:, None])

    def unscale_(self, B: Tensor) -> Tensor:
        """The weight (I, O) of B (I, O), in place."""
        return B.div_(self.scale[:, None])

    def inverse(self, rho: float) -> Tensor:
        """(A + rho 1)^-1, shape (I, I). Raises ValueError, naming the linear, if A + rho 1 is not positive definite."""
        shifted = self.A.clone()
        shifted.diagonal().add_(rho)
        lower, failed = cholesky_(shifted)
        if failed:
            raise ValueError(
                f"{self.name}: its hessian from {self.num_tokens} tokens could not be factorised; raise the damping or "
                "calibration.num_samples"
            )
        return torch.cholesky_inverse(lower)

    def refit(self, B: Tensor, B0: Tensor, max_steps: int, tolerance: float = 0.0) -> Solution:
        """The nonzeros of B (I, O), moved in place towards the best values for their support: see `conjugate_gradients`."""
        return conjugate_gradients(self.A, B, B0, max_steps, tolerance)
