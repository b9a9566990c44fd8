"""The hidden states of token rows as they pass through the decoder layers.

Letters: N samples, B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nnprune.engine import parallel
from nnprune.engine.hidden_buffer import HiddenBuffer
from nnprune.engine.logits import compare_logits, tokens_of_logits
from nnprune.model.decoder import Decoder, LayerCall, run_layer
from nnprune.recovery.base import Compare
from nnprune.runtime import Runtime


class HiddenStates:
    """The hidden states of rows of ids, replaced layer by layer. A context manager that frees their memory.

    With several processes each holds its share of the rows.

    Args:
        decoder: the model.
        runtime: the device, tokens per batch, and where hidden states are offloaded.
        ids: token ids (N, T).
        path: the mapped file for hidden states offloaded to disk.
        whole: rank 0 holds all rows.
    """

    def __init__(self, decoder: Decoder, runtime: Runtime, ids: Tensor, path: Path, whole: bool = False) -> None:
        self.decoder = decoder
        self.runtime = runtime
        self.device = runtime.torch_device
        first = decoder.embed(ids[:1].to(self.device))
        self.shape = (*ids.shape, first.shape[-1])
        self.share = parallel.share(len(ids), whole)  # of this rank
        self.ids = ids[self.share]
        shape = (len(self.ids), *self.shape[1:])
        self.activations = HiddenBuffer(shape, first.dtype, runtime, path)
        self.rows: slice | list[int] = slice(0, 0)  # of `ids`, that are on the device
        self.batch = slice(0, 0)  # those that `each_batch` handed out last
        self._calls: dict[torch.Size, list[LayerCall]] = {}
        self._each_batch(lambda rows: self.activations.put(rows, decoder.embed(self.ids[rows].to(self.device))))

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(self, *_: object) -> None:
        self.activations.close()

    def run(self, index: int, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The outputs (B, T, D) of decoder layer `index`, fetched as `layer`, for a batch of hidden states (B, T, D): the one that
        `each_batch` hands out, or those that were probed or picked last."""
        shape = hidden.shape[:2]
        if self.decoder.calls_depend_on_tokens:
            call = self.decoder.record_calls(self.ids[self.rows, : shape[1]].to(self.device))[index]
            return run_layer(layer, hidden, call)
        if shape not in self._calls:  # without padding only the shape of the ids matters
            self._calls[shape] = self.decoder.record_calls(torch.zeros(shape, dtype=torch.int64, device=self.device))
        return run_layer(layer, hidden, self._calls[shape][index])

    def probe(self, num_tokens: int) -> Tensor:
        """Hidden states (1, tokens, D) to run a layer on when values do not matter, but for not being zero: that is what some models
        give an expert for tokens of others."""
        like, self.rows = self.activations.tensor, slice(0, 1)
        token = torch.linspace(-1, 1, like.shape[-1], dtype=like.dtype, device=self.device)
        return token.repeat(1, min(num_tokens, self.ids.shape[1]), 1)

    def pick(self, rows: Sequence[int]) -> Tensor:
        """The hidden states (B, T, D) of those of `rows` that this process holds, in that order, on the device."""
        start, stop = self.share.start, self.share.stop
        self.rows = [row - start for row in rows if start <= row < stop]
        return self.activations.pick(self.rows)

    def total(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place, and return it."""
        return parallel.all_reduce(tensor)

    def each_batch(self, step: Callable[[slice, Tensor], Tensor | None], split: int = 0) -> None:
        """Call `step(rows, hidden)` for every batch of hidden states (B, T, D), and replace them by what it returns, if anything. No batch
        holds both the first `split` rows, or some of them, and others.

        When the device runs out of memory, the batch size is halved and the same rows are tried again.
        """

        def replace(rows: slice) -> None:
            self.rows = self.batch = rows
            output = step(rows, self.activations.get(rows))
            if output is not None:
                self.activations.put(rows, output)

        self._each_batch(replace, split)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Take all rows through decoder layer `index`, fetched as `layer`."""
        self.each_batch(lambda rows, hidden: self.run(index, layer, hidden))

    def logits(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Logits after the last decoder layer, as (row, slice of its tokens, logits (tokens, V)), for all tokens of all rows.

        Only a few are alive at a time: they are the largest tensors of a small model.
        """
        num_rows, seq_len = self.ids.shape
        step = tokens_of_logits(self.device, seq_len, self.decoder.vocab_size)
        for row in range(num_rows):
            ids, hidden = self.ids[row : row + 1].to(self.device), self.activations.get(slice(row, row + 1))
            for start in range(0, seq_len, step):  # after the layers, tokens are independent
                tokens = slice(start, min(start + step, seq_len))
                yield row, tokens, self.decoder.logits(ids[:, tokens], hidden[:, tokens])[0]

    def compare_logits(self, compare: Compare, outputs: Tensor, dense: Tensor) -> Tensor:
        """The sum of what `compare` finds over the tokens of the rows picked last, for outputs (B, T, D) of the last decoder layer and
        those of the dense model; float32 ()."""
        return compare_logits(self.decoder, compare, self.ids[self.rows].to(self.device), outputs, dense)

    def _each_batch(self, step: Callable[[slice], None], split: int = 0) -> None:
        num_rows, seq_len = self.ids.shape
        start = 0
        while start < num_rows:
            stop = split if start < split else num_rows
            rows = slice(start, min(start + self.runtime.rows_per_batch(seq_len), stop, num_rows))
            try:
                step(rows)
            except torch.OutOfMemoryError:
                if rows.stop - rows.start == 1:
                    raise
                self.runtime.halve_batches(seq_len)
                continue  # out of the except block, where the traceback would keep the failed attempt's tensors alive
            start = rows.stop
