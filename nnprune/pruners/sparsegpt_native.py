"""SparseGPT's sweep of one column block on a CPU, by the kernel in `nnprune/native/sweep.c`.

Letters: C columns of a block, O output features.
"""

from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from nnprune.native.library import library

MAX_M = 32
"""Largest group: the kernel compares each weight of a group with each other."""

MAX_COLUMNS = 512
"""Columns whose weights, errors and masks of a few outputs fit on a thread's stack."""

SUB_BLOCK = 16
"""Columns, about, whose errors reach later sub-blocks together."""


def available() -> bool:
    """Whether the kernel is compiled."""
    return library() is not None


def prune_block_masked(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor) -> Tensor:
    """Prune one column block in place by a mask that is fixed before the sweep.

    Args:
        weight_CO: weights of the block, float32, contiguous; on return the dropped ones are zero.
        U_CC: the block's part of U, where H^-1 = U^T U: float32, upper triangular, of any strides.
        drop_CO: bool, True = remove.

    Returns:
        The errors (C, O), float32, that columns after the block have yet to absorb.
    """
    return _sweep(weight_CO, U_CC, drop_CO.contiguous(), n=0, m=1)


def prune_block_nm(weight_CO: Tensor, U_CC: Tensor, n: int, m: int) -> Tensor:
    """Prune one column block in place, keeping exactly n of every m columns in each row.

    The mask of a group is chosen when its first column is reached: the m - n weights of lowest cost (w_j / U_jj)^2 go, of
    equal ones the later. A cost of NaN counts as infinite. Arguments and result as for `prune_block_masked`; C is a multiple
    of m.
    """
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
