"""The one evaluator of all programs: a plain forward of the whole model, a window at a time, outside of what is timed.

Letters: N windows, T tokens of a window.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from nnprune.model.decoder import Decoder


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    """exp(mean negative log-likelihood of every token but each window's first), for ids (N, T)."""
    total = 0.0
    for row in ids.to(model.device):
        logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0]
        total += float(cross_entropy(logits[:-1].float(), row[1:], reduction="sum"))
    mean = total / (ids.shape[0] * (ids.shape[1] - 1))
    return math.exp(min(mean, 700))  # beyond, a float overflows


def linear_sparsity(model: PreTrainedModel) -> float:
    """Fraction of zeros among the weights of the linears of the decoder layers."""
    decoder = Decoder(model)
    weights = [weight.read() for index in range(len(decoder.layers)) for weight in decoder.weights(index).values()]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
