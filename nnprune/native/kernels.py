"""The kernels in C that a forward and statistics need, as functions of tensors. What each computes stands in its own file of C.

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

FEWEST_TOKENS = 1024
"""Of a forward that is worth packing a weight for."""

KEYS = 64
"""Tokens of a block of attention, as in `attention.h`."""


def multiply_bfloat16(*tensors: Tensor) -> bool:
    """Whether there are kernels for these: bfloat16 on a CPU that multiplies bfloat16."""
    return all(map(has_squares, tensors)) and hasattr(library(), "gram_add")


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


def has_linear(X: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` takes these, and is faster than PyTorch: some tokens have to share its packing of the weight."""
    return (
        X.numel() >= FEWEST_TOKENS * X.shape[-1]
        and X.shape[-1] == weight.shape[-1]
        and X.shape[-1] % 2 == 0
        and multiply_bfloat16(X, weight, *([] if bias is None else [bias]))
        and all(tensor.is_contiguous() and tensor.data_ptr() % 4 == 0 for tensor in (X, weight))
    )


def linear(X: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X weight^T + bias, (..., O), summed in float32, for X (..., I), weight (O, I) and bias (O,), bfloat16."""
    (outputs, inputs), kernels = weight.shape, library()
    output, room = X.new_empty(*X.shape[:-1], outputs), Packed.empty(inputs, outputs)
    sizes, shift = map(c_long, (X.numel() // inputs, inputs, outputs)), None if bias is None else address(bias)
    with record_function("nnprune::linear"):
        kernels.linear(
            address(X), address(weight), shift, *sizes, address(output), address(room.lanes), c_int(torch.get_num_threads())
        )
    return output


def has_squares(X: Tensor) -> bool:
    """Whether `add_squares` and `negative_log_likelihood` take X."""
    return X.dtype == torch.bfloat16 and X.device.type == "cpu" and library() is not None


def add_squares(total: Tensor, X: Tensor) -> None:
    """total (I,), float32, += the squared norms of the columns of X (T, I), bfloat16, summed in float32."""
    X = X if X.stride(1) == 1 else X.contiguous()
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape == X.shape[1:]
    sizes = map(c_long, (*X.shape, X.stride(0)))
    library().add_squares(address(X), *sizes, address(total), c_int(torch.get_num_threads()))


def has_elementwise(*tensors: Tensor) -> bool:
    """Whether `rms_norm` and `silu_product` take these."""
    return all(has_squares(tensor) and tensor.shape[-1] % LANES == 0 and tensor.is_contiguous() for tensor in tensors)


def rms_norm(X: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * bfloat16(X / sqrt(mean(X^2) + eps)), the mean over features, shaped as X (..., I), for a weight (I,)."""
    assert X.shape[-1:] == weight.shape
    output = torch.empty_like(X)
    sizes = map(c_long, (X.numel() // len(weight), len(weight)))
    library().rms_norm(address(X), address(weight), *sizes, c_float(eps), address(output), c_int(torch.get_num_threads()))
    return output


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """bfloat16(silu(gate)) * up, all of one shape."""
    assert gate.shape == up.shape
    output = torch.empty_like(gate)
    library().silu_product(address(gate), address(up), c_long(gate.numel()), address(output), c_int(torch.get_num_threads()))
    return output


def has_rotation(X: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these."""
    if X.ndim != 4 or not all(map(has_squares, (X, cos, sin))):
        return False
    (batch, _, tokens, width), shape = X.shape, tuple(cos.shape)
    return (
        width % (2 * LANES) == 0
        and X.stride(-1) == 1
        and shape in ((1, tokens, width), (batch, tokens, width))
        and shape == sin.shape
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def rotate(X: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864) in the order of GPT-NeoX: X cos + (-X_2, X_1) sin, X_1 and X_2 the
    halves of a head's features.

    Args:
        X: (B, H, T, E), bfloat16.
        cos, sin: (B or 1, T, E), bfloat16.
    """
    batch, heads, tokens, width = X.shape
    output = X.new_empty(batch, tokens, heads, width)
    sizes = map(c_long, (tokens * width if len(cos) > 1 else 0, *X.shape))
    library().rotate(*_heads(X), address(cos), address(sin), *sizes, address(output), c_int(torch.get_num_threads()))
    return output.transpose(1, 2)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits) at the targets, (T,), float32, for logits (T, V), bfloat16, and targets (T,), int64, in [0, V)."""
    logits, targets = logits if logits.stride(1) == 1 else logits.contiguous(), targets.contiguous()
    (tokens, vocab_size), losses = logits.shape, torch.empty(len(logits))
    assert targets.shape == losses.shape and targets.dtype == torch.int64
    assert not tokens or 0 <= int(targets.min()) <= int(targets.max()) < vocab_size
    sizes = map(c_long, (tokens, vocab_size))
    library().negative_log_likelihood(
        address(logits), c_long(logits.stride(0)), address(targets), *sizes, address(losses), c_int(torch.get_num_threads())
    )
    return losses


def has_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether `causal_attention` takes these."""
    return multiply_bfloat16(query, key, value) and query.shape[-1] % 2 == 0 and value.shape[-1] % 16 == 0 and scaling > 0


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, log_sums: Tensor | None = None) -> Tensor:
    """softmax(scaling Q K^T, over the keys up to each query's own place) V, shape (B, H, T, E) in bfloat16.

    Args:
        query: (B, H, T, E), bfloat16.
        key, value: (B, K, T, E), K a divisor of H; values may have another E.
        scaling: of the scores, positive.
        log_sums: from `room_for_sums`, for `attention_gradients`.
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
    outputs = (address(output), None if log_sums is None else address(log_sums))
    sizes = map(c_long, (batch, heads, key_heads, tokens, width, value_width))
    with record_function("nnprune::causal_attention"):
        kernels.attention(
            *_heads(query, key, value),
            *outputs,
            *sizes,
            c_float(scaling),
            address(keys),
            address(values),
            address(room),
            c_int(threads),
        )
    return output.transpose(1, 2)


def has_attention_gradients(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> bool:
    """Whether `attention_gradients` takes these."""
    return has_attention(query, key, value, scaling) and query.shape[-1] == value.shape[-1] and query.shape[-1] % 16 == 0


def room_for_sums(query: Tensor) -> Tensor:
    """For the logarithms of the sums of the softmax of queries (B, H, T, E): (B, H, T rounded up), float32."""
    batch, heads, tokens, _ = query.shape
    return torch.zeros(batch, heads, -(-tokens // KEYS) * KEYS)


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, output: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, shaped as they are, in bfloat16, from that of the output of `causal_attention`.

    Args:
        query, key, value, scaling: those of `causal_attention`.
        output, log_sums: what it gave.
        grad: of the output, (B, H, T, E), bfloat16.
    """
    query, key, value, grad = (_in_pairs(tensor) for tensor in (query, key, value, grad))
    (batch, heads, tokens, width), key_heads = query.shape, key.shape[1]
    kernels, threads = library(), torch.get_num_threads()
    kernels.attention_backward_size.restype = c_long
    room = torch.empty(threads * kernels.attention_backward_size(c_long(tokens), c_long(width)))
    output = output.transpose(1, 2).contiguous()
    query_grad = torch.empty_like(output)
    others = torch.empty(2, batch, key_heads, heads // key_heads, tokens, width)  # of keys and values, by head of queries
    given, wanted = (output, log_sums), (query_grad, *others)
    sizes = map(c_long, (batch, heads, key_heads, tokens, width))
    with record_function("nnprune::attention_gradients"):
        kernels.attention_backward(
            *_heads(query, key, value, grad),
            *map(address, (*given, *wanted)),
            *sizes,
            c_float(scaling),
            address(room),
            c_int(threads),
        )
    return query_grad.transpose(1, 2), *others.sum(3).bfloat16()


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
