"""Hidden states of rows of token ids, taken through the decoder layers one after the other.

Letters: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from nnprune.engine.hidden_buffer import HiddenBuffer
from nnprune.model.decoder import Decoder, LayerCall, run_layer
from nnprune.runtime import Runtime

CPU_LOGITS = 1 << 23
"""Logits at a time on a CPU: few enough for the cache, and enough tokens for a fast product."""


def tokens_of_logits(device: torch.device, seq_len: int, vocab_size: int) -> int:
    """Tokens of a row whose logits are computed at once: all on CUDA, on a CPU not more than 64 for V beyond 131 072."""
    return seq_len if device.type == "cuda" else min(max(CPU_LOGITS // vocab_size, 64), seq_len)


class HiddenStates:
    """The hidden states of some rows of ids, replaced layer by layer. A context manager that frees their memory.

    Args:
        decoder: the model.
        runtime: the device, tokens in a batch, and where hidden states are offloaded.
        ids: token ids (N, T).
        path: the file for hidden states that are offloaded to disk.
    """

    def __init__(self, decoder: Decoder, runtime: Runtime, ids: Tensor, path: Path) -> None:
        self.decoder = decoder
        self.runtime = runtime
        self.ids = ids
        self.device = runtime.torch_device
        first = decoder.embed(ids[:1].to(self.device))
        shape = (*ids.shape, first.shape[-1])
        self.activations = HiddenBuffer(shape, first.dtype, self.device, runtime.activations, path)
        self.rows = slice(0, 0)  # those that `each_batch` is at
        self._calls: dict[torch.Size, list[LayerCall]] = {}
        self._each_batch(lambda rows: self.activations.put(rows, decoder.embed(ids[rows].to(self.device))))

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(self, *_: object) -> None:
        self.activations.close()

    def run(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """What leaves decoder layer `index`, fetched as `layer`, for the hidden states (B, T, D) of a batch."""
        shape = hidden.shape[:2]
        if shape not in self._calls:  # without padding only the shape of the ids matters
            self._calls[shape] = self.decoder.record_calls(torch.zeros(shape, dtype=torch.int64, device=self.device))
        return run_layer(layer, hidden, self._calls[shape][index])

    def probe(self, num_tokens: int) -> Tensor:
        """Hidden states (1, tokens, D) without meaning, to see how a layer works."""
        width = self.activations.tensor.shape[-1]
        return torch.zeros(
            1, min(num_tokens, self.ids.shape[1]), width, dtype=self.activations.tensor.dtype, device=self.device
        )

    def each_batch(self, step: Callable[[slice, Tensor], Tensor | None]) -> None:
        """Call `step(rows, hidden)` for every batch of hidden states (B, T, D), which are replaced by what it returns, if anything.

        When the device runs out of memory, the same rows are tried again in two halves, and later batches are that small.
        """

        def replace(rows: slice) -> None:
            self.rows = rows
            output = step(rows, self.activations.get(rows))
            if output is not None:
                self.activations.put(rows, output)

        self._each_batch(replace)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Take all rows through decoder layer `index`, fetched as `layer`."""
        self.each_batch(lambda rows, hidden: self.run(index, layer, hidden))

    def logits(self) -> Iterator[tuple[int, slice, Tensor]]:
        """A row, some of its tokens, and their logits (tokens, V) after the last decoder layer, for all tokens of all rows.

        They are the largest tensors of a small model, so there are few at a time.
        """
        num_rows, seq_len = self.ids.shape
        step = tokens_of_logits(self.device, seq_len, self.decoder.vocab_size)
        for row in range(num_rows):
            ids, hidden = self.ids[row : row + 1].to(self.device), self.activations.get(slice(row, row + 1))
            for start in range(0, seq_len, step):  # what follows the layers sees each token alone
                tokens = slice(start, min(start + step, seq_len))
                yield row, tokens, self.decoder.logits(ids[:, tokens], hidden[:, tokens])[0]

    def _each_batch(self, step: Callable[[slice], None]) -> None:
        num_rows, seq_len = self.ids.shape
        start = 0
        while start < num_rows:
            rows = slice(start, min(start + self.runtime.rows_per_batch(seq_len), num_rows))
            try:
                step(rows)
            except torch.OutOfMemoryError:
                if rows.stop - rows.start == 1:
                    raise
                self.runtime.halve_batches(seq_len)
                continue  # out here nothing of the failed attempt is alive
            start = rows.stop
