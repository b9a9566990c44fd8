"""Statistics accumulated over the inputs of a linear.

Letters: I input features. Sums are float32, over all tokens, and divided by the token count once, when read.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nnprune.checks import finite
from nnprune.kernels.gram import Packed, add_product, multiply_bfloat16, pack
from nnprune.kernels.matmul import fast_products
from nnprune.kernels.work_sizes import work_sizes

LEAST_VARIANCE = 1e-5
"""Of an input, as a fraction of E[x_i^2], that is added to a centred hessian: rounding could leave less than nothing of an input that
hardly varies around a large mean."""


class InputStatistic(ABC):
    """A running sum over calibration tokens, shared by all linears that receive the same input."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._sum: Tensor | None = None
        self._memo: dict[Any, Any] = {}
        self._until: dict[
            tuple[str, int], int
        ] = {}  # source, part of the sum (-1: the token count) -> `until` of its last batch

    def add(self, X: Tensor, *others: Tensor, until: int | None = None, source: str = "") -> None:
        """Accumulate a batch.

        Args:
            X: inputs (tokens, I) or (..., I), of any floating dtype.
            others: further inputs of the same tokens, for a statistic of several inputs.
            until: a number that grows from batch to batch, such as the rows seen so far. It makes the call repeatable: after
                running out of memory, the same tokens may be added again in smaller batches, and are counted once.
            source: where the batch comes from, if several places add to one sum: `until` grows in each.
        """
        X, *rest = (inputs.reshape(-1, inputs.shape[-1]) for inputs in (X, *others))
        if self._sum is None:
            self._sum = torch.zeros(self._shape(X.shape[-1]), dtype=torch.float32, device=X.device)
        prepared = self._prepare(X, *rest)
        for index, part in enumerate(self._parts(*prepared)):
            if self._is_new((source, index), until):
                self._accumulate(self._sum[part], part, *prepared)
                self._until[source, index] = until or 0
        if self._is_new((source, -1), until):
            self.num_tokens += len(X)
            self._until[source, -1] = until or 0
        self._memo.clear()

    def merge(self, other: "InputStatistic") -> None:
        """Add the sum of `other`, of the same kind, over other tokens."""
        assert type(other) is type(self), f"{type(other).__name__} merged into {type(self).__name__}"
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum)
            self.num_tokens += other.num_tokens
            self._memo.clear()

    def fill_up(self, pool: "InputStatistic", num_tokens: int) -> None:
        """Add the mean of `pool`, of the same kind, as that of `num_tokens` further tokens."""
        if num_tokens and pool._sum is not None:
            share = pool._sum * (num_tokens / pool.num_tokens)
            self._sum = share if self._sum is None else self._sum.add_(share)
            self.num_tokens += num_tokens
            self._memo.clear()

    def all_reduce(self, reduce: Callable[[Tensor], Tensor], weight: Tensor) -> None:
        """Sum over all processes, some of which may have no tokens.

        `reduce` replaces a tensor by its sum over processes and returns it; `weight` (O, I) is that of a linear with this input.
        """
        if self._sum is None:
            self._sum = torch.zeros(self._shape(weight.shape[1]), dtype=torch.float32, device=weight.device)
        self._sum, self.num_tokens = reduce(self._sum), int(reduce(torch.tensor(self.num_tokens)))
        self._memo.clear()

    def mean(self) -> Tensor:
        """The sum divided by the number of tokens, float32, as a new tensor. Raises ValueError without tokens."""
        if self._sum is None or not self.num_tokens:
            raise ValueError("no calibration tokens reached this linear, so it has no statistics")
        return self._sum / self.num_tokens

    def finite(self) -> Tensor:
        """Whether all inputs were finite and their sum fits float32: bool (), on the device; False, on the CPU, before the first
        `add`."""
        return torch.tensor(False) if self._sum is None else finite(self._sum)

    def memo(self, key: Any, compute: Callable[[], Any]) -> Any:
        """`compute()`, such as a factorisation, cached under `key` until the next `add`."""
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def centred(self, means: "Means") -> "InputStatistic":
        """The same statistic of the inputs minus their `means`, where it is one of products of inputs: what a linear whose bias can
        change is pruned from. Others stay as they are."""
        return self

    def forget(self) -> None:
        """Compute anew what `memo` holds."""
        self._memo.clear()

    def _is_new(self, part: tuple[str, int], until: int | None) -> bool:
        return until is None or self._until.get(part, 0) < until

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        """The shape of the sum for I features, by default that of a matrix (I, I)."""
        return (width, width)

    @staticmethod
    def _prepare(*inputs: Tensor) -> tuple[Any, ...]:
        """The arguments of `_accumulate` for a batch, the same for all parts of the sum."""
        return inputs

    @staticmethod
    def _parts(*prepared: Any) -> Iterable[slice]:
        """Rows of the sum that are updated by one operation each, which runs in full or, out of memory, not at all."""
        return (slice(None),)

    @staticmethod
    @abstractmethod
    def _accumulate(total: Tensor, part: slice, *prepared: Any) -> None:
        """Add a batch to `total`, the rows `part` of the float32 sum, in place."""


