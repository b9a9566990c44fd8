"""How a run uses the machine. Nothing here changes what is computed, so nothing here counts for the fingerprint of a run."""

import contextlib
import ctypes
import gc
import logging
import math
import os
import re
import resource
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nnprune.checks import check_count, one_of, quoted
from nnprune.files.gpus import own_gpu
from nnprune.kernels import library

log = logging.getLogger(__name__)

M_MMAP_THRESHOLD = -3
"""The number of this setting in malloc.h."""

PLACES = ("host", "device", "disk")

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
"""Enough to keep the matrix units busy; on a CPU few enough for the activations of a linear to stay in its cache."""

MAX_BATCH_TOKENS = 1 << 24
"""Upper bound of `batch_tokens`: even a narrow model's activations of so many tokens fill a large device."""

SECONDS_UNSAVED = 60
"""Of `resume="auto"`: a short run writes no layer at all."""

MIN_DEVICE_MEMORY = 1 << 30
"""Lower bound of `device_memory`: CUDA's libraries take about half of it."""

THREADS_PER_CPU = 4
"""Upper bound of `threads`: far more threads than CPUs take the machine down."""


@dataclass
class Runtime:
    """Settings of the machine.

    Args:
        device: auto (CUDA if there is a device, else the CPU), cpu, cuda (a GPU that no other run uses, if there is one) or cuda:N.
        batch_tokens: tokens in one forward, at least one row; None: what suits the device. Halved when it runs out of memory.
        layers: where decoder layers are kept: host, device or disk.
        activations: where the activations between two layers are kept: host, device, disk, or auto (the device while they fit).
        threads: CPU threads; None: PyTorch's choice.
        native: use the C kernels on a CPU if they can be compiled; there are none for CUDA.
        resume: whether pruned layers are written to the disk, for a killed run to resume from: true: each at once; false: none;
            auto: all so far whenever a kill would lose a minute. Where files are the model, in a grid, for save=true and with
            layers=disk, each is written whatever this says.
        device_memory: what a run may take of a CUDA device's memory, such as "12GiB" or a number of bytes; None: what is free.

    Attributes:
        reserved_bytes: device memory that hidden states leave to what computes.
        one_by_one: whether linears that share an input are pruned one after the other, to save memory.
        statistics_bytes: what the statistics of a layer may take together; if they take more, they are collected in several passes.

    Raises:
        ValueError: a setting that is impossible on this machine.
    """

    device: str = "auto"
    batch_tokens: int | None = None
    layers: str = "host"
    activations: str = "auto"
    threads: int | None = None
    native: bool = True
    resume: bool | str = "auto"
    device_memory: int | str | None = None
    reserved_bytes: int = field(default=0, init=False)
    one_by_one: bool = field(default=False, init=False)
    statistics_bytes: float = field(default=math.inf, init=False)

    def __post_init__(self) -> None:
        if self.batch_tokens is not None:
            check_count("runtime.batch_tokens", self.batch_tokens, 1, MAX_BATCH_TOKENS)
        for key, places in {"layers": PLACES, "activations": (*PLACES, "auto")}.items():
            if getattr(self, key) not in places:
                raise ValueError(f"runtime.{key}={quoted(getattr(self, key))}: must be {one_of(places)}")
        if self.threads is not None:
            most = THREADS_PER_CPU * (os.cpu_count() or 1)
            why_most = f"{THREADS_PER_CPU} for each of this machine's CPUs; null leaves it to PyTorch"
            check_count("runtime.threads", self.threads, 1, most, why_most)
        if not isinstance(self.native, bool):
            raise ValueError(f"runtime.native={quoted(self.native)}: must be true or false")
        if not (isinstance(self.resume, bool) or self.resume == "auto"):
            raise ValueError(f"runtime.resume={quoted(self.resume)}: must be auto, true or false")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise ValueError(f"runtime.device={quoted(self.device)}: must be auto, cpu, cuda or cuda:N")
        if self.device.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
            raise ValueError(f"runtime.device={self.device}: each process of torchrun needs its own; set runtime.device=cuda")
        if self.torch_device.type == "cuda" and (self.torch_device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"runtime.device={self.torch_device}: this machine has {torch.cuda.device_count()} CUDA devices; "
                "use cpu, another device or fewer processes"
            )
        if self.device_memory is not None:
            self._check_device_memory()

    def _check_device_memory(self) -> None:
        key, limit = f"runtime.device_memory={quoted(self.device_memory)}", self.device_memory_bytes
        if limit is None:
            raise ValueError(f"{key}: must be a size such as 12GiB, a number of bytes, or null")
        if self.torch_device.type != "cuda":
            raise ValueError(f"{key}: is for a CUDA device, this run computes on the CPU; set runtime.device_memory=null")
        if limit < MIN_DEVICE_MEMORY:
            raise ValueError(f"{key}: must be at least {MIN_DEVICE_MEMORY >> 30}GiB")
        if limit > (total := torch.cuda.get_device_properties(self.torch_device).total_memory):
            raise ValueError(f"{key}: the device has {total / 2**30:.1f} GiB; lower it, or null for what is free")

    @property
    def device_memory_bytes(self) -> int | None:
        """`device_memory` in bytes; None for no limit, or if it is no size."""
        found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([kMGT]?)(i?)B?", str(self.device_memory).strip(), re.IGNORECASE)
        return (
            round(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else None
        )

    def free_device_bytes(self) -> float:
        """CUDA memory that this process may still allocate: what is free, and no more than `device_memory` leaves. Without CUDA the
        device is the host, and this is infinite."""
        device = self.torch_device
        if device.type != "cuda":
            return math.inf
        allocated = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - allocated  # it keeps what was freed
        limit = self.device_memory_bytes
        return free if limit is None else min(free, limit - allocated)

    @property
    def torch_device(self) -> torch.device:
        """The device that runs the layers. Each process that torchrun starts on this machine has its own."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and "TORCHELASTIC_RUN_ID" in os.environ:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        elif device == "cuda" and torch.cuda.device_count() > 1:
            device = f"cuda:{own_gpu()}"
        return torch.device(device)

    @property
    def seconds_unsaved(self) -> float:
        """Seconds of pruning that a kill may lose, as `resume` says."""
        return 0 if self.layers == "disk" or self.resume is True else SECONDS_UNSAVED if self.resume else math.inf

    def rows_per_batch(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens in one forward."""
        return max((self.batch_tokens or TOKENS_PER_BATCH[self.torch_device.type]) // seq_len, 1)

    def halve_batches(self, seq_len: int) -> None:
        """Continue with half the rows in a batch, after the device ran out of memory."""
        self.batch_tokens = max(self.rows_per_batch(seq_len) // 2, 1) * seq_len
        log.warning("warning: out of device memory, going on with runtime.batch_tokens=%d", self.batch_tokens)

    def start(self, seed: int) -> None:
        """Set the seed and the threads, compile the kernels, and reset peaks that an earlier run in this process left."""
        gc.collect()  # in a sweep: the model of the previous run
        if self.layers == "disk":
            _return_freed_memory()
        torch.manual_seed(seed)
        library.enable(self.native and self.torch_device.type == "cpu")
        library.library()  # compiled before anything is timed
        if self.threads:
            torch.set_num_threads(self.threads)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.torch_device.type == "cuda":
            index = self.torch_device.index or 0
            torch.cuda.set_device(index)  # pinned memory takes memory of the current device, whose peaks are reset below
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction((self.device_memory_bytes or total) / total, index)
        forget_peaks()


def _return_freed_memory() -> None:
    """Make glibc return every larger block to the system when it is freed.

    By default it keeps blocks of up to 32 MiB for reuse, in a heap that becomes more fragmented with every decoder layer.
    """
    with contextlib.suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def forget_peaks() -> None:
    """Reset `peak_device_bytes` and, if the system supports it, `peak_host_bytes`."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak that VmHWM reports


def peak_host_bytes() -> int:
    """Largest resident memory of this process since `forget_peaks`, or since its start if the system cannot reset it."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peaks() -> dict[str, int]:
    """The peaks of memory as records name them."""
    return {"peak_host_bytes": peak_host_bytes(), "peak_device_bytes": peak_device_bytes()}


def resident_host_bytes() -> int:
    """Resident memory of this process now, or its peak if the system does not tell."""
    return _status_bytes("VmRSS") or peak_host_bytes()


def available_host_bytes() -> int:
    """Memory that this process could use in total: what it holds and what is free, or the limit of its cgroup if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [resident_host_bytes() + (_proc_bytes(Path("/proc/meminfo"), "MemAvailable") or free)]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no cgroup, or no limit ("max")
            limits.append(int(Path(path).read_text()))
    return min(limits)


def _status_bytes(key: str) -> int:
    return _proc_bytes(Path("/proc/self/status"), key)


def _proc_bytes(path: Path, key: str) -> int:
    """The value of `key` in a table of the kernel, in bytes; 0 if there is none."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


def peak_device_bytes() -> int:
    """Largest memory allocated on the CUDA devices since `forget_peaks`; 0 without CUDA."""
    return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
