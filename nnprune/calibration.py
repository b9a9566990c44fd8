"""Calibration: the token ids shown to the model before pruning. No model.

Letters: N samples (`num_samples`), T tokens (`seq_len`). Ids are int64 (N, T): full rows, no padding.
"""

import hashlib
import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nnprune.checks import check_count
from nnprune.texts import TextSource


class Calibration:
    """What all calibrations share: how many rows of how many tokens, drawn with which seed."""

    source: TextSource | None = None

    def __init__(self, num_samples: int, seq_len: int, seed: int) -> None:
        check_count("calibration.num_samples", num_samples, 1)
        check_count("calibration.seq_len", seq_len, 2)
        check_count("calibration.seed", seed, 0)
        self.num_samples = num_samples
        self.seq_len = seq_len
        self.seed = seed

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        """The ids (N, T)."""
        raise NotImplementedError


class RandomCalibration(Calibration):
    """Uniformly random token ids: what pruning does without any text."""

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab_size, (self.num_samples, self.seq_len), generator=generator)


class TextCalibration(Calibration):
    """Random windows of a text.

    mode "documents": a window within one document that is long enough, drawn anew for each sample, as the C4 loader of
    SparseGPT and Wanda does; "packed": windows at random places of the joined text, as their WikiText-2 loader does.
    The draws are those loaders' draws: the same seed gives the same windows. The other arguments are TextSource's.
    """

    def __init__(self, num_samples: int, seq_len: int, seed: int, mode: str = "packed", **source: Any) -> None:
        super().__init__(num_samples, seq_len, seed)
        if mode not in ("packed", "documents"):
            raise ValueError(f"calibration.mode={mode}: must be packed or documents")
        self.mode = mode
        self.source = TextSource(key="calibration", **source)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        rng = random.Random(self.seed)
        draw = self._packed if self.mode == "packed" else self._documents
        return torch.tensor(draw(tokenizer, rng), dtype=torch.int64)

    def _packed(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[list[int]]:
        ids = tokenizer(self.source.joined()).input_ids
        if len(ids) <= self.seq_len:
            raise ValueError(
                f"calibration.seq_len={self.seq_len}: the text has {len(ids)} tokens, fewer than one window and its "
                "next token; lower calibration.seq_len or give a longer text"
            )
        starts = [rng.randint(0, len(ids) - self.seq_len - 1) for _ in range(self.num_samples)]
        return [ids[start : start + self.seq_len] for start in starts]

    def _documents(self, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[list[int]]:
        documents = self.source.documents()
        too_short: set[int] = set()  # draws are with replacement; no document is tokenised twice in vain
        rows: list[list[int]] = []
        while len(rows) < self.num_samples:
            if len(too_short) == len(documents):
                raise ValueError(
                    f"calibration.seq_len={self.seq_len}: no document is longer than that; lower calibration.seq_len or "
                    "join documents with calibration.mode=packed"
                )
            index = rng.randint(0, len(documents) - 1)
            if index in too_short:
                continue
            ids = tokenizer(documents[index]).input_ids
            if len(ids) <= self.seq_len:
                too_short.add(index)
                continue
            start = rng.randint(0, len(ids) - self.seq_len - 1)
            rows.append(ids[start : start + self.seq_len])
        return rows


def token_hash(ids: Tensor) -> str:
    """16 hexadecimal digits that name token ids (N, T) by shape and content."""
    sha = hashlib.sha256(str(tuple(ids.shape)).encode())
    sha.update(ids.to(torch.int64).contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
