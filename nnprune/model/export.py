"""Writes a pruned model as an ordinary Hugging Face directory: the base checkpoint with the pruned tensors replaced.

Names, files and settings are those of the base checkpoint and zeros are stored dense, so whatever loads the base loads this one.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nnprune.model.card import model_card
from nnprune.model.checkpoint import FLOATS, LOADED_BY_TRANSFORMERS, Checkpoint, read_headers
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
        places = _places(checkpoint, model, layers, summary)
        unfinished.mkdir(parents=True)
        _write_weights(places, unfinished)
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


def check_names(checkpoint: Checkpoint, model: PreTrainedModel, tensors: Iterable[str]) -> None:
    """Raise ValueError if one of the `tensors`, by its name in the model, is neither in the checkpoint nor can be turned into what
    it was made of."""
    for name in tensors:
        if name in checkpoint.places:
            continue
        try:
            conversion = checkpoint.made[name]
            conversion.unmake(model, {one: model.get_parameter(one).to("meta") for one in conversion.names})
        except Exception as error:  # whatever a rule of transformers meets
            raise ValueError(
                f"save=true: transformers makes {name} of other tensors of {checkpoint.label}, and it can't be saved under "
                f"their names ({error}); run without save=true"
            ) from error


def changed_names(names: Iterable[str], summary: Mapping[str, Any]) -> set[str]:
    """Of the `names` in memory of tensors of decoder layers, those that the run may have changed: pruned weights, or all if the layers
    were tuned."""
    pruned = {tensor_of(linear) for linear in summary["per_linear"]}
    return {name for name in names if summary["recovered"] or name in pruned}


def tensor_of(linear: Mapping[str, Any]) -> str:
    """The name in memory of the tensor that holds the weight of a linear of a record."""
    return linear.get("tensor", f"{linear['name']}.weight")


class Source(NamedTuple):
    """What is saved under a key: of which dtype (safetensors' name), shape and size, and where the values come from."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], Tensor]


def _places(
    checkpoint: Checkpoint, model: PreTrainedModel, layers: Sequence[Path], summary: Mapping[str, Any]
) -> dict[str, Source]:
    """Key of the base checkpoint -> the tensor to be saved under it.

    A changed tensor gets a dtype that holds the values of both its base's and its own.
    """
    pruned = {header.key: header for path in layers for header in read_headers(path, "outputs")}
    changed = changed_names(pruned, summary)
    check_names(checkpoint, model, {tensor_of(linear) for linear in summary["per_linear"]})
    conversions = {key: one for one in checkpoint.made.values() for key, _ in one.sources}

    @lru_cache(maxsize=4)  # the tensors made together are often, but not always, neighbours
    def unmade(target: str) -> dict[str, Tensor]:
        conversion = checkpoint.made[target]
        return conversion.unmake(model, {name: checkpoint.tensor(pruned[name]) for name in conversion.names})

    places = {}
    for key, header in checkpoint.headers.items():
        names = conversions[key].names if key in conversions else [checkpoint.names.get(key, key)]
        read = partial(checkpoint.tensor, header)
        dtype, num_bytes = header.dtype, header.num_bytes
        if changed & set(names) and dtype in FLOATS:
            read = partial(checkpoint.tensor, pruned[names[0]])
            if key in conversions:
                read = partial(lambda key, target: unmade(target)[key], key, conversions[key].target)
            both = torch.promote_types(FLOATS[dtype], FLOATS[pruned[names[0]].dtype])
            dtype = next(known for known, one in FLOATS.items() if one == both)
            num_bytes = math.prod(header.shape) * both.itemsize
        places[key] = Source(dtype, header.shape, num_bytes, read)
    return places


def _write_weights(places: dict[str, Source], folder: Path) -> None:
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
        _write_shard({key: places[key] for key in keys}, folder / name)
    total_size = sum(header.num_bytes for header in places.values())
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(places: dict[str, Source], path: Path) -> None:
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
            file.write(_bytes(places[key]))
        file.flush()
        os.fsync(file.fileno())
    read_headers(path, "save=true")  # raises if the library does not accept it


def _bytes(source: Source) -> memoryview:
    tensor = source.read()
    tensor = tensor.to(FLOATS.get(source.dtype, tensor.dtype)).contiguous()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _adapt_config(path: Path, source: ModelSource) -> None:
    """Let config.json name the dtype that was asked for, and no file of weights; otherwise it stays as it is."""
    config = read_json(path, source.label)
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if source.dtype != "auto":
        adapted["torch_dtype" if "torch_dtype" in config else "dtype"] = source.dtype
    if adapted != config:
        path.write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")
