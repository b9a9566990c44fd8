"""ALPS: ADMM for the support, conjugate gradients for the weights on it (Meng et al. 2024, arXiv:2406.07831).

The iterations of nnprune/solvers/admm.py (section 3.2, equation 4) with a growing rho: a small one looks for good supports, a large
one settles on one. Then the weights on the support of the last mask are refitted by preconditioned conjugate gradients (section
3.3).

Unlike the authors' code this needs no eigendecomposition, and one factorisation, at the geometric mean of all rho, serves every
rho. Twelve iterations so, rho growing with each, find better supports than growth by levels with exact steps does in as many
(docs/methods.md).

Letters: O output features, I input features.
"""

from torch import Tensor

from nnprune.checks import check_count, check_positive
from nnprune.kernels.matmul import FastFactor
from nnprune.patterns import SparsityPattern
from nnprune.pruners.stacked import StackedPruner
from nnprune.solvers.admm import Alternation
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.mask_projection import Projection


class ALPS(StackedPruner):
    """Whole linears are compared when there is no structure.

    Args:
        first_rho, last_rho: where rho begins and ends; the diagonal of A is 1. last_rho < 4 first_rho.
        num_iterations: of ADMM; rho grows geometrically from one to the next.
        num_refit_steps: of conjugate gradients.
        damping: lambda, a fraction of the scaled Hessian's diagonal.

    Raises:
        ValueError: a setting out of range, and in `prune_stack` a Hessian that cannot be factorised.
    """

    def __init__(
        self,
        first_rho: float = 0.3,
        last_rho: float = 0.7,
        num_iterations: int = 12,
        num_refit_steps: int = 4,
        damping: float = 0.01,
    ) -> None:
        check_count("pruner.num_iterations", num_iterations, 1)
        check_count("pruner.num_refit_steps", num_refit_steps, 1)
        check_positive("pruner.first_rho", first_rho)
        check_positive("pruner.last_rho", last_rho)
        if not first_rho <= last_rho < 4 * first_rho:
            raise ValueError(
                f"pruner.last_rho={last_rho}: must lie between pruner.first_rho={first_rho} and four times that, where the search "
                "would diverge"
            )
        growth = (last_rho / first_rho) ** (1 / max(num_iterations - 1, 1))
        self.rhos = [first_rho * growth**iteration for iteration in range(num_iterations)]
        self.alpha = (first_rho * last_rho) ** 0.5
        self.num_refit_steps = num_refit_steps
        self.damping = check_positive("pruner.damping", damping)

    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        statistic = self.statistics[names[0]]
        problem = ScaledProblem.of(statistic, self.damping, names[0])
        inverse = statistic.memo((ALPS, self.damping, self.alpha), lambda: FastFactor(problem.inverse(self.alpha)))
        projection = Projection(pattern, sizes)
        search = Alternation(problem.scaled(weight_IO.t()).t(), inverse, self.alpha, projection)
        for rho in self.rhos:
            search.advance(rho)
        B = search.B.mul_(projection.exact(search.total.abs_()))
        return problem.unscaled(problem.refit(B, search.B0, self.num_refit_steps).B.t()).t()
