"""Rank, world size and sums over the processes of a run, by `torch.distributed` if a launcher such as torchrun set it up."""

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if _is_distributed() else 1


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all ranks, in place, and return it."""
    if _is_distributed():
        dist.all_reduce(tensor)
    return tensor


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
