"""How many logits are alive at a time, and those of two models compared: those of all tokens of a step may take more memory than the model.

Letters: B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnprune.model.decoder import Decoder
from nnprune.recovery.base import Compare

LOGITS = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Logits of one model that are computed at a time; on a CPU few enough for the cache, and enough tokens for a fast product."""

LOGIT_BYTES = 32
"""Of one of these where two models are compared: logits and logarithms of probabilities of both models, products of them, and gradients."""


def tokens_of_logits(device: torch.device, seq_len: int, vocab_size: int) -> int:
    """Tokens of a row whose logits an evaluation computes at once: all on CUDA; on a CPU, 64 for V of 131 072 or more."""
    return seq_len if device.type == "cuda" else min(max(LOGITS["cpu"] // vocab_size, 64), seq_len)


def compare_logits(decoder: Decoder, compare: Compare, ids: Tensor, outputs: Tensor, dense: Tensor) -> Tensor:
    """The sum of what `compare` finds over all tokens of ids (B, T), for outputs (B, T, D) of the last decoder layer and those of the dense
    model, in whose dtype logits are computed; float32 (), with a gradient for `outputs`."""

    def compare_part(tokens: slice, part: Tensor) -> Tensor:
        # where tuning multiplies in bfloat16, a float16 head would be converted for every part
        with torch.autocast(dense.device.type, dtype=torch.bfloat16, enabled=dense.dtype == torch.bfloat16):
            with torch.no_grad():
                of_dense = decoder.logits(ids[:, tokens], dense[:, tokens])
            return compare(decoder.logits(ids[:, tokens], part.to(dense.dtype)), of_dense)

    return _SumOfParts.apply(outputs, compare_part, max(LOGITS[dense.device.type] // (decoder.vocab_size * len(ids)), 1))


class _SumOfParts(torch.autograd.Function):
    """The sum over parts of `size` tokens. The gradient is computed beside it, so that no part is computed twice, and scaled afterwards:
    that of a mean over tokens would be too small for float16."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, function: Callable[[slice, Tensor], Tensor], size: int) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        sums, gradients = [], []
        for start in range(0, outputs.shape[1], size):
            tokens = slice(start, start + size)
            with torch.set_grad_enabled(needs_gradient):
                part = outputs[:, tokens].detach().requires_grad_(needs_gradient)
                found = function(tokens, part)
            sums.append(found.detach())
            if needs_gradient:
                gradients += torch.autograd.grad(found, part)
        if needs_gradient:
            ctx.save_for_backward(torch.cat(gradients, dim=1))
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (of_sum,) = ctx.saved_tensors
        return of_sum * gradient, None, None
