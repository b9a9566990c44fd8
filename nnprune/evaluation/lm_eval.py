"""Tasks of lm-eval, measured by nnprune's engine: all requests pass through the decoder layers as token rows.

Letters: N rows, T tokens of a row.
"""

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nnprune.checks import check_count, one_of, quoted
from nnprune.evaluation.base import Evaluator, Logits
from nnprune.evaluation.lm_eval_tasks import LMEvalTask

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from nnprune.evaluation.lm_eval_rows import Answers, RequestRows

BACKENDS = ("layerwise", "hf")


class LMEval(Evaluator):
    """The metrics of a task of lm-eval, `<task>_<metric>` with `<task>_<metric>_stderr`, and of its subtasks if it is a group.

    Args:
        task: the task.
        max_length: tokens of the longest request, from its end; None: the model's number of positions.
        backend: "layerwise", or "hf": lm-eval's own model class, which loads a whole saved model and generates text too.
    """

    length_key = "evaluation.max_length"

    def __init__(self, task: LMEvalTask, max_length: int | None = None, backend: str = "layerwise") -> None:
        self.task, self.seq_len, self.backend = task, max_length, backend
        self.settings = {"max_length": max_length, "backend": backend}
        self.loads_model = backend == "hf"
        self._rows: RequestRows | None = None

    def check(self) -> None:
        if self.settings["max_length"] is not None:
            check_count("evaluation.max_length", self.settings["max_length"], 2)
        if self.backend not in BACKENDS:
            raise ValueError(f"evaluation.backend={quoted(self.backend)}: must be {one_of(BACKENDS)}")
        self.task.check()
        if not self.loads_model and (names := self.task.generating()):
            self._refuse_generation(names[0])

    def identity(self) -> dict[str, Any]:
        return self.task.identity() | self.settings

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
        """The rows of all requests, in several lengths T; none if it loads the model."""
        tasks = self.task.load()["tasks"]
        if self.loads_model:
            return []
        from nnprune.evaluation.lm_eval_rows import RequestRows

        for name, task in tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                self._refuse_generation(name)
        self._rows = RequestRows(tokenizer, self.seq_len)
        with self.task.seeded():
            self._rows.collect(tasks.values(), self.task.limit)
        return self._rows.ids()

    def measure(self, ids: Tensor, logits: Logits) -> "Answers":
        answers = self._rows.score(ids, logits)
        if not all(math.isfinite(value) for value, _ in answers.values()):
            raise ValueError(f"{self.task.name}: the model gives NaN or infinite logits; try model.dtype=float32 or bfloat16")
        return answers

    def combine(self, parts: list[tuple[int, "Answers"]]) -> dict[str, float]:
        self._rows.answers = {number: answer for _, answers in parts for number, answer in answers.items()}
        return self._figures(self._rows)

    def measure_model(self, path: str, **options: Any) -> dict[str, float]:
        from lm_eval.models.huggingface import HFLM

        return self._figures(HFLM(pretrained=path, max_length=self.settings["max_length"], **options))

    def _figures(self, model: "LM") -> dict[str, float]:
        """The metrics that lm-eval computes of a model's answers."""
        from lm_eval.evaluator import evaluate

        loaded = self.task.load()
        with self.task.seeded():
            results = evaluate(lm=model, task_dict=loaded, limit=self.task.limit, log_samples=False)["results"]
        metrics = {}
        for task, values in results.items():
            for key, value in values.items():
                metric, _, answer_filter = key.partition(",")
                if answer_filter and isinstance(value, int | float):
                    parts = (task, metric) if answer_filter == "none" else (task, answer_filter, metric)
                    metrics["_".join(parts)] = float(value)
        return metrics

    def _refuse_generation(self, name: str) -> None:
        more = "" if name == self.task.name else f" ({name})"
        raise ValueError(
            f"evaluation.tasks={self.task.name}: generates text{more}, which takes a whole saved model; set evaluation.backend=hf "
            "save=true, or leave it out"
        )
