"""A model seen as a row of decoder layers, one of which is on the device at a time.

Letters: N samples, T tokens.
"""

from pathlib import Path
from urllib.parse import quote

from torch import Tensor
from tqdm.auto import tqdm

from nnprune.engine import parallel
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_store import LayerStore
from nnprune.model.decoder import Decoder
from nnprune.runtime import Runtime


class LayerwiseEngine:
    """Keeps one decoder layer and one batch of hidden states on the device at a time.

    Args:
        decoder: the model.
        store: brings its layers to the device.
        runtime: tokens in a batch, and where hidden states are offloaded.
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

    def hidden_states(self, ids: Tensor, name: str) -> HiddenStates:
        """Hidden states that enter the first decoder layer, for ids (N, T); `name` tells them from others in use at the same time."""
        return HiddenStates(self.decoder, self.runtime, ids, self.scratch / f"activations-{_file_name(name)}.bin")

    @staticmethod
    def progress(total: int, title: str) -> tqdm:
        """A progress bar with time left, on a terminal; of several processes the first shows it."""
        return tqdm(total=total, desc=title, disable=True if parallel.rank() else None, leave=False)


def _file_name(name: str) -> str:
    """A name as part of one file's name, another for every name."""
    return quote(name, safe="")
