"""ADMM: alternate between the best weights and the best mask (Boza 2024, arXiv:2401.02938).

The iterations of nnprune/solvers/admm.py (section 3.1, algorithm 1) with constant rho. Gradual masks (section 3.3): the mask is
chosen again in each of the first iterations, at a sparsity that rises along a cubic curve, and is then fixed.

Letters: O output features, I input features.
"""

from torch import Tensor

from nnprune.checks import check_count, check_positive
from nnprune.kernels.matmul import FastFactor
from nnprune.patterns import SparsityPattern
from nnprune.pruners.stacked import StackedPruner
from nnprune.solvers.admm import MAX_ITERATIONS, ADMMIterations
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.mask_projection import Projection


class ADMM(StackedPruner):
    """Chooses a mask in scaled coordinates, unstructured over the whole matrix, and optimises the weights that it keeps.
    Raises ValueError for a setting out of range; in `prune_stack` for a hessian that cannot be factorised.

    Args:
        num_iterations: of ADMM, in total.
        num_mask_iterations: the first of them, which raise the sparsity and choose the mask again. 0: the mask of the dense weights
            is kept, which has Wanda's scores.
        rho: penalty on the difference between B and its sparse copy.
        damping: lambda, a fraction of the scaled hessian's diagonal.
    """

    def __init__(self, num_iterations: int = 20, num_mask_iterations: int = 15, rho: float = 1.0, damping: float = 0.1) -> None:
        self.num_iterations = check_count("pruner.num_iterations", num_iterations, 1, MAX_ITERATIONS)
        self.num_mask_iterations = check_count("pruner.num_mask_iterations", num_mask_iterations, 0)
        if num_mask_iterations > num_iterations:
            raise ValueError(
                f"pruner.num_mask_iterations={num_mask_iterations}: must not exceed pruner.num_iterations={num_iterations}"
            )
        self.rho = check_positive("pruner.rho", rho)
        self.damping = check_positive("pruner.damping", damping)

    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        statistic = self.statistics[names[0]]
        problem = ScaledProblem.of(statistic, self.damping, names[0])
        inverse = statistic.memo((ADMM, self.damping, self.rho), lambda: FastFactor(problem.inverse(self.rho)))
        projection = Projection(pattern, sizes)
        search = ADMMIterations(problem.scale_(weight_IO), inverse, self.rho, projection)
        mask = None
        for iteration in range(1, self.num_iterations + 1):
            if iteration < self.num_mask_iterations:
                share = 1 - (1 - iteration / self.num_mask_iterations) ** 3
                search.advance(self.rho, share * float(pattern.sparsity))
            else:
                if mask is None:
                    mask = projection.exact(search.total.abs_()).float()  # products with bool are slow on a CPU
                search.advance(self.rho, mask=mask)
        return problem.unscale_(search.total.mul_(mask))
