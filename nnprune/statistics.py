"""What is accumulated from the inputs of a linear while the calibration tokens stream by.

Letters: I input features. Sums run in float32 over all tokens and are divided by the token count once, when read.
A statistic is read, not consumed: `mean()` is a fresh tensor each time. Knows no model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nnprune.kernels.gram import PANEL, add_product, multiply_bfloat16, pack
from nnprune.kernels.matmul import fast_products

STRIP = 4 * PANEL
"""Rows of a strip of the Hessian: wide enough for the matrix units, narrow enough to leave out most of its upper half."""

TOKENS = 256
"""Of a part whose squares are summed at once: few enough for the cache."""


class InputStatistic(ABC):
    """A running sum over calibration tokens, shared by all linears that receive the same input."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum: Tensor | None = None
        self._memo: dict[Any, Any] = {}

    def add(self, X: Tensor, *others: Tensor) -> None:
        """Accumulate inputs X (..., I) of any floating dtype, with `others` of the same tokens for a statistic of several."""
        inputs = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (X, *others)]
        if self._sum is None:
            self._sum = torch.zeros(self._shape(X.shape[-1]), dtype=torch.float32, device=X.device)
        self._accumulate(self._sum, *inputs)
        self.num_tokens += len(inputs[0])
        self._memo.clear()

    def mean(self) -> Tensor:
        """The sum divided by the number of tokens, float32, as a fresh tensor. ValueError before the first `add`."""
        if self._sum is None:
            raise ValueError("no calibration tokens reached this linear, so it has no statistics")
        return self._sum / self.num_tokens

    def is_finite(self) -> bool:
        """Whether no input seen so far was NaN or infinite, nor their sum too large for float32."""
        return self._sum is not None and bool(self._sum.isfinite().all())

    def memo(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What `compute()` returned the first time for this `key`, such as a factorisation; dropped by `add`."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @staticmethod
    @abstractmethod
    def _shape(width: int) -> tuple[int, ...]:
        """The shape of the sum for I features."""

    @staticmethod
    @abstractmethod
    def _accumulate(total: Tensor, X: Tensor) -> None:
        """Add what a batch X (tokens, I) brings to the float32 sum, in place."""


class SquaredNorm(InputStatistic):
    """E[x_i^2], shape (I,): Wanda's ||X_i||_2^2 divided by the token count (Sun et al. 2023, arXiv:2306.11695)."""

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (width,)

    @staticmethod
    def _accumulate(total: Tensor, X: Tensor) -> None:
        total += sum(part.float().square().sum(0) for part in X.split(TOKENS))


class Moments(InputStatistic):
    """E[x_i] and E[x_i^2], shape (2, I): what a method needs that looks at an input's mean and variance."""

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (2, width)

    @staticmethod
    def _accumulate(total: Tensor, X: Tensor) -> None:
        X = X.float()
        total[0] += X.sum(0)
        total[1] += X.square().sum(0)


class Hessian(InputStatistic):
    """E[x x^T], shape (I, I): half the Hessian of a linear's squared output error, per token.

    The sum holds the lower triangle, and of the rest what is no extra work; `mean` mirrors it.
    """

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (width, width)

    @staticmethod
    def _accumulate(total: Tensor, X: Tensor) -> None:
        if multiply_bfloat16(X):
            packed = pack(X)
            add_product(total, packed, packed, lower=True)
            return
        with fast_products(enabled=X.dtype == torch.bfloat16):
            X = _factor(X)
            for strip in _strips(len(total), STRIP):
                _add_product(total[strip, : strip.stop], X[:, strip], X[:, : strip.stop])

    def mean(self) -> Tensor:
        mean = super().mean()
        for strip in _strips(len(mean), PANEL):
            mean[: strip.start, strip] = mean[strip, : strip.start].t()
        return mean


class CrossProduct(InputStatistic):
    """E[x_dense x^T], shape (I, I): what a linear of the dense model receives, against what it receives behind pruned ones.

    `add(X, dense)` takes both inputs of the same tokens.
    """

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (width, width)

    @staticmethod
    def _accumulate(total: Tensor, X: Tensor, dense: Tensor) -> None:
        if multiply_bfloat16(X, dense):
            add_product(total, pack(dense), pack(X))
            return
        with fast_products(enabled=X.dtype == torch.bfloat16):
            _add_product(total, _factor(dense), _factor(X))


def _factor(X: Tensor) -> Tensor:
    """X (tokens, I) as `_add_product` wants it: float32, but for what the matrix units of a CUDA device sum up exactly."""
    return X if X.is_cuda and X.dtype in (torch.bfloat16, torch.float16) else X.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left.t(), right)
    else:
        total += torch.mm(left.t(), right, out_dtype=torch.float32)


def _strips(width: int, rows: int) -> Iterator[slice]:
    """Rows of the strips that cover a symmetric matrix's lower triangle, each from the left edge to its diagonal block."""
    return (slice(start, min(start + rows, width)) for start in range(0, width, rows))
