# mypy: disable-error-code="assignment"
"""SparseGPT's sweep of one column block as one Triton kernel (Frantar & Alistarh 2023, arXiv:2301.00774).

One launch on a CUDA device replaces several launches for each column. For each column j of the block in order
    error_j = where(dropped, w_j, 0) / U_jj,    w_l -= U_jl error_j  for all l > j.
The kernel looks back instead: it subtracts sum_{j<l} U_jl error_j from w_l when it reaches column l, so that each weight is written
once. Output features are independent: a program processes BLOCK_O of them.

Columns are taken in sub-blocks of about 16:
  1. The sum over earlier sub-blocks is a product of small tiles, shared by all threads.
  2. Within the sub-block each column is a vector, one output feature for each thread. The long chain of dependences stays in
     registers, without shuffles or barriers between columns.
Tiles become vectors, and vectors tiles, through memory that only this program uses and that stays in the nearest cache.

Letters: C columns of a block, O output features.
"""

import contextlib
import math
import os

import torch
from torch import Tensor

from nnprune.kernels.library import cache_folder

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for the CPU comes without
    triton = None
else:
    with contextlib.suppress(RuntimeError):  # the user has no home; Triton then keeps nothing either
        os.environ.setdefault(
            "TRITON_CACHE_DIR", str(cache_folder() / "triton")
        )  # read when a kernel is compiled: seconds each

BLOCK_O = 32
"""Output features of a program, one for each lane: 4096 of them fill the 132 multiprocessors of an H100 once. With this width a program
needs 6 KiB of shared memory whatever the card (compute capability 8.0 to 12.0), so there is nothing to choose by card, or to tune."""

NUM_WARPS = 4
"""They share step 1 and all execute step 2, which is bound by latency."""

MAX_M = 16
"""Largest M: the code grows with its square; beyond this it takes a minute to compile and spills registers."""

MAX_COLUMNS = math.inf
"""A block may have any width."""


def available() -> bool:
    """Whether Triton is installed and there is a CUDA device, or TRITON_INTERPRET=1 runs kernels on the CPU."""
    return triton is not None and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")


def prune_block_masked(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor) -> Tensor:
    """Prune one column block in place with a given mask.

    Args:
        weight_CO: weights of the block, float32, contiguous; on return the dropped ones are zero.
        U_CC: the block's part of U, where H^-1 = U^T U: float32, upper triangular, of any strides.
        drop_CO: bool, True = remove.

    Returns:
        The errors (C, O), float32, to apply to the columns after the block.
    """
    return _launch(weight_CO, U_CC, drop_CO.contiguous(), n=0, m=1)


def prune_block_nm(weight_CO: Tensor, U_CC: Tensor, n: int, m: int) -> Tensor:
    """Prune one column block in place, keeping exactly n of every m columns in each row.

    The mask of a group is chosen when its first column is reached: it drops the m - n weights of lowest cost (w_j / U_jj)^2, and the
    later one of equal costs. A cost of NaN counts as infinite: a row with NaN must not be pruned to a finite row.

    Args:
        weight_CO: weights of the block, float32, contiguous, C a multiple of m; on return the dropped ones are zero.
        U_CC: the block's part of U, where H^-1 = U^T U: float32, upper triangular, of any strides.
        n: weights kept of each group, 0 < n < m.
        m: columns of a group, at most MAX_M for good performance.

    Returns:
        The errors (C, O), float32, to apply to the columns after the block.
    """
    assert len(weight_CO) % m == 0, f"a block of {len(weight_CO)} columns cuts a group of {m}"
    return _launch(weight_CO, U_CC, None, n, m)


