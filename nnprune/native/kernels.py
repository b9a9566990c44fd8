"""Products and attention of bfloat16 tensors by the kernels in C (`gram.c`, `attention.c`).

They exist only on processors with AVX512-BF16 and without AMX: ask `multiply_bfloat16` or `has_attention` first.
Letters: B batch, H heads, K heads of keys and values, T tokens, E features of a head, I and J columns of matrices.
"""

import ctypes
from ctypes import c_float, c_int, c_long
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from nnprune.native.library import library

PANEL = 48
"""Features of a block of a product, as in `tile.h`."""

LANES = 16
"""Numbers that are computed at once, as in `vectors.h`."""


def multiply_bfloat16(*tensors: Tensor) -> bool:
    """Whether these tensors are bfloat16 on a CPU whose kernels multiply bfloat16."""
    are_fit = all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
    return are_fit and hasattr(library(), "gram_add")


@dataclass(frozen=True)
class Packed:
    """A matrix (T, I) in bfloat16 as the products want it."""

    lanes: Tensor
    shape: tuple[int, int]

    @classmethod
    def empty(cls, tokens: int, width: int) -> "Packed":
        """Room for such a matrix."""
        kernels = library()
        kernels.gram_packed_size.restype = c_long
        return cls(torch.empty(kernels.gram_packed_size(c_long(tokens), c_long(width)), dtype=torch.int32), (tokens, width))


def pack(X: Tensor) -> Packed:
    """X (T, I), bfloat16, to be multiplied once or many times."""
    X = X if X.stride(1) == 1 else X.contiguous()
    packed, sizes = Packed.empty(*X.shape), map(c_long, (*X.shape, X.stride(0)))
    library().gram_pack(address(X), *sizes, address(packed.lanes), c_int(torch.get_num_threads()))
    return packed


def add_product(total: Tensor, X: Packed, Y: Packed, keep: bool = True, lower: bool = False) -> None:
    """total (I, J), float32, += X^T Y, or = X^T Y without `keep`, summed in float32, for X (T, I) and Y (T, J).

    `lower`: only in blocks of PANEL x PANEL in the lower triangle and on the diagonal.
    """
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape == (X.shape[1], Y.shape[1])
    assert X.shape[0] == Y.shape[0], f"{X.shape[0]} rows against {Y.shape[0]}"
    sizes, flags = map(c_long, (X.shape[0], *total.shape)), map(c_int, (lower, keep))
    with record_function("nnprune::add_product"):
        library().gram_add(address(X.lanes), address(Y.lanes), *sizes, *flags, address(total), c_int(torch.get_num_threads()))


def has_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether `causal_attention` takes these."""
    return multiply_bfloat16(query, key, value) and query.shape[-1] % 2 == 0 and value.shape[-1] % 16 == 0 and scaling > 0


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T, over the keys up to each query's own place) V.

    Args:
        query: (B, H, T, E), bfloat16.
        key, value: (B, K, T, E), bfloat16, K a divisor of H; values may have another E.
        scaling: of the scores, positive.

    Returns:
        (B, H, T, E of the values), bfloat16; in memory tokens come before heads.
    """
    query, key, value = (_in_pairs(tensor) for tensor in (query, key, value))
    (batch, heads, tokens, width), key_heads, value_width = query.shape, key.shape[1], value.shape[-1]
    kernels, threads = library(), torch.get_num_threads()
    kernels.attention_packed_size.restype = kernels.attention_thread_size.restype = c_long
    keys, values = (
        torch.empty(kernels.attention_packed_size(*map(c_long, (batch, key_heads, tokens, size))), dtype=torch.int32)
        for size in (width, value_width)
    )
    room = torch.empty(threads * kernels.attention_thread_size(c_long(tokens), c_long(width)))
    output = query.new_empty(batch, tokens, heads, value_width)
    sizes = map(c_long, (batch, heads, key_heads, tokens, width, value_width))
    rest = (c_float(scaling), *map(address, (keys, values, room)), c_int(threads))
    with record_function("nnprune::causal_attention"):
        kernels.attention(*_heads(query, key, value), address(output), *sizes, *rest)
    return output.transpose(1, 2)


def _heads(*tensors: Tensor) -> list[ctypes.c_void_p | ctypes.Array]:
    """Address and strides of tensors (B, H, T, E)."""
    return [part for tensor in tensors for part in (address(tensor), (c_long * 3)(*tensor.stride()[:3]))]


def _in_pairs(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbouring features can be read as one number, or else a copy."""
    is_fit = tensor.stride(-1) == 1 and not any(step % 2 for step in tensor.stride()[:-1]) and tensor.data_ptr() % 4 == 0
    return tensor if is_fit else tensor.contiguous()


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Of the first number, for a kernel."""
    return ctypes.c_void_p(tensor.data_ptr())
