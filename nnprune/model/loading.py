"""Model and tokenizer from a hub id, a local directory or the embedded demo.

Everything that can be known without weights (configuration, tokenizer, shapes of linears) is checked before they are read.
"""

import copy
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from nnprune.model.checkpoint import Checkpoint
from nnprune.model.dtypes import DTYPES, choose_computing_dtype
from nnprune.texts import DEMO_FOLDER

SMALL_FILES = ["config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"]
CHECKPOINT_FILES = ["*.safetensors", "*.safetensors.index.json"]


def quieten_transformers() -> None:
    """Leave the screen to our own log."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@dataclass
class ModelSource:
    """Where a model comes from.

    Args:
        path: a hub id, a local directory, or "demo".
        name: what the model is called in folders and tables; None: the last part of `path`.
        dtype: bfloat16, float16 or float32: what the model is loaded, computed and saved in. auto: the checkpoint's is stored
            and saved, and computes where the hardware has units for it, else float32.
        revision: branch, tag or commit on the hub.
        layers_path: the module that lists the decoder layers, where it cannot be found without help.

    Raises:
        ValueError: no path, an unknown dtype, or a local path that is no directory.
    """

    path: str
    name: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    layers_path: str | None = None
    directory: Path | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("model.path=null: has no value; add model.path=DIR, or a hub id, to the command line")
        self.path = str(self.path)  # the command line makes numbers of some names
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"model.dtype={self.dtype}: must be auto, {', '.join(DTYPES)}")
        local = DEMO_FOLDER if self.path == "demo" else Path(self.path).expanduser()
        self.name = str(self.name or Path(self.path).expanduser().resolve().name)
        if local.is_dir():
            self.directory = local
        elif not re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", self.path):
            raise ValueError(f"model.path={self.path}: no such directory; give a directory or a hub id like facebook/opt-125m")

    @property
    def _location(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.directory or self.path), "revision": self.revision}

    def config(self) -> Any:
        """The model's configuration, a fresh copy. Raises ValueError when it cannot be had or is no causal language model's."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> Any:
        if self.directory and not (self.directory / "config.json").is_file():
            raise ValueError(f"model.path={self.path}: has no config.json; give a directory made by save_pretrained")
        with self._explained():
            config = AutoConfig.from_pretrained(**self._location)
        known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        named = config.architectures or []
        is_known = type(config) in AutoModelForCausalLM._model_mapping and (not named or known & set(named))
        if config.is_encoder_decoder or not is_known:
            kind = ", ".join(named) or config.model_type
            raise ValueError(f"model.path={self.path}: {kind} is no causal language model; choose a decoder-only model")
        return config

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        with self._explained():
            return AutoTokenizer.from_pretrained(**self._location)

    def generation_config(self) -> GenerationConfig | None:
        """The model's settings for generating text, where it has any."""
        try:
            return GenerationConfig.from_pretrained(str(self.directory or self.path), revision=self.revision)
        except OSError:
            return None

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that weights are kept, and saved, in."""
        return DTYPES.get(self.dtype) or self._config.dtype or torch.float32

    def computing_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that `device` computes in."""
        return DTYPES.get(self.dtype) or choose_computing_dtype(self.stored_dtype, device)

    def skeleton(self, config: Any) -> PreTrainedModel:
        """The model with its parameters on the meta device and its buffers real: shapes without weights."""
        with _parameters_on_meta():
            return self.random(config)

    def random(self, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A model of this configuration in host memory, with random weights, in `dtype` or else the stored one."""
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype or self.stored_dtype, attn_implementation=_attention(config)
        ).eval()

    def load(self, config: Any) -> PreTrainedModel:
        """The whole model in host memory. Raises ValueError when the checkpoint lacks weights."""
        with self._explained():
            model, info = AutoModelForCausalLM.from_pretrained(
                **self._location,
                config=config,
                dtype=self.stored_dtype,
                attn_implementation=_attention(config),
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise ValueError(f"model.path={self.path}: the checkpoint lacks {min(info['missing_keys'])}; is it complete?")
        return model.eval()

    def checkpoint(self, model: PreTrainedModel) -> "Checkpoint":
        """The model's safetensors files, for reading a layer at a time."""
        folder = self.directory
        if folder is None:
            from huggingface_hub import snapshot_download

            with self._explained():
                folder = Path(snapshot_download(self.path, revision=self.revision, allow_patterns=CHECKPOINT_FILES))
        return Checkpoint(folder, model, f"model.path={self.path}")

    def digest(self) -> str | None:
        """A short hash of a local model's configuration, tokenizer and weights; None on the hub, where revisions tell.

        Each weight file counts by its size, its header and 64 slices of 4 KiB spread over it.
        """
        if self.directory is None:
            return None
        sha = hashlib.sha256()
        for path in sorted({path for pattern in SMALL_FILES for path in self.directory.glob(pattern) if path.is_file()}):
            sha.update(f"{path.name} {path.stat().st_size}".encode() + path.read_bytes())
        for path in sorted([*self.directory.glob("*.safetensors"), *self.directory.glob("*.bin")]):
            size = path.stat().st_size
            sha.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for step in range(64):
                    file.seek(size * step // 64)
                    sha.update(file.read(4096))
        return sha.hexdigest()[:16]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the hub and transformers raise into one line with the remedy."""
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            if self.directory:
                raise ValueError(f"model.path={self.path}: cannot be loaded ({reason}); give a model directory") from error
            raise ValueError(
                f"model.path={self.path}: no such directory, and the hub did not give it ({reason}); "
                "without a hub use model=local model.path=DIR"
            ) from error


def _attention(config: Any) -> str | None:
    """None: "sdpa" where the model supports it, else "eager", as transformers chooses, whatever the configuration names."""
    return "eager" if config.output_attentions else None  # a configuration that asks for weights can't be saved with another


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device; buffers, which no checkpoint may hold, stay real."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()
