"""Decoder layers at rest: in host memory, on the device, or on disk, and as files once they are pruned.

A finished layer is one safetensors file in the run's folder, written atomically, with its report in the file's metadata.
Its presence means "finished": a killed run goes on behind the last of them.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nnprune.decoder import Decoder
from nnprune.loading import Checkpoint


class LayerStore:
    """Brings decoder layers to the device and back.

    Args:
        decoder: its layers hold weights when `checkpoint` is None, otherwise they are on the meta device.
        device: where a fetched layer computes; the shell is kept there for good.
        rest: host, device or disk.
        folder: where the files of finished layers are, and nothing else.
        checkpoint: the dense weights, for rest "disk".
    """

    def __init__(self, decoder: Decoder, device: torch.device, rest: str, folder: Path, checkpoint: Checkpoint | None) -> None:
        self.decoder = decoder
        self.device = device
        self.rest = rest
        self.folder = folder
        self.checkpoint = checkpoint
        self._pruned_in_memory: set[int] = set()
        if checkpoint is not None:
            self._load_shell()
        self._move_shell()
        self.reports = self._read_reports()

    def fetch(self, index: int, pruned: bool = True) -> nn.Module:
        """Decoder layer `index` on the device: its finished weights if there are any and `pruned`, else its dense ones."""
        layer = self.decoder.layers[index]
        finished = pruned and index in self.reports
        if finished and index not in self._pruned_in_memory:
            with safe_open(self._path(index), "pt") as file:
                self._assign(layer, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            if self.checkpoint is None:
                self._pruned_in_memory.add(index)
        elif self.checkpoint is not None:
            self._assign(layer, self._read_dense(index))
        return layer.to(self.device)

    def release(self, index: int) -> None:
        """Put decoder layer `index` back where it rests. On disk only finished weights survive."""
        layer = self.decoder.layers[index]
        if self.rest == "host":
            layer.to("cpu")
        elif self.rest == "disk":
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def save(self, index: int, report: dict[str, Any]) -> None:
        """Write decoder layer `index` as finished. Raises OSError naming the folder when it cannot be written."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.decoder.layers[index].state_dict().items()}
        path = self._path(index)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(state, path, {"report": json.dumps(report)})
        except OSError as error:
            raise OSError(
                error.errno,
                f"outputs: decoder layer {index} could not be saved in {path.parent} ({error.strerror or error}); "
                "make room or set outputs to another disk, then run again: finished layers are kept",
            ) from error
        self.reports[index] = report
        if self.checkpoint is None:
            self._pruned_in_memory.add(index)

    def _path(self, index: int) -> Path:
        return self.folder / f"layer-{index:04d}.safetensors"

    def _read_reports(self) -> dict[int, dict[str, Any]]:
        """Reports of the finished layers before the first unfinished one."""
        reports: dict[int, dict[str, Any]] = {}
        for index in range(len(self.decoder.layers)):
            if not self._path(index).exists():
                break
            with safe_open(self._path(index), "pt") as file:
                reports[index] = json.loads(file.metadata()["report"])
        return reports

    def _read_dense(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.decoder.path}.{index}."
        names = list(self.decoder.layers[index].state_dict())
        tensors = self.checkpoint.read([prefix + name for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _load_shell(self) -> None:
        model = self.decoder.model
        names = [name for name in model.state_dict() if not name.startswith(f"{self.decoder.path}.")]
        tied = model.all_tied_weights_keys
        model.load_state_dict(self.checkpoint.read(names, optional=tied), strict=False, assign=True)
        model.tie_weights()

    def _move_shell(self) -> None:
        """Move all outside the decoder layers to the device; tied tensors are moved once and stay tied."""
        inside = set(self.decoder.layers.modules())
        for module in self.decoder.model.modules():
            if module not in inside:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = parameter.data.to(self.device)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(self.device)

    @staticmethod
    def _assign(layer: nn.Module, state: dict[str, Tensor]) -> None:
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)


def save_atomically(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file by rename. Raises OSError, also for the library's own I/O errors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(state, temporary, metadata=metadata)
        temporary.chmod(mode)  # the library makes files that nobody else may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
