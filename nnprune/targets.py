"""Which weights a linear is pruned towards: `target`.

Letters: O output features, I input features.
"""

import torch
from torch import Tensor

from nnprune.checks import check_positive, quoted
from nnprune.solvers.cholesky import cholesky_
from nnprune.statistics import CrossProduct, Hessian, InputStatistic


class Target:
    """The linear's own dense weight: ||X (W - W0)^T||^2 on the inputs X that the pruned model produces."""

    statistics: tuple[type[InputStatistic], ...] = ()
    """What it needs to know of the inputs. CrossProduct asks for the dense model's inputs beside the pruned model's."""

    matrix_copies, weight_copies = 0, 0
    """float32 matrices (I, I) and weights (O, I) that it holds at its peak, besides statistics: for estimates of memory."""

    def weights(self, dense: dict[str, Tensor], statistics: dict[type[InputStatistic], InputStatistic]) -> dict[str, Tensor]:
        """The weights to prune in place of the dense ones.

        Args:
            dense: linear name -> weight (O, I) of linears that receive the same input.
            statistics: of that input, one of each kind in `statistics`.

        Returns:
            Linear name -> weight (O, I).
        """
        return dense

    def mean_input(self, means: Tensor) -> Tensor:
        """The input (I,) whose output, by the dense weight and bias, is the mean output to be matched.

        Args:
            means: (2, I), of the inputs in the pruned and in the dense model.
        """
        return means[0]


class Asymmetric(Target):
    """The dense model's outputs: ||X_dense W0^T - X W^T||^2, where X_dense are the dense model's inputs for the same tokens.

    With G = E[x x^T] and C = E[x_dense x^T] the best dense weight is W* = W0 (C + lambda 1)(G + lambda 1)^-1, and the loss of any
    W is a constant plus ||X (W - W*)^T||^2: a pruner works unchanged on W* in place of W0. (GPTAQ, Li et al. 2025,
    arXiv:2504.02692, pursues the same aim column by column.) W* repairs errors of the pruned layers before, but also fits the noise
    in C, so it is blended: W0 + alpha (W* - W0). Dead inputs keep their dense weights.

    That is the best weight for outputs W0 (x + alpha (x_dense - x)), between the linear's own and the dense model's. With a bias that
    is corrected, G and C are centred, and the mean of these outputs is matched too.

    Args:
        alpha: 0 is the dense weight, 1 is W*.
        damping: lambda as a fraction of the mean diagonal of G.

    Raises:
        ValueError: alpha outside (0, 1], damping not above 0; in `weights` a hessian that cannot be factorised.
    """

    statistics = (Hessian, CrossProduct)
    matrix_copies, weight_copies = 1, 1

    def __init__(self, alpha: float = 0.25, damping: float = 0.01) -> None:
        if type(alpha) not in (int, float) or not 0 < alpha <= 1:
            raise ValueError(f"target.alpha={quoted(alpha)}: must be above 0 and at most 1; target=dense is alpha 0")
        self.alpha = alpha
        self.damping = check_positive("target.damping", damping)

    def weights(self, dense: dict[str, Tensor], statistics: dict[type[InputStatistic], InputStatistic]) -> dict[str, Tensor]:
        correction = statistics[CrossProduct].memo("correction", lambda: self._correction(statistics, next(iter(dense))))
        return {name: W.float().addmm(W.float(), correction, alpha=self.alpha) for name, W in dense.items()}

    def mean_input(self, means: Tensor) -> Tensor:
        return torch.lerp(*means, self.alpha)

    def _correction(self, statistics: dict[type[InputStatistic], InputStatistic], name: str) -> Tensor:
        """(C - G)(G + lambda 1)^-1, shape (I, I): W0 times it is W* - W0."""
        G, C = statistics[Hessian].mean(), statistics[CrossProduct].mean()
        C.sub_(G)
        # The lower bound keeps G positive definite if all inputs are dead: C is 0 then, and so is the correction.
        G.diagonal().add_((self.damping * G.diagonal().mean()).clamp_min(torch.finfo(G.dtype).tiny))
        lower, failed = cholesky_(G)
        if failed:
            raise ValueError(
                f"{name}: its hessian from {statistics[Hessian].num_tokens} tokens could not be factorised; raise target.damping "
                "or calibration.num_samples"
            )
        return torch.cholesky_solve(C.t(), lower).t()
