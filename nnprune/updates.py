"""What becomes of the kept weights once a pruner has chosen the mask: `update`.

Letters: O output features, I input features.
"""

import torch
from torch import Tensor

from nnprune.checks import check_count, check_positive
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.statistics import Hessian, InputStatistic


class Update:
    """Leaves the kept weights as the pruner left them."""

    statistic: type[InputStatistic] | None = None
    """What it needs to know of the inputs."""

    def update_group(
        self, pruned: dict[str, Tensor], targets: dict[str, Tensor], statistic: InputStatistic | None
    ) -> dict[str, Tensor]:
        """Better weights (O, I) on the nonzeros of `pruned` (O, I), for linears that receive the same input."""
        return pruned


class Refit(Update):
    """Least squares on the support: min tr((W - W0) H (W - W0)^T) + lambda ||W - W0||^2 over the nonzeros of W, row by row.

    Preconditioned conjugate gradients, as in phase 2 of ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.3), from the
    pruner's own solution, with a step size for every row; the preconditioner is the diagonal of H.

    Args:
        num_steps: conjugate-gradient steps.
        damping: lambda as a fraction of each input's squared norm.

    Raises:
        ValueError: a setting out of range.
    """

    statistic = Hessian

    def __init__(self, num_steps: int = 7, damping: float = 0.01) -> None:
        check_count("update.num_steps", num_steps, 1)
        self.num_steps = num_steps
        self.damping = check_positive("update.damping", damping)

    def update_group(
        self, pruned: dict[str, Tensor], targets: dict[str, Tensor], statistic: InputStatistic | None
    ) -> dict[str, Tensor]:
        names = list(pruned)
        problem = ScaledProblem.of(statistic, self.damping, names[0])
        B, B0 = (problem.scaled(torch.cat([weights[name].float() for name in names])).t() for weights in (pruned, targets))
        pieces = problem.unscaled(problem.refit(B, B0, self.num_steps).t()).split([len(pruned[name]) for name in names])
        return dict(zip(names, pieces, strict=True))