def sub_block(m: int) -> dict[str, int]:
    """Constants of the kernel for groups of m: columns of a sub-block (whole groups) and the next power of two."""
    columns = max(16 // m, 1) * m
    return {"SUB_BLOCK": columns, "PADDED": max(1 << (columns - 1).bit_length(), 16)}


def _launch(weight_CO: Tensor, U_CC: Tensor, drop_CO: Tensor | None, n: int, m: int) -> Tensor:
    """Run the kernel on the device of `weight_CO`; returns the errors (C, O)."""
    assert weight_CO.is_contiguous() and weight_CO.dtype == U_CC.dtype == torch.float32
    num_columns, num_outputs = weight_CO.shape
    errors_CO = torch.empty_like(weight_CO)
    tensors = weight_CO, errors_CO, drop_CO, U_CC
    with torch.cuda.device_of(weight_CO):  # Triton launches on the current device
        _sweep[(triton.cdiv(num_outputs, BLOCK_O),)](
            *(*tensors, num_columns, num_outputs, *U_CC.stride()),
            **sub_block(m),
            N=n,
            M=m,
            BLOCK_O=BLOCK_O,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,  # the default of Triton before 3.10
        )
    return errors_CO


if triton is not None:

    @triton.jit
    def _absorb_earlier(
        weight_CO,
        errors_CO,
        U_CC,
        start,
        output,
        num_columns,
        num_outputs,
        U_row,
        U_column,
        SUB_BLOCK: tl.constexpr,
        PADDED: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        """Step 1: take from the sub-block at `start` what the errors of earlier ones ask for, in full float32."""
        DEPTH: tl.constexpr = 16  # the least that tl.dot sums over
        is_output = output < num_outputs
        column = start + tl.arange(0, PADDED)
        is_column = (tl.arange(0, PADDED) < SUB_BLOCK) & (column < num_columns)
        owed = tl.full((PADDED, BLOCK_O), 0.0, tl.float32)
        for first in range(0, start, DEPTH):
            earlier = first + tl.arange(0, DEPTH)
            U_transposed = tl.load(
                U_CC + column[:, None] * U_column + earlier[None, :] * U_row,
                mask=is_column[:, None] & (earlier < start)[None, :],
                other=0.0,
            )
            errors = tl.load(
                errors_CO + earlier[:, None] * num_outputs + output[None, :],
                mask=(earlier < start)[:, None] & is_output[None, :],
                other=0.0,
            )
            owed = tl.dot(U_transposed, errors, owed, input_precision="ieee")
        tile = weight_CO + column[:, None] * num_outputs + output[None, :]
        is_weight = is_column[:, None] & is_output[None, :]
        tl.store(tile, tl.load(tile, mask=is_weight) - owed, mask=is_weight)

    @triton.jit
    def _rank(costs, j: tl.constexpr, M: tl.constexpr, BLOCK_O: tl.constexpr):
        """How many of M costs go before number j: the lower ones, and of equal ones the later."""
        rank = tl.full((BLOCK_O,), 0, tl.int32)
        for k in tl.static_range(M):
            if k < j:
                rank += (costs[k] < costs[j]).to(tl.int32)
            elif k > j:
                rank += (costs[k] <= costs[j]).to(tl.int32)
        return rank

    @triton.jit(do_not_specialize=["num_columns"])  # a narrower last block runs the same code
    def _sweep(
        weight_CO,
        errors_CO,
        drop_CO,  # None: N of every M
        U_CC,
        num_columns,
        num_outputs,
        U_row,  # stride
        U_column,  # stride
        N: tl.constexpr,
        M: tl.constexpr,  # columns whose mask is chosen at once; 1 where it is given
        SUB_BLOCK: tl.constexpr,
        PADDED: tl.constexpr,
        BLOCK_O: tl.constexpr,
    ):
        output, size = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O), num_columns * num_outputs
        is_output = output < num_outputs
        for start in range(0, num_columns, SUB_BLOCK):
            _absorb_earlier(
                weight_CO, errors_CO, U_CC, start, output, num_columns, num_outputs, U_row, U_column, SUB_BLOCK, PADDED, BLOCK_O
            )
            tl.debug_barrier()  # stored as a tile, loaded below as vectors by other threads
            # Step 2: sweep the sub-block, unrolled. It stores nothing before its end, so that no load has to wait.
            negated, pruned = (), ()  # by column: minus the error, the weight
            for group in tl.static_range(0, SUB_BLOCK, M):
                weights, inverses, costs = (), (), ()
                for j in tl.static_range(M):
                    this = start + group + j
                    at = this * num_outputs + output
                    weight = tl.load(weight_CO + at, mask=is_output & (at < size), other=0.0)
                    for k in tl.static_range(group):
                        U = tl.load(U_CC + (start + k) * U_row + this * U_column, mask=this < num_columns, other=0.0)
                        weight = tl.fma(U, negated[k], weight)
                    inverse = 1.0 / tl.load(U_CC + this * (U_row + U_column), mask=this < num_columns, other=1.0)
                    cost = (weight * inverse) * (weight * inverse)
                    weights += (weight,)
                    inverses += (inverse,)
                    costs += (tl.where(cost == cost, cost, float("inf")),)
                for j in tl.static_range(M):
                    this = start + group + j
                    if drop_CO is None:  # by rank and not by threshold: ties cannot change the count
                        drop = _rank(costs, j, M, BLOCK_O) < M - N
                    else:
                        at = this * num_outputs + output
                        drop = tl.load(drop_CO + at, mask=is_output & (at < size), other=0)
                    weight = weights[j]
                    for k in tl.static_range(group, group + j):
                        U = tl.load(U_CC + (start + k) * U_row + this * U_column, mask=this < num_columns, other=0.0)
                        weight = tl.fma(U, negated[k], weight)
                    negated += (tl.where(drop, weight, 0.0) * -inverses[j],)
                    pruned += (tl.where(drop, 0.0, weight),)
            for j in tl.static_range(SUB_BLOCK):
                at = (start + j) * num_outputs + output
                tl.store(weight_CO + at, pruned[j], mask=is_output & (at < size))
                tl.store(errors_CO + at, -negated[j], mask=is_output & (at < size))
            tl.debug_barrier()  # stored as vectors, loaded above as tiles by other threads
