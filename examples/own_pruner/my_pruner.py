"""A pruner of one's own: Wanda with another exponent on the inputs."""

from torch import Tensor

from nnprune import ScorePruner, SquaredNorm


class MyPruner(ScorePruner):
    """Scores a weight by |W_ij| E[x_j²]^alpha, compared within each output row."""

    statistic = SquaredNorm

    def __init__(self, alpha: float = 0.5) -> None:
        self.alpha = alpha

    def score(self, W: Tensor, module_name: str) -> Tensor:
        return W.abs().float() * self.statistics[module_name].mean() ** self.alpha
