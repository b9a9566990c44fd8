"""What a linear is asked to match: `target`.

Letters: O output features, I input features.
"""

import torch
from torch import Tensor

from nnprune.checks import check_positive
from nnprune.statistics import CrossProduct, Hessian, InputStatistic


class Target:
    """The linear's own dense weight: ||X (W - W0)^T||^2, on the inputs X that the pruned model gives it."""

    statistics: tuple[type[InputStatistic], ...] = ()
    """What it needs to know of the inputs. A CrossProduct asks for the dense model's inputs beside the pruned one's."""

    def weights(self, dense: dict[str, Tensor], statistics: dict[type[InputStatistic], InputStatistic]) -> dict[str, Tensor]:
        """The weights (O, I) to prune in place of the `dense` ones (O, I), of linears that receive the same input."""
        return dense


class Asymmetric(Target):
    """The dense model's outputs: ||X_dense W0^T - X W^T||^2, where X_dense are the dense model's inputs for the same tokens.

    With G = E[x x^T] and C = E[x_dense x^T] the best dense answer is W* = W0 (C + lambda 1)(G + lambda 1)^-1, and the loss of
    any W is a constant plus ||X (W - W*)^T||^2: a pruner works unchanged on W* in place of W0 (GPTAQ, Li et al. 2025,
    arXiv:2504.02692, has the same aim column by column). W* repairs what upstream pruning has done, and fits C's noise, so it
    is blended:  W0 + alpha (W* - W0).

    Args:
        alpha: 0 is the dense weight, 1 is W*.
        damping: lambda as a fraction of G's mean diagonal.

    Raises:
        ValueError: alpha outside (0, 1], damping not above 0, and in `weights` a Hessian that cannot be factorised.
    """

    statistics = (Hessian, CrossProduct)

    def __init__(self, alpha: float = 0.25, damping: float = 0.01) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"target.alpha={alpha}: must be above 0 and at most 1; target=dense is alpha 0")
        self.alpha = alpha
        self.damping = check_positive("target.damping", damping)

    def weights(self, dense: dict[str, Tensor], statistics: dict[type[InputStatistic], InputStatistic]) -> dict[str, Tensor]:
        repair = statistics[CrossProduct].memo("repair", lambda: self._repair(statistics, next(iter(dense))))
        return {name: W.float().addmm(W.float(), repair, alpha=self.alpha) for name, W in dense.items()}

    def _repair(self, statistics: dict[type[InputStatistic], InputStatistic], name: str) -> Tensor:
        """(C - G)(G + lambda 1)^-1, shape (I, I): W0 times it is W* - W0."""
        G, C = statistics[Hessian].mean(), statistics[CrossProduct].mean()
        C.sub_(G)
        G.diagonal().add_(self.damping * G.diagonal().mean())
        lower, info = torch.linalg.cholesky_ex(G)
        if info.item():
            raise ValueError(
                f"{name}: its Hessian from {statistics[Hessian].num_tokens} tokens could not be factorised; raise target.damping "
                "or calibration.num_samples"
            )
        return torch.cholesky_solve(C.t(), lower).t()
