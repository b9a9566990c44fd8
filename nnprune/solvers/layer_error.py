"""The error that pruning causes in the outputs of a linear.

Letters: O output features, I input features.
"""

import torch
from torch import Tensor

from nnprune.kernels.work_sizes import work_sizes


def relative_error(
    W: Tensor, pruned: Tensor, X: Tensor, dense_output: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """||X (pruned - W)^T + shift||^2 / ||X W^T||^2 for weights (O, I) and inputs X (tokens, I), as reported by ALPS (arXiv:2406.07831).

    A scalar in float64 on the device: who reads it waits for the device.

    Args:
        dense_output: ||X W^T||^2 if it is known.
        shift: (O,), float32, by which the bias has changed.
    """
    total = squared_output(W, X) if dense_output is None else dense_output
    return squared_output(pruned, X, W, shift).double() / total.double().clamp(min=torch.finfo(torch.float32).tiny)


def squared_output(W: Tensor, X: Tensor, minus: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """||X (W - minus)^T + shift||^2 for weights (O, I), inputs X (tokens, I) and outputs (O,): a scalar in float32.

    For a bfloat16 model, difference and outputs are rounded to bfloat16. These errors average out: four digits of the sum are right. A
    shift may cancel what the mean input contributes, so that is computed apart, in float32.
    """
    mean = X.float().mean(0) if shift is not None else None
    X = X if mean is None else X - mean
    total = torch.zeros((), dtype=torch.float32, device=X.device)
    rows_at_once = work_sizes(X.device).outputs
    others = (W if minus is None else minus).split(rows_at_once)
    dtype = torch.bfloat16 if W.dtype == torch.bfloat16 else torch.float32
    X = X.to(dtype)
    shifts = W.new_zeros(len(W), dtype=torch.float32) if shift is None else shift
    for rows, other, change in zip(W.split(rows_at_once), others, shifts.split(rows_at_once), strict=True):
        difference = rows.to(dtype) if minus is None else rows.to(dtype) - other.to(dtype)
        offset = change if mean is None else change + difference.float() @ mean
        total += (X @ difference.t()).float().add_(offset).square().sum()
    return total
