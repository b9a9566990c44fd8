"""Splits a Hugging Face decoder-only model into embeddings and head, decoder layers, and linears, for any architecture.

The decoder layers are the one `nn.ModuleList` with `num_hidden_layers` entries. Each layer's arguments are recorded from the
model's own forward, and logits come from that forward with the layers bypassed, so that masks, rotary embeddings, final norm,
`project_out` and soft-capping need no code here.

Letters: B batch, T tokens, D hidden, O output features, I input features, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from nnprune.model.weight_views import WeightView, weight_views


class StopForward(Exception):
    """Ends a forward whose remaining layers are not needed."""


@dataclass
class LayerCall:
    """The arguments of a decoder layer besides the hidden states, for one shape of batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


AroundLayer = Callable[[int, Callable[..., Any], Tensor, LayerCall], Tensor]


class Decoder:
    """A causal language model as embeddings and head, decoder layers, and linears.

    Raises ValueError if its list of decoder layers is ambiguous, or for a mixture of experts.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str | None = None) -> None:
        self.model = model.eval()
        self.text_config = model.config.get_text_config()
        self.path, self.layers = _find_layers(model, layers_path)
        self._tuple_classes: dict[type[nn.Module], bool] = {}
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim > 2 or "expert" in name:
                raise ValueError(
                    f"model.path: {type(model).__name__} holds {self.path}.{name}, no weight of a linear: mixture-of-experts "
                    "and convolutional layers are not supported yet; choose a dense decoder-only model"
                )
        self._weights = [weight_views(layer, f"{self.path}.{index}") for index, layer in enumerate(self.layers)]

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary."""
        return self.text_config.vocab_size

    def weights(self, index: int) -> dict[str, WeightView]:
        """Full name -> weight that can be pruned, of decoder layer `index`, in order of definition."""
        return self._weights[index]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (O, I) of every linear of every decoder layer."""
        return {name: shape for layer in self.shapes_by_layer() for name, shape in layer.items()}

    def shapes_by_layer(self) -> list[dict[str, tuple[int, int]]]:
        """For each decoder layer: full name -> (O, I) of its linears."""
        return [{name: view.shape for name, view in views.items()} for views in self._weights]

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states (B, T, D) at the input of the first decoder layer, for ids (B, T)."""
        captured = []

        def stop(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
            captured.append(hidden)
            raise StopForward

        self._forward(ids, stop)
        if captured[0].ndim != 3:
            raise ValueError(
                f"model.path: {type(self.model).__name__} gives its decoder layers hidden states {tuple(captured[0].shape)} instead "
                "of (batch, tokens, features), which is not supported; choose another model"
            )
        return captured[0]

    def record_calls(self, ids: Tensor) -> list[LayerCall]:
        """The arguments of every decoder layer for ids (B, T), which may differ between layers, as in Gemma."""
        calls: list[LayerCall] = []

        def record(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
            calls.append(call)
            if len(calls) == len(self.layers):
                raise StopForward
            return hidden

        self._forward(ids, record)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"{self.path}: the model calls {len(calls)} of its {len(self.layers)} layers; set model.layers_path"
            )
        return calls

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits (B, T, V) for outputs (B, T, D) of the last decoder layer."""
        return self._forward(ids, lambda layer, ignored, call: hidden)

    def forward(self, ids: Tensor, around_layer: AroundLayer) -> Tensor:
        """The model's own logits (B, T, V), with `around_layer(index, layer_forward, hidden, call)` in place of each layer."""
        index = {layer: i for i, layer in enumerate(self.layers)}
        forwards = {layer: layer.forward for layer in self.layers}
        return self._forward(ids, lambda layer, hidden, call: around_layer(index[layer], forwards[layer], hidden, call))

    def _forward(self, ids: Tensor, replacement: Callable[[nn.Module, Tensor, LayerCall], Tensor]) -> Tensor | None:
        """The model's forward over ids with each layer's forward replaced; None if StopForward ended it."""

        def bind(layer: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, *rest = args or (kwargs.pop("hidden_states"),)
                as_tuple = self._returns_tuple(layer, hidden, tuple(rest), kwargs)
                output = replacement(layer, hidden, LayerCall(tuple(rest), kwargs))
                return (output, None) if as_tuple else output

            return forward

        for layer in self.layers:
            layer.forward = bind(layer)  # on the instance, so that attributes of the layer stay readable
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        except StopForward:
            return None
        finally:
            for layer in self.layers:
                del layer.forward

    def _returns_tuple(self, layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether layers of this class return a tuple: tested once by a forward on the meta device."""
        kind = type(layer)
        if kind not in self._tuple_classes:
            replaced = layer.__dict__.pop("forward")
            state = dict(layer.named_parameters()) | dict(layer.named_buffers())

            def to_meta(x: Tensor, computing: torch.dtype = hidden.dtype) -> Tensor:  # weights may be stored in another dtype
                return x.to("meta", computing if x.is_floating_point() else x.dtype)

            state, hidden, args, kwargs = tree_map_only(Tensor, to_meta, (state, hidden, args, kwargs))
            output = torch.func.functional_call(layer, state, (hidden, *args), kwargs)
            layer.forward = replaced
            self._tuple_classes[kind] = isinstance(output, tuple)
        return self._tuple_classes[kind]


def run_layer(layer: Callable[..., Any], hidden: Tensor, call: LayerCall) -> Tensor:
    """The outputs (B, T, D) of a decoder layer, or of its forward, for hidden states (B, T, D).

    The only place that knows what a layer returns: a tensor, or a tuple that starts with one. Raises ValueError if its shape
    differs from that of the input.
    """
    output = layer(hidden, *call.args, **call.kwargs)
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor) or output.shape != hidden.shape:
        found = f"{type(output).__name__} instead of hidden states {tuple(hidden.shape)}"
        raise ValueError(f"model.path: a decoder layer of it returns a {found}, so it is not supported; choose another model")
    return output


def _find_layers(model: PreTrainedModel, layers_path: str | None) -> tuple[str, nn.ModuleList]:
    if layers_path is not None:
        layers = dict(model.named_modules(remove_duplicate=False)).get(layers_path)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"model.layers_path={layers_path}: {type(model).__name__} has no list of layers of that name; name an nn.ModuleList"
            )
        return layers_path, layers
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found = [(name, layers) for name, layers in lists.items() if len(layers) == depth]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"model.path: {type(model).__name__}: expected one list of {depth} decoder layers, found {names}; set model.layers_path"
        )
    return found[0]
