"""What an evaluator is: it provides token rows and computes metrics from the model's logits for them.

Letters: N rows (windows), T tokens of a row, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

Logits = Iterable[tuple[int, slice, Tensor]]
"""(row, slice of its tokens, logits (tokens, V)) for all tokens of all rows, in order. An evaluator should keep none: logits are the
largest tensors of a small model."""


class Evaluator(ABC):
    """Computes metrics of a model. Subclasses are configured by `_target_` under `evaluation.datasets`, like pruners."""

    seq_len: int | None = None
    """T, at most the model's number of positions; None: set to it before `prepare`."""

    length_key = "evaluation.seq_len"
    """The setting that it comes from, for messages."""

    combine: Callable[[list[tuple[int, Any]]], dict[str, float]] | None = None
    """The metrics of all rows, from (number of rows, what `measure` returned) of each part: of each tensor of rows, and of each
    process. None: there is one tensor, and one process measures all of it."""

    loads_model: bool = False
    """Whether it loads a model directory itself, in `measure_model`, and has no rows."""

    def check(self) -> None:
        """Raise ValueError for settings that can be refused before anything is read."""

    def identity(self) -> dict[str, Any]:
        """The settings that its fingerprint is made of."""
        return dict(vars(self))

    @abstractmethod
    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> Tensor | list[Tensor]:
        """The token rows (N, T), int64, for the model; several such tensors where rows differ in length."""

    @abstractmethod
    def measure(self, ids: Tensor, logits: Logits) -> Any:
        """Metric -> value, from the rows `ids` (N, T) of one tensor and their logits, or what `combine` takes, which must be
        picklable. Raises ValueError if a value is not finite."""

    def measure_model(self, path: str, **options: Any) -> dict[str, float]:
        """Metric -> value of the model directory or hub id `path`, if `loads_model`."""
        raise NotImplementedError
