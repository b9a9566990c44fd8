"""Processes that share one model: which one this is, and sums over all of them.

Ranks are those of `torch.distributed`, where a launcher such as torchrun has set it up.
"""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that work on this run."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all ranks, in place, and return it."""
    if _is_distributed():
        dist.all_reduce(tensor)
    return tensor


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
