"""What happens to the kept weights once a pruner has chosen the mask: `update`.

Letters: O output features, I input features.
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nnprune.checks import check_count, check_positive, quoted
from nnprune.solvers.least_squares import ScaledProblem
from nnprune.solvers.quantization import Quantization
from nnprune.statistics import Hessian, InputStatistic

MAX_STEPS = 100_000
"""Upper bound of `update.max_steps`."""


class Update:
    """Leaves the kept weights as the pruner left them. Raises ValueError for a setting out of range.

    Args:
        bias: whether the bias b0 of a linear that has one is corrected: b = b0 + (W0 - W) E[x], for which weights are pruned and updated
            by the centred hessian. "auto": where kept weights change too. A linear without a bias gets none.
    """

    bias: bool | str = "auto"

    statistic: type[InputStatistic] | None = None
    """What it needs to know of the inputs."""

    matrix_copies, weight_copies = 0, 0
    """float32 matrices (I, I) and weights (O, I) that it holds at its peak, besides statistics: for estimates of memory."""

    corrects_biases = False
    """Whether `bias="auto"` corrects biases."""

    quantization: Quantization | None = None
    """The grid that all kept weights are rounded to."""

    def __init__(self, bias: bool | str = "auto") -> None:
        if not (isinstance(bias, bool) or bias == "auto"):
            raise ValueError(f"update.bias={quoted(bias)}: must be auto, true or false")
        self.bias = bias

    # Created on first use, so that a subclass need not call super().__init__().
    @cached_property
    def notes(self) -> dict[str, dict[str, Any]]:
        """Linear name -> entries for its part of the record, such as the residual of a solver; a scalar may stay on the device."""
        return {}

    def update_group(
        self, pruned: dict[str, Tensor], targets: dict[str, Tensor], statistic: InputStatistic | None
    ) -> dict[str, Tensor]:
        """Better values for the nonzeros of `pruned`.

        Args:
            pruned: linear name -> weight (O, I), float32, of linears that receive the same input.
            targets: linear name -> weight (O, I), float32, to be matched.
            statistic: of that input, of the kind that `statistic` names.

        Returns:
            Linear name -> weight (O, I), float32, zero wherever `pruned` is.
        """
        return pruned


class Refit(Update):
    """Least squares on the mask: min tr((W - W0) H (W - W0)^T) + lambda ||(W - W0) a||^2, a_i^2 = H_ii, over the nonzeros of W, row by
    row.

    Conjugate gradients as in phase 2 of ALPS (Meng et al. 2024, arXiv:2406.07831, section 3.3), from the pruner's own weights,
    preconditioned by the diagonal of H. A fixed number of steps would leave some rows far from the solution, and there rounding
    of H shows in the weights: so each row stops by its own residual, after seven steps at the earliest.

    Notes for each linear: `refit_steps`, most steps of a row, and `refit_residual`, largest relative residual of a row. A residual
    above the tolerance means that `max_steps` ended the refit.

    Args:
        tolerance: of a row's residual, as a fraction of its first residual, below 1 (docs/methods.md, "The tolerance of a refit").
        max_steps: of conjugate gradients.
        damping: lambda as a fraction of each input's squared norm.
        bias: as in Update.

    Raises:
        ValueError: a setting out of range.
    """

    statistic = Hessian
    corrects_biases = True
    matrix_copies, weight_copies = 1, 10

    def __init__(self, tolerance: float = 0.1, max_steps: int = 30, damping: float = 0.01, bias: bool | str = "auto") -> None:
        super().__init__(bias)
        self.tolerance = check_positive("update.tolerance", tolerance, below=1)
        check_count("update.max_steps", max_steps, 1, MAX_STEPS)
        self.max_steps = max_steps
        self.damping = check_positive("update.damping", damping)

    def update_group(
        self, pruned: dict[str, Tensor], targets: dict[str, Tensor], statistic: InputStatistic | None
    ) -> dict[str, Tensor]:
        names, sizes = list(pruned), [len(W) for W in pruned.values()]
        problem = ScaledProblem.of(statistic, self.damping, names[0])
        B, B0 = (problem.scale_(torch.cat([weights[name].float().t() for name in names], 1)) for weights in (pruned, targets))
        found = problem.refit(B, B0, self.max_steps, self.tolerance)
        for name, residuals, steps in zip(names, found.residuals.split(sizes), found.steps.split(sizes), strict=True):
            self.notes[name] = {"refit_steps": steps.max(), "refit_residual": residuals.max()}
        return {name: B.t() for name, B in zip(names, problem.unscale_(found.B).split(sizes, 1), strict=True)}


class Round(Update):
    """Each kept weight becomes the nearest value of a grid, whose scales have the least squared error of those tried.

    Args:
        bits: of the grid.
        group_size: consecutive inputs that share a scale.
        bias: as in Update.

    Raises:
        ValueError: a setting out of range.
    """

    weight_copies = 2

    def __init__(self, bits: int = 4, group_size: int = 128, bias: bool | str = "auto") -> None:
        super().__init__(bias)
        self.quantization = Quantization.checked("update", bits, group_size)

    def update_group(
        self, pruned: dict[str, Tensor], targets: dict[str, Tensor], statistic: InputStatistic | None
    ) -> dict[str, Tensor]:
        return {name: self.quantization.round_all(W.float()) for name, W in pruned.items()}
