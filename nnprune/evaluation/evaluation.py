"""The evaluators of a run, from the settings of `evaluation`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nnprune.checks import check_count, quoted
from nnprune.evaluation.base import Evaluator
from nnprune.evaluation.lm_eval import LMEval
from nnprune.evaluation.lm_eval_tasks import LMEvalTask
from nnprune.evaluation.perplexity import Perplexity
from nnprune.texts import TextSource


class Evaluation:
    """The evaluators of a run.

    Args:
        datasets: name -> an evaluator, or the arguments of a TextSource to compute its perplexity, and optionally `max_windows`.
        seq_len: T of texts.
        max_windows: maximum number of windows of each text, from its start; None: all.
        path: local files, measured as a text named "text".
        column: the column of `path` that holds the text; not for .txt.
        tasks: names of tasks, groups or tags of lm-eval, an evaluator each.
        num_fewshot: examples in the context of a task's requests; None: as the task says.
        limit: the first documents of each task, or a fraction of them below 1; None: all.
        include_path: folders of a user's own tasks.
        seed: of the draw of examples; None: lm-eval's own.
        max_length: tokens of a task's longest request; None: the model's number of positions.
        backend: what measures tasks: "layerwise", or "hf" (see `LMEval`).
    """

    def __init__(
        self,
        datasets: Mapping[str, Mapping[str, Any] | Evaluator],
        seq_len: int = 2048,
        max_windows: int | None = None,
        path: str | list[str] | None = None,
        column: str = "text",
        tasks: str | Sequence[str] = (),
        num_fewshot: int | None = None,
        limit: float | None = None,
        include_path: str | list[str] | None = None,
        seed: int | None = None,
        max_length: int | None = None,
        backend: str = "layerwise",
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
            if "text" in self.evaluators:
                raise ValueError(
                    "evaluation.datasets.text: evaluation.path has this name; call one otherwise, such as evaluation.datasets.mine"
                )
            self.evaluators["text"] = _perplexity("text", "evaluation", {"path": path, "column": column}, seq_len, max_windows)
        for name in _names("tasks", tasks):
            if name in self.evaluators:
                raise ValueError(
                    f"evaluation.tasks={quoted(name)}: there is a text of this name, or the task twice; leave one out"
                )
            task = LMEvalTask(name, num_fewshot, limit, tuple(_names("include_path", include_path or ())), seed)
            self.evaluators[name] = LMEval(task, max_length, backend)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor | list[Tensor]]:
        """Evaluator name -> its rows (N, T), int64."""
        return {name: evaluator.prepare(tokenizer) for name, evaluator in self.evaluators.items()}


def _names(key: str, value: Any) -> list[str]:
    """One name or several as a list. Raises ValueError for anything else."""
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"evaluation.{key}={quoted(value)}: must be one name, or a list of them")
    return names


def _perplexity(name: str, key: str, source: dict[str, Any], seq_len: int, max_windows: int | None) -> Perplexity:
    """The perplexity of a text with settings `source` from `key`; its own and the common `max_windows` both apply."""
    limits = {f"{key}.max_windows": source.pop("max_windows", None), "evaluation.max_windows": max_windows}
    limits = {limit_key: limit for limit_key, limit in limits.items() if limit is not None}
    for limit_key, limit in limits.items():
        check_count(limit_key, limit, 1)
    return Perplexity(name, TextSource(key=key, **source), seq_len, min(limits.values(), default=None))
