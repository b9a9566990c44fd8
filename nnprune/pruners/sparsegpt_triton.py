"""SparseGPT's sweep of one column block as one Triton kernel (Frantar & Alistarh 2023, arXiv:2301.00774).

What `SparseGPT._prune_block` does in several launches a column, for CUDA devices. For each column j of the block in order
    error_j = where(dropped, w_j, 0) / U_jj,    w_l -= U_jl error_j  for all l > j,
so that w_l before its own turn is its old value minus sum_{j<l} U_jl error_j: the kernel computes this sum, looking back,
which reads and writes each weight once. Output features do not depend on each other: each program owns BLOCK_O of them.

The columns are taken in sub-blocks of about 16, whole groups of m:
  1. The sum over earlier sub-blocks is a small product in full float32 (16 x BLOCK_O tile, all threads).
  2. Within the sub-block each column is a vector of its own over output features, one feature a thread. What depends on
     what is then a chain of multiply-adds in registers, with neither shuffles nor barriers from one column to the next.
The two layouts meet in memory that only this program touches and that the first-level cache holds.

Letters: C columns of a block, O output features.
"""

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not part of PyTorch's builds for the CPU
    triton = None

BLOCK_O = 32
"""Output features of a program: one a lane. A matrix of 4096 rows then fills the 132 multiprocessors of an H100."""

NUM_WARPS = 4
"""They share step 1 and repeat step 2, whose time is latency."""


def available() -> bool:
    """Whether the kernel can run: Triton is installed and there is a CUDA device, or TRITON_INTERPRET=1 asks for the CPU."""
    return triton is not None and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


def prune_block_masked(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor) -> Tensor:
    """Prune one column block in place by a mask that is fixed before the sweep.

    Args:
        weight_CO: the block's weights, float32, contiguous; on return the dropped ones are zero.
        U_CC: the block's part of U with H^-1 = U^T U, float32, upper triangular, of any strides.
        drop_CO: bool, True = remove.

    Returns:
        The errors (C, O), float32, that later columns have yet to absorb.
    """
    return _launch(weight_CO, U_CC, drop_CO.contiguous(), n=0, m=1)


def prune_block_nm(weight_CO: Tensor, U_CC: Tensor, n: int, m: int) -> Tensor:
    """Prune one column block in place, keeping exactly n of every m columns in each row.

    The mask of a group is chosen when its first column is reached: the m - n weights of lowest cost (w_j / U_jj)^2 go, and
    of equal ones the later. A cost that is NaN counts as infinite, so that a row with NaN cannot be pruned to finite zeros.

    Args:
        weight_CO: the block's weights, float32, contiguous, C a multiple of m; on return the dropped ones are zero.
        U_CC: the block's part of U with H^-1 = U^T U, float32, upper triangular, of any strides.
        n: weights kept of each group, 0 < n < m.
        m: columns of a group, small: code grows with its square.

    Returns:
        The errors (C, O), float32, that later columns have yet to absorb.
    """
    assert len(weight_CO) % m == 0, "a group of m lies across two blocks"
    return _launch(weight_CO, U_CC, None, n, m)


