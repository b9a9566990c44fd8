"""The importance pass over the dense model: what an allocation measures of each decoder layer before anything is pruned.

Weights are read layer by layer. If inputs are needed too, the calibration passes once through the dense layers, with the same
engine as a pruning pass.

Letters: N samples, T tokens, L decoder layers, I input features.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from nnprune.allocations.base import DenseLayer
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.experts import Routing
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import InputCollector
from nnprune.engine.input_groups import check_weight, layer_groups
from nnprune.statistics import InputStatistic, SquaredNorm

Measure = Callable[[DenseLayer], float]


@torch.no_grad()
def run_importance_pass(engine: LayerwiseEngine, ids: Tensor | None, measures: dict[str, Measure]) -> dict[str, list[float]]:
    """Apply each measure to each dense decoder layer with linears to prune. Returns its key -> its numbers, for these layers.

    `ids` are calibration ids (N, T), or None if the measures need weights only. Raises ValueError if a weight, an input or a
    measured number is not finite.
    """
    found: dict[str, list[float]] = {key: [] for key in measures}
    bar = engine.progress(engine.num_layers, "importance pass")
    with nullcontext() if ids is None else engine.hidden_states(ids, "importance") as states, bar:
        for index in range(engine.num_layers):
            module = engine.store.fetch(index, pruned=False)
            engine.store.prefetch(index + 1)
            if engine.decoder.weights(index):
                layer = _dense_layer(engine, index, module, states)
                for key, measure in measures.items():
                    number = measure(layer)
                    if not math.isfinite(number):
                        raise ValueError(f"allocation: {key} of decoder layer {index} is {number}; try model.dtype=float32")
                    found[key].append(number)
                del layer
            elif states is not None:
                states.advance(index, module)
            engine.store.release(index)
            bar.update()
    return found


def _dense_layer(engine: LayerwiseEngine, index: int, module: nn.Module, states: HiddenStates | None) -> DenseLayer:
    """Decoder layer `index`, fetched as `module`, as a measure sees it. Hidden states, if any, advance to the next layer."""
    weights = {name: view.read() for name, view in engine.decoder.weights(index).items()}
    for name, W in weights.items():
        check_weight(name, W)
    layer = DenseLayer(weights, {}, {})
    if states is None:
        return layer
    collector = collect_inputs(states, index, module, [SquaredNorm], index == engine.num_layers - 1, engine.routing)
    for names in collector.groups:
        layer.squared_norms |= dict.fromkeys(names, collector.statistics[names[0]][SquaredNorm].mean())
        layer.samples |= dict.fromkeys(names, collector.sample(names))
    return layer


def collect_inputs(
    states: HiddenStates,
    index: int,
    layer: nn.Module,
    statistics: Sequence[type[InputStatistic]],
    is_last: bool,
    routing: Routing | None = None,
) -> InputCollector:
    """Statistics of the inputs of decoder layer `index`, fetched as `layer`. The hidden states advance to the next layer unless
    it `is_last`."""
    weights = states.decoder.weights(index)
    groups, first_row = layer_groups(states, index, layer), states.share.start
    collector = InputCollector(
        statistics, [], groups, weights, states.shape[1], first_row=first_row, routing=routing or Routing()
    )
    with collector.observing(stop=is_last):
        states.each_batch(lambda rows, hidden: collector.run(rows, lambda: states.run(index, layer, hidden)), collector.split)
    collector.finish()
    return collector
