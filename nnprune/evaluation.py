"""Evaluation: perplexity over the fixed windows of a text, streamed through the decoder layers.

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

from nnprune.checks import check_count
from nnprune.engine.hidden_states import HiddenStates
from nnprune.texts import TextSource


class Evaluation:
    """The texts that a model is measured on.

    Args:
        datasets: name -> arguments of TextSource, and `max_windows` where a text has a customary limit of its own.
        seq_len: T.
        max_windows: at most so many windows of each text, from its start; None: all.
        path: local files, measured as the text named "text".
        column: the column of `path` that holds the text, in all formats but .txt.
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any]],
        seq_len: int,
        max_windows: int | None = None,
        path: str | list[str] | None = None,
        column: str = "text",
    ) -> None:
        check_count("evaluation.seq_len", seq_len, 2)
        self.seq_len = seq_len
        self.max_windows: dict[str, int | None] = {}
        self.sources: dict[str, TextSource] = {}
        own_text = {"text": {"path": path, "column": column}} if path is not None else {}
        for name, entry in {**datasets, **own_text}.items():
            key = "evaluation" if name in own_text else f"evaluation.datasets.{name}"
            source = dict(entry)
            limits = {f"{key}.max_windows": source.pop("max_windows", None), "evaluation.max_windows": max_windows}
            limits = {key: limit for key, limit in limits.items() if limit is not None}
            for limit_key, limit in limits.items():
                check_count(limit_key, limit, 1)
            self.max_windows[name] = min(limits.values(), default=None)
            self.sources[name] = TextSource(key=key, **source)

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
def perplexity(stream: HiddenStates, title: str) -> float:
    """exp(mean negative log-likelihood of all tokens but each window's first), of windows that went through all layers.

    Raises ValueError when it is not finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=stream.device)
    for row, tokens, logits in stream.logits():
        following = stream.ids[row, tokens.start + 1 : tokens.stop + 1].to(stream.device)
        losses = cross_entropy(logits[: len(following)].float(), following, reduction="none")
        total += losses.sum(dtype=torch.float64)
    num_windows, seq_len = stream.ids.shape
    mean = float(total) / (num_windows * (seq_len - 1))
    if not math.isfinite(mean):
        raise ValueError(f"{title}: the model gives NaN or infinite logits; try model.dtype=float32 or bfloat16")
    return math.exp(min(mean, 700))  # beyond, a float overflows