class SquaredNorm(InputStatistic):
    """E[x_i^2], shape (I,): Wanda's ||X_i||_2^2 divided by the token count (Sun et al. 2023, arXiv:2306.11695)."""

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (width,)

    @staticmethod
    def _accumulate(total: Tensor, part: slice, X: Tensor) -> None:
        total += sum(part.float().square().sum(0) for part in X.split(work_sizes(X.device).tokens))


class Moments(InputStatistic):
    """E[x_i] and E[x_i^2], shape (2, I), for methods that use the mean and variance of an input."""

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (2, width)

    @staticmethod
    def _parts(X: Tensor) -> Iterable[slice]:
        return (slice(0, 1), slice(1, 2))

    @staticmethod
    def _accumulate(total: Tensor, part: slice, X: Tensor) -> None:
        total += X.float().pow(part.stop).sum(0)


class Means(InputStatistic):
    """E[x] and E[x_dense], shape (2, I), of a linear's inputs in the pruned and in the dense model. `add(X, dense)` takes both; without
    `dense` the two are the same."""

    @staticmethod
    def _shape(width: int) -> tuple[int, ...]:
        return (2, width)

    @staticmethod
    def _parts(*inputs: Tensor) -> Iterable[slice]:
        return (slice(0, 1), slice(1, 2))

    @staticmethod
    def _accumulate(total: Tensor, part: slice, *inputs: Tensor) -> None:
        total += inputs[0 if part.start == 0 else -1].sum(0, dtype=torch.float32)


class _Products(InputStatistic):
    """A matrix of products of inputs, which can be centred."""

    _means: Means | None = None

    def centred(self, means: Means) -> InputStatistic:
        def make() -> InputStatistic:
            view = copy.copy(self)
            view._memo, view._means = {}, means
            return view

        return self.memo("centred", make)


class Hessian(_Products):
    """E[x x^T], shape (I, I): half the Hessian of a linear's squared output error, per token.

    Only the lower triangle of the sum is complete; `mean` mirrors it.
    """

    @staticmethod
    def _prepare(X: Tensor) -> tuple[Tensor | Packed, bool]:
        return pack(X) if multiply_bfloat16(X) else _factor(X), X.dtype == torch.bfloat16

    @staticmethod
    def _parts(X: Tensor | Packed, is_bfloat16: bool) -> Iterable[slice]:
        return (slice(None),) if isinstance(X, Packed) else _strips(X.shape[1], work_sizes(X.device).strip)

    @staticmethod
    def _accumulate(total: Tensor, part: slice, X: Tensor | Packed, is_bfloat16: bool) -> None:
        if isinstance(X, Packed):
            add_product(total, X, X, lower=True)
            return
        with fast_products(enabled=is_bfloat16):
            _add_product(total[:, : part.stop], X[:, part], X[:, : part.stop])

    def mean(self) -> Tensor:
        mean = super().mean()
        for strip in _strips(len(mean), work_sizes(mean.device).mirrored):
            mean[: strip.start, strip] = mean[strip, : strip.start].t()
        if self._means is not None:
            mu, floor = self._means.mean()[0], LEAST_VARIANCE * mean.diagonal()
            mean.addr_(mu, mu, alpha=-1).diagonal().add_(floor)
        return mean


class CrossProduct(_Products):
    """E[x_dense x^T], shape (I, I), of a linear's inputs in the dense and in the pruned model. `add(X, dense)` takes both."""

    def mean(self) -> Tensor:
        mean = super().mean()
        if self._means is not None:
            mu, mu_dense = self._means.mean()
            mean.addr_(mu_dense, mu, alpha=-1)
        return mean

    @staticmethod
    def _accumulate(total: Tensor, part: slice, X: Tensor, dense: Tensor) -> None:
        if multiply_bfloat16(X, dense):
            add_product(total, pack(dense), pack(X))
            return
        with fast_products(enabled=X.dtype == torch.bfloat16):
            _add_product(total, _factor(dense), _factor(X))


def _factor(X: Tensor) -> Tensor:
    """X (tokens, I) for `_add_product`: float32, except for 16-bit inputs on CUDA, which accumulates them in float32 anyway."""
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
