"""Products of bfloat16 matrices with sums in float32, by the kernel in `gram.c`.

The kernel exists only on processors with AVX512-BF16 and without AMX: check `multiply_bfloat16` first. Elsewhere use `torch.mm` on
float32 matrices.

Letters: T tokens, I and J columns of matrices.
"""

from ctypes import c_int, c_long
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from nnprune.kernels.library import address, library

PANEL = 48
"""Features in a block of a product, as in `tile.h`."""


def multiply_bfloat16(*tensors: Tensor) -> bool:
    """Whether the tensors are bfloat16 on a CPU and the kernel exists."""
    are_fit = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return are_fit and hasattr(library(), "gram_add")


@dataclass(frozen=True)
class Packed:
    """A bfloat16 matrix (T, I) in the layout of the kernel."""

    lanes: Tensor
    shape: tuple[int, int]

    @classmethod
    def empty(cls, tokens: int, width: int) -> "Packed":
        """An uninitialised matrix (tokens, width)."""
        kernels = library()
        kernels.gram_packed_size.restype = c_long
        return cls(torch.empty(kernels.gram_packed_size(c_long(tokens), c_long(width)), dtype=torch.int32), (tokens, width))


def pack(X: Tensor) -> Packed:
    """X (T, I), bfloat16, in the layout of the kernel."""
    X = X if X.stride(1) == 1 else X.contiguous()
    packed, sizes = Packed.empty(*X.shape), map(c_long, (*X.shape, X.stride(0)))
    library().gram_pack(address(X), *sizes, address(packed.lanes), c_int(torch.get_num_threads()))
    return packed


def add_product(total: Tensor, X: Packed, Y: Packed, keep: bool = True, lower: bool = False) -> None:
    """total += X^T Y, summed in float32.

    Args:
        total: (I, J), float32, contiguous.
        X, Y: (T, I) and (T, J).
        keep: False: total = X^T Y.
        lower: only compute blocks of PANEL x PANEL in the lower triangle and on the diagonal.
    """
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape == (X.shape[1], Y.shape[1])
    assert X.shape[0] == Y.shape[0], f"{X.shape[0]} rows against {Y.shape[0]}"
    sizes, flags = map(c_long, (X.shape[0], *total.shape)), map(c_int, (lower, keep))
    with record_function("nnprune::add_product"):
        library().gram_add(address(X.lanes), address(Y.lanes), *sizes, *flags, address(total), c_int(torch.get_num_threads()))
