"""Two CSV files for all runs: layers.csv, a line for each decoder layer, and runs.csv, a line for each run."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from nnprune.records import write_atomically
from nnprune.tracking.base import TrackedRun, Tracker

LAYER_FIELDS = ("run", "layer", "relative_error", "sparsity", "seconds")


class CSV(Tracker):
    """Appends to two files that any number of processes may share.

    Args:
        folder: of both files.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def start(self, run: TrackedRun, run_id: str | None) -> str:
        self.run = run
        self.folder.mkdir(parents=True, exist_ok=True)
        return run.key

    def log_layer(self, layer: int, metrics: Mapping[str, float]) -> None:
        path = self.folder / "layers.csv"
        with FileLock(self.folder / ".lock"), path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LAYER_FIELDS)
            if not file.tell():
                writer.writeheader()
            writer.writerow({"run": self.run.key, "layer": layer, **metrics})

    def finish(self, metrics: Mapping[str, float], record: Path) -> None:
        path = self.folder / "runs.csv"
        with FileLock(self.folder / ".lock"):
            rows = []
            if path.exists():
                with path.open(newline="", encoding="utf-8") as file:
                    rows = [row for row in csv.DictReader(file) if row["run"] != self.run.key]
            rows.append({"run": self.run.key, **metrics, **self.run.settings, "record": str(record)})
            text = io.StringIO()
            writer = csv.DictWriter(text, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(path, text.getvalue())
