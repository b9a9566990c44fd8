"""Calibration by token ids from files, tokenised by another program."""

import random
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nnprune.calibration import MIN_TOKENS_PER_EXPERT, Calibration
from nnprune.texts import TextSource, check_ids


class TokenCalibration(Calibration):
    """Rows of token ids, each drawn at most once, in the order of the files; of a longer row a random window of `seq_len` tokens.

    As many rows of exactly `seq_len` tokens as samples are thus the calibration as it is. The other arguments are those of TextSource.
    Raises ValueError in `token_ids` for too few rows that are long enough, or an id that the model does not have.
    """

    def __init__(
        self,
        num_samples: int,
        seq_len: int,
        seed: int,
        min_tokens_per_expert: int = MIN_TOKENS_PER_EXPERT,
        route: str = "own",
        column: str = "input_ids",
        **source: Any,
    ) -> None:
        super().__init__(num_samples, seq_len, seed, min_tokens_per_expert, route)
        self.source = TextSource(key="calibration", column=column, **source)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        rows, rng = self.source.rows(), random.Random(self.seed)
        drawn: dict[int, Tensor] = {}
        for index in rng.sample(range(len(rows)), len(rows)):
            if len(row := rows[index]) >= self.seq_len:
                start = rng.randint(0, len(row) - self.seq_len)
                drawn[index] = torch.tensor(row[start : start + self.seq_len], dtype=torch.int64)
            if len(drawn) == self.num_samples:
                break
        else:
            raise ValueError(
                f"calibration.num_samples={self.num_samples}: of {len(rows)} rows, {len(drawn)} have calibration.seq_len={self.seq_len} "
                "tokens or more; lower one of the two, or give more rows"
            )
        ids = torch.stack([drawn[index] for index in sorted(drawn)])
        check_ids(f"calibration.column={self.source.column}", ids, vocab_size)
        return ids
