"""Calibration by text that the dense model writes (Williams et al. 2024, arXiv:2410.17170: self-calibration)."""

import logging
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from nnprune.calibration import Calibration
from nnprune.checks import check_count, check_positive, quoted
from nnprune.runtime import Runtime

log = logging.getLogger(__name__)


class SelfCalibration(Calibration):
    """N samples of T tokens that the model continues from a first token, each drawn from its own distribution.

    A sample goes on after an end of text: rows are full. The same settings give the same ids on the same machine.

    Args:
        num_samples: N.
        seq_len: T, with the first token.
        seed: of the draws.
        temperature: of the distribution; 1 is the model's own.
        first_token: bos, the tokenizer's beginning of text; random, a uniformly random token each; None: bos if there is one.
        batch_size: samples written together, which the draws depend on.

    Raises:
        ValueError: a setting out of range. From `check`: layers on disk. From `token_ids`: no beginning of text. From `write`: a model
            that can't generate, or too little device memory.
    """

    needs_model = True

    def __init__(
        self,
        num_samples: int,
        seq_len: int,
        seed: int,
        temperature: float = 1.0,
        first_token: Literal["bos", "random"] | None = None,
        batch_size: int = 16,
        **experts: Any,
    ) -> None:
        super().__init__(num_samples, seq_len, seed, **experts)
        self.temperature = check_positive("calibration.temperature", temperature)
        self.batch_size = check_count("calibration.batch_size", batch_size, 1)
        if first_token not in ("bos", "random", None):
            raise ValueError(f"calibration.first_token={quoted(first_token)}: must be bos, random or null")
        self.first_token = first_token

    def check(self, runtime: Runtime) -> None:
        if runtime.layers == "disk":
            raise ValueError(
                "calibration=self: the whole model must be in memory to write its text, runtime.layers=disk keeps it on disk; set "
                "runtime.layers=host, or choose another calibration"
            )

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
        """The ids (N, T) before `write`: first tokens, and zeros."""
        ids = torch.zeros(self.num_samples, self.seq_len, dtype=torch.int64)
        bos = tokenizer.bos_token_id
        if self.first_token == "bos" and bos is None:
            raise ValueError("calibration.first_token=bos: the model's tokenizer has no beginning of text; set it to random")
        if self.first_token == "random" or bos is None:
            generator = torch.Generator().manual_seed(self.seed)
            ids[:, 0] = torch.randint(min(len(tokenizer), vocab_size), (self.num_samples,), generator=generator)
        else:
            ids[:, 0] = bos
        return ids

    @torch.no_grad()
    def write(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        """The ids (N, T), int64, that the model writes after the first column of `ids`. Replaces its settings of generation."""
        if not model.can_generate():
            raise ValueError(f"calibration=self: {type(model).__name__} can't generate text; choose another calibration")
        model.generation_config = GenerationConfig(
            do_sample=True, temperature=self.temperature, top_k=0, top_p=1.0, max_new_tokens=self.seq_len - 1
        )
        written: list[Tensor] = []
        device = model.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(self.seed)
                for first in ids[:, :1].split(self.batch_size):
                    log.info("calibration: sample %d of %d", len(written) * self.batch_size + 1, self.num_samples)
                    first = first.to(device)
                    written.append(model.generate(first, attention_mask=torch.ones_like(first)).cpu())
        except torch.OutOfMemoryError as error:
            key = f"calibration.batch_size={self.batch_size}"
            raise ValueError(f"{key}: the device ran out of memory while the model wrote its text; lower it") from error
        return torch.cat(written)
