"""Writes a pruned model as an ordinary Hugging Face directory, a decoder layer at a time.

Zeros are stored dense and the configuration says nothing of sparsity: whatever loads the dense model loads this one.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from nnprune.engine.layer_files import save_atomically
from nnprune.engine.layer_store import LayerStore
from nnprune.records import write_atomically


def save_model(store: LayerStore, tokenizer: Any, generation_config: Any, summary: dict[str, Any], target: Path) -> None:
    """Write model, tokenizer and `pruning.json` (the `summary`) to `target`, which appears only once it is whole.

    `generation_config` is the dense model's, or None where it has none.

    Shards are the shell and one a decoder layer: the files of finished layers, which are not written a second time.
    Raises OSError when the folder cannot be written.
    """
    decoder = store.decoder
    model = decoder.model
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    names = [
        f"model-{number + 1:05d}-of-{1 + len(decoder.layers):05d}.safetensors" for number in range(1 + len(decoder.layers))
    ]
    shell = _shell_state(store)
    save_atomically(shell, unfinished / names[0])
    weight_map = dict.fromkeys(shell, names[0])
    size = sum(tensor.nbytes for tensor in shell.values())
    for index, name in enumerate(names[1:]):
        if index in store.finished:
            _link_or_copy(store.finished.path(index), unfinished / name)
        else:
            save_atomically(store.finished.named(index, _fetched_state(store, index)), unfinished / name)
            store.release(index)
        with safe_open(unfinished / name, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
            size += sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    index_file = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomically(unfinished / "model.safetensors.index.json", json.dumps(index_file, indent=1) + "\n")
    model.config.save_pretrained(unfinished)
    if generation_config is not None:
        generation_config.to_json_file(unfinished / "generation_config.json")  # unlike save_pretrained, as it is
    tokenizer.save_pretrained(unfinished)
    write_atomically(unfinished / "pruning.json", json.dumps(summary, indent=1) + "\n")
    if target.exists():
        shutil.rmtree(target)
    unfinished.replace(target)


def _fetched_state(store: LayerStore, index: int) -> dict[str, Tensor]:
    """The tensors of decoder layer `index`, which is not pruned, by their names within it."""
    store.fetch(index)
    return store.stored_state(index)


def _link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a second file where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _shell_state(store: LayerStore) -> dict[str, Tensor]:
    """All weights outside the decoder layers, each tied one under one name only."""
    decoder = store.decoder
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in decoder.model.state_dict().items():
        if not name.startswith(f"{decoder.path}.") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = store.as_stored(name, tensor)
    return state
