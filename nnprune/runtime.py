"""How a run uses the machine: never part of what the run means, and so never part of its identity."""

import contextlib
import gc
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from nnprune.checks import check_count

RESTS = ("host", "device", "disk")


@dataclass
class Runtime:
    """Settings of the machine.

    Args:
        device: auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N.
        batch_size: rows of tokens in one forward.
        layers: where decoder layers rest: host, device or disk.
        activations: where the activations between two layers rest: host, device or disk.
        threads: CPU threads; None leaves PyTorch's choice.

    Raises:
        ValueError: a setting that this machine cannot have.
    """

    device: str = "auto"
    batch_size: int = 8
    layers: str = "host"
    activations: str = "host"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_count("runtime.batch_size", self.batch_size, 1)
        for key in ("layers", "activations"):
            if getattr(self, key) not in RESTS:
                raise ValueError(f"runtime.{key}={getattr(self, key)}: must be {', '.join(RESTS)}")
        if self.threads is not None:
            check_count("runtime.threads", self.threads, 1)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise ValueError(f"runtime.device={self.device}: must be auto, cpu, cuda or cuda:N")
        if self.torch_device.type == "cuda" and (self.torch_device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"runtime.device={self.device}: this machine has {torch.cuda.device_count()} CUDA devices; use cpu"
            )

    @property
    def torch_device(self) -> torch.device:
        """The device that layers compute on."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    def start(self, seed: int) -> None:
        """Set seeds and threads, and forget the peaks of an earlier run in this process."""
        gc.collect()  # the model of the run before, in a sweep
        torch.manual_seed(seed)
        if self.threads:
            torch.set_num_threads(self.threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak that VmHWM reports


def peak_host_bytes() -> int:
    """Largest resident memory of this process since `Runtime.start`, where the system can tell, else since it began."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_device_bytes() -> int:
    """Largest memory allocated on the CUDA devices since `Runtime.start`; 0 without one."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
