"""How much a device is given at once: pieces that stay in a CPU's caches, or that fill a CUDA device."""

from dataclasses import dataclass
from functools import cache

import torch

from nnprune.kernels.gram import PANEL

SHARE_OF_MEMORY = 32
"""Pieces take this part of the memory that the process may use of a CUDA device: more would not make them faster."""


@dataclass(frozen=True)
class WorkSizes:
    """Sizes of pieces of work. None of them changes a result beyond the order of sums and the choice between equal scores.

    Args:
        piece_bytes: of the temporary tensors of a piece.
        strip: rows of a strip of the Hessian: enough for the matrix units, few enough to skip most of the upper triangle.
        mirrored: rows of the Hessian that are mirrored at once, at most `strip`.
        tokens: tokens whose squares are summed at once.
        outputs: output features whose errors are measured at once.
        scores: that one selection handles: their indices take 8 bytes each.
        is_asynchronous: whether the host waits for the device when it looks at a result.
        steps_per_read: steps of an iterative method between two such looks.
    """

    piece_bytes: int
    strip: int
    mirrored: int
    tokens: int
    outputs: int
    scores: int
    is_asynchronous: bool
    steps_per_read: int


CPU = WorkSizes(
    piece_bytes=80 << 20,
    strip=4 * PANEL,
    mirrored=PANEL,
    tokens=256,
    outputs=1024,
    scores=1 << 22,
    is_asynchronous=False,
    steps_per_read=1,
)


def work_sizes(device: torch.device) -> WorkSizes:
    """The sizes for a device. On CUDA pieces grow with the memory that `runtime.device_memory` leaves to the process."""
    if device.type == "cpu":
        return CPU
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda(int(_total_memory(index) * torch.cuda.get_per_process_memory_fraction(index)))


@cache
def _cuda(usable_bytes: int) -> WorkSizes:
    piece_bytes = usable_bytes // SHARE_OF_MEMORY
    return WorkSizes(
        piece_bytes,
        strip=1024,
        mirrored=1024,
        tokens=4096,
        outputs=4096,
        scores=piece_bytes // 32,
        is_asynchronous=True,
        steps_per_read=4,
    )


@cache
def _total_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory
