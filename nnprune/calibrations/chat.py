"""Calibration by conversations, as the model's chat template writes them."""

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nnprune.calibration import TextCalibration
from nnprune.checks import quoted
from nnprune.texts import Conversation

TODAY = datetime(2024, 7, 26)
"""The date that templates write as today's, so that the text is the same on any day: Llama 3's have this one where they are told none."""

STRFTIME_NOW = (
    "{% macro strftime_now(layout) %}{{ layout"
    + "".join(f"|replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in "aAbBdHIjmMpSUwWyY")
    + " }}{% endmacro %}{{ '' }}"
)
"""In place of the function that transformers gives to templates; it takes no other."""


class ChatCalibration(TextCalibration):
    """Random windows of conversations, drawn like those of a text: mode "packed" joins them, "documents" stays within one.

    Each conversation is written by the chat template of the model's tokenizer, with the template's own special tokens and no others.
    The arguments are those of TextCalibration. Raises ValueError for a tokenizer without a template, already in `identity`; in
    `token_ids` also for a conversation that the template refuses.
    """

    def identity(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> dict[str, Any]:
        return {"chat_template": hashlib.sha256(_template(tokenizer()).encode()).hexdigest()[:16]}

    def _documents(self) -> Sequence[Conversation]:
        return self.source.conversations()

    def _joined(self, tokenizer: PreTrainedTokenizerBase) -> str:
        return self.source.separator.join(_rendered(tokenizer, one) for one in self.source.conversations())

    def _ids(self, tokenizer: PreTrainedTokenizerBase, document: str | Conversation) -> Tensor:
        text = document if isinstance(document, str) else _rendered(tokenizer, document)
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.int64)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that is used for conversations without tools."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise ValueError(
            "calibration=chat: the model's tokenizer has no chat template; choose a chat model, or calibration=text with a column of "
            "text"
        ) from None


def _rendered(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    template = _template(tokenizer)
    if "strftime_now" in template:
        template = STRFTIME_NOW + template
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, chat_template=template)
    except Exception as error:  # a template is a program that may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"calibration.path: the model's chat template refuses {quoted(conversation)} ({quoted(reason)}); take it out"
        ) from error
