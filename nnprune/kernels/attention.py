"""Causal attention of bfloat16 sequences, by the kernel in `attention.c`.

The kernel exists only on processors with AVX512-BF16 and without AMX: check `has_attention` first. Elsewhere use PyTorch's
`scaled_dot_product_attention`.

Letters: B batch, H query heads, K key-value heads, T tokens, E features of a head.
"""

import ctypes
from ctypes import c_float, c_int, c_long

import torch
from torch import Tensor
from torch.profiler import record_function

from nnprune.kernels.gram import multiply_bfloat16
from nnprune.kernels.library import address, library


def has_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether `causal_attention` supports these arguments."""
    return multiply_bfloat16(query, key, value) and query.shape[-1] % 2 == 0 and value.shape[-1] % 16 == 0 and scaling > 0


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T) V, where the softmax of a query is over the keys up to its own position.

    Args:
        query: (B, H, T, E), bfloat16.
        key, value: (B, K, T, E), bfloat16, where K divides H; values may have a different E.
        scaling: of the scores, > 0.

    Returns:
        (B, H, T, E of the values), bfloat16; the memory layout is (B, T, H, E).
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
    """The tensor itself if pairs of neighbouring features can be read as one 32-bit number, otherwise a copy."""
    is_fit = tensor.stride(-1) == 1 and not any(step % 2 for step in tensor.stride()[:-1]) and tensor.data_ptr() % 4 == 0
    return tensor if is_fit else tensor.contiguous()
