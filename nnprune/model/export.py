"""Writes a pruned model as an ordinary Hugging Face directory, one decoder layer at a time.

Zeros are stored dense and the configuration does not mention sparsity, so whatever loads the dense model loads this one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor

from nnprune.model.checkpoint import save_atomically
from nnprune.model.decoder import Decoder
from nnprune.records import write_atomically


class Layers(Protocol):
    """The decoder layers of a pruned model, as the engine keeps them."""

    decoder: Decoder

    def file_of(self, index: int) -> Path | None:
        """The safetensors file of a pruned layer, with full names; None if the layer was not pruned."""

    def read_dense(self, index: int) -> dict[str, Tensor]:
        """Full name -> tensor of a layer that was not pruned."""

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, by its full name in the model, in its stored dtype."""


def save_model(layers: Layers, tokenizer: Any, generation_config: Any, summary: dict[str, Any], target: Path) -> None:
    """Write model, tokenizer and `pruning.json` (the `summary`) to `target`, which appears only when complete.

    `generation_config` is the dense model's, if it has one. The first shard holds embeddings and head; each other one is a decoder
    layer, linked from its layer file if possible. Raises OSError if the folder cannot be written.
    """
    decoder = layers.decoder
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_files = 1 + len(decoder.layers)
    names = [f"model-{number:05d}-of-{num_files:05d}.safetensors" for number in range(1, num_files + 1)]
    save_atomically(_embeddings_and_head(layers), unfinished / names[0])
    for index, name in enumerate(names[1:]):
        if (source := layers.file_of(index)) is not None:
            _link_or_copy(source, unfinished / name)
        else:
            save_atomically(layers.read_dense(index), unfinished / name)
    write_atomically(unfinished / "model.safetensors.index.json", json.dumps(_index(unfinished, names), indent=1) + "\n")
    decoder.model.config.save_pretrained(unfinished)
    if generation_config is not None:
        generation_config.to_json_file(
            unfinished / "generation_config.json"
        )  # as it is: save_pretrained validates it and may raise
    tokenizer.save_pretrained(unfinished)
    write_atomically(unfinished / "pruning.json", json.dumps(summary, indent=1) + "\n")
    if target.exists():
        shutil.rmtree(target)
    unfinished.replace(target)


def _index(folder: Path, names: list[str]) -> dict[str, Any]:
    """The index of a sharded checkpoint."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for name in names:
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                weight_map[key] = name
                total_size += file.get_tensor(key).nbytes
    return {"metadata": {"total_size": total_size}, "weight_map": weight_map}


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _embeddings_and_head(layers: Layers) -> dict[str, Tensor]:
    """All weights outside the decoder layers; tied ones under one name only."""
    decoder = layers.decoder
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in decoder.model.state_dict().items():
        if not name.startswith(f"{decoder.path}.") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = layers.as_stored(name, tensor)
    return state
