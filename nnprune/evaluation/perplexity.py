"""The perplexity of a text.

Letters: N rows (windows), T tokens of a row, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from nnprune.evaluation.base import Evaluator, Logits
from nnprune.texts import TextSource


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
        if len(parts) == 1:
            return parts[0][1]
        metric = f"{self.name}_perplexity"
        total = math.fsum(num_windows * math.log(metrics[metric]) for num_windows, metrics in parts)
        return {metric: math.exp(total / sum(num_windows for num_windows, _ in parts))}
