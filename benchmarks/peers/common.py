"""What every program of the benchmark is told, and what it has to tell.

Imports nothing but torch, transformers and the memory readings of nnprune: peers may live in environments of their own.
Letters: N samples, T tokens.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from benchmarks.products import ProductProfile
from nnprune.runtime import peak_device_bytes, peak_host_bytes


@dataclass
class Spec:
    """One run of one program. All of them hand on the outputs of pruned layers unless their result notes otherwise.

    Args:
        model: a directory made by save_pretrained.
        ids: a .pt file with the calibration ids (N, T) int64.
        ids_hash: `nnprune.calibration.token_hash` of them.
        calibration: where nnprune itself gets the same ids from: path (None: random ids), num_samples, seq_len.
        method: sparsegpt or wanda.
        pattern: a fraction of zeros such as "0.5", or "2:4".
        dtype: name of a torch dtype.
        device: cpu or cuda.
        seed: of torch, and of the calibration.
        threads: CPU threads; None: the program's own choice.
        scratch: a folder for whatever the program leaves behind.
        profile: also profile the stage "prune".
        save: folder for the pruned model; None: it is not kept.
        options: settings of this program alone.
    """

    model: str
    ids: str
    ids_hash: str
    calibration: dict[str, Any]
    method: str
    pattern: str
    dtype: str
    device: str
    seed: int
    threads: int | None
    scratch: str
    profile: bool = False
    save: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return getattr(torch, self.dtype)

    @property
    def nm(self) -> tuple[int, int] | None:
        """(n, m) of a pattern that keeps n of m, None for an unstructured one."""
        kept, colon, group = self.pattern.partition(":")
        return (int(kept), int(group)) if colon else None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - self.nm[0] / self.nm[1] if self.nm else float(self.pattern)


@dataclass
class Result:
    """What one run tells. Times are seconds, sizes bytes; `pruned_model` is where `save` was obeyed."""

    seconds: dict[str, float]
    peak_host_bytes: int
    peak_device_bytes: int
    versions: dict[str, str]
    note: str | None = None
    profile: dict[str, float] | None = None
    pruned_model: str | None = None


class Run:
    """A program's run, from its spec on the command line to the result beside it."""

    def __init__(self) -> None:
        self.path = Path(sys.argv[1])
        self.spec = Spec(**json.loads(self.path.read_text(encoding="utf-8")))
        self.seconds: dict[str, float] = {}
        self.profile: dict[str, float] | None = None
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        torch.manual_seed(self.spec.seed)
        if self.spec.threads:
            torch.set_num_threads(self.spec.threads)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within, profiled if it is "prune" and the spec says so."""
        profile = ProductProfile() if self.spec.profile and name == "prune" else None
        with ExitStack() as stack:
            if profile:
                stack.enter_context(profile)
            start = time.perf_counter()
            yield
            if self.spec.device == "cuda":
                torch.cuda.synchronize()
            self.seconds[name] = time.perf_counter() - start
        if profile:
            self.profile = profile.shares()

    def load(self) -> tuple[PreTrainedModel, Tensor]:
        """The whole model in host memory, and the calibration ids (N, T)."""
        model = AutoModelForCausalLM.from_pretrained(self.spec.model, dtype=self.spec.torch_dtype).eval()
        return model, torch.load(self.spec.ids)

    def finish(self, model: PreTrainedModel, packages: tuple[str, ...] = (), note: str | None = None) -> None:
        """Write the result, and the model where the spec wants it, which counts neither as time nor as memory."""
        result = Result(
            self.seconds,
            peak_host_bytes(),
            peak_device_bytes(),
            {package: version(package) for package in ("torch", "transformers", *packages)},
            note,
            self.profile,
        )
        if self.spec.save:
            PreTrainedModel.save_pretrained(model, self.spec.save)  # the class's own: some programs replace the instance's
            result.pruned_model = self.spec.save
        write_result(self.path, result)


def result_path(spec_path: Path) -> Path:
    """Where the result of a spec belongs."""
    return spec_path.with_suffix(".result.json")


def write_result(spec_path: Path, result: Result) -> None:
    """Put the result beside its spec, whole or not at all."""
    unfinished = spec_path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
    unfinished.replace(result_path(spec_path))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a model of any family. Raises ValueError when there is not exactly one."""
    depth = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: {len(found)} lists of {depth} layers instead of one")
    return found[0]
