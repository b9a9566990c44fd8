"""Layer files: per-layer checkpoints that a resumed run starts from.

A finished layer is a safetensors file, with the full names of its weights, and a JSON file with its report and the checksum of
the weights. The report is written last: its presence means "finished".
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nnprune.engine import parallel
from nnprune.model.checkpoint import save_atomically
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)


class LayerFiles:
    """The finished decoder layers of one run. A damaged file is ignored, and so are those of all later layers.

    Args:
        folder: holds the files.
        prefix: full name of the list of decoder layers, such as "model.layers".
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder = folder
        self.prefix = prefix
        self.reports = self._read_reports()

    @parallel.on_rank_0
    def _read_reports(self) -> dict[int, dict[str, Any]]:
        """The reports of the finished layers."""
        reports: dict[int, dict[str, Any]] = {}
        while (found := read_journal(self._report_path(len(reports)))) is not None:
            index = len(reports)
            weights = self.path(index)
            if not weights.is_file() or found.get("index") != index or found.get("weights_sha256") != _checksum(weights):
                log.warning("warning: %s is missing or damaged: this layer and later ones are pruned again", weights)
                break
            reports[index] = found["report"]
        return reports

    def __contains__(self, index: int) -> bool:
        return index in self.reports

    def path(self, index: int) -> Path:
        """The safetensors file of decoder layer `index`."""
        return self.folder / f"layer-{index:04d}.safetensors"

    def named(self, index: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state`, the tensors of decoder layer `index`, under their full names, detached."""
        return {f"{self.prefix}.{index}.{name}": tensor.detach() for name, tensor in state.items()}

    def read(self, index: int) -> dict[str, Tensor]:
        """Name within the layer -> tensor, of a finished decoder layer."""
        prefix = f"{self.prefix}.{index}."
        with safe_open(self.path(index), "pt") as file:
            return {name.removeprefix(prefix): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def write(self, index: int, state: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Save decoder layer `index`, `state` (name within the layer -> tensor), as finished. Raises OSError naming the folder."""
        self._save(index, state, report)
        self.reports[index] = report

    @parallel.on_rank_0
    def _save(self, index: int, state: dict[str, Tensor], report: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_atomically(self.named(index, state), self.path(index))
            write_journal(
                self._report_path(index), {"index": index, "report": report, "weights_sha256": _checksum(self.path(index))}
            )
        except OSError as error:
            raise OSError(
                error.errno,
                f"outputs: decoder layer {index} could not be saved in {self.folder} ({error.strerror or error}); "
                "make room or set outputs to another disk, then run again: finished layers are kept",
            ) from error

    def _report_path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.json"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
