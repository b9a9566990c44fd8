"""SparseGPT's sweep of one column block on a CPU, by the kernel in `nnprune/native/sweep.c`.

Letters: C columns of a block, O output features.
"""

from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from nnprune.kernels.library import library

MAX_M = 32
"""Largest group, MOST_M of `sweep.c`: the kernel compares each weight of a group with each other."""

MAX_COLUMNS = 512
"""Columns whose weights, errors and masks of a few outputs fit on a thread's stack."""

SUB_BLOCK = 16
"""Columns, about, whose errors reach later sub-blocks together."""


def available() -> bool:
    """Whether the kernel is compiled."""
    return library() is not None


def prune_block_masked(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor) -> Tensor:
    """What `sweep_triton.prune_block_masked` does, with the same arguments and result."""
    return _sweep(weight_CO, U_CC, drop_CO.contiguous(), n=0, m=1)


def prune_block_nm(weight_CO: Tensor, U_CC: Tensor, n: int, m: int) -> Tensor:
    """What `sweep_triton.prune_block_nm` does, with the same arguments and result; m is at most MAX_M."""
    assert len(weight_CO) % m == 0 and m <= MAX_M, f"a block of {len(weight_CO)} columns cuts a group of {m}"
    return _sweep(weight_CO, U_CC, None, n, m)


def _sweep(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor | None, n: int, m: int) -> Tensor:
    assert weight_CO.is_contiguous() and weight_CO.dtype == U_CC.dtype == torch.float32
    errors_CO, U_CC = torch.empty_like(weight_CO), U_CC.contiguous()
    at = [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (weight_CO, errors_CO, drop_CO, U_CC)]
    counts = map(c_int, (n, m))
    sub_block = max(SUB_BLOCK // m, 1) * m
    library().sweep(*at, *map(c_long, weight_CO.shape), *counts, c_long(sub_block), c_int(torch.get_num_threads()))
    return errors_CO
