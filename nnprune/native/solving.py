"""The kernels in C that choose masks and solve for weights, as functions of tensors. What each computes stands in its own file of C.

Letters: G groups, O output features, I input features.
"""

from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from nnprune.native.kernels import LANES, PANEL, Packed, address
from nnprune.native.library import library

MOST_M = 32
"""Largest group of a pattern that kernels take, as in `native.h`."""

MOST_AT_ONCE = 64
"""Swaps of a step that there is room for, as in `swaps.c`."""


def admm_step(
    total: Tensor, E: Tensor, B0: Tensor, thresholds: Tensor | None, n: int, m: int, step: float, growth: float, pull: float
) -> Packed:
    """What stands in `admm.c`, for contiguous float32 (I, O): changes `total` and returns what goes to the right, packed.

    Args:
        thresholds: (O,); None: the n largest of every m inputs are kept, m at most MOST_M.
    """
    assert all(
        tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.shape == total.shape for tensor in (total, E, B0)
    )
    assert (thresholds is None and 0 < n < m <= MOST_M and len(total) % m == 0) or thresholds.shape == total.shape[1:]
    packed, sizes = Packed.empty(*total.shape), (*map(c_long, total.shape), *map(c_int, (n, m if thresholds is None else 0)))
    at = [*map(address, (total, E, B0)), None if thresholds is None else address(thresholds)]
    library().admm_step(*at, *sizes, *map(c_float, (step, growth, pull)), address(packed.lanes), c_int(torch.get_num_threads()))
    return packed


class ConjugateGradients:
    """What stands in `conjugate.c`: a step at a time for the columns of B (I, O), float32, whose nonzeros are the support.

    Attributes:
        B: moved in place, contiguous.
        direction: to be multiplied, packed.
    """

    def __init__(self, B: Tensor, residual: Tensor) -> None:
        """`residual` (I, O) is what the first direction is to be, on the support; it is overwritten."""
        assert all(
            tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.shape == B.shape for tensor in (B, residual)
        )
        inputs, outputs = B.shape
        vectors = -(-outputs // PANEL) * PANEL // LANES
        self.B, self.direction = B, Packed.empty(inputs, outputs)
        self._residual, self._norm = residual, torch.empty(outputs)
        self._support = torch.empty(vectors, inputs, dtype=torch.int16)
        self._sizes = (c_long(inputs), c_long(outputs))
        library().conjugate_start(address(B), address(residual), *self._sizes, *self._rest())

    def step(self, product: Tensor) -> None:
        """Move along the direction, whose product (I, O) with the matrix is given, and turn it."""
        assert product.is_contiguous() and product.dtype == torch.float32 and product.shape == self.B.shape
        library().conjugate_step(address(self.B), address(self._residual), address(product), *self._sizes, *self._rest())

    def _rest(self) -> tuple[c_void_p | c_int, ...]:
        return *map(address, (self._support, self._norm, self.direction.lanes)), c_int(torch.get_num_threads())


def has_selection(scores: Tensor) -> bool:
    """Whether `keep_in_groups`, `kth_smallest` and `search_swaps` take these."""
    return scores.dtype == torch.float32 and scores.device.type == "cpu" and library() is not None


def kth_smallest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th smallest (G,) of each group of scores (G, width), float32, 1 <= k <= width; and whether there are a NaN, or more than k
    scores up to it, (G,), bool."""
    scores, (groups, width) = scores.contiguous(), scores.shape
    assert 1 <= k <= width
    values, spoilt = torch.empty(groups), torch.empty(groups, dtype=torch.bool)
    threads = min(torch.get_num_threads(), groups)
    at, room = map(address, (values, spoilt)), torch.empty(threads, width, dtype=torch.int32)
    library().kth_smallest(address(scores), *map(c_long, (groups, width, k)), *at, address(room), c_int(threads))
    return values, spoilt


def keep_in_groups(scores: Tensor, n: int, kept: Tensor) -> Tensor:
    """Choose the n largest scores of each group (G, m), float32, m at most MOST_M, in a mask `kept` (G, m), bool, contiguous.

    Returns where that has failed, for ties or a NaN have made them more than n: (G,), bool.
    """
    scores, (groups, m) = scores.contiguous(), scores.shape
    assert kept.shape == scores.shape and kept.dtype == torch.bool and kept.is_contiguous() and m <= MOST_M
    spoilt = torch.empty(groups, dtype=torch.bool)
    at = map(address, (kept, spoilt))
    library().keep_in_groups(address(scores), c_long(groups), *map(c_int, (n, m)), *at, c_int(torch.get_num_threads()))
    return spoilt


def search_swaps(
    weight: Tensor,
    mask: Tensor,
    c: Tensor,
    hessian: Tensor,
    least: Tensor,
    size: int,
    max_swaps: int,
    num_candidates: int,
    at_once: int,
) -> None:
    """Improve a mask (O, I) in place as nnprune/pruners/swaps.py has it.

    Args:
        weight: (O, I), like the others but the mask float32; all contiguous.
        mask: (O, I), bool.
        c: (O, I), the pruned part of the weight times the Hessian, brought up to date in place.
        hessian: (I, I).
        least: (O,), the least gain of a swap.
        size: columns of a group, a divisor of I.
        max_swaps: of a row.
        num_candidates: kept and pruned columns of a group that are paired.
        at_once: swaps of a step, at most MOST_AT_ONCE.
    """
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (weight, c, hessian, least))
    assert mask.is_contiguous() and mask.dtype == torch.bool and mask.shape == weight.shape == c.shape
    assert at_once <= MOST_AT_ONCE and weight.shape[1] % size == 0
    kernels, threads = library(), torch.get_num_threads()
    kernels.swaps_thread_size.restype = c_long
    room = torch.empty(threads * kernels.swaps_thread_size(c_long(weight.shape[1])))
    at, sizes = map(address, (weight, mask, c, hessian, least, room)), (*weight.shape, size, max_swaps, num_candidates)
    kernels.search_swaps(*at, *map(c_long, sizes), c_int(at_once), c_int(threads))
