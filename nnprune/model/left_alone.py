"""What the decoder layers hold that is not pruned, and why: convolutions, decays, weights that layers share."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from nnprune.model.weight_views import WeightView

NO_LINEAR = "a router, or not the weight of a linear"
SHARED = "shared by several decoder layers"
NOT_CALLED = "not called by the model's own forward"
CALLED_OTHERWISE = "not called exactly once for each token"


def summarise(path: str, reasons: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """`reasons`, full name -> why, with one entry, `path.*.name`, for what has the same reason in all decoder layers that hold it.

    `names` are the full names of all that the layers of the list `path` hold.
    """

    def own(name: str) -> str:
        return name.removeprefix(f"{path}.").partition(".")[2]

    holding = Counter(map(own, names))
    agreeing = Counter((own(name), reason) for name, reason in reasons.items())
    return {
        f"{path}.*.{own(name)}" if agreeing[own(name), reason] == holding[own(name)] else name: reason
        for name, reason in reasons.items()
    }


def no_linears(path: str, layers: nn.ModuleList, weights: Sequence[Mapping[str, WeightView]]) -> dict[str, str]:
    """Summarised reasons for the parameters of the layers that have more than one dimension and are not among `weights`."""
    seen = {id(view.parameter) for views in weights for view in views.values()}
    matrices = {f"{path}.{name}": one for name, one in layers.named_parameters() if sum(size > 1 for size in one.shape) > 1}
    return summarise(path, {name: NO_LINEAR for name, one in matrices.items() if id(one) not in seen}, matrices)


def shared(path: str, layers: nn.ModuleList, weights: Sequence[Mapping[str, WeightView]]) -> dict[str, str]:
    """Full name -> reason, for the linears of more than one layer: pruned for one of them, their weights would be so for all."""
    uses = Counter(id(one) for layer in layers for one in layer.parameters())
    return {name: SHARED for views in weights for name, view in views.items() if uses[id(view.parameter)] > 1}
