"""The contract between the layer-wise engine and a recovery.

Letters: N samples, B batch, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Run = Callable[[nn.Module, Tensor], Tensor]  # runs what is tuned: (module, inputs (B, T, D)) -> outputs (B, T, D)


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
    num_layers: int = 1
    """Consecutive decoder layers that are tuned together once the last of them is pruned."""

    @property
    def is_on(self) -> bool:
        """Whether any layer is tuned."""
        return self.epochs_before + self.epochs_after > 0

    def calibration(self, ids: Tensor) -> Tensor:
        """Token ids (M, T) to calibrate with, from those of the calibration (N, T); `tune` gets the hidden states of these rows."""
        return ids

    def tune(self, index: int, layers: nn.ModuleList, run: Run, inputs: Rows, targets: Rows, num_epochs: int) -> dict[str, Any]:
        """Tune the weights of decoder layer `index`, or of several of which it is the last, in place, zeros excepted: from their `inputs`
        for the calibration towards the dense model's outputs `targets`, in all processes alike. Returns a report for the record."""
        raise NotImplementedError
