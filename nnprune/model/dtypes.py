"""Chooses the dtype that a model computes in.

A checkpoint's 16-bit dtype is fastest where the hardware supports it and slowest where it is emulated: a CPU with only AVX2
multiplies bfloat16 at a seventh of its float32 rate.
"""

import time
from functools import cache

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""PyTorch's names of instructions that multiply bfloat16, on x86 and Arm."""

TRIES = 5
"""Products timed for each dtype; the fastest counts."""


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype in settings and records, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choose_computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`stored`, the dtype of a checkpoint, if `device` multiplies it natively, else float32.

    A CPU never computes in float16: without hardware that accumulates in float32, sums overflow its range.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return stored
    if device.type == "cuda":
        emulated = stored == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32 if emulated else stored
    return stored if stored == torch.bfloat16 and cpu_multiplies_bfloat16() else torch.float32


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions, and a timed product shows that PyTorch uses them.

    The answer is part of a run's fingerprint, so it must not depend on the machine's load. Native bfloat16 takes at most half the
    time of float32, emulated bfloat16 several times as long. One thread, so that none waits for others.
    """
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if flags and not any(flags.get(flag) for flag in CPU_FLAGS):
        return False
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _product_seconds(torch.bfloat16), _product_seconds(torch.float32)  # first calls are slow
        times = [(_product_seconds(torch.bfloat16), _product_seconds(torch.float32)) for _ in range(TRIES)]
    finally:
        torch.set_num_threads(num_threads)
    return min(bfloat16 for bfloat16, _ in times) < min(float32 for _, float32 in times)


def _product_seconds(dtype: torch.dtype) -> float:
    """Seconds of one product of the shape of a linear."""
    X, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    start = time.perf_counter()
    torch.nn.functional.linear(X, weight)
    return time.perf_counter() - start
