"""Calibration: the token ids that the model sees before pruning. Knows no model.

Letters: N samples (`num_samples`), T tokens of a sample (`seq_len`). Ids are int64 (N, T): full rows, no padding.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nnprune.checks import check_count, one_of, quoted
from nnprune.runtime import Runtime, available_host_bytes
from nnprune.texts import TextSource

MIN_TOKENS_PER_EXPERT = 256
ROUTES = ("own", "all")
ID_BYTES = 8  # int64
MEMORY_SHARE = 0.25  # that the ids may fill: the hidden states of as many tokens need far more


class Calibration:
    """N samples of T tokens, drawn with a seed. Raises ValueError for a setting out of range, or more ids than fit into memory.

    In mixtures of experts, `min_tokens_per_expert` is what an expert needs for statistics of its own, and `route` what it sees: its
    "own" tokens or "all" (see `Routing`).
    """

    source: TextSource | None = None

    needs_model = False
    """Whether only the first column of `token_ids` counts, and `write` gives the others."""

    def __init__(
        self, num_samples: int, seq_len: int, seed: int, min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT, route: str = "own"
    ) -> None:
        self.num_samples = check_count("calibration.num_samples", num_samples, 1)
        self.seq_len = check_count("calibration.seq_len", seq_len, 2)
        self.seed = check_count("calibration.seed", seed, 0)
        self.min_tokens_per_expert = check_count("calibration.min_tokens_per_expert", min_tokens_per_expert, 1)
        if route not in ROUTES:
            raise ValueError(f"calibration.route={quoted(route)}: must be {one_of(ROUTES)}")
        self.route = route
        most = int(MEMORY_SHARE * available_host_bytes()) // ID_BYTES
        if num_samples * seq_len > most:
            key, value = ("seq_len", seq_len) if seq_len > most else ("num_samples", num_samples)
            raise ValueError(
                f"calibration.{key}={value}: {num_samples} samples of {seq_len} tokens are more than the {most} token ids that fit "
                f"into {MEMORY_SHARE:.0%} of this machine's memory; lower calibration.{key}"
            )

    def check(self, runtime: Runtime) -> None:
        """Raise ValueError for what can be refused before anything is read."""

    def identity(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> dict[str, Any]:
        """What a fingerprint counts besides settings and files."""
        return {}

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        """The ids (N, T), int64, each below `vocab_size`."""
        raise NotImplementedError

    def write(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """The ids (N, T), int64, that the dense model writes after the first column of `ids`, if `needs_model`."""
        raise NotImplementedError


class RandomCalibration(Calibration):
    """Uniformly random token ids: pruning without any text."""

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.num_samples, self.seq_len), generator=generator)


class TextCalibration(Calibration):
    """Random windows of a text.

    mode "documents": each window lies within one document that is long enough, drawn anew for each sample, as in the C4 loader of
    SparseGPT and Wanda. "packed": windows at random places of the joined text, as in their WikiText-2 loader. The draws are those
    loaders' draws: the same seed gives the same windows. The other arguments are those of TextSource. Raises ValueError for an
    unknown mode; in `token_ids` for a text with no window of `seq_len` tokens.
    """

    def __init__(
        self,
        num_samples: int,
        seq_len: int,
        seed: int,
        min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT,
        route: str = "own",
        mode: str = "packed",
        **source: Any,
    ) -> None:
        super().__init__(num_samples, seq_len, seed, min_tokens_per_expert, route)
        if mode not in ("packed", "documents"):
            raise ValueError(f"calibration.mode={quoted(mode)}: must be packed or documents")
        self.mode = mode
        self.source = TextSource(key="calibration", **source)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        draw = self._draw_packed if self.mode == "packed" else self._draw_documents
        return draw(tokenizer, random.Random(self.seed))

    def _documents(self) -> Sequence[Any]:
        return self.source.documents()

    def _joined(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self.source.joined()

    def _ids(self, tokenizer: PreTrainedTokenizerBase, document: Any) -> Tensor:
        """The ids (tokens,), int64, of a document or of the joined text."""
        return torch.tensor(tokenizer(document).input_ids, dtype=torch.int64)

    def _draw_packed(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Tensor:
        ids = self._ids(tokenizer, self._joined(tokenizer))
        if len(ids) <= self.seq_len:
            raise ValueError(
                f"calibration.seq_len={self.seq_len}: the text has {len(ids)} tokens, fewer than one window and its "
                "next token; lower calibration.seq_len or give a longer text"
            )
        last = len(ids) - self.seq_len - 1  # the loaders leave the last possible window out
        starts = array("q", (rng.randint(0, last) for _ in range(self.num_samples)))
        return ids.unfold(0, self.seq_len, 1)[torch.frombuffer(starts, dtype=torch.int64)]

    def _draw_documents(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Tensor:
        documents = self._documents()
        too_short: set[int] = set()  # draws are with replacement: a short document is tokenised once
        rows = torch.empty(self.num_samples, self.seq_len, dtype=torch.int64)
        num_drawn = 0
        while num_drawn < self.num_samples:
            if len(too_short) == len(documents):
                raise ValueError(
                    f"calibration.seq_len={self.seq_len}: no document is longer than that; lower calibration.seq_len or "
                    "join documents with calibration.mode=packed"
                )
            index = rng.randint(0, len(documents) - 1)
            if index in too_short:
                continue
            ids = self._ids(tokenizer, documents[index])
            if len(ids) <= self.seq_len:
                too_short.add(index)
                continue
            start = rng.randint(0, len(ids) - self.seq_len - 1)
            rows[num_drawn] = ids[start : start + self.seq_len]
            num_drawn += 1
        return rows


def token_hash(ids: Tensor) -> str:
    """16 hexadecimal digits that identify token ids (N, T) by shape and content."""
    sha = hashlib.sha256(str(tuple(ids.shape)).encode())
    sha.update(ids.to(torch.int64).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
