"""How exactly float32 matrices are multiplied.

Letters: O output features, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nnprune.kernels import gram


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Let float32 products round their factors (to bfloat16 on a CPU with AMX, TF32 on a CUDA device) and sum in float32.

    Several times as fast where the machine has units for it; other CPUs round nothing, but take another library's product. Lossless
    for factors that hold bfloat16 values; else good for products whose rounding only delays a solver, and wrong for the rest, hence
    the switch.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FastFactor:
    """A symmetric matrix (I, I), float32, for many products that may round their factors, as `fast_products` has it."""

    def __init__(self, matrix: Tensor) -> None:
        rounded = matrix.bfloat16() if matrix.device.type == "cpu" else matrix
        self._packed = gram.pack(rounded) if gram.multiply_bfloat16(rounded) else None
        self._matrix = None if self._packed else matrix

    def times(self, right: Tensor, out: Tensor | None = None) -> Tensor:
        """The product (I, O) with a float32 `right` (I, O), which is not `out`."""
        if self._packed is None:
            with fast_products():
                return torch.mm(self._matrix, right, out=out)
        out = torch.empty_like(right, memory_format=torch.contiguous_format) if out is None else out
        gram.add_product(out, self._packed, gram.pack(right.bfloat16()), keep=False)
        return out
