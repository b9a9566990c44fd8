"""Storage for the hidden states between two decoder layers: on the device, or offloaded to host memory or to a mapped file.

Letters: N samples, B batch, T tokens, D hidden.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

DEVICE_SHARE = 0.4
"""Share of a CUDA device's free memory that one buffer may take with offload "auto"."""


class HiddenBuffer:
    """One buffer (N, T, D), read and overwritten a batch of rows at a time.

    Args:
        shape: (N, T, D).
        dtype: the model's.
        device: where a batch computes.
        offload: where the buffer is kept: host, device, disk, or auto (the device while there is room to spare, else the host).
        path: the mapped file of offload "disk"; removed by `close`.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, offload: str, path: Path) -> None:
        self.device = device
        self.shape = shape
        self.path = path if offload == "disk" else None
        size = shape[0] * shape[1] * shape[2]
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _reserve(path, size * dtype.itemsize)
            flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
            self.tensor = flat.view(shape)
        elif offload == "device" or (offload == "auto" and _fits(device, size * dtype.itemsize)):
            self.tensor = torch.empty(shape, dtype=dtype, device=device)
        else:  # pinned: copies to and from a CUDA device then overlap with its work
            self.tensor = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")

    def get(self, rows: slice) -> Tensor:
        """The hidden states (B, T, D) of `rows`, on the device."""
        return self.tensor[rows].to(self.device, non_blocking=True)

    def pick(self, rows: Tensor) -> Tensor:
        """The hidden states (B, T, D) of `rows` (B,), in that order, on the device."""
        return self.tensor[rows.to(self.tensor.device)].to(self.device)

    def put(self, rows: slice, hidden: Tensor) -> None:
        """Overwrite `rows`. On one CUDA stream a later `get` waits for it; the host has to synchronise before it reads."""
        self.tensor[rows].copy_(hidden, non_blocking=True)

    @property
    def is_near(self) -> bool:
        """Whether the buffer is in the memory of the device itself."""
        return self.path is None and self.tensor.device.type == self.device.type

    def close(self) -> None:
        """Free the memory, and remove the mapped file."""
        del self.tensor
        if self.path:
            self.path.unlink(missing_ok=True)


def _fits(device: torch.device, num_bytes: int) -> bool:
    """Whether a buffer may stay on the device. Without CUDA the device is the host."""
    return device.type != "cuda" or num_bytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def _reserve(path: Path, num_bytes: int) -> None:
    """Make a file that has its space on the disk: a mapped one without it would end the process by SIGBUS."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                file.truncate(num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        reason = f"outputs: {path} cannot hold {num_bytes} bytes of activations ({error.strerror})"
        raise OSError(error.errno, f"{reason}; make room or set runtime.activations=host") from error
