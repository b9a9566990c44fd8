"""Distillation: the tuning of all decoder layers at once towards the dense model's logits."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from nnprune.checks import check_count
from nnprune.recovery.base import Compare, Recovery, Rows
from nnprune.recovery.divergence import divergence
from nnprune.recovery.tuning import MAX_EPOCHS, EachEpoch, Tuning


class Model(Protocol):
    """The pruned model beside the outputs of the dense one; its embeddings, final norm and head are the dense model's."""

    @property
    def calibration(self) -> Rows:
        """What the model is tuned on."""

    def compare(self, compare: Compare, layers: nn.Module, rows: Sequence[int]) -> Tensor:
        """The sum of what `compare` finds over all tokens of those of `rows` that this process holds, with `layers`, float32, in place of
        the pruned model's; float32 ()."""


class Distillation(Recovery):
    """Tunes the weights of all decoder layers together with Adam, zeros fixed, towards the dense model's logits.

    Loss: the mean over tokens of KL(dense || pruned) over the vocabulary (see `divergence`).
    Embeddings, final norm and head stay as they are. The weights of the epoch with the lowest loss on held-out sequences are kept, or
    the initial ones. Raises ValueError for a setting out of range.

    Unlike all other methods it holds the whole model, with gradients and Adam's moments, on the device.

    Args:
        epochs: passes over the calibration.
        lr, batch_tokens, holdout: see Tuning.
        layers: a recovery that tunes each decoder layer before; None: none.
    """

    def __init__(
        self,
        epochs: int,
        lr: float = 0.003,
        batch_tokens: int = 1024,
        holdout: float = 0.125,
        layers: Recovery | None = None,
    ) -> None:
        self.epochs = check_count("recover.epochs", epochs, 1, MAX_EPOCHS)
        self.tuning = Tuning(lr, batch_tokens, holdout)
        self.batch_tokens = batch_tokens
        self.layers = layers or Recovery()
        if not isinstance(self.layers, Recovery) or isinstance(self.layers, Distillation):
            raise ValueError(
                "recover.layers: must be a recovery of decoder layers; choose recover=layer_model, or null for none"
            )

    def tune_model(self, layers: nn.Module, model: Model, each_epoch: EachEpoch) -> dict[str, Any]:
        """Tune the weights of all decoder `layers` in place, zeros excepted, in all processes alike. Returns a report for the record:
        the held-out loss before and after, and the epoch that was kept."""
        seq_len = model.calibration.shape[1]

        def loss(layers: nn.Module, rows: Sequence[int]) -> Tensor:
            return model.compare(divergence, layers, rows) / (len(rows) * seq_len)

        return self.tuning.run(layers, loss, model.calibration, self.epochs, seed=0, each_epoch=each_epoch)
