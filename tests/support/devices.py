"""A CPU that is computed on as a CUDA device is, and a count of how often the host reads a tensor."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nnprune.kernels import work_sizes

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
"""Operators whose result, or its shape, the host needs: with a CUDA device it waits."""


def set_work_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Give a CPU other sizes of work than its own."""
    monkeypatch.setattr(work_sizes, "CPU", replace(work_sizes.CPU, **sizes))


class HostReads(TorchDispatchMode):
    """Counts, by operator, how often the host would wait for a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in READS or name.startswith(("unique", "_unique")) or is_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))
