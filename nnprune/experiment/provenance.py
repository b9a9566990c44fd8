"""The provenance of a record: settings, package versions, the machine and the commit of this checkout."""

import os
import platform
import shlex
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from nnprune.experiment.build import Experiment
from nnprune.experiment.identity import own_code
from nnprune.kernels import sweep_triton
from nnprune.kernels.library import library
from nnprune.model.dtypes import name_of
from nnprune.records import RunRecord

PACKAGES = ("nnprune", "torch", "transformers", "datasets", "hydra-core", "safetensors")
REPOSITORY = Path(__file__).parent.parent.parent


def new_record(experiment: Experiment) -> RunRecord:
    """The record of a run that is about to complete, without its results."""
    head, dirty = commit()
    source, calibration = experiment.source, experiment.calibration.source
    commits = {"model": source.commit, "calibration": calibration and not experiment.is_dense and calibration.commit}
    return RunRecord(
        status="completed",
        fingerprint=experiment.fingerprint,
        seedless_fingerprint=experiment.seedless_fingerprint,
        model=source.name,
        pruner=experiment.label,
        sparsity=str(experiment.pattern),
        dtype=name_of(experiment.computing_dtype),
        config=experiment.config,
        model_hash=source.digest(),
        commits={key: found for key, found in commits.items() if found},
        code=own_code(experiment),
        command=command(experiment),
        versions=versions(experiment.runtime.torch_device.type),
        machine=machine(experiment.runtime.torch_device),
        commit=head,
        dirty=dirty,
    )


def now() -> str:
    """The time, in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command(experiment: Experiment) -> str | None:
    """The command line of this run alone, also where it is one of a sweep or a grid; None if it was called from Python."""
    if not HydraConfig.initialized():
        return None
    # The pattern stands in place of the option that it was made of.
    own = (experiment.cell or {}) | {"sparsity": str(experiment.pattern)}
    typed = [(one.partition("=")[0], one) for one in HydraConfig.get().overrides.task]
    overrides = [f"{key}={own[key]}" if key in own else one for key, one in typed if key != "grid"]
    if experiment.is_dense and "sparsity=dense" not in overrides:  # measured by a run that prunes
        overrides.append("sparsity=dense")
    return shlex.join(["nnprune", *overrides])


def versions(device_type: str) -> dict[str, str]:
    """Versions of Python and packages by name; `kernels` names what computes on this type of device ("cpu", "cuda"): PyTorch, C, Triton."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            found[package] = "not installed"
    is_cpu = device_type == "cpu"
    has_kernels = library() is not None if is_cpu else sweep_triton.available()
    found["kernels"] = ("C" if is_cpu else "Triton") if has_kernels else "PyTorch"
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What this process computes on: name of the CPU, its cores and the threads used, host memory in bytes; on CUDA also name and
    memory of the device."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "device_bytes": properties.total_memory}
    return found


@cache
def _cpu_name() -> str:
    with suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> tuple[str | None, bool | None]:
    """The commit of this checkout, and whether tracked files outside `outputs` differ from it; (None, None) outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None, None
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!outputs"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
