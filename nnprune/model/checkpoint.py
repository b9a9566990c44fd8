"""The weights of a checkpoint, read from its safetensors files tensor by tensor."""

from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key


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
