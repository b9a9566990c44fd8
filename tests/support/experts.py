"""Inputs of the linears of a mixture by plain loops over a whole model's forward: the reference for what the engine shows."""

import torch
from torch import Tensor, nn

from nnprune.model.decoder import Decoder


@torch.no_grad()
def plain_inputs(decoder: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """Name of each linear -> its inputs (tokens, I) in one forward of the dense model, of an expert those routed to it."""
    seen: dict[str, Tensor] = {}
    views = {view.key: view for index in range(len(decoder.layers)) for view in decoder.weights(index).values()}
    handles = []
    for name, module in decoder.model.named_modules():
        if f"{name}.weight" in views and isinstance(module, nn.Linear):
            handles.append(
                module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, -2)}))
            )
        elif any(
            parameter.ndim == 3 and f"{name}.{one}" in views
            for one, parameter in module._parameters.items()
            if parameter is not None
        ):
            see = _split if hasattr(module, "input_size") else _routed if hasattr(module, "is_transposed") else _padded
            hook = lambda one, args, name=name, see=see: seen.update(see(name, one, *args))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    decoder.model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _split(name, module, inputs, expert_size):
    """JetMoe: the tokens of one expert after those of another."""
    return {f"{name}.{index}": X for index, X in enumerate(inputs.split(expert_size))}


def _routed(name, module, hidden, indices, weights):
    """transformers' own: the experts of each token."""
    found = {}
    for index in range(len(module.down_proj)):
        X = hidden[(indices == index).any(-1)]
        first = "gate_up_proj" if module.has_gate else "up_proj"
        weight = getattr(module, first)[index]
        inner = X @ (weight if module.is_transposed else weight.t())
        if module.has_bias:
            inner = inner + getattr(module, f"{first}_bias")[index]
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        found |= {f"{name}.{index}.{first}": X, f"{name}.{index}.down_proj": inner}
    return found


def _padded(name, module, hidden):
    """Llama 4: all tokens for each expert, zero where they are not its own."""
    found = {}
    for index, X in enumerate(hidden.view(len(module.down_proj), -1, hidden.shape[-1])):
        X = X[X.any(-1)]
        gate, up = (X @ module.gate_up_proj[index]).chunk(2, -1)
        found |= {f"{name}.{index}.gate_up_proj": X, f"{name}.{index}.down_proj": up * module.act_fn(gate)}
    return found
