"""Splits a Hugging Face decoder-only model into embeddings and head, decoder layers, and linears, for any architecture.

The decoder layers are the one `nn.ModuleList` with `num_hidden_layers` entries, in the text decoder where the model also sees images.
Each layer's arguments are recorded from the model's own forward, and logits come from that forward with the layers bypassed, so that
masks, rotary embeddings, final norm, `project_out` and soft-capping need no code here.

Letters: B batch, T tokens, D hidden, O output features, I input features, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from nnprune.model.left_alone import no_linears, shared, summarise
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

    Raises ValueError if its list of decoder layers is ambiguous, if it has no linear of its own, or for experts in one matrix.
    """

    def __init__(self, model: PreTrainedModel, layers_path: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)  # of what is tuned there is a copy
        self._experts = model.get_experts_implementation()
        model.set_experts_implementation("eager")  # one expert after the other, so that what each receives can be seen
        self.text_config = model.config.get_text_config()
        for config in (model.config, self.text_config):
            if getattr(config, "output_router_logits", False):  # for a loss over them, which is none where layers are replaced
                config.output_router_logits = False
        self.path, self.layers = _find_layers(model, layers_path)
        self.calls_depend_on_tokens = False  # arguments of the layers besides the hidden states: embeddings, say
        self._tuple_lengths: dict[type[nn.Module], int] = {}
        hidden_size = getattr(self.text_config, "hidden_size", None)
        self._weights = [weight_views(layer, f"{self.path}.{index}", hidden_size) for index, layer in enumerate(self.layers)]
        self._all_weights = self._weights
        viewed = {id(view.module) for views in self._weights for view in views.values()}
        for name, module in self.layers.named_modules():
            matrices = [one for one in module._parameters.values() if one is not None and one.ndim == 2]
            if "expert" in name and matrices and id(module) not in viewed and not isinstance(module, nn.Linear):
                reason = f"holds the weights of all experts in the matrices of {self.path}.{name}, which is not supported"
                remedy = "choose a model whose experts are separate"
                raise ValueError(f"model.path: {type(model).__name__} {reason}; {remedy}")
        self.left_alone = no_linears(self.path, self.layers, self._weights)
        """Full name of each matrix of the layers that is not pruned, `*` for all that have it -> why."""
        self.leave_alone(shared(self.path, self.layers, self._weights))

    @contextmanager
    def chosen_experts(self) -> Iterator[None]:
        """Experts are computed by what transformers chooses, whose inputs cannot be seen."""
        self.model.set_experts_implementation(self._experts)
        try:
            yield
        finally:
            self.model.set_experts_implementation("eager")

    @property
    def vocab_size(self) -> int:
        """V, the size of the vocabulary."""
        return self.text_config.vocab_size

    def weights(self, index: int) -> dict[str, WeightView]:
        """Full name -> weight that can be pruned, of decoder layer `index`, in order of definition."""
        return self._weights[index]

    def all_weights(self, index: int) -> dict[str, WeightView]:
        """As `weights`, with those that `keep` has left out."""
        return self._all_weights[index]

    def all_shapes_by_layer(self) -> list[dict[str, tuple[int, int]]]:
        """As `shapes_by_layer`, with those that `keep` has left out."""
        return [{name: view.shape for name, view in views.items()} for views in self._all_weights]

    def keep(self, names: Set[str]) -> None:
        """Leave out all weights but those of these full names: they stay as they are, and nothing is collected for them."""
        self._weights = [{name: view for name, view in views.items() if name in names} for views in self._all_weights]

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full name -> (O, I) of every linear of every decoder layer."""
        return {name: shape for layer in self.shapes_by_layer() for name, shape in layer.items()}

    def shapes_by_layer(self) -> list[dict[str, tuple[int, int]]]:
        """For each decoder layer: full name -> (O, I) of its linears."""
        return [{name: view.shape for name, view in views.items()} for views in self._weights]

    @property
    def largest(self) -> int:
        """The first of the decoder layers with most weights."""
        sizes = [sum(math.prod(shape) for shape in layer.values()) for layer in self.all_shapes_by_layer()]
        return sizes.index(max(sizes))

    def kinds(self) -> list[int]:
        """For each decoder layer the first one of its kind: of the same class and type, with parameters of the same names and shapes."""
        types = dict(enumerate(getattr(self.text_config, "layer_types", None) or ()))
        first: dict[tuple, int] = {}
        parameters = [tuple((name, one.shape) for name, one in layer.named_parameters()) for layer in self.layers]
        return [first.setdefault((types.get(i), type(self.layers[i]), parameters[i]), i) for i in range(len(self.layers))]

    def leave_alone(self, reasons: Mapping[str, str]) -> None:
        """Take the linears in `reasons`, full name -> why, out of `weights`. Raises ValueError if none is left."""
        self.left_alone |= summarise(self.path, reasons, list(self.shapes()))
        self._weights = [{name: view for name, view in views.items() if name not in reasons} for views in self._weights]
        self._all_weights = self._weights
        if not any(self._weights):
            why = "; ".join(f"{name} is {reason}" for name, reason in self.left_alone.items())
            raise ValueError(
                f"model.path: {type(self.model).__name__} has no linear that can be pruned ({why}); choose another model"
            )

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

    @torch.no_grad()
    def record_calls(self, ids: Tensor) -> list[LayerCall]:
        """The arguments of every decoder layer for ids (B, T), which may differ between layers, as in Gemma. Raises ValueError when text
        does not pass through all layers."""
        calls: list[LayerCall] = []

        def record(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
            calls.append(call)
            if len(calls) == len(self.layers):
                raise StopForward
            return hidden

        self._forward(ids, record)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"model.path: {type(self.model).__name__} calls {len(calls)} of its {len(self.layers)} layers {self.path} for text, so "
                "it is not supported; set model.layers_path if these are not its decoder layers"
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
                as_tuple = self._length_of_tuple(layer, hidden, tuple(rest), kwargs)
                output = replacement(layer, hidden, LayerCall(tuple(rest), kwargs))
                return (output, *[None] * (as_tuple - 1)) if as_tuple else output

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

    def _length_of_tuple(self, layer: nn.Module, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> int:
        """How many values layers of this class return in a tuple, 0 for a bare tensor: found once by a forward on the meta device or,
        where what is computed depends on values, with weights of zero."""
        kind = type(layer)
        if kind not in self._tuple_lengths:
            replaced = layer.__dict__.pop("forward")
            state = dict(layer.named_parameters()) | dict(layer.named_buffers())

            def to_meta(x: Tensor) -> Tensor:  # weights may be stored in another dtype
                return x.to("meta", hidden.dtype if x.is_floating_point() else x.dtype)

            arguments = ((hidden, *args), kwargs)
            meta = tree_map_only(Tensor, to_meta, (state, *arguments))
            try:
                output = torch.func.functional_call(layer, *meta)
            except (NotImplementedError, RuntimeError):
                zeros = {name: torch.zeros_like(x, device=hidden.device) for name, x in meta[0].items()}
                output = torch.func.functional_call(layer, zeros, *arguments)
            finally:
                layer.forward = replaced
            self._tuple_lengths[kind] = len(output) if isinstance(output, tuple) else 0
        return self._tuple_lengths[kind]


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
    if len(found) > 1:  # a vision tower may be as deep as the text decoder
        text_modules = set(model.get_decoder().modules())
        found = [(name, layers) for name, layers in found if layers in text_modules]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(
            f"model.path: {type(model).__name__}: expected one list of {depth} decoder layers, found {names}; set model.layers_path"
        )
    return found[0]
