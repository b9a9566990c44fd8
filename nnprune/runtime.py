"""How a run uses the machine: never part of what the run means, and so never part of its identity."""

import contextlib
import ctypes
import gc
import logging
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from nnprune.checks import check_count
from nnprune.kernels import library

log = logging.getLogger(__name__)

M_MMAP_THRESHOLD = -3
"""The number that malloc.h gives this setting."""
RESTS = ("host", "device", "disk")
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
"""Enough to keep the matrix units busy; on a CPU few enough for the activations of a linear to stay in its cache."""


@dataclass
class Runtime:
    """Settings of the machine.

    Args:
        device: auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N.
        batch_tokens: tokens in one forward, at least one row; None: what suits the device. Halved when it runs out of memory.
        layers: where decoder layers rest: host, device or disk.
        activations: where the activations between two layers rest: host, device, disk, or auto (the device while they fit).
        threads: CPU threads; None leaves PyTorch's choice.
        native: use the kernels in C on a CPU, where they can be compiled; on CUDA there are none.

    Raises:
        ValueError: a setting that this machine cannot have.
    """

    device: str = "auto"
    batch_tokens: int | None = None
    layers: str = "host"
    activations: str = "auto"
    threads: int | None = None
    native: bool = True

    def __post_init__(self) -> None:
        if self.batch_tokens is not None:
            check_count("runtime.batch_tokens", self.batch_tokens, 1)
        for key, rests in {"layers": RESTS, "activations": (*RESTS, "auto")}.items():
            if getattr(self, key) not in rests:
                raise ValueError(f"runtime.{key}={getattr(self, key)}: must be {', '.join(rests)}")
        if self.threads is not None:
            check_count("runtime.threads", self.threads, 1)
        if not isinstance(self.native, bool):
            raise ValueError(f"runtime.native={self.native}: must be true or false")
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

    def rows_per_batch(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens in one forward."""
        return max((self.batch_tokens or TOKENS_PER_BATCH[self.torch_device.type]) // seq_len, 1)

    def halve_batches(self, seq_len: int) -> None:
        """The device ran out of memory with this many rows at once: go on with half of them."""
        self.batch_tokens = max(self.rows_per_batch(seq_len) // 2, 1) * seq_len
        log.warning("warning: out of device memory, going on with runtime.batch_tokens=%d", self.batch_tokens)

    def start(self, seed: int) -> None:
        """Set seeds and threads, and forget the peaks of an earlier run in this process."""
        gc.collect()  # the model of the run before, in a sweep
        if self.layers == "disk":
            _give_back_freed_memory()
        torch.manual_seed(seed)
        library.enable(self.native and self.torch_device.type == "cpu")
        library.library()  # compiled before anything is timed
        if self.threads:
            torch.set_num_threads(self.threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        forget_peaks()


def _give_back_freed_memory() -> None:
    """Let glibc return every larger block to the system once it is freed.

    By default it keeps blocks of up to 32 MiB for later, in a heap whose holes grow with every decoder layer.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def forget_peaks() -> None:
    """Let `peak_host_bytes`, where the system can do that, and `peak_device_bytes` start anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak that VmHWM reports


def peak_host_bytes() -> int:
    """Largest resident memory of this process since `forget_peaks`, where the system can tell, else since it began."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_host_bytes() -> int:
    """Resident memory of this process now, where the system can tell, else its peak."""
    return _status_bytes("VmRSS") or peak_host_bytes()


def available_host_bytes() -> int:
    """Memory that this process could have in all: what it holds and what is free, or less where a cgroup limits it."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [resident_host_bytes() + (_proc_bytes(Path("/proc/meminfo"), "MemAvailable") or free)]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
            limits.append(int(Path(path).read_text()))
    return min(limits)


def _status_bytes(key: str) -> int:
    return _proc_bytes(Path("/proc/self/status"), key)


def _proc_bytes(path: Path, key: str) -> int:
    """The value of `key` in a table of kilobytes of the kernel's; 0 where there is none."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_device_bytes() -> int:
    """Largest memory allocated on the CUDA devices since `forget_peaks`; 0 without one."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
