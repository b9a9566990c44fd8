"""Model and tokenizer from a hub id, a local directory or the embedded demo.

Everything that can be known without weights (configuration, tokenizer, shapes of linears) is checked before they are read.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nnprune.files.hub import Repository
from nnprune.model.checkpoint import QUANTISED, Checkpoint, first_float
from nnprune.model.decoder import Decoder
from nnprune.model.dtypes import DTYPES, choose_computing_dtype
from nnprune.model.model_files import ModelFiles, read_json
from nnprune.model.skeleton import keep_float32, parameters_on_meta, recompute_buffers
from nnprune.texts import DEMO_FOLDER

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText)
"""What loads a text decoder alone, or within a model that also sees images."""


def quieten_transformers() -> None:
    """Leave the screen to our own log."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@dataclass
class ModelSource:
    """Where a model comes from. Raises ValueError for no path, an unknown dtype, or a local path that is no directory.

    The model is loaded, computed and saved in `dtype`, bfloat16, float16 or float32. auto: the checkpoint's dtype is stored and saved,
    and computes where the hardware has units for it, else float32.
    """

    path: str  # a hub id, a local directory, or "demo"
    name: str | None = None  # in folders and tables; None: the last part of `path`
    dtype: str = "auto"
    revision: str | None = None  # branch, tag or commit on the hub
    layers_path: str | None = None  # the module that lists the decoder layers, where it cannot be found without help
    trust_remote_code: bool = False  # whether Python code that comes with the model may run
    directory: Path | None = field(init=False, default=None)
    _is_checked: bool = field(init=False, default=False, repr=False, compare=False)  # whether the weights fit

    def __post_init__(self) -> None:
        if self.path is None:
            raise ValueError("model.path=null: has no value; add model.path=DIR, or a hub id, to the command line")
        self.path = str(self.path)  # the command line makes numbers of some names
        self.label = f"model.path={self.path}"
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"model.dtype={self.dtype}: must be auto, {', '.join(DTYPES)}")
        if not isinstance(self.trust_remote_code, bool):
            raise ValueError(f"model.trust_remote_code={self.trust_remote_code}: must be true or false")
        self.revision = None if self.revision is None else str(self.revision)
        local = DEMO_FOLDER if self.path == "demo" else Path(self.path).expanduser()
        self.name = str(self.name or Path(self.path).expanduser().resolve().name)
        if local.is_dir():
            self.directory = local
            if not (local / "config.json").is_file():
                raise ValueError(f"{self.label}: has no config.json; give a directory made by save_pretrained")
            if self.revision is not None:
                raise ValueError(f"model.revision={self.revision}: {self.path} is a local directory; leave model.revision out")
        elif not re.fullmatch(r"[\w.-]*\w(/[\w.-]+)?", self.path):
            raise ValueError(f"{self.label}: no such directory; give a directory or a hub id like facebook/opt-125m")

    @cached_property
    def files(self) -> ModelFiles:
        """Where configuration, tokenizer and weights lie."""
        repository = None if self.directory else Repository("model.path", self.path, "model", self.revision)
        return ModelFiles(self.label, self.directory, repository, self.trust_remote_code)

    @property
    def origin(self) -> str:
        """Where it comes from, whatever the current folder: a hub id, the full path of a local directory, or "demo"."""
        return self.path if self.path == "demo" or not self.directory else str(self.directory.resolve())

    @property
    def commit(self) -> str | None:
        """The model's commit on the hub, asked for once a process; None for a local one. Raises ValueError when it can't be had."""
        return self.files.repository.commit() if self.files.repository else None

    def digest(self) -> str | None:
        """A short hash of all bytes of a local model's configuration, tokenizer and weights; None on the hub, which has `commit`."""
        return self.files.digest() if self.directory else None

    def config(self) -> Any:
        """The model's configuration, a fresh copy. Raises ValueError when it cannot be had or is no causal language model's."""
        return copy.deepcopy(self._config)

    @cached_property
    def _config(self) -> Any:
        folder = self.files.folder
        if not (folder / "config.json").is_file():
            raise ValueError(f"{self.label}: has no config.json; choose a model in Hugging Face's format")
        self._refuse_quantised(read_json(folder / "config.json", self.label))
        with self._explained():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
        is_known = _auto_class(config) is not None
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            if not is_known and not self.trust_remote_code:
                raise ValueError(self._needs_code)
            is_known = True
        if getattr(config, "is_encoder_decoder", False) or not is_known:
            kind = ", ".join(config.architectures or []) or config.model_type
            raise ValueError(f"{self.label}: {kind} is no causal language model; choose a decoder-only model")
        return config

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ValueError when it has no tokens, or gives ids that the model has no embeddings for."""
        with self._explained():
            tokenizer = AutoTokenizer.from_pretrained(self.files.folder, trust_remote_code=self.trust_remote_code)
        size = getattr(self._config.get_text_config(), "vocab_size", None)
        # A special token beyond the embeddings, for padding say, does no harm until it is put in.
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        ids = [index for index in tokenizer.get_vocab().values() if index not in special]
        if not ids:
            raise ValueError(f"{self.label}: has no tokenizer, or one without tokens; get its tokenizer files too")
        highest = max([*ids, *tokenizer("a").input_ids])
        if size and highest >= size:
            raise ValueError(
                f"{self.label}: its tokenizer gives ids up to {highest}, and config.json says vocab_size={size}; get the "
                "tokenizer that the model was trained with"
            )
        return tokenizer

    @cached_property
    def has_biases(self) -> bool:
        """Whether a linear of the decoder layers has a bias. Raises ValueError when the configuration is none of a language model."""
        decoder = Decoder(self.skeleton(self.config()), self.layers_path)
        views = (view for index in range(len(decoder.layers)) for view in decoder.all_weights(index).values())
        return any(view.bias is not None for view in views)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype that weights are kept, and saved, in."""
        return DTYPES.get(self.dtype) or self.named_dtype or self._dtype_of_weights

    @property
    def named_dtype(self) -> torch.dtype | None:
        """The dtype that config.json names, if it does."""
        return self._config.dtype or self._config.get_text_config().dtype

    @cached_property
    def _dtype_of_weights(self) -> torch.dtype:
        """What transformers takes where config.json names no dtype, but no float64. The weights of the hub are fetched."""
        found = first_float(self.files.weights()[0], self.label)
        return found if found in DTYPES.values() else torch.float32

    def computing_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that `device` computes in."""
        return DTYPES.get(self.dtype) or choose_computing_dtype(self.stored_dtype, device)

    def skeleton(self, config: Any) -> PreTrainedModel:
        """The model with its parameters on the meta device and its buffers real: shapes without weights."""
        with parameters_on_meta():
            model = self.random(config)
        recompute_buffers(model)
        keep_float32(model)
        if not self._is_checked and self.files.are_weights_here():
            self.check(model)
        return model

    def check(self, model: PreTrainedModel, layers: str = "host") -> None:
        """Raise ValueError when the weights are not those of `model`, a skeleton, or can't be read as `layers` says: host, device
        or disk. Reads headers; weights that would have to be fetched are looked at once they are there."""
        if layers == "disk" and not self.files.is_safetensors:
            raise ValueError(
                f"runtime.layers=disk: {self.path} has its weights in {self.files.chosen}, which can't be read layer by layer; "
                "use runtime.layers=host, or save the model as safetensors first"
            )
        if not self._is_checked and self.files.are_weights_here():
            Checkpoint(self.files.weights(), model, self.label).check()
            self._is_checked = True

    def random(self, config: Any, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """A model of this configuration in host memory, with random weights, in `dtype` or else the stored one."""
        options = {"attn_implementation": _attention(config), "trust_remote_code": self.trust_remote_code}
        with self._explained():
            return self._auto_class.from_config(config, dtype=dtype or self.stored_dtype, **options).eval()

    def load(self, config: Any) -> PreTrainedModel:
        """The whole model in host memory. Raises ValueError when the checkpoint lacks weights."""
        self.files.weights()  # those of the hub are fetched
        if not self._is_checked:
            self.skeleton(config)
        with self._explained():
            model, info = self._auto_class.from_pretrained(
                self.files.folder,
                config=config,
                dtype=self.stored_dtype,
                attn_implementation=_attention(config),
                trust_remote_code=self.trust_remote_code,
                use_safetensors=self.files.is_safetensors,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise ValueError(f"{self.label}: the checkpoint lacks {min(info['missing_keys'])}; is it complete?")
        return model.eval()

    def checkpoint(self, model: PreTrainedModel) -> Checkpoint:
        """The model's safetensors files, for reading a layer at a time."""
        self.check(model, "disk")
        paths = self.files.weights()
        self.check(model)  # those of the hub are here now
        return Checkpoint(paths, model, self.label)

    @property
    def _auto_class(self) -> type[Any]:
        return _auto_class(self._config) or AutoModelForCausalLM  # what comes with code of its own says so

    def _refuse_quantised(self, config: dict[str, Any]) -> None:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            for key in ("quantization_config", "compression_config"):
                if method := part.get(key):
                    method = method.get("quant_method", key) if isinstance(method, dict) else key
                    raise ValueError(f"{self.label}: {key} in config.json says {method}: the checkpoint {QUANTISED}")

    @property
    def _needs_code(self) -> str:
        return (
            f"{self.label}: comes with Python code of its own, which runs only if you say so; read the code, then set "
            "model.trust_remote_code=true (nnprune-check: --trust-remote-code), or choose a model that transformers knows"
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what transformers raises, of whatever kind, into one line with the remedy."""
        try:
            yield
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise ValueError(self._needs_code) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            remedy = "get it again, or choose another model" if self.directory else "choose another model or revision"
            raise ValueError(f"{self.label}: cannot be loaded ({reason[:300]}); {remedy}") from error


def _auto_class(config: Any) -> type[Any] | None:
    """Which of transformers' classes loads the architecture that a configuration names, or any that it knows if it names none; None:
    it is no language model's."""
    known = {auto: auto._model_mapping[type(config)] for auto in AUTO_CLASSES if type(config) in auto._model_mapping}
    named = set(config.architectures or [])
    exact = [auto for auto, model in known.items() if getattr(model, "__name__", None) in named]
    if named and not exact and not any(named & set(auto._model_mapping._model_mapping.values()) for auto in AUTO_CLASSES):
        return None
    return next(iter([*exact, *known]), None)


def _attention(config: Any) -> str | None:
    """None: "sdpa" where the model supports it, else "eager", as transformers chooses, whatever the configuration names."""
    return "eager" if config.output_attentions else None  # a configuration that asks for weights can't be saved with another
