"""The kernels in C as functions of tensors. What each computes stands in its own file of C.

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
"""Features of a block of a product, as in `gram.c`."""


def multiply_bfloat16(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: bfloat16 on a CPU that multiplies bfloat16."""
    return all(map(has_squares, tensors)) and hasattr(library(), "gram_add")


@dataclass(frozen=True)
class Packed:
    """A matrix (T, I) in bfloat16 as the products want it."""

    lanes: Tensor
    shape: tuple[int, int]


def pack(X: Tensor) -> Packed:
    """X (T, I), bfloat16, to be multiplied once or many times."""
    kernels, (tokens, width) = library(), map(c_long, X.shape)
    X = X if X.stride(1) == 1 else X.contiguous()
    kernels.gram_packed_size.restype = c_long
    lanes = torch.empty(kernels.gram_packed_size(tokens, width), dtype=torch.int32)
    kernels.gram_pack(_at(X), tokens, width, c_long(X.stride(0)), _at(lanes), c_int(torch.get_num_threads()))
    return Packed(lanes, tuple(X.shape))


def add_product(total: Tensor, X: Packed, Y: Packed, keep: bool = True, lower: bool = False) -> None:
    """total (I, J), float32, += X^T Y, or = X^T Y without `keep`, summed in float32, for X (T, I) and Y (T, J).

    `lower`: only in blocks of PANEL x PANEL in the lower triangle and on the diagonal.
    """
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape == (X.shape[1], Y.shape[1])
    assert X.shape[0] == Y.shape[0], f"{X.shape[0]} rows against {Y.shape[0]}"
    sizes, flags = map(c_long, (X.shape[0], *total.shape)), map(c_int, (lower, keep))
    with record_function("nnprune::add_product"):
        library().gram_add(_at(X.lanes), _at(Y.lanes), *sizes, *flags, _at(total), c_int(torch.get_num_threads()))


def has_squares(X: Tensor) -> bool:
    """Whether `add_squares` takes X."""
    return X.dtype == torch.bfloat16 and X.device.type == "cpu" and library() is not None


def add_squares(total: Tensor, X: Tensor) -> None:
    """total (I,), float32, += the squared norms of the columns of X (T, I), bfloat16, summed in float32."""
    X = X if X.stride(1) == 1 else X.contiguous()
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape == X.shape[1:]
    sizes = map(c_long, (*X.shape, X.stride(0)))
    library().add_squares(_at(X), *sizes, _at(total), c_int(torch.get_num_threads()))


def has_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether `causal_attention` takes these."""
    return multiply_bfloat16(query, key, value) and query.shape[-1] % 2 == 0 and value.shape[-1] % 16 == 0 and scaling > 0


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T, over the keys up to each query's own place) V, shape (B, H, T, E) in bfloat16.

    Args:
        query: (B, H, T, E), bfloat16.
        key, value: (B, K, T, E), K a divisor of H; values may have another E.
        scaling: of the scores, positive.
    """
    query, key, value = (_in_pairs(tensor) for tensor in (query, key, value))
    (batch, heads, tokens, width), key_heads, value_width = query.shape, key.shape[1], value.shape[-1]
    kernels, threads = library(), torch.get_num_threads()
    kernels.attention_keys_size.restype = kernels.attention_thread_size.restype = c_long
    keys = torch.empty(kernels.attention_keys_size(*map(c_long, (batch, key_heads, tokens, width))), dtype=torch.int32)
    values = torch.empty(batch * key_heads * tokens * value_width)
    room = torch.empty(threads * kernels.attention_thread_size(c_long(tokens), c_long(width)))
    output = query.new_empty(batch, tokens, heads, value_width)
    inputs = [part for tensor in (query, key, value) for part in (_at(tensor), (c_long * 3)(*tensor.stride()[:3]))]
    sizes = map(c_long, (batch, heads, key_heads, tokens, width, value_width))
    with record_function("nnprune::causal_attention"):
        kernels.attention(*inputs, _at(output), *sizes, c_float(scaling), _at(keys), _at(values), _at(room), c_int(threads))
    return output.transpose(1, 2)


def _in_pairs(tensor: Tensor) -> Tensor:
    """The tensor itself where neighbouring features can be read as one number, or else a copy."""
    is_fit = tensor.stride(-1) == 1 and not any(step % 2 for step in tensor.stride()[:-1]) and tensor.data_ptr() % 4 == 0
    return tensor if is_fit else tensor.contiguous()


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
