"""A uniform view of what can be pruned: a weight (O, I) and its inputs, whatever module holds it.

Letters: O output features, I input features.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


class WeightView:
    """The weight of an `nn.Linear`, or of GPT-2's `Conv1D`, which stores it transposed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return tuple(self.read().shape)

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return self.module.weight

    def within(self, parameter: Tensor) -> Tensor:
        """The weight (O, I) within a tensor laid out like `self.parameter`, such as one from a file. Shares its memory."""
        return parameter.t() if isinstance(self.module, Conv1D) else parameter

    def read(self) -> Tensor:
        """The weight (O, I), detached. Shares the parameter's memory."""
        return self.within(self.parameter.detach())

    def write(self, weight_OI: Tensor) -> None:
        """Overwrite the weight with `weight_OI` (O, I), converted to the parameter's dtype."""
        self.read().copy_(weight_OI)

    def observe(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see(X)` with the inputs X (tokens, I) of every forward, before the product. An exception in `see` ends the forward."""
        return self.module.register_forward_pre_hook(lambda _, args: see(args[0].detach().flatten(0, -2)))


def weight_views(layer: nn.Module, prefix: str) -> dict[str, WeightView]:
    """Full name -> view of every weight of a decoder layer that can be pruned, in order of definition. `prefix` is the layer's
    full name."""
    modules = layer.named_modules(prefix=prefix)
    return {name: WeightView(module) for name, module in modules if isinstance(module, nn.Linear | Conv1D)}
