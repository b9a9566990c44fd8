"""Evaluation: perplexity over the fixed windows of a text, streamed through the layer-wise engine.

The field's protocol: the whole split joined, cut into windows of `seq_len` that do not overlap, every prediction counted.
Letters: N windows, T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from nnprune.layerwise import LayerwiseEngine
from nnprune.texts import TextSource


class Evaluation:
    """The texts that a model is measured on.

    Args:
        datasets: name -> arguments of TextSource, and `max_windows` where a text has a customary limit of its own.
        seq_len: T.
        max_windows: at most so many windows of each text, from its start; None: all.
        path: local files, measured as the text named "text".
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any]],
        seq_len: int,
        max_windows: int | None = None,
        path: str | list[str] | None = None,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"evaluation.seq_len={seq_len}: must be at least 2, such as 2048")
        if max_windows is not None and max_windows < 1:
            raise ValueError(f"evaluation.max_windows={max_windows}: must be at least 1, or null for all")
        self.seq_len = seq_len
        self.max_windows: dict[str, int | None] = {}
        self.sources: dict[str, TextSource] = {}
        for name, entry in {**datasets, **({"text": {"path": path}} if path else {})}.items():
            entry = dict(entry)
            limits = [limit for limit in (entry.pop("max_windows", None), max_windows) if limit]
            self.max_windows[name] = min(limits, default=None)
            self.sources[name] = TextSource(key="evaluation", **entry)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Text name -> windows (N, T) int64. Raises ValueError for a text shorter than one window."""
        return {name: self._windows(name, source, tokenizer) for name, source in self.sources.items()}

    def _windows(self, name: str, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        ids = torch.tensor(tokenizer(source.joined()).input_ids, dtype=torch.int64)
        num_windows = len(ids) // self.seq_len
        if not num_windows:
            raise ValueError(
                f"evaluation.seq_len={self.seq_len}: the text {name} has only {len(ids)} tokens, less than one window; "
                "lower evaluation.seq_len or give a longer text"
            )
        return ids[: num_windows * self.seq_len].view(num_windows, self.seq_len)[: self.max_windows[name]]


@torch.no_grad()
def perplexity(engine: LayerwiseEngine, ids: Tensor, pruned: bool = True, title: str = "evaluation") -> float:
    """exp(mean negative log-likelihood of all tokens but each window's first) for ids (N, T).

    `pruned` asks for finished layers where there are any, else for dense ones. Raises ValueError when it is not finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for row_ids, logits in engine.logits(ids, pruned, title):
        total += cross_entropy(logits[0, :-1].float(), row_ids[0, 1:], reduction="sum").double()
    mean = float(total) / (ids.shape[0] * (ids.shape[1] - 1))
    if not math.isfinite(mean):
        raise ValueError(f"{title}: the model gives NaN or infinite logits; try model.dtype=float32 or bfloat16")
    return math.exp(mean) if mean < 700 else math.inf
