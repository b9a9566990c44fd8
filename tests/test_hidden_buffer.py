"""The buffer for hidden states between two layers: in memory or in a mapped file."""

import errno

import pytest
import torch

import nnprune.engine.hidden_buffer
from nnprune.engine.hidden_buffer import HiddenBuffer
from nnprune.runtime import Runtime


def on_cpu(activations):
    return Runtime(device="cpu", activations=activations)


@pytest.fixture(params=["host", "device", "disk", "auto"])
def buffer(request, tmp_path):
    return HiddenBuffer((5, 3, 4), torch.float32, on_cpu(request.param), tmp_path / "new" / "hidden.bin")


def test_what_is_put_is_what_is_got(buffer):
    wanted = torch.arange(60.0).view(5, 3, 4)
    buffer.put(slice(0, 2), wanted[:2])
    buffer.put(slice(2, 5), wanted[2:])
    assert torch.equal(buffer.get(slice(1, 4)), wanted[1:4])
    assert torch.equal(buffer.pick([4, 0, 4]), wanted[[4, 0, 4]])
    assert buffer.pick([]).shape == (0, 3, 4)
    buffer.put(slice(1, 2), -wanted[1:2])
    assert torch.equal(buffer.get(slice(0, 5)), torch.cat([wanted[:1], -wanted[1:2], wanted[2:]]))


def test_a_mapped_file_is_as_large_as_it_must_be_and_removed(tmp_path):
    path = tmp_path / "hidden.bin"
    buffer = HiddenBuffer((5, 3, 4), torch.bfloat16, on_cpu("disk"), path)
    assert path.stat().st_size == 5 * 3 * 4 * 2
    assert not buffer.is_on_device
    buffer.close()
    assert not path.exists()


def test_what_is_picked_from_the_host_arrives_in_the_order_of_the_stream(device, tmp_path):
    """The host copies nothing itself that may not have arrived yet."""
    buffer = HiddenBuffer((5, 3, 4), torch.float32, Runtime(device=device, activations="host"), tmp_path / "hidden.bin")
    buffer.put(slice(0, 5), wanted := torch.arange(60.0, device=device).view(5, 3, 4))
    buffer.device = torch.device("meta") if device == "cpu" else buffer.device  # as if it were another one
    picked = buffer.pick([4, 0, 4])
    assert (picked.device.type, picked.shape) == (buffer.device.type, (3, 3, 4))
    assert device == "cpu" or torch.equal(picked, wanted[[4, 0, 4]])


@pytest.mark.parametrize("offload", ["host", "device", "auto"])
def test_in_memory_there_is_no_file(offload, tmp_path):
    buffer = HiddenBuffer((2, 3, 4), torch.float32, on_cpu(offload), tmp_path / "hidden.bin")
    assert buffer.is_on_device
    buffer.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nnprune.engine.hidden_buffer.os, "posix_fallocate", full, raising=False)
    path = tmp_path / "hidden.bin"
    with pytest.raises(OSError, match=r"hidden.bin cannot hold 96 bytes .*No space left.*set runtime\.activations=host"):
        HiddenBuffer((2, 3, 4), torch.float32, on_cpu("disk"), path)
    assert not path.exists()
