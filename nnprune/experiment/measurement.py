"""The metrics of one model, including those that an interrupted run measured."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.evaluation import Evaluator
from nnprune.records import read_journal, write_journal


class Measurement:
    """Computes the metrics of one model, as the rows of its evaluators pass through the layers.

    Args:
        kind: "dense" or "pruned", for messages.
        evaluators: by fingerprint.
        ids: fingerprint -> rows (N, T).
        folder: holds the metrics until the record is written.
    """

    def __init__(self, kind: str, evaluators: Mapping[str, Evaluator], ids: Mapping[str, Tensor], folder: Path) -> None:
        self.kind, self.evaluators, self.ids = kind, evaluators, ids
        self.journal = folder / f"{kind}_metrics.json"
        self.metrics: dict[str, dict[str, float]] = read_journal(self.journal) or {}  # by fingerprint
        self._states: dict[str, HiddenStates] = {}

    @contextmanager
    def hidden_states(self, engine: LayerwiseEngine) -> Iterator[list[HiddenStates]]:
        """Hidden states at the input of the first layer, for every evaluator without metrics."""
        with ExitStack() as stack:
            for key in self.evaluators:
                if key not in self.metrics:
                    self._states[key] = stack.enter_context(engine.hidden_states(self.ids[key], f"{self.kind}-{key}"))
            yield list(self._states.values())
            self._states.clear()

    def finish(self) -> dict[str, dict[str, float]]:
        """Fingerprint -> metrics. Call it when all rows have passed through all layers. Each evaluator's metrics are saved at once."""
        for key, states in self._states.items():
            try:
                self.metrics[key] = self.evaluators[key].measure(states.ids, states.logits())
            except ValueError as error:
                raise ValueError(f"{self.kind} {error}") from error
            write_journal(self.journal, self.metrics)
        return {key: self.metrics[key] for key in self.evaluators}
