"""A model as a sequence of decoder layers, one of which is on the device at a time.

Letters: N samples, T tokens.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from torch import Tensor
from tqdm.auto import tqdm

from nnprune.engine import parallel
from nnprune.engine.experts import Routing
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.layer_store import LayerStore
from nnprune.model.decoder import Decoder
from nnprune.runtime import Runtime


@dataclass(eq=False)
class LayerwiseEngine:
    """Holds one decoder layer and one batch of hidden states on the device at a time.

    Args:
        decoder: the model.
        store: fetches and releases its layers.
        runtime: tokens per batch, and where hidden states are offloaded.
        scratch: folder for mapped files.
        routing: which tokens experts are calibrated with.
    """

    decoder: Decoder
    store: LayerStore
    runtime: Runtime
    scratch: Path
    routing: Routing = Routing()  # noqa: RUF009 -- frozen

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self.decoder.layers)

    def hidden_states(self, ids: Tensor, name: str, whole: bool = False) -> HiddenStates:
        """Hidden states at the input of the first decoder layer, for ids (N, T); `name` must differ among those alive.

        Several processes share them out, unless they are to stay `whole`.
        """
        path = self.scratch / f"activations-{quote(name, safe='')}.bin"
        return HiddenStates(self.decoder, self.runtime, ids, path, whole)

    @staticmethod
    def progress(total: int, title: str) -> tqdm:
        """A progress bar with time left, on a terminal and in the first process only; none if TQDM_DISABLE is set."""
        is_off = parallel.rank() or os.environ.get("TQDM_DISABLE")
        return tqdm(total=total, desc=title, disable=True if is_off else None, leave=False)
