"""Experts of a mixture whose weights are slices of 3-D parameters: where they are, and what each of them receives.

No architecture is known by name. The product of such a slice with its inputs is seen where PyTorch computes it, in whatever code
that is.

Letters: E experts, O output features, I input features.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

OPERANDS = {
    **dict.fromkeys((linear, torch.matmul, torch.mm, torch.bmm), (0, 1)),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), (0, 1)),
    **dict.fromkeys((torch.addmm, torch.baddbmm), (1, 2)),
}
"""What may multiply inputs with a weight, and the places of the two among its arguments."""

See = Callable[[Tensor], None]


class Experts(TorchFunctionMode):
    """The 3-D parameters of a module, (E, O, I) or (E, I, O), and who sees the inputs of which expert.

    While somebody does, the module's forward runs in this mode, which shows inputs before their product.
    """

    def __init__(self, module: nn.Module, hidden_size: int | None) -> None:
        super().__init__()
        self.module = module
        self.names = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.ndim == 3]
        shapes = [tuple(module._parameters[name].shape) for name in self.names]
        self.size = shapes[0][0]
        self.is_transposed = _is_transposed(module, shapes, hidden_size)
        self.shows_all_tokens = False  # every expert sees every token, not just those routed to it; outputs stay the same
        self._see: dict[tuple[str, int], list[See]] = {}

    def weights(self, parameter: Tensor) -> Tensor:
        """A tensor laid out like one of the parameters as (E, O, I). Shares its memory."""
        return parameter.mT if self.is_transposed else parameter

    def add(self, name: str, index: int, see: See) -> None:
        """Call `see(X)` with the inputs X (tokens, I) of expert `index` in the parameter `name`, when there are any."""
        if not self._see:
            forward = self.module.forward
            self.module.forward = lambda *args, **kwargs: self._forward(forward, args, kwargs)  # hides the class's own
        self._see.setdefault((name, index), []).append(see)

    def remove(self, name: str, index: int, see: See) -> None:
        """Stop what `add` started."""
        self._see[name, index].remove(see)
        if not any(self._see.values()):
            self._see.clear()
            del self.module.forward

    @property
    def is_told_routes(self) -> bool:
        """Whether the forward takes hidden states, the experts of each token, and their weights, as transformers' own classes do."""
        return len(inspect.signature(type(self.module).forward).parameters) >= 4 or hasattr(self.module, "is_transposed")

    def _forward(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.shows_all_tokens:
            hidden, indices, weights = inspect.signature(forward).bind(*args, **kwargs).args
            for index in range(self.size):
                with self:
                    forward(hidden, torch.full_like(indices[:, :1], index), torch.ones_like(weights[:, :1]))
            return forward(*args, **kwargs)
        with self:
            return forward(*args, **kwargs)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in OPERANDS and len(args) > OPERANDS[func][1]:
            X, weight = (args[place] for place in OPERANDS[func])
            self._show(X, weight if func is linear else weight.mT)
        return func(*args, **kwargs or {})

    def _show(self, X: Tensor, weight: Tensor) -> None:
        """Show X (..., I) if `weight` (O, I), or (E, O, I), is that of an expert, or of all."""
        storage = weight.untyped_storage().data_ptr()
        for name in self.names:
            all_weights = self.weights(self.module._parameters[name].detach())
            if storage != all_weights.untyped_storage().data_ptr() or weight.shape[-2:] != all_weights.shape[1:]:
                continue
            if weight.stride()[-2:] != all_weights.stride()[1:]:
                continue
            if weight.ndim == 2:
                index, inside = divmod(weight.storage_offset() - all_weights.storage_offset(), all_weights.stride(0))
                if not inside:
                    self._call(name, index, X.detach().flatten(0, -2))
            elif len(weight) == len(X) == self.size:
                for index, inputs in enumerate(X.detach()):
                    self._call(name, index, inputs[inputs.any(-1)])  # rows of zeros pad, or stand for other experts' tokens

    def _call(self, name: str, index: int, X: Tensor) -> None:
        for see in self._see.get((name, index), ()) if len(X) else ():
            see(X)


def experts_in(layer: nn.Module, prefix: str, hidden_size: int | None) -> Iterator[tuple[str, Experts]]:
    """Full name of a module within a decoder layer -> its experts. `prefix` is the layer's full name, `hidden_size` that between
    layers."""
    for name, module in layer.named_modules(prefix=prefix):
        if not isinstance(module, _ConvNd) and any(one is not None and one.ndim == 3 for one in module._parameters.values()):
            yield name, Experts(module, hidden_size)


def _is_transposed(module: nn.Module, shapes: list[tuple[int, ...]], hidden_size: int | None) -> bool:
    """Whether parameters are (E, I, O): as transformers says or, where it does not, by the first one, whose inputs are hidden states,
    and the last one, whose outputs are. The products that `Experts` sees prove it."""
    if isinstance(told := getattr(module, "is_transposed", None), bool):
        return told
    (_, rows, columns), (_, last_rows, last_columns) = shapes[0], shapes[-1]
    return rows == hidden_size == last_columns and (columns, last_rows) != (hidden_size, hidden_size)
