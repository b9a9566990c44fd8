"""The consistency check at the start of every run: run layer by layer, the model must give its own logits.

Letters: B batch, T tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nnprune.engine.called_linears import Calls, leave_uncalled_alone, noting_calls
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.input_groups import refuse_nonfinite
from nnprune.model.decoder import LayerCall, run_layer

CHECKED_IN_FULL = 8
"""Decoder layers up to which all are compared."""


@torch.no_grad()
def check_consistency(engine: LayerwiseEngine) -> None:
    """Compare the layer-wise forward with `model(ids)` on a batch of two, and check that no token sees a later one.

    Of a deep model, or with layers on disk, only the first layer of each kind, the middle one and the last one are compared. Linears
    that the model does not call once for each token are left alone from here on, which is logged.

    Raises:
        ValueError: the model does not fit the layer-wise engine, is not causal, holds NaN, or has no linear that can be pruned.
    """
    decoder, store, name = engine.decoder, engine.store, type(engine.decoder.model).__name__
    generator = torch.Generator().manual_seed(0)
    recorded_ids, ids = torch.randint(decoder.vocab_size, (2, 2, 16), generator=generator).to(store.device)
    ids[1, :8] = ids[0, :8]
    hidden = decoder.embed(ids)
    name = type(decoder.model).__name__
    checked = _layers_to_check(engine)
    # Each layer gets arguments of its own, as in a run: what it would leave in them for a later one is lost.
    calls = {index: decoder.record_calls(recorded_ids)[index] for index in checked}
    own_calls = {index: decoder.record_calls(ids)[index] for index in checked}
    noted: dict[int, Calls] = {}

    def run_both(index: int, layer_forward: Callable, model_hidden: Tensor, call: LayerCall) -> Tensor:
        nonlocal hidden
        if index not in checked:
            return model_hidden
        store.fetch(index, pruned=False)
        with refuse_nonfinite(decoder.weights(index)), noting_calls(decoder.weights(index)) as noted[index]:
            model_output = run_layer(layer_forward, model_hidden, call)
        if any(weight.expert for weight in decoder.weights(index).values()):
            with decoder.chosen_experts():
                if not _agree(model_output, run_layer(layer_forward, model_hidden, call)):
                    raise ValueError(
                        f"{name}: its experts, one by one, do not give layer {index}'s own outputs; it is not supported"
                    )
        if not _same_arguments(calls[index], own_calls[index]):
            decoder.calls_depend_on_tokens = True
        if not _same_arguments(call, own_calls[index]):
            raise ValueError(f"{name}: its layers hand each other more than hidden states; it is not supported")
        try:
            hidden = run_layer(layer_forward, hidden, own_calls[index] if decoder.calls_depend_on_tokens else calls[index])
        except (LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{name}: its layer {index} cannot be run by itself ({error!r}); it is not supported") from error
        store.release(index)
        return model_output

    logits = decoder.forward(ids, run_both)
    if not _agree(logits, decoder.logits(ids, hidden)):
        raise ValueError(f"{name}: its layers, run one by one, do not give the model's own logits; it is not supported")
    if not _agree(logits[0, :8], logits[1, :8]):
        raise ValueError(f"{name}: its tokens see later ones, so it is no causal language model; choose another model.path")
    leave_uncalled_alone(decoder, noted, ids.numel())


def _layers_to_check(engine: LayerwiseEngine) -> set[int]:
    num_layers = engine.num_layers
    if num_layers <= CHECKED_IN_FULL and engine.store.offload != "disk":
        return set(range(num_layers))
    return {*engine.decoder.kinds(), num_layers // 2, num_layers - 1}


def _same_arguments(one: LayerCall, other: LayerCall) -> bool:
    """Whether all tensors that two calls of a layer pass are equal."""
    both = [tree_leaves((call.args, call.kwargs)) for call in (one, other)]
    tensors, others = ([leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in both)
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether tensors are equal up to the rounding of their dtype. NaNs agree: the check of each linear reports them."""
    tolerance = 1e-4 if first.dtype == torch.float32 else 2e-2
    scale = float(first.nan_to_num().abs().max())
    return torch.allclose(first, second, rtol=0, atol=tolerance * scale, equal_nan=True)
