"""A uniform view of what can be pruned: a weight (O, I) and its inputs, whatever module holds it.

Letters: E experts, O output features, I input features.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nnprune.model.experts import Experts, experts_in


class Handle(NamedTuple):
    """Ends what it was returned for."""

    remove: Callable[[], None]


class Expert(NamedTuple):
    """Which of a mixture's experts a weight belongs to, and which of the expert's weights it is."""

    mixture: str
    number: int
    part: str

    @property
    def name(self) -> str:
        """The full name of the weight."""
        return ".".join(filter(None, (self.mixture, str(self.number), self.part)))


class WeightView:
    """The weight of an `nn.Linear`, or of GPT-2's `Conv1D`, which stores it transposed.

    `key` is the name of the tensor that holds it, in the model's state dict; `expert` is None outside mixtures.
    """

    def __init__(self, module: nn.Module, key: str = "", expert: Expert | None = None) -> None:
        self.module, self.key, self.expert = module, key, expert

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return tuple(self.read().shape)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), detached, sharing its memory; None where there is none, and for an expert's slice of a 3-D parameter."""
        bias = self.module.bias
        return None if bias is None else bias.detach()

    def within(self, parameter: Tensor) -> Tensor:
        """The weight (O, I) within a tensor laid out like `self.parameter`, such as one from a file. Shares its memory."""
        return parameter.t() if isinstance(self.module, Conv1D) else parameter

    def read(self) -> Tensor:
        """The weight (O, I), detached. Shares the parameter's memory."""
        return self.within(self.parameter.detach())

    def tensors(self) -> list[Tensor]:
        """What pruning may change: the weight (O, I) and the bias, if there is one. They share the parameters' memory."""
        return [tensor for tensor in (self.read(), self.bias) if tensor is not None]

    def write(self, weight_OI: Tensor) -> None:
        """Overwrite the weight with `weight_OI` (O, I), converted to the parameter's dtype."""
        self.read().copy_(weight_OI)

    def observe(self, see: Callable[[Tensor], None]) -> Handle:
        """Call `see(X)` with the inputs X (tokens, I) of every forward, before the product: of an expert, those routed to it. An
        exception in `see` ends the forward."""
        hook = self.module.register_forward_pre_hook(lambda _, args: see(args[0].detach().flatten(0, -2)))
        return Handle(hook.remove)


class ExpertView(WeightView):
    """The weight of one expert within a 3-D parameter, by its `name` in the module that holds it."""

    def __init__(self, experts: Experts, name: str, key: str, expert: Expert) -> None:
        super().__init__(experts.module, key, expert)
        self.experts, self.name = experts, name

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.name]

    @property
    def bias(self) -> None:
        return None

    def within(self, parameter: Tensor) -> Tensor:
        return self.experts.weights(parameter)[self.expert.number]

    def observe(self, see: Callable[[Tensor], None]) -> Handle:
        self.experts.add(self.name, self.expert.number, see)
        return Handle(partial(self.experts.remove, self.name, self.expert.number, see))


def weight_views(layer: nn.Module, prefix: str, hidden_size: int | None = None) -> dict[str, WeightView]:
    """Full name -> view of every weight of a decoder layer that can be pruned, in order of definition. Routers are left alone.

    `prefix` is the layer's full name; `hidden_size`, that of the model, tells how experts are laid out where their class does not.
    """
    modules = dict(layer.named_modules(prefix=prefix))
    mixtures = dict(experts_in(layer, prefix, hidden_size))
    lists = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 1}
    sizes = {name: experts.size for name, experts in mixtures.items()} | {name: len(module) for name, module in lists.items()}
    views: dict[str, WeightView] = {}
    for name, module in modules.items():
        if name in mixtures:
            views |= {view.expert.name: view for view in _views_of_experts(name, mixtures[name])}
        elif isinstance(module, nn.Linear | Conv1D):
            view = WeightView(module, f"{name}.weight", _expert_in_list(name, lists))
            if view.expert or not _is_router(name, view.shape[0], sizes, prefix):
                views[name] = view
    return views


def _views_of_experts(name: str, experts: Experts) -> list[ExpertView]:
    parts = {one: "" if one == "weight" else one for one in experts.names}
    return [
        ExpertView(experts, one, f"{name}.{one}", Expert(name, number, part))
        for number in range(experts.size)
        for one, part in parts.items()
    ]


def _expert_in_list(name: str, lists: dict[str, nn.ModuleList]) -> Expert | None:
    """What the linear `name` is in a list of experts, if it is in one."""
    for mixture in lists:
        if name.startswith(f"{mixture}."):
            number, _, part = name.removeprefix(f"{mixture}.").partition(".")
            return Expert(mixture, int(number), part)
    return None


def _is_router(name: str, num_outputs: int, sizes: dict[str, int], prefix: str) -> bool:
    """Whether a linear decides which experts of a mixture, by name and size, compute, or how much an expert that always computes
    counts: it has an output for each, and stands beside them."""
    parents = {name.rsplit(".", level)[0] for level in (1, 2)} - {prefix}
    is_beside = any(mixture.startswith(f"{parent}.") for mixture in sizes for parent in parents)
    return num_outputs in {1, *sizes.values()} and bool(sizes) and (is_beside or "router" in name)
