"""Useful floating point operations of one pruning, by formula: the same figure for every program.

What a program computes beyond it, such as one statistic a linear where several share an input, is its own loss.
Letters: T tokens of a sequence, O output features, I input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nnprune.model.decoder import Decoder


@dataclass(frozen=True)
class LayerShapes:
    """One decoder layer: its linears (O, I), the widths of their distinct inputs, and the width of its attention."""

    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    attention: int


@torch.no_grad()
def layer_shapes(model: PreTrainedModel) -> list[LayerShapes]:
    """The shapes of every decoder layer. Which linears share an input is seen in a forward of four tokens."""
    decoder = Decoder(model)
    seen: dict[str, Tensor] = {}  # alive until compared: a freed tensor could lend its address to the next
    hooks = [
        weight.observe(lambda X, name=name: seen.update({name: X}))
        for index in range(len(decoder.layers))
        for name, weight in decoder.weights(index).items()
    ]
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    shapes = decoder.shapes()
    text_config = decoder.text_config
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    layers = []
    for index in range(len(decoder.layers)):
        names = list(decoder.weights(index))
        distinct = {seen[name].data_ptr(): shapes[name][1] for name in names}
        linears = tuple(shapes[name] for name in names)
        layers.append(LayerShapes(linears, tuple(distinct.values()), head_width * text_config.num_attention_heads))
    return layers


def forward_flops(layer: LayerShapes, num_sequences: int, seq_len: int) -> float:
    """Products with weights, and causal attention: each query against itself and the keys before it, twice."""
    weights = 2 * num_sequences * seq_len * sum(rows * columns for rows, columns in layer.linears)
    pairs = num_sequences * seq_len * (seq_len + 1) / 2
    return weights + 2 * 2 * pairs * layer.attention


def statistic_flops(layer: LayerShapes, method: str, num_tokens: int) -> float:
    """One Gram matrix (SparseGPT) or one vector of squared norms (Wanda) for each distinct input."""
    return sum(2 * num_tokens * (width**2 if method == "sparsegpt" else width) for width in layer.inputs)


def solver_flops(layer: LayerShapes, method: str) -> float:
    """SparseGPT: 4/3 I^3 for the factorisations of each distinct input, O I^2 for the updates of each linear."""
    if method != "sparsegpt":
        return 0.0
    return sum(4 / 3 * width**3 for width in layer.inputs) + sum(rows * columns**2 for rows, columns in layer.linears)


def useful_flops(layers: list[LayerShapes], method: str, num_sequences: int, seq_len: int) -> dict[str, float]:
    """Operations by part: two forwards (dense for the statistics, pruned for the next layer), statistics, solver."""
    return {
        "forwards": 2 * sum(forward_flops(layer, num_sequences, seq_len) for layer in layers),
        "statistics": sum(statistic_flops(layer, method, num_sequences * seq_len) for layer in layers),
        "solver": sum(solver_flops(layer, method) for layer in layers),
    }
