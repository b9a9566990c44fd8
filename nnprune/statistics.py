"""What is accumulated from the inputs of a linear while the calibration tokens stream by.

Letters: I input features. Sums run in float32 over all tokens and are divided by the token count once, when read.
A statistic is read, not consumed: `mean()` is a fresh tensor each time. Knows no model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class InputStatistic(ABC):
    """A running sum over calibration tokens, shared by all linears that receive the same input."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum: Tensor | None = None
        self._memo: dict[Any, Any] = {}

    def add(self, X: Tensor) -> None:
        """Accumulate inputs X (..., I) of any floating dtype."""
        X = X.reshape(-1, X.shape[-1])
        term = self._term(X)
        self._sum = term if self._sum is None else self._sum.add_(term)
        self.num_tokens += X.shape[0]
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

    @abstractmethod
    def _term(self, X: Tensor) -> Tensor:
        """The float32 summand of one batch X (tokens, I)."""


class SquaredNorm(InputStatistic):
    """E[x_i^2], shape (I,): Wanda's ||X_i||_2^2 divided by the token count (Sun et al. 2023, arXiv:2306.11695)."""

    def _term(self, X: Tensor) -> Tensor:
        return X.float().square_().sum(0) if X.dtype != torch.float32 else X.square().sum(0)


class Hessian(InputStatistic):
    """E[x x^T], shape (I, I): half the Hessian of a linear's squared output error, per token."""

    def _term(self, X: Tensor) -> Tensor:
        if X.dtype not in (torch.bfloat16, torch.float16):
            X = X.float()
            return X.t() @ X
        if X.is_cuda:
            return torch.mm(X.t(), X, out_dtype=torch.float32)
        with _bf16_products(enabled=X.dtype == torch.bfloat16):
            X = X.float()
            return X.t() @ X


@contextmanager
def _bf16_products(enabled: bool) -> Iterator[None]:
    """Let the CPU multiply float32 matrices in bfloat16 with float32 sums.

    Lossless for factors that hold bfloat16 values, and several times as fast; wrong for all others, hence the switch.
    """
    before = torch.get_float32_matmul_precision()
    if enabled:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
