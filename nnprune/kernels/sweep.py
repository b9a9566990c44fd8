"""SparseGPT's sweep of one column block on a CPU, by the kernel in `sweep.c`.

Letters: C columns of a block, O output features.
"""

from ctypes import c_int, c_long, c_void_p

import torch
from torch import Tensor

from nnprune.kernels.library import library

MAX_M = 32
"""Largest M, MOST_M in `sweep.c`: the kernel compares all pairs of weights in a group."""

MAX_COLUMNS = 512
"""Largest block, MOST_COLUMNS in `sweep.c`: weights, errors and masks of a few outputs fit on a thread's stack."""

SUB_BLOCK = 16
"""About how many columns form a sub-block, whose errors are applied to later columns together."""


def available() -> bool:
    """Whether the kernel is compiled."""
    return library() is not None


def prune_block_masked(
    weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor, scale_CO: Tensor | None = None, most: int = 0
) -> Tensor:
    """As `sweep_triton.prune_block_masked`. With scales (C, O), float32, kept weights become levels of at most `most` times them."""
    return _sweep(weight_CO, U_CC, drop_CO.contiguous(), 0, 1, scale_CO, most)


def prune_block_nm(weight_CO: Tensor, U_CC: Tensor, n: int, m: int, scale_CO: Tensor | None = None, most: int = 0) -> Tensor:
    """As `sweep_triton.prune_block_nm`, for m up to MAX_M. Scales as above."""
    assert len(weight_CO) % m == 0 and m <= MAX_M, f"a block of {len(weight_CO)} columns cuts a group of {m}"
    return _sweep(weight_CO, U_CC, None, n, m, scale_CO, most)


def _sweep(
    weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor | None, n: int, m: int, scale_CO: Tensor | None, most: int
) -> Tensor:
    assert weight_CO.is_contiguous() and weight_CO.dtype == U_CC.dtype == torch.float32
    assert scale_CO is None or (scale_CO.is_contiguous() and scale_CO.shape == weight_CO.shape)
    errors_CO, U_CC = torch.empty_like(weight_CO), U_CC.contiguous()
    at = [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in (weight_CO, errors_CO, drop_CO, U_CC, scale_CO)]
    counts = map(c_int, (n, m, most))
    sub_block = max(SUB_BLOCK // m, 1) * m
    library().sweep(*at, *map(c_long, weight_CO.shape), *counts, c_long(sub_block), c_int(torch.get_num_threads()))
    return errors_CO
