"""Which linears of a decoder layer share an input, found by looking at what they receive.

Letters: I input features.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from nnprune.checks import is_finite
from nnprune.engine.experts import with_all_experts
from nnprune.engine.hidden_states import HiddenStates
from nnprune.model.weight_views import WeightView

PROBE_TOKENS = 8  # of the forward that shows which linears share an input
NONFINITE_WEIGHT = "{}: its weight holds NaN or infinite values; the checkpoint is damaged, get it again"
NONFINITE_INPUTS = "{}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16"


def input_groups(weights: dict[str, WeightView], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the linears that receive the same input tensor (q, k and v; gate and up), in order of use.

    Inputs are compared by identity in one forward of the decoder layer, where values do not matter. It need not reach all experts
    of a mixture. Raises ValueError for another linear that it never reaches.
    """
    groups: dict[tuple, list[str]] = {}
    alive: list[Tensor] = []  # a freed input's address could be reused by the next one

    def note(name: str, X: Tensor) -> None:
        alive.append(X)
        names = groups.setdefault((X.data_ptr(), X.shape, X.stride(), X._version), [])
        if name not in names:
            names.append(name)

    with observed(weights, note):
        forward()
    found = with_all_experts(list(groups.values()), weights)
    if unused := set(weights) - {name for names in found for name in names}:
        raise ValueError(f"{min(unused)}: never receives an input, so it cannot be pruned with this model's own forward")
    return found


def layer_groups(states: HiddenStates, index: int, layer: nn.Module) -> list[list[str]]:
    """The `input_groups` of decoder layer `index`, fetched as `layer`, which is run on a few tokens, of its linears that are chosen."""
    chosen, weights = states.decoder.weights(index), states.decoder.all_weights(index)
    if not chosen:
        return []
    groups = input_groups(
        weights, lambda: states.run(index, layer, states.probe(PROBE_TOKENS))
    )  # of all: it reaches some experts
    return [kept for names in groups if (kept := [name for name in names if name in chosen])]


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the linear, for NaN or infinity in its weight."""
    if not is_finite(weight):
        raise ValueError(NONFINITE_WEIGHT.format(name))


@contextmanager
def refuse_nonfinite(weights: dict[str, WeightView]) -> Iterator[None]:
    """Raise ValueError, naming the linear, for NaN or infinity in `weights` or, in forwards inside, in their inputs."""
    for name, weight in weights.items():
        check_weight(name, weight.read())

    def check(name: str, X: Tensor) -> None:
        if not is_finite(X):
            raise ValueError(NONFINITE_INPUTS.format(name))

    with observed(weights, check):
        yield


@contextmanager
def observed(weights: Mapping[str, WeightView], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, X)` with the inputs X (tokens, I) of each weight in forwards inside."""
    handles = [weight.observe(partial(see, name)) for name, weight in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
