"""The perplexities of one model on its texts, those that an interrupted run has measured included."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.evaluation import perplexity
from nnprune.records import write_atomically


class Measurement:
    """What is still to be measured, on its way through the layers.

    Args:
        kind: "dense" or "pruned", for messages.
        ids: text name -> windows (N, T).
        folder: keeps what is measured until the record is written.
    """

    def __init__(self, kind: str, ids: dict[str, Tensor], folder: Path) -> None:
        self.kind = kind
        self.ids = ids
        self.journal = folder / f"{kind}_metrics.json"
        self.metrics: dict[str, float] = {}
        if self.journal.exists():
            self.metrics = json.loads(self.journal.read_text(encoding="utf-8"))
        self._streams: dict[str, HiddenStates] = {}

    @contextmanager
    def streams(self, engine: LayerwiseEngine) -> Iterator[list[HiddenStates]]:
        """The windows of all texts that are not measured yet, before the first layer."""
        with ExitStack() as stack:
            for name, ids in self.ids.items():
                if _key(name) not in self.metrics:
                    self._streams[name] = stack.enter_context(engine.stream(ids, f"{self.kind}-{name}"))
            yield list(self._streams.values())
            self._streams.clear()

    def finish(self) -> dict[str, float]:
        """`<text>_perplexity` -> its value, once all streams went through all layers. Each is kept as soon as it is known."""
        for name, stream in self._streams.items():
            self.metrics[_key(name)] = perplexity(stream, f"{self.kind} {name} perplexity")
            write_atomically(self.journal, json.dumps(self.metrics))
        return {_key(name): self.metrics[_key(name)] for name in self.ids}


def _key(name: str) -> str:
    return f"{name}_perplexity"
