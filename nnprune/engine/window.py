"""The decoder layers that are pruned but not yet final: they are tuned again together with the next one.

Letters: B batch, T tokens, D hidden.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_store import LayerStore


class Window:
    """Layers in order, and the hidden states of the calibration at the input of the first of them.

    Args:
        store: fetches the layers, which stay on the device until they are final.
        calibration: at the input of the layer that is pruned next.
        kept: hidden states of the same rows, to be overwritten. None for windows of one layer; one to be taken through the pruned
            layers; as many as a window has layers if these get the outputs of dense layers.

    Attributes:
        reports: layer -> its report so far.
    """

    def __init__(self, store: LayerStore, calibration: HiddenStates, kept: Sequence[HiddenStates] = ()) -> None:
        self.store = store
        self.calibration = calibration
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
            self.calibration.each_batch(lambda rows, hidden: kept.put(rows, hidden))
            self._place = index
        self.reports[index] = {}

    def fetch(self) -> nn.ModuleList:
        """The layers, on the device."""
        return nn.ModuleList([self.store.fetch(index) for index in self.reports])

    def run(self, layers: nn.ModuleList, hidden: Tensor) -> Tensor:
        """The outputs (B, T, D) of `layers`, those of the window or a copy, for a batch (B, T, D) that was picked from `inputs`."""
        for index, layer in zip(self.reports, layers, strict=True):
            hidden = self.inputs.run(index, layer, hidden)
        return hidden

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
