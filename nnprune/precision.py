"""How exactly float32 matrices are multiplied."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products(enabled: bool = True) -> Iterator[None]:
    """Let float32 products round their factors (to bfloat16 on a CPU, TF32 on a CUDA device) and sum in float32.

    Several times as fast where the machine has units for it. Lossless for factors that hold bfloat16 values; else good for
    products whose rounding only delays a solver, and wrong for the rest, hence the switch.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
