"""A pruning method: the target of each linear, the pruner, the update of kept weights, the recovery of layers or the model."""

from dataclasses import dataclass, field

from torch import Tensor

from nnprune.pruners.base import Pruner
from nnprune.recovery import Distillation, Recovery
from nnprune.solvers.quantization import Quantization
from nnprune.statistics import CrossProduct, InputStatistic, Means
from nnprune.targets import Target
from nnprune.updates import Update


@dataclass
class Method:
    """A pruner and the steps around it."""

    pruner: Pruner  # chooses the mask
    target: Target = field(default_factory=Target)  # the weights to approximate, by default the dense ones
    update: Update = field(default_factory=Update)  # changes the kept weights afterwards
    recovery: Recovery = field(default_factory=Recovery)  # tunes whole decoder layers
    distillation: Distillation | None = None  # tunes the whole model when all layers are pruned

    @property
    def statistics(self) -> set[type[InputStatistic]]:
        """The kinds that the engine accumulates for each linear; a pruner may collect its own besides."""
        of_pruner = self.pruner.statistic if self.pruner.shares_statistics else None
        kinds: tuple[type[InputStatistic] | None, ...]
        kinds = (of_pruner, self.update.statistic, *self.target.statistics, Means if self.corrects_biases else None)
        return {kind for kind in kinds if kind is not None}

    @property
    def corrects_biases(self) -> bool:
        """Whether the biases of pruned linears are corrected, where there are any."""
        if self.update.bias != "auto":
            return bool(self.update.bias)
        return self.pruner.corrects_biases or self.update.corrects_biases or type(self.target) is not Target

    @property
    def pairs_inputs(self) -> bool:
        """Whether a statistic compares the inputs with those in the dense model."""
        return CrossProduct in self.statistics

    @property
    def needs_reference(self) -> bool:
        """Whether the calibration has to pass through the dense model too."""
        return self.pairs_inputs or self.recovery.is_on

    @property
    def needs_calibration(self) -> bool:
        """Whether the method uses inputs at all."""
        return self.pruner.needs_calibration or bool(self.statistics) or self.recovery.is_on

    @property
    def quantization(self) -> Quantization | None:
        """The grid that all kept weights are on at the end."""
        return self.update.quantization or self.pruner.quantization

    @property
    def is_plain(self) -> bool:
        """Whether the pruner gets the dense weights in their own dtype and its result is final."""
        return type(self.target) is Target and type(self.update) is Update

    def check(self) -> None:
        """Raise ValueError if weights that were rounded to a grid would be changed afterwards."""
        if self.pruner.quantization and type(self.update) is not Update:
            changed = f"update._target_={type(self.update).__module__}.{type(self.update).__qualname__}"
            rounded = f"pruner.bits={self.pruner.quantization.bits}"
            raise ValueError(f"{changed}: changes what {rounded} has rounded; set update=none, or take a pruner without bits")
        if self.quantization and (self.distillation or self.recovery.epochs_after):
            rounded = f"{'pruner' if self.pruner.quantization else 'update'}.bits={self.quantization.bits}"
            remedy = "set recover=none, or recover=next_layer, which tunes before pruning"
            tuned = "recover=model" if self.distillation else f"recover.epochs_after={self.recovery.epochs_after}"
            raise ValueError(f"{tuned}: changes what {rounded} has rounded; {remedy}")

    def corrected_bias(self, bias: Tensor, W: Tensor, pruned: Tensor, means: InputStatistic) -> Tensor:
        """The bias (O,), float32, with which a linear's mean output is that which the target asks of its dense weight and bias.

        Args:
            bias: the dense one, (O,).
            W: the dense weight, (O, I).
            pruned: the weight, (O, I), that has replaced it.
            means: of its inputs.
        """
        mean = means.mean()
        wanted = self.target.mean_input(mean)
        return bias.float() + (W.float() - pruned.float()) @ mean[0] + W.float() @ (wanted - mean[0])
