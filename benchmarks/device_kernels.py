"""What nnprune computes on a device against plain PyTorch on the same device."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.peers.common import Spec
from benchmarks.peers.official import prune_block
from nnprune.kernels import sweep, sweep_triton
from nnprune.statistics import Hessian, SquaredNorm

TOLERANCE = 1e-4
"""Of kernels that compute in float32: norm of the difference relative to the norm."""


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference relative to the norm of what is expected, in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def check_kernels(spec: Spec) -> Iterator[tuple[str, dict[str, float]]]:
    """What is computed on the device against plain PyTorch. `same` is the share of rows with the same mask, whose weights are compared."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(4096, 512, generator=generator).to(spec.device).bfloat16()
    exact = X.double().t() @ X.double() / len(X)
    for name, kind, expected in (("Hessian", Hessian, exact), ("squared norms", SquaredNorm, exact.diagonal())):
        statistic = kind()
        statistic.add(X)
        yield name, {"error": relative_error(statistic.mean(), expected)}
    kernels = sweep_triton if spec.device == "cuda" else sweep
    if not kernels.available():
        return
    W = torch.randn(1000, 128, generator=generator).to(spec.device)
    U = torch.linalg.cholesky(exact[:128, :128].inverse(), upper=True).float()
    for pattern in ("2:4", "0.5"):
        weight_CO = W.t().contiguous()
        expected, _ = prune_block(W.clone(), U, replace(spec, pattern=pattern))
        if pattern == "2:4":
            kernels.prune_block_nm(weight_CO, U, 2, 4)
        else:
            kernels.prune_block_masked(weight_CO, U, (expected == 0).t())
        same = ((weight_CO.t() == 0) == (expected == 0)).all(1)  # rounding decides between equal costs
        yield (
            f"sweep {pattern}",
            {"error": relative_error(weight_CO.t()[same], expected[same]), "same": float(same.float().mean())},
        )
