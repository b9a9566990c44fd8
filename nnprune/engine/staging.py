"""Copies tensors from the host to a CUDA device through pinned memory.

A copy from other memory, such as a mapped file, makes the driver copy it in small pieces while the device waits. Pinning each
tensor would take longer, and its memory is rounded up to a power of two.
"""

from collections import deque
from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

BUFFER_BYTES = 1 << 26


class Staging:
    """Two pinned buffers: one is filled while the device reads the other. Any thread may copy.

    Args:
        device: of the copies.
        num_bytes: of a buffer.
        new_event: makes the events that tell when the device has read a buffer.
    """

    def __init__(
        self, device: torch.device, num_bytes: int = BUFFER_BYTES, new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event
    ) -> None:
        self._device = device
        self._num_bytes = num_bytes
        pin = device.type == "cuda"
        self._buffers = deque((torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pin), new_event()) for _ in range(2))
        self._lock = Lock()

    def copy(self, tensor: Tensor) -> Tensor:
        """`tensor` on the device, once the current stream has done its work. The tensor itself may be freed or changed at once."""
        result = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        pieces, places = (one.reshape(-1).view(torch.uint8).split(self._num_bytes) for one in (tensor, result))
        for piece, place in zip(pieces, places, strict=True):
            with self._lock:
                buffer, was_read = self._buffers[0]
                self._buffers.rotate()
                was_read.synchronize()
                part = buffer[: len(piece)].copy_(piece)
                place.copy_(part, non_blocking=True)
                was_read.record()
        return result
