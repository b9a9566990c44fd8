"""A CPU that is computed on as a CUDA device is, and a count of how often the host reads a tensor."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nnprune.kernels import work_sizes

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "repeat_interleave")
"""Operators whose result, or its shape, the host needs: with a CUDA device it waits."""


def set_work_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    """Give a CPU other sizes of work than its own."""
    monkeypatch.setattr(work_sizes, "CPU", replace(work_sizes.CPU, **sizes))


class HostReads(TorchDispatchMode):
    """Counts, by operator, how often the host would wait for a CUDA device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._lists = _Lists(self.counts)

    def __enter__(self) -> "HostReads":
        self._lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        is_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        if name in READS or name.startswith(("unique", "_unique")) or is_mask:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """Counts `tolist` and `numpy`, which read memory without an operator."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and args[0].ndim:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))
