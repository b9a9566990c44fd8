"""Evaluation of models."""

from nnprune.evaluation.base import Evaluator, Logits
from nnprune.evaluation.evaluation import Evaluation
from nnprune.evaluation.perplexity import Perplexity

__all__ = ["Evaluation", "Evaluator", "Logits", "Perplexity"]
