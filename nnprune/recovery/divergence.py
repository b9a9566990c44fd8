"""The Kullback-Leibler divergence of a pruned model's predictions from those of the dense one.

Letters: V vocabulary.
"""

from torch import Tensor


def divergence(logits: Tensor, dense_logits: Tensor) -> Tensor:
    """The sum over tokens of KL(dense || pruned), from logits (..., V) of any dtype; float32 (). Hinton et al. 2015,
    arXiv:1503.02531, at temperature 1."""
    log_q, log_p = logits.float().log_softmax(-1), dense_logits.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()
