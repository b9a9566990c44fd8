"""The weights of a checkpoint: what its headers say of them, read tensor by tensor; and files written as a whole or not at all.

Names, shapes and dtypes are what transformers' loader makes of the same files.
"""

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from nnprune.model.conversions import Conversion, plan_loading

LOADED_BY_TRANSFORMERS = {"format": "pt"}

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the dtypes of weights that are what they seem."""

INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}

PACKED = re.compile("qweight|qzeros|packed|scale|absmax|quant|SCB|blocks|code")
"""What the parts of a quantised weight are called."""

QUANTISED = "is quantised, and only dense weights can be pruned; choose the checkpoint that it was made of"


class Header(NamedTuple):
    """Of a tensor in a file; `dtype` is safetensors' name for it."""

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


class Checkpoint:
    """Weights in files, by the names that the model has for them. Nothing but headers is read until a tensor is asked for.

    Args:
        paths: the files, all .safetensors, or all .bin; of a name that is in two of them the last one counts.
        model: tells, by its state dict, what the weights are called; transformers' own rules rename those of the files.
        label: the config key and value, for error messages.
    """

    def __init__(self, paths: Sequence[Path], model: PreTrainedModel, label: str) -> None:
        self.label = label
        self._model = model
        self._state = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        self.headers = {header.key: header for path in paths for header in read_headers(path, label)}
        names, self._conversions = plan_loading(model, {key: header.shape for key, header in self.headers.items()})
        self.places = {name: self.headers[key] for key, name in names.items()}
        self.conversions = {name: one for one in self._conversions.values() for name in one.shapes}
        self._names = names
        self._open: tuple[Path, dict[str, Tensor]] | None = None  # the .bin file that was read last

    def check(self) -> None:
        """Raise ValueError when these are no dense weights, or not this model's."""
        for name, header in self.places.items():
            if name not in self._state:
                continue
            dtype, shape = self._state[name]
            if dtype.is_floating_point and header.dtype not in FLOATS:
                raise ValueError(f"{self.label}: {header.key} is of {header.dtype}: the checkpoint {QUANTISED}")
            if header.shape != shape:
                raise ValueError(
                    f"{self.label}: {header.key} is {header.shape} in {header.path.name}, and config.json asks for {shape}; "
                    "they are of different models, get both again"
                )
        for name, conversion in self.conversions.items():
            if name in self._state and conversion.shapes[name] != self._state[name][1]:
                raise ValueError(
                    f"{self.label}: {min(conversion.patterns)} and others make {name} of {conversion.shapes[name]}, and config.json "
                    f"asks for {self._state[name][1]}; they are of different models, get both again"
                )
        if missing := sorted(self.missing(list(self._state))):
            module = missing[0].rpartition(".")[0] + "."
            others = [name.removeprefix(module) for name in self.places if name.startswith(module) and name not in self._state]
            if any(PACKED.search(name) for name in others):
                raise ValueError(f"{self.label}: {module}{others[0]} stands for {missing[0]}: the checkpoint {QUANTISED}")
            raise ValueError(f"{self.label}: the checkpoint lacks {missing[0]}; is it complete?")

    def missing(self, names: Sequence[str]) -> set[str]:
        """Those of the model's `names` that neither the files hold nor a weight that is tied to it stands for."""
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        absent = {name for name in names if name not in self and not any(re.search(rule, name) for rule in ignored)}
        tied: dict[str, set[str]] = {}
        for target, source in self._model.all_tied_weights_keys.items():
            tied.setdefault(source, {source}).add(target)
        for group in tied.values():
            if any(name in self for name in group):
                absent -= group
        return absent

    def can_read(self) -> bool:
        """Whether `read` gives every weight, some for those that they are tied to."""
        absent = [name for name in self._state if name not in self]
        return all(map(self._stand_in, absent)) and not self.missing(absent)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Name -> tensor, in the model's dtype, for the model's parameters `names`."""
        held = {name: name if name in self else self._stand_in(name) for name in names}
        if missing := [name for name, stored in held.items() if stored is None]:
            raise ValueError(f"{self.label}: its safetensors lack {min(missing)}; use runtime.layers=host")
        conversions = {id(one): one for name in held.values() if (one := self.conversions.get(name))}.values()
        keys = {name: self.places[name].key for name in held.values() if name in self.places}
        found = self._get([*keys.values(), *(key for one in conversions for key in one.patterns)])
        tensors = {name: found.pop(key) for name, key in keys.items()}
        for conversion in conversions:
            tensors |= conversion.apply({key: found.pop(key) for key in conversion.patterns})
        return {name: tensors[stored].to(self._state[name][0]) for name, stored in held.items()}

    def _stand_in(self, name: str) -> str | None:
        """A weight that the files hold and that `name`, which they lack, is tied to."""
        tied = self._model.all_tied_weights_keys
        source = tied.get(name, name)
        return next((one for one in (source, *(key for key, value in tied.items() if value == source)) if one in self), None)

    def weights_of(self, key: str) -> set[str]:
        """The names of the weights that a tensor of the files is, or that are made of it."""
        return {self._names[key]} if key in self._names else set(self._conversions[key].shapes)

    def conversion_of(self, key: str) -> Conversion | None:
        """What makes weights of a tensor of the files and others; None: it is a weight as it is."""
        return self._conversions.get(key)

    def __contains__(self, name: str) -> bool:
        """Whether the files hold a weight of this name, as it is or in parts."""
        return name in self.places or name in self.conversions

    def _get(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Key -> tensor, as stored in safetensors."""
        tensors: dict[str, Tensor] = {}
        for path in {self.headers[key].path for key in keys}:
            with safe_open(path, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in keys if self.headers[key].path == path}
        return tensors

    def tensor(self, header: Header) -> Tensor:
        """A tensor as it is stored. Those of safetensors are mapped: they take memory while they are used."""
        if header.path.suffix == ".safetensors":
            with safe_open(header.path, "pt") as file:
                return file.get_tensor(header.key)
        if self._open is None or self._open[0] != header.path:
            self._open = header.path, _load_bin(header.path, "cpu")
        return self._open[1][header.key].detach()

    def load_embeddings_and_head(self, names: Sequence[str]) -> None:
        """Give the model the weights `names`, all those outside its decoder layers, and tie what transformers ties: a head
        of its own stays, and of two tied weights the one that is stored counts for both."""
        absent = {name for name in names if name not in self}
        if missing := self.missing(names):
            raise ValueError(f"{self.label}: its safetensors lack {min(missing)}; use runtime.layers=host")
        self._model.load_state_dict(self.read([name for name in names if name not in absent]), strict=False, assign=True)
        self._model.tie_weights(missing_keys=absent, recompute_mapping=False)
        state = self._model.state_dict()
        if empty := sorted(name for name in names if state[name].is_meta):
            raise ValueError(f"{self.label}: its safetensors lack {empty[0]}; use runtime.layers=host")


