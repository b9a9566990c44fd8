"""`recover`: block-wise reconstruction, the tuning of a decoder layer towards the dense model's outputs.

Letters: N samples, B batch, T tokens, D hidden.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nnprune.checks import check_count, check_positive, read_together

log = logging.getLogger(__name__)

MAX_EPOCHS = 100_000

Run = Callable[[nn.Module, Tensor], Tensor]  # runs a decoder layer: (layer, inputs (B, T, D)) -> outputs (B, T, D)


class Rows(Protocol):
    """Hidden states (N, T, D), wherever they are offloaded. Of several processes each holds a share of the rows."""

    shape: tuple[int, int, int]

    def total(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place, and return it."""

    def pick(self, rows: Sequence[int]) -> Tensor:
        """The hidden states (B, T, D) of those of `rows` that this process holds, in that order, on the device."""


class Recovery:
    """Leaves decoder layers as they are."""

    epochs_before: int = 0
    epochs_after: int = 0
    batch_tokens: int = 0

    @property
    def is_on(self) -> bool:
        """Whether any layer is tuned."""
        return self.epochs_before + self.epochs_after > 0

    def tune(self, index: int, layer: nn.Module, run: Run, inputs: Rows, targets: Rows, num_epochs: int) -> dict[str, Any]:
        """Tune the weights of decoder layer `index` in place, zeros excepted, from its `inputs` for the calibration towards the dense
        model's outputs `targets`, in all processes alike. Returns a report for the record."""
        raise NotImplementedError


