"""A buffer for hidden states, offloaded to host memory or a mapped file, or kept on the device.

Letters: N samples, B batch, T tokens, D hidden.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from nnprune.runtime import Runtime

DEVICE_SHARE = 0.4
"""Share of a CUDA device's free memory that one buffer may take with activations=auto: the rest is for others, and for gaps."""


class HiddenBuffer:
    """One buffer (N, T, D), read and overwritten a batch of rows at a time.

    Args:
        shape: (N, T, D).
        dtype: the model's.
        runtime: the device where batches are computed, and `activations`: host, device, disk, or auto (the device if the buffer
            fits there with room to spare, else the host).
        path: the mapped file for disk; removed by `close`.

    Raises:
        OSError: the disk has no room for the mapped file.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, runtime: Runtime, path: Path) -> None:
        self.device, offload = runtime.torch_device, runtime.activations
        self.shape = shape
        size = math.prod(shape)
        self.path = path if offload == "disk" and size else None  # no file of no bytes can be mapped
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _reserve(path, size * dtype.itemsize)
            self.tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        elif offload == "device" or (offload == "auto" and _fits(runtime, size * dtype.itemsize)):
            self.tensor = torch.empty(shape, dtype=dtype, device=self.device)
        else:  # pinned, so that copies to and from a CUDA device overlap with its work
            self.tensor = torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def get(self, rows: slice) -> Tensor:
        """The hidden states (B, T, D) of `rows`, on the device."""
        return self.tensor[rows].to(self.device, non_blocking=True)

    def pick(self, rows: Sequence[int]) -> Tensor:
        """The hidden states (B, T, D) of `rows`, in that order, on the device, where they arrive in the order of its stream."""
        if self.tensor.device.type == self.device.type:
            index = torch.tensor(rows, dtype=torch.int64, pin_memory=self.device.type == "cuda")
            return self.tensor.index_select(0, index.to(self.tensor.device, non_blocking=True))
        picked = torch.empty(len(rows), *self.shape[1:], dtype=self.tensor.dtype, device=self.device)
        for place, row in zip(picked, rows, strict=True):  # not gathered by the host, which would have to wait for what was put
            place.copy_(self.tensor[row], non_blocking=True)
        return picked

    def put(self, rows: slice, hidden: Tensor) -> None:
        """Overwrite `rows`. A later `get` or `pick` on the same CUDA stream waits for it."""
        self.tensor[rows].copy_(hidden, non_blocking=True)

    @property
    def is_on_device(self) -> bool:
        """Whether the buffer is in the memory of the device itself."""
        return self.path is None and self.tensor.device.type == self.device.type

    def close(self) -> None:
        """Free the memory and remove the mapped file."""
        del self.tensor
        if self.path:
            self.path.unlink(missing_ok=True)


def _fits(runtime: Runtime, num_bytes: int) -> bool:
    """Whether a buffer may be kept on the device."""
    free = runtime.free_device_bytes()
    return num_bytes < min(DEVICE_SHARE * free, free - runtime.reserved_bytes)


def _reserve(path: Path, num_bytes: int) -> None:
    """Create a file with its disk space allocated: writing to a mapped file on a full disk ends the process by SIGBUS."""
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            else:  # macOS
                file.truncate(num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        reason = f"outputs: {path} cannot hold {num_bytes} bytes of hidden states ({error.strerror})"
        raise OSError(error.errno, f"{reason}; make room or set runtime.activations=host") from error
