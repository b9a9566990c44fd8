"""The layer-wise least-squares problem in scaled coordinates: what ADMM, ALPS and the refit solve.

A linear with target weight W0 shall become a sparse W with a small  tr((W - W0) H (W - W0)^T) + lambda ||(W - W0) a||^2,
H = E[x x^T]. With the inputs scaled to unit norm, a_i = sqrt(H_ii), B = (W a)^T and A = H / (a a^T) + lambda 1 this reads
tr((B - B0)^T A (B - B0)): A has a constant diagonal, so that magnitudes of B can be compared and conjugate gradients need no
other preconditioner. The ridge lambda pulls towards W0, not towards zero.

Letters: O output features (of several linears side by side), I input features. Float32 throughout.
"""

import torch
from torch import Tensor

from nnprune.kernels.matmul import FastFactor
from nnprune.statistics import Hessian

FLOOR = 1e-8
"""Share of the mean squared norm below which an input counts as being that loud: a dead input then costs next to nothing
and keeps the target's weights, by the ridge."""


class ScaledProblem:
    """The quadratic form of linears that receive the same input.

    Args:
        statistic: their Hessian.
        damping: lambda, a fraction of the diagonal of the scaled Hessian, which is 1.
        name: of one of the linears, for error messages.

    Attributes:
        A: (I, I), symmetric, diagonal 1 + lambda.
        scale: a (I,).
    """

    def __init__(self, statistic: Hessian, damping: float, name: str) -> None:
        self.name = name
        self.num_tokens = statistic.num_tokens
        self.A = statistic.mean()
        norms = self.A.diagonal().clone()
        norms.clamp_(min=float(norms.mean()) * FLOOR or 1.0)
        self.scale = norms.sqrt()
        self.A.div_(self.scale[:, None]).div_(self.scale)
        self.A.diagonal().add_(damping)

    @classmethod
    def of(cls, statistic: Hessian, damping: float, name: str) -> "ScaledProblem":
        """The problem, made once for a statistic and damping."""
        return statistic.memo((cls, damping), lambda: cls(statistic, damping, name))

    def scaled(self, weight: Tensor) -> Tensor:
        """B^T (O, I), float32, for a weight (O, I)."""
        return weight * self.scale

    def unscaled(self, B_OI: Tensor) -> Tensor:
        """The weight (O, I), for B^T (O, I)."""
        return B_OI / self.scale

    def inverse(self, rho: float) -> Tensor:
        """(A + rho 1)^-1, shape (I, I).

        Raises ValueError, naming the linear, when A + rho 1 is not positive definite even so.
        """
        shifted = self.A.clone()
        shifted.diagonal().add_(rho)
        lower, info = torch.linalg.cholesky_ex(shifted, out=(shifted, torch.empty(0, dtype=torch.int32, device=shifted.device)))
        if info.item():
            raise ValueError(
                f"{self.name}: its Hessian from {self.num_tokens} tokens could not be factorised; raise the damping or "
                "calibration.num_samples"
            )
        return torch.cholesky_inverse(lower)

    def refit(self, B: Tensor, B0: Tensor, num_steps: int) -> Tensor:
        """The nonzeros of B (I, O), moved towards the best values for their support by conjugate gradients.

        Every output feature is a problem of its own with step sizes of its own, and none ends with a larger error. Products
        but the first are fast ones: what is solved for is the correction of B, so their rounding costs a small share of the gain.
        """
        factor = FastFactor(self.A)
        B = B.clone(memory_format=torch.contiguous_format)
        support = (B != 0).to(B.dtype)
        residual = (self.A @ (B0 - B)).mul_(support)
        direction, product = residual.clone(), torch.empty_like(B)
        norm = residual.square().sum(0)
        for _ in range(num_steps):
            factor.times(direction, out=product)
            step = norm / (direction * product).sum(0)
            step.nan_to_num_(0, 0, 0).clamp_(min=0)  # nothing left to do, or nothing but rounding
            B.addcmul_(direction, step)
            residual.addcmul_(product.mul_(support), step, value=-1)
            last, norm = norm, residual.square().sum(0)
            direction.mul_((norm / last).nan_to_num_(0, 0, 0)).add_(residual)
        return B
