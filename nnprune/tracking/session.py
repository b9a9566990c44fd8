"""Keeps a tracker up to date with a run: live from its log lines, and at the end from its record.

The layers that are shown already, and the tracker's id of the run, are kept in the run's folder. So a resumed run continues its
own, and a record that was made without the tracker is shown when the same command is started again.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import Any

from nnprune.records import RESULT_FILE, RunRecord, read_journal, write_journal
from nnprune.tracking.base import TrackedRun, Tracker

log = logging.getLogger(__name__)

JOURNAL = "tracking.json"


class TrackingSession(logging.Handler):
    """A context manager: within it, log lines that carry a `layer` are shown by the tracker.

    Args:
        tracker: shows the run, if it is no plain `Tracker`.
        run: what it shows.
    """

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        super().__init__()
        self.tracker, self.run, self.kind = tracker, run, type(tracker).__module__.rpartition(".")[2]
        self.is_active = type(tracker) is not Tracker
        self.is_started = False
        self._all = (read_journal(run.folder / JOURNAL) or {}) if self.is_active else {}
        self.state: dict[str, Any] = self._all.setdefault(self.kind, {"id": None, "layers": [], "finished": None})

    def __enter__(self) -> "TrackingSession":
        if self.is_active:
            logging.getLogger("nnprune").addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        logging.getLogger("nnprune").removeHandler(self)
        if kind and self.is_started:
            self._call(self.tracker.stop)

    def begin(self) -> None:
        """Begin the run, or continue an interrupted one. The layers of a finished one are pruned again, and shown again."""
        if self.is_active:
            if self.state["finished"]:
                self.state["layers"] = []
            self._start()

    def emit(self, record: logging.LogRecord) -> None:
        """Show the layer that a log line tells of."""
        if self.is_started and (layer := getattr(record, "layer", None)):
            self._show_layer(*layer)

    def finish(self, record: RunRecord) -> None:
        """Show what a record has and the tracker lacks."""
        if not self.is_active or self.state["finished"] == record.finished:
            return
        self._start()
        for layer, linears in _by_layer(record).items():
            self._show_layer(layer, {key: fmean(float(one[key]) for one in linears) for key in ("relative_error", "sparsity")})
        metrics = {**record.metrics, **{f"dense_{key}": value for key, value in record.dense_metrics.items()}}
        metrics |= {"linear_sparsity": record.linear_sparsity, "model_sparsity": record.model_sparsity}
        metrics |= {f"{stage}_seconds": seconds for stage, seconds in record.seconds.items()}
        known = {key: float(value) for key, value in metrics.items() if value is not None}
        self._call(self.tracker.finish, known, self.run.folder / RESULT_FILE)
        if self.is_active:
            self.state["finished"] = record.finished
            self._keep()

    def _start(self) -> None:
        if self.is_active and not self.is_started:
            self.is_started, self.state["finished"] = True, None
            self.state["id"] = self._call(self.tracker.start, self.run, self.state["id"])
            self._keep()

    def _show_layer(self, layer: int, metrics: dict[str, float]) -> None:
        if layer not in self.state["layers"] and self.is_active:
            self._call(self.tracker.log_layer, layer, metrics)
            if self.is_active:
                self.state["layers"].append(layer)
                self._keep()

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of the tracker, and no other after one has failed."""
        if self.is_active:
            try:
                return method(*arguments)
            except Exception as error:  # whatever it is, the run is worth more
                self.is_active = False
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                log.warning("warning: tracking=%s: %s; the run goes on without it", self.kind, reason)
        return None

    def _keep(self) -> None:
        if self.is_active:
            write_journal(self.run.folder / JOURNAL, self._all)


def flattened(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"pruner": {"damping": 1}} as {"pruner.damping": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _by_layer(record: RunRecord) -> dict[int, list[dict[str, Any]]]:
    """The linears of each decoder layer, counted from 1: the first number in a linear's name is its layer's index."""
    layers = defaultdict(list)
    for linear in record.per_linear:
        if match := re.search(r"\.(\d+)\.", linear["name"]):
            layers[int(match[1]) + 1].append(linear)
    return dict(layers)
