"""What this machine can do: its name, and the rate of its matrix products, measured."""

import os
import platform
import time
from pathlib import Path

import torch

LARGE = {"cpu": 2048, "cuda": 8192}
"""Side of the large square product, by device."""


def description(device: str, threads: int | None) -> dict[str, str | int]:
    """Processor or accelerator, cores, threads and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "cores": os.cpu_count() or 1,
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def matrix_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str, seconds: float = 0.5) -> float:
    """FLOP/s of (rows, inner) @ (inner, columns): the best of as many products as fit into `seconds`, at least three."""
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    best = float("inf")
    end = time.perf_counter() + seconds
    repeats = 0
    while repeats < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        if repeats:  # the first one sets things up
            best = min(best, time.perf_counter() - start)
        repeats += 1
    return 2 * rows * inner * columns / best


def matrix_rates(num_tokens: int, largest: tuple[int, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """FLOP/s of a product like the model's, `num_tokens` through its largest linear (O, I), and of a large square one."""
    outputs, inputs = largest
    side = LARGE[device]
    return {
        f"{num_tokens} x {inputs} x {outputs}": matrix_rate(num_tokens, inputs, outputs, dtype, device),
        f"{side} x {side} x {side}": matrix_rate(side, side, side, dtype, device),
    }


def disk_seconds(folder: Path, num_bytes: int) -> float:
    """How long the disk takes to hold so many bytes more, in a file that is removed again."""
    chunk, file = os.urandom(1 << 24), folder / "bytes"
    start = time.perf_counter()
    with file.open("wb") as stream:
        for written in range(0, num_bytes, len(chunk)):
            stream.write(chunk[: num_bytes - written])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def _processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
