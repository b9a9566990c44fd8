"""`recover`: tuning of pruned weights, zeros excepted, towards the dense model."""

from nnprune.recovery.base import Recovery, Rows, Run
from nnprune.recovery.reconstruction import Reconstruction

__all__ = ["Reconstruction", "Recovery", "Rows", "Run"]
