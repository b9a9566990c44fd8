"""What a tracker is, and `tracking=none`."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Args:
        key: its folder below `outputs`, which names it among all runs.
        name: for people, such as "demo wanda 2:4".
        folder: the run's folder.
        settings: its config, flattened: "pruner.damping" -> 0.01.
    """

    key: str
    name: str
    folder: Path
    settings: Mapping[str, Any]


class Tracker:
    """Shows nothing. Subclasses are configured by `_target_` under `tracking`, and import their package in `start`.

    Whatever `start`, `log_layer` and `finish` raise becomes one warning, and the run goes on.
    """

    package = ""
    """What has to be installed."""

    remedy = ""
    """The command that installs it."""

    def check(self) -> None:
        """Raise ValueError if the package is not installed."""
        if self.package and find_spec(self.package) is None:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"tracking={name}: {self.package} is not installed; {self.remedy}, or use tracking=none")

    def start(self, run: TrackedRun, run_id: str | None) -> str | None:
        """Begin a run, or continue the one of this id. Returns its id, which is kept in the run's folder."""

    def log_layer(self, layer: int, metrics: Mapping[str, float]) -> None:
        """Show relative_error and sparsity of a pruned decoder layer, counted from 1, and its seconds if it was pruned now."""

    def finish(self, metrics: Mapping[str, float], record: Path) -> None:
        """Show the final metrics and keep the record, a JSON file. The run is complete."""

    def stop(self) -> None:
        """The run failed or was interrupted; it may be continued later."""
