"""Products of float32 matrices that may round their factors.

Letters: O output features, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nnprune.kernels import gram


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Allow float32 products to round their factors (to bfloat16 on a CPU with AMX, to TF32 on CUDA) and sum in float32.

    Several times faster on hardware with such units; other CPUs round nothing. Lossless for bfloat16 values. Otherwise only for
    products whose rounding a solver corrects later.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FastFactor:
    """A symmetric matrix (I, I), float32, for many products that may round their factors as in `fast_products`, or with `rounds=False`
    do not."""

    def __init__(self, matrix: Tensor, rounds: bool = True) -> None:
        rounded = matrix.bfloat16() if rounds and matrix.device.type == "cpu" else matrix
        self._packed = gram.pack(rounded) if gram.multiply_bfloat16(rounded) else None
        self._matrix = None if self._packed else matrix
        self._rounds = rounds

    def times(self, right: Tensor, out: Tensor | None = None) -> Tensor:
        """The product (I, O), float32, with `right` (I, O), float32. `out` must not be `right`."""
        if self._packed is None:
            with fast_products(self._rounds):
                return torch.mm(self._matrix, right, out=out)
        out = torch.empty_like(right, memory_format=torch.contiguous_format) if out is None else out
        gram.add_product(out, self._packed, gram.pack(right.bfloat16()), keep=False)
        return out
