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
from nnprune.model.checkpoint import FLOATS, LOADED_BY_TRANSFORMERS, Checkpoint, Header, read_headers, save_atomically
from nnprune.model.conversions import Conversion
from nnprune.model.dtypes import name_of
from nnprune.model.loading import ModelSource
from nnprune.model.model_files import SAFETENSORS, SAFETENSORS_INDEX, read_json
from nnprune.model.scales import SCALES
from nnprune.records import RunRecord, write_atomically

SUMMARY = "pruning.json"
"""The record of a saved model, and where its base model is."""

MAX_SHARD_BYTES = 5 * 10**9


def save_model(
    source: ModelSource,
    model: PreTrainedModel,
    layers: Sequence[Path],
    record: RunRecord,
    target: Path,
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, configuration, tokenizer, model card and record to `target`, which appears only when complete.

    Args:
        source: the base model.
        model: tells what the weights are called in memory; its own are not read.
        layers: the files of pruned decoder layers, with the names in memory.
        record: as far as it is known.
        scales: what `scales_of` found, to be written beside the weights.

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
        tensors = _Tensors(checkpoint, layers, summary)
        unfinished.mkdir(parents=True)
        _write_weights(tensors, unfinished)
        for path in source.files.companions():
            copy = unfinished / path.relative_to(source.files.folder)
            copy.parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(path, copy)
        _adapt_config(unfinished / "config.json", source)
        if scales:
            save_atomically(dict(scales), unfinished / SCALES)
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
    write_card(folder, summary)


def write_card(folder: Path, summary: Mapping[str, Any], place: str = "DIR") -> None:
    """Write the model card of a saved model, to be loaded from `place`."""
    architectures = read_json(folder / "config.json", f"{folder}").get("architectures") or ()
    write_atomically(folder / "README.md", model_card(summary, architectures, place))


def weight_of(linear: Mapping[str, Any]) -> str:
    """The name in memory of the tensor that holds the weight of a linear of a record: of an expert, that of all experts."""
    return linear.get("tensor", f"{linear['name']}.weight")


def check_names(checkpoint: Checkpoint, weights: Iterable[str]) -> None:
    """Raise ValueError if one of the `weights`, by its full name, can't be saved as what it is in the checkpoint."""
    for weight in weights:
        conversion = checkpoint.conversions.get(weight)
        if not (weight in checkpoint.places or (conversion and conversion.can_revert())):
            raise ValueError(
                f"save=true: transformers computes {weight} from other tensors of {checkpoint.label}, and it can't be saved under "
                "their names; run without save=true"
            )


def changed_names(names: Iterable[str], summary: Mapping[str, Any]) -> set[str]:
    """Of the `names` in memory of tensors of decoder layers, those that the run may have changed: pruned weights and biases that were
    corrected, or all if the layers were tuned."""
    pruned = {weight_of(linear) for linear in summary["per_linear"] if linear["pattern"] != "dense"}
    pruned |= {f"{linear['name']}.bias" for linear in summary["per_linear"] if "bias_change" in linear}
    return {name for name in names if summary["recovered"] or name in pruned}


class _Tensors:
    """The tensors to be saved, by their keys in the base checkpoint.

    A changed tensor gets a dtype that holds the values of both its base's and its own. Those that transformers makes weights of are
    taken from these weights again.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Sequence[Path], summary: Mapping[str, Any]) -> None:
        check_names(checkpoint, {weight_of(linear) for linear in summary["per_linear"]})
        self.checkpoint = checkpoint
        self._pruned = {header.key: header for path in layers for header in read_headers(path, "outputs")}
        self._changed = changed_names(self._pruned, summary)
        self._apart: dict[str, dict[str, Tensor]] = {}  # first weight -> key -> tensor, of one layer
        self._layer: Path | None = None
        self.headers = {key: self._header(key) for key in checkpoint.headers}

    def _header(self, key: str) -> Header:
        """Of the tensor as it is to be saved."""
        base = self.checkpoint.headers[key]
        changed = self.checkpoint.weights_of(key) & self._changed
        if not changed or base.dtype not in FLOATS:
            return base
        own = self._pruned[min(changed)]
        both = torch.promote_types(FLOATS[base.dtype], FLOATS[own.dtype])
        dtype = next(known for known, one in FLOATS.items() if one == both)
        return Header(own.path, key, dtype, base.shape, math.prod(base.shape) * both.itemsize)

    def get(self, key: str) -> Tensor:
        """The tensor in the dtype of its header."""
        base, header = self.checkpoint.headers[key], self.headers[key]
        if header is base:
            tensor = self.checkpoint.tensor(base)
        elif (conversion := self.checkpoint.conversion_of(key)) is None:
            (name,) = self.checkpoint.weights_of(key)
            tensor = self.checkpoint.tensor(self._pruned[name])
        else:
            tensor = self._taken_apart(conversion, header.path)[key]
        return tensor.to(FLOATS.get(header.dtype, tensor.dtype)).contiguous()

    def _taken_apart(self, conversion: Conversion, layer: Path) -> dict[str, Tensor]:
        if layer != self._layer:
            self._layer, self._apart = layer, {}
        if conversion.name not in self._apart:
            weights = {name: self.checkpoint.tensor(self._pruned[name]) for name in conversion.shapes}
            tensors = conversion.revert(weights)
            again = conversion.apply(tensors)
            if not all(torch.equal(again[name], weight) for name, weight in weights.items()):
                raise ValueError(
                    f"save=true: {conversion.name} can't be taken apart as transformers makes it; run without save=true"
                )
            self._apart[conversion.name] = tensors
        return self._apart[conversion.name]


def _write_weights(tensors: _Tensors, folder: Path) -> None:
    """Write shards of at most `MAX_SHARD_BYTES`, or of one tensor, and their index, which a single file has too for whoever reads it."""
    shards: list[list[str]] = []
    room = 0
    for key, header in tensors.headers.items():
        if not shards or header.num_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(key)
        room -= header.num_bytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(names) == 1:
        names = [SAFETENSORS]
    for name, keys in zip(names, shards, strict=True):
        _write_shard(tensors, keys, folder / name)
    total_size = sum(header.num_bytes for header in tensors.headers.values())
    weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(tensors: _Tensors, keys: Sequence[str], path: Path) -> None:
    """Write a safetensors file a tensor at a time: the library's `save_file` wants them all in memory, or mapped, at once."""
    headers = tensors.headers
    order = sorted(keys, key=lambda key: -headers[key].num_bytes // max(math.prod(headers[key].shape), 1))  # for alignment
    told: dict[str, Any] = {"__metadata__": LOADED_BY_TRANSFORMERS}
    end = 0
    for key in order:
        start, end = end, end + headers[key].num_bytes
        told[key] = {"dtype": headers[key].dtype, "shape": list(headers[key].shape), "data_offsets": [start, end]}
    header = json.dumps(told).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for key in order:
            file.write(memoryview(tensors.get(key).reshape(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    read_headers(path, "save=true")  # raises if the library does not accept it


def _adapt_config(path: Path, source: ModelSource) -> None:
    """Let config.json name the dtype that was asked for, or that was found where it named none, and no file of weights; otherwise it
    stays as it is."""
    config = read_json(path, source.label)
    adapted = {key: value for key, value in config.items() if key != "transformers_weights"}
    if source.dtype != "auto" or source.named_dtype is None:
        adapted["torch_dtype" if "torch_dtype" in config else "dtype"] = name_of(source.stored_dtype)
    if adapted != config:
        path.write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")
