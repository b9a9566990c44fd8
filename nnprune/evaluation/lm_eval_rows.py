"""lm-eval's requests as token rows, and its view of a model whose answers to them are known. Imports lm-eval.

A request is a context and a continuation, and what follows in a row does not change what precedes. So rows are padded on the right to
one of a few lengths, and requests with the same tokens up to the last one share a row, such as the choices "yes" and "no".

Letters: N rows, T tokens of a row, V vocabulary.
"""

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator_utils import get_sample_size
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedTokenizerBase

from nnprune.evaluation.base import Logits

Answers = dict[int, tuple[float, bool]]
"""Number of a request -> log-likelihood of its continuation, and whether that is what greedy decoding gives."""

PADDING = 0


def padded_length(length: int) -> int:
    """T of a row of `length` tokens: four lengths between a power of two and the next, so that a tenth is padding on average."""
    step = 1 << max(length.bit_length() - 3, 2)
    return -(-length // step) * step


class RequestRows(TemplateLM):
    """Collects requests as rows, and answers them once `answers` is set. Tokens are those of lm-eval's `hf` model.

    Args:
        tokenizer: the model's.
        max_length: tokens of the longest row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, max_length
        self.answers: Answers | None = None
        self._numbers: dict[bytes, dict[tuple[int, tuple[int, ...]], int]] = {}  # row -> (start, continuation) -> number
        self._num_requests = 0

    def collect(self, tasks: Iterable[Task], limit: float | None) -> None:
        """Make the requests of tasks, and a row of each."""
        requests: dict[str, list[Instance]] = defaultdict(list)
        for task in tasks:
            task.build_all_requests(limit=get_sample_size(task, limit))
            for instance in task.instances:
                requests[instance.request_type].append(instance)
        for kind, instances in requests.items():
            getattr(self, kind)(instances)

    def ids(self) -> list[Tensor]:
        """The rows (N, T) of each length T, int64."""
        by_length: dict[int, list[bytes]] = defaultdict(list)
        for row in self._numbers:
            by_length[len(row)].append(row)
        rows = (by_length[length] for length in sorted(by_length))
        return [torch.frombuffer(bytearray(b"".join(one)), dtype=torch.int32).view(len(one), -1).long() for one in rows]

    def score(self, ids: Tensor, logits: Logits) -> Answers:
        """The answers to the requests of rows `ids` (N, T)."""
        requests = [self._numbers[row.numpy().tobytes()] for row in ids.int()]
        sums: dict[int, Tensor] = {}
        greedy: dict[int, Tensor] = {}
        for row, tokens, scores in logits:
            for (start, continuation), number in requests[row].items():
                first, last = max(start, tokens.start), min(start + len(continuation), tokens.stop)
                if first < last:
                    wanted = torch.tensor(continuation[first - start : last - start], device=scores.device)
                    there = scores[first - tokens.start : last - tokens.start].float()
                    found = log_softmax(there, -1).gather(1, wanted[:, None]).sum()
                    is_greedy = (there.argmax(-1) == wanted).all()
                    sums[number] = sums[number] + found if number in sums else found
                    greedy[number] = greedy[number] & is_greedy if number in greedy else is_greedy
        values, flags = torch.stack(list(sums.values())).tolist(), torch.stack(list(greedy.values())).tolist()
        return dict(zip(sums, zip(values, flags, strict=True), strict=True))

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            answers = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(value for value, _ in answers))
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("token rows generate no text")  # refused before any are made

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        return [self._answer(context + continuation, continuation) for _, context, continuation in requests]

    def _answer(self, tokens: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The answer to the request for `continuation`, the end of `tokens`, or anything until answers are known."""
        if len(continuation) > self.max_length:
            reason = f"a request is for {len(continuation)} tokens at once"
            raise ValueError(f"evaluation.max_length={self.max_length}: {reason}; raise it, or leave its task out")
        if not continuation:
            return 0.0, True
        tokens = tokens[-self.max_length - 1 : -1]
        padding = min(padded_length(len(tokens)), self.max_length) - len(tokens)
        row = array("i", [*tokens, *[PADDING] * padding]).tobytes()
        of_row = self._numbers.setdefault(row, {})
        number = of_row.setdefault((len(tokens) - len(continuation), tuple(continuation)), self._num_requests)
        self._num_requests += number == self._num_requests
        if self.answers is None:
            return 0.0, False
        if number not in self.answers:
            raise ValueError("evaluation.tasks: a task makes other requests each time, so it cannot be measured; leave it out")
        return self.answers[number]
