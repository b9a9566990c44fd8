"""Evaluation of models. An evaluator provides token rows and computes metrics from the model's logits for them.

Letters: N rows (windows), T tokens of a row, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from nnprune.checks import check_count
from nnprune.texts import TextSource

Logits = Iterable[tuple[int, slice, Tensor]]
"""(row, slice of its tokens, logits (tokens, V)) for all tokens of all rows, in order. An evaluator should keep none: logits are the
largest tensors of a small model."""


class Evaluator(ABC):
    """Computes metrics of a model. Subclasses are configured by `_target_` under `evaluation.datasets`, like pruners."""

    seq_len: int
    """T, at most the model's number of positions."""

    combine: Callable[[list[tuple[int, dict[str, float]]]], dict[str, float]] | None = None
    """The metrics of all rows, from (number of rows, metrics) of each part that a process measured. None: one measures all."""

    def check(self) -> None:
        """Raise ValueError for settings that can be refused before anything is read."""

    def identity(self) -> dict[str, Any]:
        """The settings that its fingerprint is made of."""
        return dict(vars(self))

    @abstractmethod
    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The token rows (N, T), int64, for the model."""

    @abstractmethod
    def measure(self, ids: Tensor, logits: Logits) -> dict[str, float]:
        """Metric -> value, from the rows `ids` (N, T) and their logits. Raises ValueError if one is not finite."""


@dataclass(eq=False)
class Perplexity(Evaluator):
    """exp(mean negative log-likelihood) over the joined text, cut into windows of `seq_len` that do not overlap, all predictions
    counted.

    Args:
        name: of the text; the metric is `<name>_perplexity`.
        source: the text.
        seq_len: T.
        max_windows: maximum number of windows, from the start of the text; None: all.
    """

    name: str
    source: TextSource
    seq_len: int
    max_windows: int | None = None

    def check(self) -> None:
        self.source.check()

    def identity(self) -> dict[str, Any]:
        return {"source": self.source.identity(), "seq_len": self.seq_len, "max_windows": self.max_windows}

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """The windows (N, T), int64. Raises ValueError for a text shorter than one window."""
        ids = self.source.token_ids(tokenizer)
        num_windows = len(ids) // self.seq_len
        if not num_windows:
            raise ValueError(
                f"evaluation.seq_len={self.seq_len}: {self.name} has only {len(ids)} tokens, fewer than one window; "
                "lower evaluation.seq_len or give a longer text"
            )
        return ids[: num_windows * self.seq_len].view(num_windows, self.seq_len)[: self.max_windows]

    @torch.no_grad()
    def measure(self, ids: Tensor, logits: Logits) -> dict[str, float]:
        total = 0.0
        for row, tokens, scores in logits:
            following = ids[row, tokens.start + 1 : tokens.stop + 1].to(scores.device)
            losses = cross_entropy(scores[: len(following)].float(), following, reduction="none")
            total = losses.sum(dtype=torch.float64) + total
        num_windows, seq_len = ids.shape
        mean = float(total) / (num_windows * (seq_len - 1))
        if not math.isfinite(mean):
            raise ValueError(
                f"{self.name} perplexity: the model gives NaN or infinite logits; try model.dtype=float32 or bfloat16"
            )
        return {f"{self.name}_perplexity": math.exp(min(mean, 700))}  # above 700 a float overflows

    def combine(self, parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
        metric = f"{self.name}_perplexity"
        total = math.fsum(num_windows * math.log(metrics[metric]) for num_windows, metrics in parts)
        return {metric: math.exp(total / sum(num_windows for num_windows, _ in parts))}


class Evaluation:
    """The evaluators of a run.

    Args:
        datasets: name -> an evaluator, or the arguments of a TextSource to compute its perplexity, and optionally `max_windows`.
        seq_len: T of texts.
        max_windows: maximum number of windows of each text, from its start; None: all.
        path: local files, measured as a text named "text".
        column: the column of `path` that holds the text; not for .txt.
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any] | Evaluator],
        seq_len: int,
        max_windows: int | None = None,
        path: str | list[str] | None = None,
        column: str = "text",
    ) -> None:
        check_count("evaluation.seq_len", seq_len, 2)
        self.evaluators: dict[str, Evaluator] = {}
        for name, entry in datasets.items():
            if not isinstance(entry, Evaluator):
                if not isinstance(entry, Mapping):
                    reason = (
                        f"makes a {type(entry).__name__}, which is no Evaluator; derive it from nnprune.evaluation.Evaluator"
                    )
                    raise ValueError(f"evaluation.datasets.{name}._target_: {reason}")
                entry = _perplexity(name, f"evaluation.datasets.{name}", dict(entry), seq_len, max_windows)
            self.evaluators[name] = entry
        if path is not None:
            self.evaluators["text"] = _perplexity("text", "evaluation", {"path": path, "column": column}, seq_len, max_windows)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Evaluator name -> its rows (N, T), int64."""
        return {name: evaluator.prepare(tokenizer) for name, evaluator in self.evaluators.items()}


def _perplexity(name: str, key: str, source: dict[str, Any], seq_len: int, max_windows: int | None) -> Perplexity:
    """The perplexity of a text with settings `source` from `key`; its own and the common `max_windows` both apply."""
    limits = {f"{key}.max_windows": source.pop("max_windows", None), "evaluation.max_windows": max_windows}
    limits = {limit_key: limit for limit_key, limit in limits.items() if limit is not None}
    for limit_key, limit in limits.items():
        check_count(limit_key, limit, 1)
    return Perplexity(name, TextSource(key=key, **source), seq_len, min(limits.values(), default=None))
