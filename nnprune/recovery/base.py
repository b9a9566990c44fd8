"""The contract between the layer-wise engine and a recovery.

Letters: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor], Tensor]  # runs what is tuned: (module, inputs (B, T, D)) -> outputs (B, T, D)

Compare = Callable[[Tensor, Tensor], Tensor]
"""(logits (..., V), the dense model's logits (..., V)) of some tokens -> the sum of what is compared over these tokens, float32 ()."""


class Rows(Protocol):
    """Hidden states (N, T, D), wherever they are offloaded. Of several processes each holds a share of the rows."""

    shape: tuple[int, int, int]

    def total(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place, and return it."""

    def pick(self, rows: Sequence[int]) -> Tensor:
        """The hidden states (B, T, D) of those of `rows` that this process holds, in that order, on the device."""

    def compare_logits(self, compare: Compare, outputs: Tensor, dense: Tensor) -> Tensor:
        """The sum of what `compare` finds over the tokens of the rows picked last, for outputs (B, T, D) of the last decoder layer and
        those of the dense model; float32 ()."""


class Recovery:
    """Leaves decoder layers as they are."""

    epochs_before: int = 0
    epochs_after: int = 0
    batch_tokens: int = 0
    logits_epochs: int = 0
    """Passes that tune the last decoder layers towards the dense model's logits, instead of `num_epochs`; 0 for none."""
    num_layers: int = 1
    """Consecutive decoder layers that are tuned together once the last of them is pruned."""

    @property
    def is_on(self) -> bool:
        """Whether any layer is tuned."""
        return self.epochs_before + self.epochs_after > 0

    def calibration(self, ids: Tensor) -> Tensor:
        """Token ids (M, T) to calibrate with, from those of the calibration (N, T); `tune` gets the hidden states of these rows."""
        return ids

    def tune(
        self, index: int, layers: nn.ModuleList, run: Run, inputs: Rows, targets: Rows, num_epochs: int, is_last: bool
    ) -> dict[str, Any]:
        """Tune the weights of decoder layer `index`, or of several of which it is the last, in place, zeros excepted: from their `inputs`
        for the calibration towards the dense model's outputs `targets`, in all processes alike. `is_last`: the model's last layer is
        among them, so that logits can be compared. Returns a report for the record."""
        raise NotImplementedError
