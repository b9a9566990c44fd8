"""Copies through pinned buffers. Without a CUDA device, events are fakes and the copies go from host to host."""

import pytest
import torch

from nnprune.engine.staging import Staging


class Event:
    """An event that knows whether a buffer was reused before it was read."""

    def __init__(self):
        self.is_awaited = True

    def synchronize(self):
        self.is_awaited = True

    def record(self):
        assert self.is_awaited, "the buffer was filled before the device had read it"
        self.is_awaited = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (64, 3), (7, 11, 2)])
def test_what_is_copied_arrives(shape, dtype):
    staging = Staging(torch.device("cpu"), num_bytes=64, new_event=Event)
    tensors = [torch.rand(shape).to(dtype), torch.rand(shape).t().to(dtype) if len(shape) == 2 else torch.rand(shape).to(dtype)]
    for tensor, copied in zip(tensors, [staging.copy(one) for one in tensors], strict=True):
        assert copied.dtype == dtype and torch.equal(copied, tensor)
        assert not copied.numel() or copied.data_ptr() != tensor.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_buffer_is_not_refilled_before_the_device_has_read_it():
    staging, stream = Staging(torch.device("cuda"), num_bytes=1 << 16), torch.cuda.Stream()
    tensors = [torch.full((1 << 18,), float(value)) for value in range(8)]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        copies = [staging.copy(tensor) for tensor in tensors]
    stream.synchronize()
    assert all(torch.equal(copy.cpu(), tensor) for copy, tensor in zip(copies, tensors, strict=True))
