"""Writes a pruned model as an ordinary Hugging Face directory: the base checkpoint with the pruned tensors replaced.

Names, files and settings are those of the base checkpoint and zeros are stored dense, so whatever loads the base loads this one.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nnprune.model.card import model_card
from nnprune.model.checkpoint import FLOATS, LOADED_BY_TRANSFORMERS, Checkpoint, Header, read_headers
from nnprune.model.loading import ModelSource
from nnprune.model.model_files import SAFETENSORS, SAFETENSORS_INDEX, read_json
from nnprune.records import RunRecord, write_atomically

SUMMARY = "pruning.json"
"""The record of a saved model, and where its base model is."""

MAX_SHARD_BYTES = 5 * 10**9


def save_model(source: ModelSource, model: PreTrainedModel, layers: Sequence[Path], record: RunRecord, target: Path) -> None:
    """Write weights, configuration, tokenizer, model card and record to `target`, which appears only when complete.

    Args:
        source: the base model.
        model: tells what the weights are called in memory; its own are not read.
        layers: the files of pruned decoder layers, with the names in memory.
        record: as far as it is known.

    Raises:
        OSError: the folder cannot be written.
        ValueError: the checkpoint does not hold the pruned weights as they are in memory.
    """
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    base = {"path": source.origin, "commit": source.commit, "digest": source.digest()}
    summary = {"base_model": base, **json.loads(record.as_json())}
    try:
        checkpoint = Checkpoint(source.files.weights(), model, source.label)
        places = _places(checkpoint, layers, summary)
        unfinished.mkdir(parents=True)
        _write_weights(checkpoint, places, unfinished)
        for path in source.files.companions():
            copy = unfinished / path.relative_to(source.files.folder)
            copy.parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(path, copy)
        _adapt_config(unfinished / "config.json", source)
        describe(unfinished, base, record)
        if target.exists():
            shutil.rmtree(target)
        unfinished.replace(target)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            error.errno,
            f"save=true: {target} cannot be written ({error.strerror or error}); make room or set outputs to another disk, then "
            "run again: finished layers are kept",
        ) from error


def describe(folder: Path, base: Mapping[str, Any], record: RunRecord) -> None:
    """Write `pruning.json` and the model card of a saved model; `base` is the entry base_model of the former."""
    summary = {"base_model": base, **json.loads(record.as_json())}
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    write_atomically(folder / "README.md", model_card(summary))


def check_names(checkpoint: Checkpoint, linears: Iterable[str]) -> None:
    """Raise ValueError if a linear's weight, by its full name, is not a tensor of the checkpoint that could be replaced."""
    for name in linears:
        if f"{name}.weight" not in checkpoint.places:
            raise ValueError(
                f"save=true: transformers computes {name} from other tensors of {checkpoint.label}, and it can't be saved under "
                "their names; run without save=true"
            )


def changed_names(names: Iterable[str], summary: Mapping[str, Any]) -> set[str]:
    """Of the `names` in memory of tensors of decoder layers, those that the run may have changed: pruned weights, or all if the layers
    were tuned."""
    pruned = {f"{linear['name']}.weight" for linear in summary["per_linear"] if linear["pattern"] != "dense"}
    return {name for name in names if summary["recovered"] or name in pruned}


def _places(checkpoint: Checkpoint, layers: Sequence[Path], summary: Mapping[str, Any]) -> dict[str, Header]:
    """Key of the base checkpoint -> the tensor to be saved under it.

    A changed tensor gets a dtype that holds the values of both its base's and its own.
    """
    pruned = {header.key: header for path in layers for header in read_headers(path, "outputs")}
    changed = changed_names(pruned, summary)
    check_names(checkpoint, [linear["name"] for linear in summary["per_linear"]])
    places = {}
    for key, header in checkpoint.headers.items():
        if (name := checkpoint.names[key]) in changed and header.dtype in FLOATS:
            both = torch.promote_types(FLOATS[header.dtype], FLOATS[pruned[name].dtype])
            dtype = next(known for known, one in FLOATS.items() if one == both)
            header = pruned[name]._replace(dtype=dtype, num_bytes=math.prod(header.shape) * both.itemsize)
        places[key] = header
    return places


def _write_weights(checkpoint: Checkpoint, places: dict[str, Header], folder: Path) -> None:
    """Write shards of at most `MAX_SHARD_BYTES`, or of one tensor, and their index, which a single file has too for whoever reads it."""
    shards: list[list[str]] = []
    room = 0
    for key, header in places.items():
        if not shards or header.num_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(key)
        room -= header.num_bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(names) == 1:
        names = [SAFETENSORS]
    for name, keys in zip(names, shards, strict=True):
        _write_shard(checkpoint, {key: places[key] for key in keys}, folder / name)
    total_size = sum(header.num_bytes for header in places.values())
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(checkpoint: Checkpoint, places: dict[str, Header], path: Path) -> None:
    """Write a safetensors file a tensor at a time: the library's `save_file` wants them all in memory, or mapped, at once."""
    order = sorted(places, key=lambda key: -places[key].num_bytes // max(math.prod(places[key].shape), 1))  # for alignment
    told: dict[str, Any] = {"__metadata__": LOADED_BY_TRANSFORMERS}
    end = 0
    for key in order:
        start, end = end, end + places[key].num_bytes
        told[key] = {"dtype": places[key].dtype, "shape": list(places[key].shape), "data_offsets": [start, end]}
    header = json.dumps(told).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in order:
            file.write(_bytes(checkpoint, places[key]))
        file.flush()
        os.fsync(file.fileno())
    read_headers(path, "save=true")  # raises if the library does not accept it


def _bytes(checkpoint: Checkpoint, header: Header) -> memoryview:
    tensor: Tensor = checkpoint.tensor(header)
    tensor = tensor.to(FLOATS.get(header.dtype, tensor.dtype)).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _adapt_config(path: Path, source: ModelSource) -> None:
    """Let config.json name the dtype that was asked for, and no file of weights; otherwise it stays as it is."""
    config = read_json(path, source.label)
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if source.dtype != "auto":
        adapted["torch_dtype" if "torch_dtype" in config else "dtype"] = source.dtype
    if adapted != config:
        path.write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")