class Reconstruction(Recovery):
    """Tunes one decoder layer at a time with Adam, towards the dense model's outputs for the same tokens.

    `epochs_after` tunes a pruned layer, with its zeros fixed, on inputs from pruned layers (EBFT, Guo et al. 2024,
    arXiv:2402.12419). `epochs_before` tunes the layer while it is dense, to compensate the errors of the pruned layers before it
    (ICP, "intermediate compensation pruning"); then it is pruned.

    Loss: the mean over tokens of ||y - y_dense||^2 / ||y_dense||^2. It is normalised because the norms of a few tokens are a
    thousand times larger, which the next layer's norm undoes. The weights of the epoch with the lowest loss on held-out sequences
    are kept, or the initial ones. Raises ValueError for a setting out of range; in `tune` for fewer than two sequences.

    Args:
        epochs_before, epochs_after: passes over the calibration.
        lr: learning rate, relative to the root mean square of each tensor's nonzeros; it decays to zero along a cosine.
        batch_tokens: tokens per step; at least one sequence.
        holdout: fraction of the sequences that is held out.
    """

    def __init__(
        self, epochs_before: int, epochs_after: int, lr: float = 0.01, batch_tokens: int = 1024, holdout: float = 0.125
    ) -> None:
        self.epochs_before = check_count("recover.epochs_before", epochs_before, 0, MAX_EPOCHS)
        self.epochs_after = check_count("recover.epochs_after", epochs_after, 0, MAX_EPOCHS)
        if not self.is_on:
            raise ValueError("recover.epochs_before=0, recover.epochs_after=0: nothing to do; set one of them, or recover=none")
        self.lr = check_positive("recover.lr", lr)
        self.batch_tokens = check_count("recover.batch_tokens", batch_tokens, 1)
        self.holdout = check_positive("recover.holdout", holdout, below=1)

    def tune(self, index: int, layer: nn.Module, run: Run, inputs: Rows, targets: Rows, num_epochs: int) -> dict[str, Any]:
        num_rows, seq_len = inputs.shape[:2]
        if num_rows < 2:
            raise ValueError(f"calibration.num_samples={num_rows}: recover needs one sequence to tune on and one to hold out")
        generator = torch.Generator().manual_seed(index)
        order = torch.randperm(num_rows, generator=generator)
        num_held = min(max(round(self.holdout * num_rows), 1), num_rows - 1)
        held, used = order[:num_held].tolist(), order[num_held:]
        batch = max(self.batch_tokens // seq_len, 1)
        tuned = copy.deepcopy(layer).float().requires_grad_(True)
        parameters = list(tuned.parameters())
        supports = [(parameter, parameter != 0) for parameter in parameters if parameter.ndim > 1]

        loss_of = partial(_loss, run, tuned, inputs, targets)

        def held_out() -> float:
            with torch.no_grad():
                loss = float(sum(loss_of(rows).double() * len(rows) for rows in _batches(held, batch)) / num_held)
                return float(inputs.total(torch.tensor(loss, dtype=torch.float64)))

        first = best = held_out()
        epoch_kept, step, num_steps = 0, 0, num_epochs * -(-len(used) // batch)
        scales = read_together({index: _rms(parameter) for index, parameter in enumerate(parameters)}).values()
        smallest = min(filter(None, scales), default=1.0)  # for tensors of zeros, such as the biases of an untrained model
        groups = [{"params": [one], "scale": scale or smallest} for one, scale in zip(parameters, scales, strict=True)]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
        accumulate = _Gradients(loss_of, optimizer)
        with torch.enable_grad():
            for epoch in range(1, num_epochs + 1):
                for rows in _batches(used[torch.randperm(len(used), generator=generator)].tolist(), batch):
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr * group["scale"] * _schedule(step, num_steps)
                    accumulate(rows)
                    for parameter in parameters:
                        if parameter.grad is None:  # another process holds these rows
                            parameter.grad = torch.zeros_like(parameter)
                        inputs.total(parameter.grad)
                    optimizer.step()
                    with torch.no_grad():
                        for parameter, support in supports:
                            parameter.mul_(support)
                    step += 1
                if (loss := held_out()) < best:
                    best, epoch_kept = loss, epoch
                    for parameter, value in zip(layer.parameters(), parameters, strict=True):
                        parameter.data.copy_(value.detach())
        log.debug("layer %d: held-out loss %.3e -> %.3e at epoch %d of %d", index, first, best, epoch_kept, num_epochs)
        return {"loss_before": first, "loss_after": best, "epoch": epoch_kept}


class _Gradients:
    """Computes the gradients of a batch: in one piece, or in as many as the device's memory asks for."""

    def __init__(self, loss_of: Callable[[Sequence[int]], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self.loss_of = loss_of
        self.optimizer = optimizer
        self.num_pieces = 1

    def __call__(self, rows: Sequence[int]) -> None:
        """The gradients of the loss of `rows`, in place of those that there are."""
        while True:
            self.optimizer.zero_grad()
            try:
                for piece in _batches(rows, -(-len(rows) // self.num_pieces)):
                    (self.loss_of(piece) * (len(piece) / len(rows))).backward()
                return
            except torch.OutOfMemoryError:
                if self.num_pieces >= len(rows):
                    raise
            self.num_pieces *= 2  # out of the except block, where the traceback would keep the failed attempt's tensors alive
            log.warning("warning: out of device memory, tuning goes on with a batch in %d pieces", self.num_pieces)


def _batches(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _loss(run: Run, layer: nn.Module, inputs: Rows, targets: Rows, rows: Sequence[int]) -> Tensor:
    """The normalised squared error of a layer with float32 weights on rows of the calibration: the part of this process."""
    hidden, target = inputs.pick(rows), targets.pick(rows).float()
    if not len(hidden):
        return torch.zeros((), requires_grad=True)
    # 16-bit models multiply in bfloat16; the weights stay float32
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=hidden.dtype != torch.float32):
        output = run(layer, hidden.float())
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean() * (len(hidden) / len(rows))


def _rms(parameter: Tensor) -> Tensor:
    """Root mean square of the nonzeros, float64 (), on the device; 0 without any."""
    return (parameter.detach().square().sum().double() / (parameter != 0).sum().clamp_min(1)).sqrt()


def _schedule(step: int, num_steps: int) -> float:
    """Factor of the learning rate: linear warm-up over a tenth of the steps, then a cosine to zero."""
    warm = max(num_steps // 10, 1)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(num_steps - warm, 1)))
