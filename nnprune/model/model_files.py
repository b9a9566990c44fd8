"""The files of a model, in a local directory or on the hub: configuration, tokenizer, and the weights that transformers chooses."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from nnprune.files.digests import file_digest
from nnprune.files.hub import Repository

SMALL_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "emoji.json"),
    *("processor_config.json", "*preprocessor_config.json"),
)
"""What is fetched before any weights."""

NOT_SCIENCE = ("generation_config.json", "chat_template*", "processor_config.json", "*preprocessor_config.json")
"""Those of them that no perplexity depends on."""

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What weights are looked for as, in transformers' order."""


@dataclass(frozen=True)
class ModelFiles:
    """Args:
    label: the config key and value, for error messages.
    directory: a local model, or None.
    repository: a model on the hub, or None.
    runs_code: whether Python files belong to the model.
    """

    label: str
    directory: Path | None
    repository: Repository | None
    runs_code: bool = False

    @cached_property
    def folder(self) -> Path:
        """A local folder with the configuration and the tokenizer in it, from which transformers loads."""
        if self.repository is None:
            return self.directory
        return self.repository.files([name for name in self.repository.names() if self._is_small(name)])

    @cached_property
    def chosen(self) -> str:
        """The file, or index of files, that transformers takes the weights from."""
        explicit = read_json(self.folder / "config.json", self.label).get("transformers_weights")
        order = WEIGHTS if explicit is None else (str(explicit),)
        there = set(self.repository.names()) if self.repository else {name for name in order if (self.folder / name).is_file()}
        for name in order:
            if name in there:
                return name
        if self.repository:
            self.repository.check_open()
        raise ValueError(f"{self.label}: has none of {', '.join(order)}; give a model with weights in Hugging Face's format")

    @property
    def is_safetensors(self) -> bool:
        """Whether weights can be read one by one."""
        return self.chosen.removesuffix(".index.json").endswith(".safetensors")

    def weights(self) -> list[Path]:
        """The files that hold the weights, and no others, in the order in which they are read; those of the hub are fetched.

        Raises ValueError when one is missing.
        """
        names = self._shards()
        folder = self.repository.files(names) if self.repository else self.folder
        paths = [folder / name for name in names]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{self.label}: {self.chosen} names {missing[0]}, which is missing; get the checkpoint again")
        return paths

    def are_weights_here(self) -> bool:
        """Whether `weights` need not fetch anything."""
        return self.repository is None or all((self.folder / name).is_file() for name in self._shards())

    def companions(self) -> list[Path]:
        """What belongs in a copy of the model besides its weights, of the files that are here: configuration, tokenizer, processor,
        code and licence."""
        beside = [path for path in self.folder.iterdir() if self._is_small(path.name) or fnmatchcase(path.name, "LICENSE*")]
        return sorted(
            {path for path in (*beside, *self.folder.glob("**/*.py" if self.runs_code else "*.py")) if path.is_file()}
        )

    def digest(self) -> str:
        """A short hash of all bytes of configuration, tokenizer, weights and, where it is run, code."""
        small = {path for path in self.folder.iterdir() if path.is_file() and self._is_small(path.name)}
        small = {path for path in small if not any(fnmatchcase(path.name, pattern) for pattern in NOT_SCIENCE)}
        weights: set[Path] = set()
        with suppress(ValueError):  # a damaged model has a name too, and `weights` tells what is wrong with it
            weights = {self.folder / self.chosen, *self.weights()}
        sha = hashlib.sha256()
        for path in sorted(small | weights):
            sha.update(f"{path.name} {file_digest(path)}\n".encode())
        return sha.hexdigest()[:16]

    def _is_small(self, name: str) -> bool:
        if name.endswith(".py"):
            return self.runs_code
        return "/" not in name and any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)

    def _shards(self) -> list[str]:
        if not self.chosen.endswith(".index.json"):
            return [self.chosen]
        folder = self.repository.files([self.chosen]) if self.repository else self.folder
        placed = read_json(folder / self.chosen, self.label).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
            raise ValueError(f"{self.label}: {self.chosen} says of no weights where they are; get the checkpoint again")
        return sorted(set(placed.values()))


def read_json(path: Path, label: str) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError when there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{label}: {path.name} cannot be loaded ({reason}); get it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{label}: {path.name} cannot be loaded (it holds no object); get it again")
    return found
