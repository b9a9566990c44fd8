"""Decoder layers that a run has pruned, as files: what a killed run goes on behind, and the shards of a saved model.

A finished layer is one safetensors file, with the names that the whole model gives its weights, and a JSON file with its
report. The report is written last, so that its presence means "finished".
"""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nnprune.model.checkpoint import save_atomically
from nnprune.records import write_atomically


class LayerFiles:
    """The finished decoder layers of one run.

    Args:
        folder: where their files are, and nothing else.
        prefix: what the model calls its list of decoder layers, such as "model.layers".
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.reports: dict[int, dict[str, Any]] = {}
        while (report := self._report_path(len(self.reports))).exists():
            self.reports[len(self.reports)] = json.loads(report.read_text(encoding="utf-8"))

    def __contains__(self, index: int) -> bool:
        return index in self.reports

    def path(self, index: int) -> Path:
        """The safetensors file of decoder layer `index`."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def named(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of decoder layer `index` as the whole model calls them, ready to be written."""
        return {f"{self.prefix}.{index}.{name}": tensor.detach() for name, tensor in state.items()}

    def read(self, index: int) -> dict[str, Tensor]:
        """Name within the layer -> tensor, of a finished decoder layer."""
        prefix = f"{self.prefix}.{index}."
        with safe_open(self.path(index), "pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(self, index: int, state: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Write decoder layer `index` (name within the layer -> tensor) as finished. Raises OSError naming the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_atomically(self.named(index, state), self.path(index))
            write_atomically(self._report_path(index), json.dumps(report))
        except OSError as error:
            raise OSError(
                error.errno,
                f"outputs: decoder layer {index} could not be saved in {self.folder} ({error.strerror or error}); "
                "make room or set outputs to another disk, then run again: finished layers are kept",
            ) from error
        self.reports[index] = report

    def _report_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.json"