def sub_block(m: int) -> tuple[int, int]:
    """Columns of a sub-block, the whole groups of m in 16 but at least one, and the power of two that holds them."""
    columns = max(16 // m, 1) * m
    return columns, max(1 << (columns - 1).bit_length(), 16)


def _launch(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor | None, n: int, m: int) -> Tensor:
    """Run the kernel on the device of `weight_CO`; returns the errors (C, O)."""
    assert weight_CO.is_contiguous() and weight_CO.dtype == U_CC.dtype == torch.float32
    num_columns, num_outputs = weight_CO.shape
    errors_CO = torch.empty_like(weight_CO)
    columns, padded = sub_block(m)
    with torch.cuda.device_of(weight_CO):  # Triton launches on the current device
        _sweep[(triton.cdiv(num_outputs, BLOCK_O),)](
            *(weight_CO, errors_CO, drop_CO, U_CC, num_columns, num_outputs, *U_CC.stride()),
            **dict(N=n, M=m, SUB_BLOCK=columns, PADDED=padded, BLOCK_O=BLOCK_O, num_warps=NUM_WARPS),
        )
    return errors_CO


if triton is not None:

    @triton.jit
    def _sweep(
        weight_CO,
        errors_CO,
        drop_CO,  # None: N of every M
        U_CC,
        num_columns,
        num_outputs,
        U_row,  # strides
        U_column,
        N: tl.constexpr,
        M: tl.constexpr,  # 1 where the mask is given: a group is one column
        SUB_BLOCK: tl.constexpr,
        PADDED: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        DEPTH: tl.constexpr = 16  # columns of one small product, the fewest that tl.dot takes
        output = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        is_output = output < num_outputs
        size = num_columns * num_outputs
        for start in range(0, num_columns, SUB_BLOCK):
            # Step 1: what the columns of earlier sub-blocks take from this one.
            column = start + tl.arange(0, PADDED)
            is_column = (tl.arange(0, PADDED) < SUB_BLOCK) & (column < num_columns)
            taken = tl.full((PADDED, BLOCK_O), 0.0, tl.float32)
            for first in range(0, start, DEPTH):
                earlier = first + tl.arange(0, DEPTH)
                is_earlier = earlier < start
                U_transposed = tl.load(
                    U_CC + earlier[None, :] * U_row + column[:, None] * U_column,
                    mask=is_column[:, None] & is_earlier[None, :],
                    other=0.0,
                )
                errors_tile = tl.load(
                    errors_CO + earlier[:, None] * num_outputs + output[None, :],
                    mask=is_earlier[:, None] & is_output[None, :],
                    other=0.0,
                )
                taken = tl.dot(U_transposed, errors_tile, taken, input_precision="ieee")
            tile = weight_CO + column[:, None] * num_outputs + output[None, :]
            is_tile = is_column[:, None] & is_output[None, :]
            tl.store(tile, tl.load(tile, mask=is_tile) - taken, mask=is_tile)
            tl.debug_barrier()  # written as a tile, read below by other threads as vectors

            # Step 2: sweep the sub-block, unrolled. Nothing is stored before its end: no load has to wait for a store.
            errors, pruned = (), ()
            for group in tl.static_range(0, SUB_BLOCK, M):
                weights, inverses, costs = (), (), ()
                for j in tl.static_range(group, group + M):
                    this = start + j
                    weight = tl.load(
                        weight_CO + this * num_outputs + output,
                        mask=is_output & (this * num_outputs + output < size),
                        other=0.0,
                    )
                    for k in tl.static_range(group):
                        U = tl.load(U_CC + (start + k) * U_row + this * U_column, mask=this < num_columns, other=0.0)
                        weight = tl.fma(-U, errors[k], weight)
                    inverse = 1.0 / tl.load(U_CC + this * (U_row + U_column), mask=this < num_columns, other=1.0)
                    cost = (weight * inverse) * (weight * inverse)
                    weights += (weight,)
                    inverses += (inverse,)
                    costs += (tl.where(cost == cost, cost, float("inf")),)
                for j in tl.static_range(M):
                    this = start + group + j
                    if drop_CO is None:  # by rank and not by threshold: ties cannot change the count
                        rank = tl.full((BLOCK_O,), 0, tl.int32)
                        for k in tl.static_range(M):
                            if k < j:
                                rank += (costs[k] < costs[j]).to(tl.int32)
                            elif k > j:
                                rank += (costs[k] <= costs[j]).to(tl.int32)
                        drop = rank < M - N
                    else:
                        drop = tl.load(
                            drop_CO + this * num_outputs + output,
                            mask=is_output & (this * num_outputs + output < size),
                            other=0,
                        )
                    weight = weights[j]
                    for k in tl.static_range(group, group + j):
                        U = tl.load(U_CC + (start + k) * U_row + this * U_column, mask=this < num_columns, other=0.0)
                        weight = tl.fma(-U, errors[k], weight)
                    errors += (tl.where(drop, weight, 0.0) * inverses[j],)
                    pruned += (tl.where(drop, 0.0, weight),)
            for j in tl.static_range(SUB_BLOCK):
                at = (start + j) * num_outputs + output
                tl.store(weight_CO + at, pruned[j], mask=is_output & (at < size))
                tl.store(errors_CO + at, errors[j], mask=is_output & (at < size))
            tl.debug_barrier()  # written as vectors, read above by other threads as tiles
