"""Causal attention of bfloat16 sequences on a CPU's matrix units.

PyTorch's own kernel reaches an eighth of their rate there. Here a few rows of queries at a time meet all keys before them in
one large product, so that their scores stay in the cache; scores are kept in float32, and weights too, but for the kernel in C,
which divides by the sum of what it rounded.

Letters: B batch, H heads, K heads of keys and values, T tokens, E features of a head.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nnprune.native import kernels
from nnprune.precision import fast_products

QUERIES = 128
"""Rows of queries at a time."""

SCORES = 5 << 18
"""About how many scores at a time: few enough for the cache."""

SHORTEST = 256
"""Tokens of a sequence below which PyTorch's kernel is as fast."""


@contextmanager
def fast_attention() -> Iterator[None]:
    """Within it, transformers' models have PyTorch's scaled dot product attention computed by `causal_attention`.

    That is, in bfloat16 on a CPU with wide vectors, and where nothing but causality masks scores; with gradients only by kernels in C.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        yield
        return
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if args or attention_mask is not None or not _applies(module, query, key, value, kwargs):
            return own(module, query, key, value, attention_mask, *args, **kwargs)
        return causal_attention(query, key, value, kwargs.get("scaling")).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


def _applies(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    tensors = (query, key, value)
    is_causal = options.get("is_causal")
    if _wants_gradients(tensors) and not kernels.has_attention_gradients(*tensors, _scaling(query, options.get("scaling"))):
        return False
    return (
        all(tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" for tensor in tensors)
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2] == value.shape[2] >= SHORTEST
        and query.shape[1] % key.shape[1] == 0
        and not options.get("dropout")
        and not any(options.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """softmax(scaling Q K^T, over the keys up to each query's own place) V, shape (B, H, T, E) in bfloat16.

    Args:
        query: (B, H, T, E), bfloat16.
        key, value: (B, K, T, E), K a divisor of H; values may have another E.
        scaling: of the scores; None: E^-1/2.

    Where gradients are wanted, the tensors must be fit for `kernels.has_attention_gradients`.
    """
    scaling = _scaling(query, scaling)
    if _wants_gradients((query, key, value)):
        return _WithGradients.apply(query, key, value, scaling)
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]  # heads of queries to one of keys
    if kernels.has_attention(query, key, value, scaling):
        return kernels.causal_attention(query, key, value, scaling)
    early = scaling if math.frexp(scaling)[0] == 0.5 else 1.0  # a power of two rounds no query
    output = query.new_empty(batch, tokens, heads, value.shape[-1])
    step = min(max(SCORES // (shared * QUERIES * tokens), 1), key.shape[1])
    room = torch.empty(2, step * shared * QUERIES * tokens)
    ahead = torch.full((QUERIES, QUERIES), -torch.inf).triu_(1)  # what a query must not see of its own block
    with fast_products():
        for row in range(batch):
            for first in range(0, key.shape[1], step):
                own = slice(first, first + step)
                keys, values = key[row, own].float().mT, value[row, own].float().contiguous()
                mine = slice(first * shared, (first + step) * shared)
                queries = query[row, mine].float().mul_(early)
                for start in range(0, tokens, QUERIES):
                    stop = min(start + QUERIES, tokens)
                    shape = (len(values), shared * (stop - start), stop)
                    scores, weights = (buffer[: math.prod(shape)].view(shape) for buffer in room)
                    torch.bmm(queries[:, start:stop].reshape(*shape[:2], width), keys[..., :stop], out=scores)
                    if early != scaling:
                        scores.mul_(scaling)
                    scores.view(-1, stop - start, stop)[..., start:] += ahead[: stop - start, : stop - start]
                    torch.softmax(scores, -1, out=weights)  # float32: rounding moves a first token that takes nearly all
                    mixed = torch.bmm(weights, values[:, :stop]).view(len(queries), stop - start, -1)
                    output[row, start:stop, mine] = mixed.transpose(0, 1)
    return output.transpose(1, 2)


class _WithGradients(torch.autograd.Function):
    """`causal_attention` for training; only by kernels in C."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        log_sums = kernels.room_for_sums(query)
        output = kernels.causal_attention(query, key, value, scaling, log_sums)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, log_sums = ctx.saved_tensors
        return *kernels.attention_gradients(query, key, value, ctx.scaling, output, log_sums, grad), None


def _wants_gradients(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _scaling(query: Tensor, scaling: float | None) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling
