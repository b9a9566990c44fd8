"""The layer-wise engine: a model, where its decoder layers rest, and the gate that both must pass.

Letters: N samples, B batch, T tokens, D hidden.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import refuse_nonfinite
from nnprune.engine.layer_store import LayerStore
from nnprune.model.decoder import Decoder, LayerCall, run_layer
from nnprune.runtime import Runtime


class LayerwiseEngine:
    """One decoder layer and one batch of activations on the device at a time.

    Args:
        decoder: the model.
        store: brings its layers to the device.
        runtime: tokens in a batch, and where activations rest.
        scratch: folder for mapped files.
    """

    def __init__(self, decoder: Decoder, store: LayerStore, runtime: Runtime, scratch: Path) -> None:
        self.decoder = decoder
        self.store = store
        self.runtime = runtime
        self.scratch = scratch
        self.device = runtime.torch_device

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.decoder.layers)

    def stream(self, ids: Tensor, name: str) -> HiddenStates:
        """Hidden states that enter the first decoder layer, for ids (N, T); `name` is their own among those alive."""
        return HiddenStates(self.decoder, self.runtime, ids, self.scratch / f"activations-{name}.bin")

    @staticmethod
    def progress(total: int, title: str) -> tqdm:
        """A progress bar with time left, on a terminal."""
        return tqdm(total=total, desc=title, disable=None, leave=False)

    @torch.no_grad()
    def check_model(self) -> None:
        """The gate before any long work, on a batch of two: layer by layer must give what `model(ids)` gives, and no
        token may see a later one. Where layers rest on disk, one of each kind and the last stand for all.

        Raises:
            ValueError: the model does not fit the layer-wise engine, is not causal, or holds NaN.
        """
        generator = torch.Generator().manual_seed(0)
        seen, ids = torch.randint(self.decoder.vocab_size, (2, 2, 16), generator=generator).to(self.device)
        ids[1, :8] = ids[0, :8]
        calls = self.decoder.record_calls(seen)
        hidden = self.decoder.embed(ids)
        checked = self._layers_to_check()

        def both(index: int, layer_forward: Callable, own_hidden: Tensor, call: LayerCall) -> Tensor:
            nonlocal hidden
            if index not in checked:
                return own_hidden
            self.store.fetch(index, pruned=False)
            with refuse_nonfinite(self.decoder.linears(index)):
                own_output = run_layer(layer_forward, own_hidden, call)
            hidden = run_layer(layer_forward, hidden, calls[index])
            self.store.release(index)
            return own_output

        own = self.decoder.forward(ids, both)
        name = type(self.decoder.model).__name__
        if not _agree(own, self.decoder.logits(ids, hidden)):
            raise ValueError(f"{name}: its layers, run one by one, do not give the model's own logits; it is not supported")
        if not _agree(own[0, :8], own[1, :8]):
            raise ValueError(f"{name}: its tokens see later ones, so it is no causal language model; choose another model.path")

    def _layers_to_check(self) -> set[int]:
        if self.store.rest != "disk":
            return set(range(self.num_layers))
        kinds = getattr(self.decoder.text_config, "layer_types", None) or ["decoder layer"] * self.num_layers
        return {kinds.index(kind) for kind in kinds} | {self.num_layers - 1}


def _agree(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding of their dtype; NaNs are for the check of each linear to report."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    scale = float(first.nan_to_num().abs().max())
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)
