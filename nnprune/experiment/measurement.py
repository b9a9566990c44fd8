"""The metrics of one model, including those that an interrupted run measured.

Letters: N rows, T tokens of a row.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from nnprune.calibration import token_hash
from nnprune.engine import parallel
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.evaluation import Evaluator, Logits
from nnprune.experiment.provenance import now
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)


class Measurement:
    """Computes the metrics of one model, as the rows of its evaluators pass through the layers.

    Args:
        kind: "dense" or "pruned", for messages and the journal's name.
        evaluators: by fingerprint.
        ids: fingerprint -> the rows (N, T) of each length.
        folder: holds the metrics until the record is written.
        is_saved: whether the model is a pruned one that was saved, and is measured as it is.
    """

    def __init__(
        self,
        kind: str,
        evaluators: Mapping[str, Evaluator],
        ids: Mapping[str, Sequence[Tensor]],
        folder: Path,
        is_saved: bool = False,
    ) -> None:
        self.kind, self.evaluators, self.ids = kind, evaluators, ids
        self._title = f"evaluating the {'saved' if is_saved else kind} model"
        self.journal = folder / f"{kind}_metrics.json"
        self.metrics: dict[str, dict[str, float]] = parallel.on_rank_0(read_journal)(self.journal) or {}  # by fingerprint
        self._states: dict[str, list[HiddenStates]] = {}

    @contextmanager
    def hidden_states(self, engine: LayerwiseEngine) -> Iterator[list[HiddenStates]]:
        """Hidden states at the input of the first layer, for every evaluator without metrics."""
        with ExitStack() as stack:
            for key, evaluator in self.evaluators.items():
                if key not in self.metrics:
                    name, whole = f"{self.kind}-{key}", evaluator.combine is None
                    self._states[key] = [
                        stack.enter_context(engine.hidden_states(ids, f"{name}-{index}", whole))
                        for index, ids in enumerate(self.ids[key])
                    ]
            yield [states for of_evaluator in self._states.values() for states in of_evaluator]
            self._states.clear()

    def finish(self) -> dict[str, dict[str, float]]:
        """Fingerprint -> metrics. Call it when all rows have passed through all layers. Each evaluator's metrics are saved at once."""
        for key, of_evaluator in self._states.items():
            evaluator, shapes = self.evaluators[key], [ids.shape for ids in self.ids[key]]
            windows, tokens = sum(rows for rows, _ in shapes), max(length for _, length in shapes)
            length = f"{tokens}" if len(shapes) == 1 else f"up to {tokens}"
            log.info("%s: %d windows of %s tokens", self._title, windows, length)
            own = [self._measured(evaluator, states) for states in of_evaluator]
            parts = [part for of_rank in parallel.gather(own) for part in of_rank if part]
            self.metrics[key] = evaluator.combine(parts) if evaluator.combine else parts[0][1]
            parallel.on_rank_0(write_journal)(self.journal, self.metrics)
        return {key: self.metrics[key] for key in self.evaluators}

    def _measured(self, evaluator: Evaluator, states: HiddenStates) -> tuple[int, Any] | None:
        """The number of rows that this process holds, and what the evaluator measured of them; None without rows."""
        if parallel.rank() and not len(states.ids):
            return None
        try:
            return len(states.ids), evaluator.measure(states.ids, self._watched(states))
        except ValueError as error:
            raise ValueError(f"{self.kind} {error}") from error

    def _watched(self, states: HiddenStates) -> Logits:
        """The logits, with a progress bar of the rows."""
        with LayerwiseEngine.progress(len(states.ids), self._title) as bar:
            for row, tokens, logits in states.logits():
                bar.update(row - bar.n)
                yield row, tokens, logits


def rows_hash(rows: Sequence[Tensor]) -> str:
    """16 hexadecimal digits that identify the rows (N, T) of an evaluation, of one or several lengths."""
    hashes = [token_hash(ids) for ids in rows]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def check_metrics(evaluations: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, str]) -> None:
    """Raise ValueError if two of the `wanted` evaluators, fingerprints by name, gave one metric different values: a record shows one."""
    found: dict[tuple[str, str], tuple[str, float]] = {}
    for name, key in wanted.items():
        for kind in ("metrics", "dense_metrics"):
            for metric, value in evaluations.get(key, {}).get(kind, {}).items():
                other, first = found.setdefault((kind, metric), (name, value))
                if value != first:
                    raise ValueError(
                        f"evaluation.datasets: {other} and {name} both give the metric {metric}, of different values; let `measure` name "
                        "it otherwise in one of them, or leave one out"
                    )


def evaluation_entry(
    name: str, evaluator: Evaluator, tokens: str, metrics: dict[str, float], dense_metrics: dict[str, float]
) -> dict[str, Any]:
    """What a record's `evaluations` holds of an evaluator and the hash of its rows, "" without any."""
    settings = json.loads(json.dumps(evaluator.identity(), default=str))
    figures = {"metrics": metrics, "dense_metrics": dense_metrics}
    return {"name": name, "settings": settings, "tokens": tokens, **figures, "finished": now()}
