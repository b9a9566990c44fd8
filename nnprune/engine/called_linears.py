"""Finds the linears whose inputs are not seen by observing their forward: the model uses their weights, if at all, without calling them, as
a fused kernel does, or calls them otherwise than once for each token. They are left alone.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from nnprune.engine.experts import pool_key
from nnprune.engine.input_groups import observed
from nnprune.model.decoder import Decoder
from nnprune.model.left_alone import CALLED_OTHERWISE, NOT_CALLED
from nnprune.model.weight_views import WeightView

log = logging.getLogger(__name__)

Calls = dict[str, list[int]]
"""Name of a linear -> tokens that it received in each call."""


@contextmanager
def noting_calls(weights: Mapping[str, WeightView]) -> Iterator[Calls]:
    """The calls of `weights` in forwards inside."""
    calls: Calls = {name: [] for name in weights}
    with observed(weights, lambda name, X: calls[name].append(len(X))):
        yield calls


def leave_uncalled_alone(decoder: Decoder, calls: Mapping[int, Calls], num_tokens: int) -> None:
    """Leave alone the linears that were not called once with all `num_tokens` tokens in their layer or, if that was not run, in the
    first one of its kind, and log what is left alone. Raises ValueError if no linear remains."""
    reasons = {}
    for index, first in enumerate(decoder.kinds()):
        shown = index if index in calls else first
        prefix, shown_prefix = f"{decoder.path}.{index}.", f"{decoder.path}.{shown}."
        reached = {pool_key(view.expert) for name, view in decoder.weights(shown).items() if view.expert and calls[shown][name]}
        for name, view in decoder.weights(index).items():
            shown_name = shown_prefix + name.removeprefix(prefix)
            received = calls[shown][shown_name]
            if view.expert:  # a few tokens do not reach all experts of a mixture
                if pool_key(decoder.weights(shown)[shown_name].expert) not in reached:
                    reasons[name] = NOT_CALLED
            elif received != [num_tokens]:
                reasons[name] = CALLED_OTHERWISE if received else NOT_CALLED
    decoder.leave_alone(reasons)
    for reason in sorted(set(decoder.left_alone.values())):
        log.info("left alone: %s (%s)", ", ".join(name for name, why in decoder.left_alone.items() if why == reason), reason)
