"""The decoder layers that are pruned but not yet final: they are tuned again together with the next one.

Letters: B batch, T tokens, D hidden.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from nnprune.engine import parallel
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_files import Carried
from nnprune.engine.layer_store import LayerStore
from nnprune.recovery import Recovery


def num_kept_states(recovery: Recovery, propagate: str) -> int:
    """How many hidden states of the calibration a window needs of its own."""
    if propagate == "dense" and recovery.is_on:  # where the calibration itself is taken on while inputs are collected
        return recovery.num_layers
    return int(recovery.num_layers > 1)


class Window:
    """Layers in order, and the hidden states of the calibration at the input of the first of them.

    Args:
        store: fetches the layers, which stay on the device until they are final.
        recovery: tunes them.
        calibration: at the input of the layer that is pruned next.
        reference: in the dense model, at the output of the layer pruned last; None where no layer is tuned.
        kept: hidden states of the same rows, to be overwritten: one that passes through the pruned layers, none for
            windows of one layer; as many as a window has layers if these get the outputs of dense layers.

    Attributes:
        reports: layer -> its report so far.
    """

    def __init__(
        self,
        store: LayerStore,
        recovery: Recovery,
        calibration: HiddenStates,
        reference: HiddenStates | None,
        kept: Sequence[HiddenStates] = (),
    ) -> None:
        self.store = store
        self.recovery = recovery
        self.calibration = calibration
        self.reference = reference
        self.reports: dict[int, dict[str, Any]] = {}
        self._kept = kept
        self._place = 0  # the layer at whose input the hidden states of pruned layers are

    @property
    def first(self) -> int:
        """The first layer."""
        return min(self.reports)

    @property
    def inputs(self) -> HiddenStates:
        """The hidden states at the input of the first layer."""
        return self._kept[self.first % len(self._kept)] if self._kept else self.calibration

    def open(self, index: int) -> None:
        """Add layer `index`, at whose input the calibration is."""
        if self._kept and (len(self._kept) > 1 or not self.reports):
            kept = self._kept[index % len(self._kept)].activations
            self.calibration.each_batch(kept.put)
            self._place = index
        self.reports[index] = {}

    def tune_dense(self, index: int, layer: nn.Module) -> dict[str, Any]:
        """Tune the layer that was added last before it is pruned. Returns the report of the recovery."""
        return self._tune([index], nn.ModuleList([layer]), self.calibration, self.recovery.epochs_before)

    def tune(self) -> dict[str, Any]:
        """Tune all layers. Returns the report of the recovery."""
        layers = nn.ModuleList([self.store.fetch(index) for index in self.reports])
        return self._tune(list(self.reports), layers, self.inputs, self.recovery.epochs_after)

    def _tune(self, indices: list[int], layers: nn.ModuleList, inputs: HiddenStates, num_epochs: int) -> dict[str, Any]:
        def run(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
            for index, layer in zip(indices, layers, strict=True):
                hidden = inputs.run(index, layer, hidden)
            return hidden

        is_last = indices[-1] == len(inputs.decoder.layers) - 1
        report = self.recovery.tune(indices[-1], layers, run, inputs, self.reference, num_epochs, is_last)
        for parameter in layers.parameters():
            parallel.broadcast(parameter.data)  # rounded otherwise where another device computed it
        for index in indices:
            self.store.round(index)
        return report

    def settle(self, is_last: bool) -> Iterator[tuple[int, dict[str, Any], Carried | None]]:
        """Remove the layers that are not tuned again: index, report, and what to keep beside of the layers that are left."""
        while self.reports and (is_last or len(self.reports) >= self.recovery.num_layers):
            index = self.first
            report = self.reports.pop(index)
            is_carrying = self.recovery.num_layers > 1
            yield index, report, (dict(self.reports), self.store.carried_state(list(self.reports))) if is_carrying else None

    def hand_on(self) -> None:
        """Take the calibration through the pruned layers, to the input of the next one, and `inputs` through those that are final."""
        last, states = max(self.reports), self._kept[0]
        layers = {index: self.store.fetch(index) for index in range(self._place, last + 1)}

        def step(rows: slice, hidden: Tensor) -> Tensor:
            for index, layer in layers.items():
                if index == self.first:
                    kept = hidden
                hidden = states.run(index, layer, hidden)
            self.calibration.activations.put(rows, hidden)
            return kept

        states.each_batch(step)
        self._place = self.first
