"""Finds the linears whose weights the model uses, if at all, without calling them: in a fused kernel, say. They are left alone, because
nothing is known of their inputs.
"""

import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager

from nnprune.model.decoder import Decoder
from nnprune.model.left_alone import NOT_CALLED
from nnprune.model.weight_views import WeightView

log = logging.getLogger(__name__)


@contextmanager
def noting_calls(weights: Mapping[str, WeightView], called: set[str]) -> Iterator[None]:
    """Add to `called` the names of those of `weights` that forwards inside call."""
    with ExitStack() as stack:
        for name, view in weights.items():
            stack.callback(view.observe(lambda _, name=name: called.add(name)).remove)
        yield


def leave_uncalled_alone(decoder: Decoder, called: Mapping[int, Set[str]]) -> None:
    """Leave alone the linears that are not among those `called` in their layer or, if that was not run, in the first one of its kind,
    and log what is left alone. Raises ValueError if no linear remains."""
    uncalled = []
    for index, first in enumerate(decoder.kinds()):
        shown = index if index in called else first
        own = {name.removeprefix(f"{decoder.path}.{shown}.") for name in called[shown]}
        prefix = f"{decoder.path}.{index}."
        uncalled += [name for name in decoder.weights(index) if name.removeprefix(prefix) not in own]
    decoder.leave_alone(dict.fromkeys(uncalled, NOT_CALLED))
    for reason in sorted(set(decoder.left_alone.values())):
        log.info("left alone: %s (%s)", ", ".join(name for name, why in decoder.left_alone.items() if why == reason), reason)
