"""The metrics of one model, including those that an interrupted run measured."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from nnprune.engine import parallel
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.evaluation import Evaluator, Logits
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)


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
        self.metrics: dict[str, dict[str, float]] = parallel.on_rank_0(read_journal)(self.journal) or {}  # by fingerprint
        self._states: dict[str, HiddenStates] = {}

    @contextmanager
    def hidden_states(self, engine: LayerwiseEngine) -> Iterator[list[HiddenStates]]:
        """Hidden states at the input of the first layer, for every evaluator without metrics."""
        with ExitStack() as stack:
            for key, evaluator in self.evaluators.items():
                if key not in self.metrics:
                    states = engine.hidden_states(self.ids[key], f"{self.kind}-{key}", whole=evaluator.combine is None)
                    self._states[key] = stack.enter_context(states)
            yield list(self._states.values())
            self._states.clear()

    def finish(self) -> dict[str, dict[str, float]]:
        """Fingerprint -> metrics. Call it when all rows have passed through all layers. Each evaluator's metrics are saved at once."""
        for key, states in self._states.items():
            parts = [part for part in parallel.gather(self._measured(self.evaluators[key], states)) if part]
            self.metrics[key] = parts[0][1] if len(parts) == 1 else self.evaluators[key].combine(parts)
            parallel.on_rank_0(write_journal)(self.journal, self.metrics)
        return {key: self.metrics[key] for key in self.evaluators}

    def _measured(self, evaluator: Evaluator, states: HiddenStates) -> tuple[int, dict[str, float]] | None:
        """The number of rows that this process holds, and their metrics; None without rows."""
        if parallel.rank() and not len(states.ids):
            return None
        try:
            return len(states.ids), evaluator.measure(states.ids, self._watched(states))
        except ValueError as error:
            raise ValueError(f"{self.kind} {error}") from error

    def _watched(self, states: HiddenStates) -> Logits:
        """The logits, with a line and a progress bar of the windows."""
        log.info("evaluating the %s model: %d windows of %d tokens", self.kind, *states.ids.shape)
        with LayerwiseEngine.progress(len(states.ids), f"evaluating the {self.kind} model") as bar:
            for row, tokens, logits in states.logits():
                bar.update(row - bar.n)
                yield row, tokens, logits
