"""Adam on the nonzeros of a module, stopped by the loss on held-out sequences."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nnprune.checks import check_count, check_positive, read_together
from nnprune.recovery.base import Rows

log = logging.getLogger(__name__)

MAX_EPOCHS = 100_000
LOWER = 0.3  # ours: learning rate of a second attempt, relative to the first (docs/methods.md)
TOO_HIGH = 1.15  # ours: held-out loss after the first epoch, relative to the initial one, that ends the first attempt

T = TypeVar("T")

Loss = Callable[[nn.Module, Sequence[int]], Tensor]
"""(module with float32 weights, rows) -> their mean loss, float32 (): of several processes each one's part of it."""

EachEpoch = Callable[[int, float], None]
"""Told the number of an epoch and the held-out loss after it; that of the initial weights is epoch 0."""


@dataclass(frozen=True)
class Tuning:
    """How a module is tuned; the names are those of settings in `recover`. Raises ValueError for a setting out of range.

    Args:
        lr: learning rate, relative to the root mean square of each tensor's nonzeros; it decays to zero along a cosine.
        batch_tokens: tokens per step; at least one sequence.
        holdout: fraction of the sequences that is held out.
        num_copies: how often the other sequences are added with some of their tokens replaced by tokens that occur in them, each
            equally often. That teaches rare tokens and other contexts, which makes more difference to unseen text than as many
            more epochs (docs/methods.md).
        replaced: fraction of a copy's tokens that are replaced.
    """

    lr: float
    batch_tokens: int
    holdout: float
    num_copies: int = 0
    replaced: float = 0.3

    def __post_init__(self) -> None:
        check_positive("recover.lr", self.lr)
        check_count("recover.batch_tokens", self.batch_tokens, 1)
        check_positive("recover.holdout", self.holdout, below=1)
        check_count("recover.num_copies", self.num_copies, 0, MAX_EPOCHS)
        check_positive("recover.replaced", self.replaced, below=1)

    def num_held(self, num_rows: int) -> int:
        """Sequences held out, the last ones, of so many, without those that are added behind them."""
        return min(max(round(self.holdout * num_rows), 1), num_rows - 1)

    def with_copies(self, ids: Tensor) -> Tensor:
        """Token ids (N, T), and N copies for each of `num_copies` of those that are not held out: ((1 + num_copies) N, T)."""
        num_rows = len(ids)
        check_rows(num_rows)
        if not self.num_copies:
            return ids
        used = ids[: -self.num_held(num_rows)]
        copies = used[torch.arange(self.num_copies * num_rows) % len(used)]
        generator, occurring = torch.Generator().manual_seed(0), used.unique()
        others = occurring[torch.randint(len(occurring), copies.shape, generator=generator)]
        return torch.cat([ids, torch.where(torch.rand(copies.shape, generator=generator) < self.replaced, others, copies)])

    def run(
        self,
        module: nn.Module,
        loss: Loss,
        rows: Rows,
        num_epochs: int,
        seed: int,
        each_epoch: EachEpoch = lambda epoch, held_out: None,
        lr_factors: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Tune the weights of `module` in place, zeros excepted, for so many passes over `rows`, those of `with_copies`.

        Kept are the weights of the epoch with the lowest held-out loss. If none is better than the initial weights, or the first one is
        so bad that the learning rate must be too high, there is a second attempt at `LOWER` of it; after that the initial ones stay.
        Raises ValueError for fewer than two rows.
        `lr_factors`: of the learning rate, for each of the parameters; 1 by default.
        Returns the held-out loss before and after, the epoch that was kept, and the number of attempts.
        """
        what = (module, loss, rows, num_epochs, seed, each_epoch, lr_factors)
        report = self._attempt(*what, limit=TOO_HIGH)
        if report["epoch"] or not 0 < report["loss_before"] < math.inf:
            return {**report, "attempts": 1}
        return {**replace(self, lr=LOWER * self.lr)._attempt(*what), "attempts": 2}

    def _attempt(
        self,
        module: nn.Module,
        loss: Loss,
        rows: Rows,
        num_epochs: int,
        seed: int,
        each_epoch: EachEpoch,
        lr_factors: Sequence[float] | None,
        limit: float = math.inf,
    ) -> dict[str, Any]:
        """As `run`, once, at `lr`; ended by a first epoch with more than `limit` times the initial held-out loss."""
        num_rows, seq_len = rows.shape[:2]
        check_rows(num_rows)
        num_own = num_rows // (1 + self.num_copies)
        num_held = self.num_held(num_own)
        generator = torch.Generator().manual_seed(seed)
        held = range(num_own - num_held, num_own)
        used = torch.tensor([row for row in range(num_rows) if row not in held])
        batch = max(self.batch_tokens // seq_len, 1)
        tuned = copy.deepcopy(module).float().requires_grad_(True)
        parameters = list(tuned.parameters())
        supports = [(parameter, parameter != 0) for parameter in parameters if parameter.ndim > 1]

        pieces = _Pieces()

        @torch.no_grad()
        def held_out() -> float:
            def add_up(some: list[Sequence[int]]) -> Tensor:
                return sum(loss(tuned, piece).double() * len(piece) for piece in some)

            mean = float(sum(pieces.do(part, add_up) for part in _batches(held, batch)) / num_held)
            return float(rows.total(torch.tensor(mean, dtype=torch.float64)))

        def differentiate(some: list[Sequence[int]]) -> None:
            optimizer.zero_grad()
            num_all = sum(map(len, some))
            for piece in some:
                (loss(tuned, piece) * (len(piece) / num_all)).backward()

        first = best = held_out()
        each_epoch(0, first)
        epoch_kept, step, num_steps = 0, 0, num_epochs * -(-len(used) // batch)
        scales = read_together({index: _rms(parameter) for index, parameter in enumerate(parameters)}).values()
        smallest = min(filter(None, scales), default=1.0)  # for tensors of zeros, such as the biases of an untrained model
        factors = lr_factors or [1.0] * len(parameters)
        groups = [
            {"params": [one], "scale": (scale or smallest) * factor}
            for one, scale, factor in zip(parameters, scales, factors, strict=True)
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        with torch.enable_grad():
            for epoch in range(1, num_epochs + 1):
                for part in _batches(used[torch.randperm(len(used), generator=generator)].tolist(), batch):
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr * group["scale"] * _schedule(step, num_steps)
                    pieces.do(part, differentiate)
                    for parameter in parameters:
                        if parameter.grad is None:  # another process holds these rows
                            parameter.grad = torch.zeros_like(parameter)
                        rows.total(parameter.grad)
                    optimizer.step()
                    with torch.no_grad():
                        for parameter, support in supports:
                            parameter.mul_(support)
                    step += 1
                mean = held_out()
                each_epoch(epoch, mean)
                log.debug("rate %.2g, epoch %d of %d: held-out loss %.4g -> %.4g", self.lr, epoch, num_epochs, first, mean)
                if mean < best:
                    best, epoch_kept = mean, epoch
                    for parameter, value in zip(module.parameters(), parameters, strict=True):
                        parameter.data.copy_(value.detach())
                elif epoch == 1 and mean > limit * first:
                    break
        if not math.isfinite(first):
            log.warning("warning: the loss on held-out sequences is not finite, so that tuning can't tell what is better")
        return {"loss_before": first, "loss_after": best, "epoch": epoch_kept}


def check_rows(num_rows: int) -> None:
    """Raise ValueError for too few sequences to tune on."""
    if num_rows < 2:
        raise ValueError(f"calibration.num_samples={num_rows}: recover needs one sequence to tune on and one to hold out")


class _Pieces:
    """Does the work of batches in one piece, or in as many as the device's memory asks for."""

    def __init__(self) -> None:
        self.num_pieces = 1

    def do(self, rows: Sequence[int], work: Callable[[list[Sequence[int]]], T]) -> T:
        """`work(pieces)` for the rows of a batch; it must be fit to be done again."""
        while True:
            try:
                return work(list(_batches(rows, -(-len(rows) // self.num_pieces))))
            except torch.OutOfMemoryError:
                if self.num_pieces >= len(rows):
                    raise
            self.num_pieces *= 2  # out of the except block, where the traceback would keep the failed attempt's tensors alive
            log.warning("warning: out of device memory, tuning goes on with a batch in %d pieces", self.num_pieces)


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _rms(parameter: Tensor) -> Tensor:
    """Root mean square of the nonzeros, float64 (), on the device; 0 without any."""
    return (parameter.detach().square().sum().double() / (parameter != 0).sum().clamp_min(1)).sqrt()


def _schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a tenth of the steps, then a cosine to zero."""
    warm = max(num_steps // 10, 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(num_steps - warm, 1)))
