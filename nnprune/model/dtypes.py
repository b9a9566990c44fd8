"""Which dtype a model computes in.

A checkpoint's 16-bit dtype is the best choice where the hardware multiplies it natively, and the worst where it is emulated: a
CPU with AVX2 alone multiplies bfloat16 at a seventh of its float32 rate.
"""

import time
from functools import cache

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""What PyTorch calls instructions that multiply bfloat16, on x86 and on Arm."""

TRIES = 5
"""Products that are timed of each dtype; the fastest counts."""


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype as settings and records have it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def choose_computing_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """`stored`, the dtype of a checkpoint, where `device` has units for it, else float32.

    float16 never computes on a CPU: its range is too small for sums without hardware that keeps them in float32.
    """
    if stored not in (torch.bfloat16, torch.float16):
        return stored
    if device.type == "cuda":
        emulated = stored == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.float32 if emulated else stored
    return stored if stored == torch.bfloat16 and cpu_multiplies_bfloat16() else torch.float32


@cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU claims bfloat16 instructions, and a short product shows that PyTorch makes use of them.

    The answer is part of a run's identity, so it must not depend on how busy the machine is. With such units a bfloat16 product
    takes at most half the time of a float32 one, without them several times as long; a single thread waits for no other.
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
    """Seconds of a product like that of a linear."""
    X, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    start = time.perf_counter()
    torch.nn.functional.linear(X, weight)
    return time.perf_counter() - start
