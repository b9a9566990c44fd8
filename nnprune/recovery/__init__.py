"""`recover`: tuning of pruned weights, zeros excepted, towards the dense model."""

from nnprune.recovery.base import Recovery, Rows, Run
from nnprune.recovery.reconstruction import Reconstruction
from nnprune.recovery.whole_model import Distillation

__all__ = ["Distillation", "Reconstruction", "Recovery", "Rows", "Run"]
