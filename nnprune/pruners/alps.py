"""ALPS: ADMM for the support, conjugate gradients for the weights on it (Meng et al. 2024, arXiv:2406.07831).

The iterations of nnprune/solvers/admm.py (section 3.2, equation 4) with a growing rho: a small one searches for good supports, a
large one settles on one. Then the weights on the support of the last mask are refitted by conjugate gradients (section 3.3).

Unlike the authors' code this needs no eigendecomposition: one factorisation, at the geometric mean of all rho, serves every rho.
Twelve iterations, with rho growing in each, find better supports than as many exact iterations with rho growing by levels
(docs/methods.md).

Letters: O output features, I input features.
"""

from torch import Tensor

from nnprune.checks import check_count, check_number, check_positive
from nnprune.kernels.matmul import FastFactor
from nnprune.patterns import SparsityPattern
from nnprune.pruners.stacked import StackedPruner
from nnprune.solvers.admm import MAX_ITERATIONS, ADMMIterations
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.mask_projection import Projection


class ALPS(StackedPruner):
    """Chooses a mask, unstructured over the whole matrix, and optimises the weights that it keeps.

    Its refit takes a fixed number of steps: it starts so close to the solution that three times as many lower the layer error by
    half a per cent at most (docs/methods.md). `notes` has the largest relative residual of an output as `refit_residual`.
    Raises ValueError for a setting out of range; in `prune_stack` for a hessian that cannot be factorised.

    Args:
        first_rho, last_rho: first and last rho, relative to the diagonal of A; first_rho <= last_rho < 4 first_rho.
        num_iterations: of ADMM; rho grows geometrically from one to the next.
        num_refit_steps: of conjugate gradients.
        damping: lambda, a fraction of the scaled hessian's diagonal.
        shrinkage: of the hessian towards its mean diagonal, for text unlike the calibration (ScaledProblem). Ours; the authors have none.
    """

    def __init__(
        self,
        first_rho: float = 0.3,
        last_rho: float = 0.7,
        num_iterations: int = 12,
        num_refit_steps: int = 4,
        damping: float = 0.01,
        shrinkage: float = 0.0,
    ) -> None:
        check_count("pruner.num_iterations", num_iterations, 1, MAX_ITERATIONS)
        check_positive("pruner.first_rho", first_rho)
        check_positive("pruner.last_rho", last_rho)
        if not first_rho <= last_rho < 4 * first_rho:
            raise ValueError(
                f"pruner.last_rho={last_rho}: must lie between pruner.first_rho={first_rho} and four times that, from where the "
                "search diverges"
            )
        growth = (last_rho / first_rho) ** (1 / max(num_iterations - 1, 1))
        self.rhos = [first_rho * growth**iteration for iteration in range(num_iterations)]
        self.alpha = (first_rho * last_rho) ** 0.5
        self.num_refit_steps = check_count("pruner.num_refit_steps", num_refit_steps, 1, MAX_ITERATIONS)
        self.damping = check_positive("pruner.damping", damping)
        self.shrinkage = check_number("pruner.shrinkage", shrinkage, 0)

    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        statistic = self.statistics[names[0]]
        problem = ScaledProblem.of(statistic, self.damping, names[0], self.shrinkage)
        inverse = statistic.memo(
            (ALPS, self.damping, self.shrinkage, self.alpha), lambda: FastFactor(problem.inverse(self.alpha))
        )
        projection = Projection(pattern, sizes)
        search = ADMMIterations(problem.scale_(weight_IO), inverse, self.alpha, projection)
        for rho in self.rhos:
            search.advance(rho)
        B = search.B.mul_(projection.exact(search.total.abs_()))
        del search  # it holds two matrices
        found = problem.refit(B, weight_IO, self.num_refit_steps)
        for name, residuals in zip(names, found.residuals.split(sizes), strict=True):
            self.notes[name] = {"refit_residual": residuals.max()}
        return problem.unscale_(found.B)
