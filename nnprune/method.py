"""A method as an experiment has it: what each linear shall match, who chooses its mask, what becomes of the kept weights."""

from dataclasses import dataclass, field

from nnprune.pruners.base import Pruner
from nnprune.recovery import Recovery
from nnprune.statistics import CrossProduct, InputStatistic
from nnprune.targets import Target
from nnprune.updates import Update


@dataclass
class Method:
    """A pruner and what goes with it.

    Args:
        pruner: chooses the mask.
        target: the weights it is shown in place of the dense ones.
        update: moves the kept weights afterwards.
        recovery: tunes whole decoder layers.
    """

    pruner: Pruner
    target: Target = field(default_factory=Target)
    update: Update = field(default_factory=Update)
    recovery: Recovery = field(default_factory=Recovery)

    @property
    def statistics(self) -> set[type[InputStatistic]]:
        """All kinds that are accumulated from the inputs of each linear, but for those that the pruner collects itself."""
        own = self.pruner.statistic if self.pruner.shares_statistics else None
        return {kind for kind in (own, self.update.statistic, *self.target.statistics) if kind is not None}

    @property
    def pairs_inputs(self) -> bool:
        """Whether inputs of the dense model are compared with inputs that come from pruned linears."""
        return CrossProduct in self.statistics

    @property
    def needs_reference(self) -> bool:
        """Whether the calibration goes through the dense model too."""
        return self.pairs_inputs or self.recovery.is_on

    @property
    def needs_calibration(self) -> bool:
        """Whether any part of the method uses inputs."""
        return self.pruner.needs_calibration or bool(self.statistics) or self.recovery.is_on

    @property
    def is_plain(self) -> bool:
        """Whether the pruner sees the dense weights in their own dtype, and its answer is the last word."""
        return type(self.target) is Target and type(self.update) is Update
