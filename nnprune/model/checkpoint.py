"""Safetensors files of checkpoints: read tensor by tensor, written as a whole or not at all."""

import errno
import os
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

LOADED_BY_TRANSFORMERS = {"format": "pt"}


class Checkpoint:
    """Weights in safetensors files, read by name and only when asked for.

    Args:
        folder: where the files are.
        model: tells, by its state dict, what the weights are called; transformers' own rules rename those of the files.
        label: the config key and value, for error messages.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, label: str) -> None:
        self.label = label
        self.dtype = model.dtype
        self.places: dict[str, tuple[Path, str]] = {}
        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        state = model.state_dict()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    keys = list(file.keys())
            except SafetensorError as error:
                raise ValueError(f"{label}: {path.name} cannot be read ({error}); get it again") from error
            for key in keys:
                name, _ = rename_source_key(key, renamings, [], model.base_model_prefix, state)
                self.places[name] = (path, key)
        if not self.places:
            raise ValueError(f"{label}: has no safetensors files to read layers from one at a time; use runtime.layers=host")

    def read(self, names: list[str], optional: Collection[str] = ()) -> dict[str, Tensor]:
        """Name -> tensor for the model's parameters `names`; only those in `optional` may be absent from the files."""
        wanted = [name for name in names if name in self.places]
        if missing := set(names) - set(wanted) - set(optional):
            raise ValueError(f"{self.label}: its safetensors lack {min(missing)}; use runtime.layers=host")
        tensors: dict[str, Tensor] = {}
        for path in {self.places[name][0] for name in wanted}:
            with safe_open(path, "pt") as file:
                for name in wanted:
                    place, key = self.places[name]
                    if place == path:
                        tensor = file.get_tensor(key)
                        tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensors


def save_atomically(state: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file by rename. Raises OSError, also for the library's own I/O errors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        save_file(state, temporary, metadata=LOADED_BY_TRANSFORMERS)
        temporary.chmod(mode)  # the library makes files that nobody else may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:
        full = "No space left" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