def read_headers(path: Path, label: str) -> list[Header]:
    """What a file holds. Raises ValueError when it is damaged."""
    try:
        if path.suffix != ".safetensors":
            return _headers_of_bin(path)
        with safe_open(path, "pt"):  # refuses what is cut
            pass
        with path.open("rb") as file:
            told = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        told.pop("__metadata__", None)
        sizes = {key: one["data_offsets"][1] - one["data_offsets"][0] for key, one in told.items()}
        return [Header(path, key, one["dtype"], tuple(one["shape"]), sizes[key]) for key, one in told.items()]
    except MemoryError:
        raise
    except Exception as error:  # torch.load has no end of them
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{label}: {path.name} cannot be read ({reason}); get it again") from error


def first_float(path: Path, label: str) -> torch.dtype:
    """The dtype of the first floating-point tensor in a file; float32 if it has none. Raises ValueError when it is damaged."""
    return next((FLOATS[header.dtype] for header in read_headers(path, label) if header.dtype in FLOATS), torch.float32)


def _headers_of_bin(path: Path) -> list[Header]:
    names = {dtype: name for name, dtype in (FLOATS | INTEGERS).items()}
    tensors = _load_bin(path, "meta").items()
    return [Header(path, key, names.get(one.dtype, str(one.dtype)), tuple(one.shape), one.nbytes) for key, one in tensors]


def _load_bin(path: Path, device: str) -> dict[str, Tensor]:
    options: dict[str, Any] = {"map_location": device, "weights_only": True}
    try:
        state = torch.load(path, mmap=True, **options)
    except RuntimeError:  # files of before torch 1.6 can't be mapped
        state = torch.load(path, **options)
    return {key: tensor for key, tensor in state.items() if isinstance(tensor, Tensor)}


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
