"""Block-wise reconstruction: the tuning of decoder layers towards the dense model's outputs.

Letters: B batch, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nnprune.checks import check_count, check_positive
from nnprune.recovery.base import Recovery, Rows, Run
from nnprune.recovery.divergence import divergence
from nnprune.recovery.tuning import MAX_EPOCHS, Tuning

MAX_LAYERS = 1000


class Reconstruction(Recovery):
    """Tunes decoder layers with Adam, towards the dense model's outputs for the same tokens.

    `epochs_after` tunes a pruned layer, with its zeros fixed, on inputs from pruned layers (EBFT, Guo et al. 2024,
    arXiv:2402.12419). `epochs_before` tunes the layer while it is dense, to compensate the errors of the pruned layers before it
    (ICP, "intermediate compensation pruning"); then it is pruned.

    With `num_layers` above 1, each pruned layer is tuned together with those before it (Shin et al. 2024, arXiv:2406.15524): windows
    that overlap, so that a layer is final, and the next ones get its outputs, when it has been in as many windows.

    Loss: the mean over tokens of ||y - y_dense||^2 / ||y_dense||^2. It is normalised because the norms of a few tokens are a
    thousand times larger, which the next layer's norm undoes. The weights of the epoch with the lowest loss on held-out sequences
    are kept, or the initial ones. Raises ValueError for a setting out of range; in `tune` for fewer than two sequences.

    With `logits_epochs` the last layer, or the window that it ends, is tuned towards the dense model's logits instead, by `divergence`:
    behind the last layer an error counts only as far as the final norm and the head let it through.

    Args:
        epochs_before, epochs_after: passes over the calibration.
        num_layers: of a window; `epochs_before` tunes single layers.
        earlier_lr: learning rate of the layers of a window before the last one, which were tuned before, relative to `lr`.
        logits_epochs: passes that tune the last layer or window towards the logits; 0 tunes it as all others.
        logits_lr: their learning rate, as `lr`.
        lr, batch_tokens, holdout, num_copies, replaced: see Tuning.
    """

    def __init__(
        self,
        epochs_before: int,
        epochs_after: int,
        lr: float = 0.01,
        batch_tokens: int = 1024,
        holdout: float = 0.125,
        num_layers: int = 1,
        earlier_lr: float = 0.3,
        logits_epochs: int = 0,
        logits_lr: float = 0.003,
        num_copies: int = 0,
        replaced: float = 0.3,
    ) -> None:
        self.epochs_before = check_count("recover.epochs_before", epochs_before, 0, MAX_EPOCHS)
        self.epochs_after = check_count("recover.epochs_after", epochs_after, 0, MAX_EPOCHS)
        if not self.is_on:
            raise ValueError("recover.epochs_before=0, recover.epochs_after=0: nothing to do; set one of them, or recover=none")
        self.num_layers = check_count("recover.num_layers", num_layers, 1, MAX_LAYERS)
        if num_layers > 1 and not epochs_after:
            raise ValueError(f"recover.num_layers={num_layers}: windows are tuned after pruning; set recover.epochs_after")
        self.earlier_lr = check_positive("recover.earlier_lr", earlier_lr)
        self.tuning = Tuning(lr, batch_tokens, holdout, num_copies, replaced)
        self.logits_epochs = check_count("recover.logits_epochs", logits_epochs, 0, MAX_EPOCHS)
        self.tuning_of_logits = replace(self.tuning, lr=check_positive("recover.logits_lr", logits_lr))
        self.batch_tokens = batch_tokens

    def calibration(self, ids: Tensor) -> Tensor:
        return self.tuning.with_copies(ids)

    def tune(
        self, index: int, layers: nn.ModuleList, run: Run, inputs: Rows, targets: Rows, num_epochs: int, is_last: bool
    ) -> dict[str, Any]:
        of_logits, newest = is_last and self.logits_epochs > 0, set(layers[-1].parameters())
        tuning, num_epochs = (self.tuning_of_logits, self.logits_epochs) if of_logits else (self.tuning, num_epochs)
        lr_factors = [1.0 if parameter in newest else self.earlier_lr for parameter in layers.parameters()]
        loss = partial(_loss, run, inputs, targets, of_logits)
        return tuning.run(layers, loss, inputs, num_epochs, seed=index, lr_factors=lr_factors)


def _loss(run: Run, inputs: Rows, targets: Rows, of_logits: bool, layers: nn.Module, rows: Sequence[int]) -> Tensor:
    """The normalised squared error of layers with float32 weights on rows of the calibration, or the divergence of the logits: the part
    of this process."""
    hidden, target = inputs.pick(rows), targets.pick(rows)
    if not len(hidden):
        return torch.zeros((), requires_grad=True)
    # 16-bit models multiply in bfloat16; the weights stay float32
    with torch.autocast(hidden.device.type, dtype=torch.bfloat16, enabled=hidden.dtype != torch.float32):
        output = run(layers, hidden.float())
        if of_logits:
            return targets.compare_logits(divergence, output, target) / (len(rows) * target.shape[1])
    target = target.float()
    return ((output - target).square().sum(-1) / target.square().sum(-1).clamp_min(1e-12)).mean() * (len(hidden) / len(rows))
