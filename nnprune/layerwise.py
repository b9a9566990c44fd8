"""The loop over decoder layers: one of them and one batch of activations on the device at a time.

Letters: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nnprune.activations import Activations
from nnprune.decoder import Decoder, LayerCall, StopForward, run_layer
from nnprune.inputs import refuse_nonfinite
from nnprune.layerstore import LayerStore
from nnprune.runtime import Runtime


class LayerwiseEngine:
    """Streams token ids through the decoder layers.

    Args:
        decoder: the model.
        store: brings its layers to the device.
        runtime: batch size, and where activations rest.
        scratch: folder for mapped files.
    """

    def __init__(self, decoder: Decoder, store: LayerStore, runtime: Runtime, scratch: Path) -> None:
        self.decoder = decoder
        self.store = store
        self.runtime = runtime
        self.scratch = scratch
        self.device = runtime.torch_device
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}

    @contextmanager
    def embedded(self, ids: Tensor) -> Iterator[Activations]:
        """The hidden states that enter the first decoder layer, for ids (N, T), in a buffer to be streamed through layers."""
        first = self.decoder.embed(ids[:1].to(self.device))
        shape = (*ids.shape, first.shape[-1])
        path = self.scratch / "activations.bin"
        activations = Activations(shape, first.dtype, self.device, self.runtime.activations, path)
        try:
            for rows in self.batches(len(ids)):
                activations.put(rows, self.decoder.embed(ids[rows].to(self.device)))
            yield activations
        finally:
            activations.close()

    def batches(self, num_rows: int) -> list[slice]:
        """Consecutive rows, at most `batch_size` at once."""
        size = self.runtime.batch_size
        return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]

    def call(self, index: int, batch_size: int, seq_len: int) -> LayerCall:
        """What decoder layer `index` is called with for ids (B, T): without padding only their shape matters."""
        shape = (batch_size, seq_len)
        if shape not in self._calls:
            self._calls[shape] = self.decoder.record_calls(torch.zeros(shape, dtype=torch.int64, device=self.device))
        return self._calls[shape][index]

    def stream(
        self, index: int, layer: nn.Module, activations: Activations, put: bool, step: Callable[[], object] = lambda: None
    ) -> None:
        """Run a fetched layer over all rows, and with `put` overwrite them by its outputs. `step()` is called a batch."""
        for rows in self.batches(len(activations)):
            hidden = activations.get(rows)
            try:
                output = run_layer(layer, hidden, self.call(index, *hidden.shape[:2]))
                if put:
                    activations.put(rows, output)
            except StopForward:  # someone who watched the layer's linears had seen enough
                pass
            step()

    def logits(self, ids: Tensor, pruned: bool, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of ids (1, T) with their logits (1, T, V), from finished layers if `pruned` and there are any."""
        with self.embedded(ids) as activations:
            num_layers = len(self.decoder.layers)
            with self.progress(num_layers * len(self.batches(len(ids))), title) as bar:
                for index in range(num_layers):
                    self.stream(index, self.store.fetch(index, pruned), activations, put=True, step=bar.update)
                    self.store.release(index)
            for row in range(len(ids)):  # one at a time: logits are the largest tensors of a small model
                row_ids = ids[row : row + 1].to(self.device)
                yield row_ids, self.decoder.logits(row_ids, activations.get(slice(row, row + 1)))

    @staticmethod
    def progress(total: int, title: str) -> tqdm:
        """A progress bar with time left, on a terminal."""
        return tqdm(total=total, desc=title, disable=None, leave=False)

    @torch.no_grad()
    def check_model(self) -> None:
        """The gate before any long work, on a batch of two: layer by layer must give what `model(ids)` gives, and no
        token may see a later one.

        Raises:
            ValueError: the model does not fit the layer-wise engine, is not causal, or holds NaN.
        """
        generator = torch.Generator().manual_seed(0)
        seen, ids = torch.randint(self.decoder.vocab_size, (2, 2, 16), generator=generator).to(self.device)
        ids[1, :8] = ids[0, :8]
        calls = self.decoder.record_calls(seen)
        hidden = self.decoder.embed(ids)

        def both(index: int, layer_forward: Callable, own_hidden: Tensor, call: LayerCall) -> Tensor:
            nonlocal hidden
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


def _agree(first: Tensor, second: Tensor) -> bool:
    """Equal up to rounding of their dtype; NaNs are for the check of each linear to report."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    scale = float(first.nan_to_num().abs().max())
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)
