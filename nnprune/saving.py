"""Writes a pruned model as an ordinary Hugging Face directory, a decoder layer at a time.

Zeros are stored dense and the configuration says nothing of sparsity: whatever loads the dense model loads this one.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from nnprune.layerstore import LayerStore, save_atomically
from nnprune.records import write_atomically

LOADED_BY_TRANSFORMERS = {"format": "pt"}


def save_model(store: LayerStore, tokenizer: Any, generation_config: Any, summary: dict[str, Any], target: Path) -> None:
    """Write model, tokenizer and `pruning.json` (the `summary`) to `target`, which appears only once it is whole.

    `generation_config` is the dense model's, or None where it has none.

    Shards are the shell and one a decoder layer, so that no more than one layer is in memory for it. Raises OSError when
    the folder cannot be written.
    """
    decoder = store.decoder
    model = decoder.model
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_shards = 1 + len(decoder.layers)
    weight_map: dict[str, str] = {}
    size = 0

    def write_shard(number: int, state: dict[str, Tensor]) -> int:
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_atomically(state, unfinished / file, LOADED_BY_TRANSFORMERS)
        weight_map.update(dict.fromkeys(state, file))
        return sum(tensor.nbytes for tensor in state.values())

    size += write_shard(1, _shell_state(store))
    for index in range(len(decoder.layers)):
        layer = store.fetch(index)
        prefix = f"{decoder.path}.{index}."
        state = {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
        size += write_shard(2 + index, state)
        store.release(index)
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


def _shell_state(store: LayerStore) -> dict[str, Tensor]:
    """All weights outside the decoder layers, each tied one under one name only."""
    decoder = store.decoder
    seen: set[int] = set()
    state: dict[str, Tensor] = {}
    for name, tensor in decoder.model.state_dict().items():
        if not name.startswith(f"{decoder.path}.") and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            state[name] = tensor.detach().cpu().contiguous()
    return state
