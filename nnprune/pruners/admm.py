"""ADMM: alternate between the best weights and the best mask (Boza 2024, arXiv:2401.02938).

The iterations of nnprune/solvers/admm.py (section 3.1, algorithm 1) with one rho. Gradual masks (section 3.3): the mask is chosen anew
in each of the first iterations, at a sparsity that rises along a cubic curve, and then stays.

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


class ADMM(StackedPruner):
    """Chooses a mask in scaled coordinates, whole linears compared, and updates the weights that it keeps.

    Args:
        num_iterations: all of them.
        num_mask_iterations: those that raise the sparsity and choose the mask anew. 0: the mask of the dense weights, which is
            Wanda's score, stays.
        rho: weight of the agreement of B and Z.
        damping: lambda, a fraction of the scaled Hessian's diagonal.

    Raises:
        ValueError: a setting out of range, and in `prune_stack` a Hessian that cannot be factorised.
    """

    def __init__(self, num_iterations: int = 20, num_mask_iterations: int = 15, rho: float = 1.0, damping: float = 0.1) -> None:
        check_count("pruner.num_iterations", num_iterations, 1)
        check_count("pruner.num_mask_iterations", num_mask_iterations, 0)
        if num_mask_iterations > num_iterations:
            raise ValueError(
                f"pruner.num_mask_iterations={num_mask_iterations}: must not exceed pruner.num_iterations={num_iterations}"
            )
        self.num_iterations = num_iterations
        self.num_mask_iterations = num_mask_iterations
        self.rho = check_positive("pruner.rho", rho)
        self.damping = check_positive("pruner.damping", damping)

    def prune_stack(self, weight_IO: Tensor, sizes: list[int], pattern: SparsityPattern, names: list[str]) -> Tensor:
        statistic = self.statistics[names[0]]
        problem = ScaledProblem.of(statistic, self.damping, names[0])
        inverse = statistic.memo((ADMM, self.damping, self.rho), lambda: FastFactor(problem.inverse(self.rho)))
        projection = Projection(pattern, sizes)
        search = Alternation(problem.scaled(weight_IO.t()).t(), inverse, self.rho, projection)
        mask = None
        for iteration in range(1, self.num_iterations + 1):
            if iteration < self.num_mask_iterations:
                share = 1 - (1 - iteration / self.num_mask_iterations) ** 3
                search.advance(self.rho, share * float(pattern.sparsity))
            else:
                if mask is None:
                    mask = projection.exact(search.total.abs_()).float()  # masked operations take long on a CPU
                search.advance(self.rho, mask=mask)
        return problem.unscaled(search.total.mul_(mask).t()).t()
