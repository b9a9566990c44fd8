"""Prunes a model layer by layer: collect the inputs of each linear, prune it, check it, hand the outputs on.

Letters: N samples, T tokens, O output features, I input features.
"""

import logging
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from nnprune.activations import Activations
from nnprune.decoder import weight_OI
from nnprune.inputs import SAMPLED_TOKENS, InputCollector, check_weight, input_groups
from nnprune.layerwise import LayerwiseEngine
from nnprune.patterns import PatternError, SparsityPattern
from nnprune.pruners.base import Pruner

log = logging.getLogger(__name__)

PROPAGATE = ("pruned", "dense", "sequential")


class LayerwisePruning:
    """One pruning of one model.

    Args:
        engine: the model and its layers.
        pruner: the method.
        plan: linear name -> pattern, for every linear of the decoder layers.
        propagate: what later linears see. pruned: outputs of pruned layers; dense: of dense layers; sequential: of pruned
            layers, and within a layer of the linears already pruned.
    """

    def __init__(self, engine: LayerwiseEngine, pruner: Pruner, plan: dict[str, SparsityPattern], propagate: str) -> None:
        self.engine = engine
        self.pruner = pruner
        self.plan = plan
        self.propagate = propagate

    @torch.no_grad()
    def run(self, ids: Tensor) -> list[dict[str, Any]]:
        """Prune every decoder layer that is not finished yet, with calibration ids (N, T). Returns a report a layer."""
        engine, store = self.engine, self.engine.store
        num_layers = len(engine.decoder.layers)
        if not self.pruner.needs_calibration:
            ids = ids[: -(-SAMPLED_TOKENS // ids.shape[1])]  # just enough to measure relative errors
        if len(store.reports) < num_layers:
            if store.reports:
                log.info("resuming behind %d finished decoder layers", len(store.reports))
            with engine.embedded(ids) as activations, logging_redirect_tqdm(), engine.progress(num_layers, "pruning") as bar:
                for index in range(num_layers):
                    if index in store.reports:
                        layer = store.fetch(index, pruned=self.propagate != "dense")
                        engine.stream(index, layer, activations, put=True)
                        store.fetch(index)
                    else:
                        self._prune_layer(index, activations)
                    store.release(index)
                    bar.update()
        return [store.reports[index] for index in range(num_layers)]

    def _prune_layer(self, index: int, activations: Activations) -> None:
        start = time.perf_counter()
        engine = self.engine
        layer = engine.store.fetch(index)
        linears = engine.decoder.linears(index)
        first_row = activations.get(slice(0, 1))
        groups = input_groups(layer, linears, first_row, engine.call(index, *first_row.shape[:2]))
        dense = self.propagate == "dense"
        reports: list[dict[str, Any]] = []
        for stage in [[names] for names in groups] if self.propagate == "sequential" else [groups]:
            collector = InputCollector(self.pruner, stage, linears, *activations.tensor.shape[:2])
            with collector.watching(stop=not dense):
                engine.stream(index, layer, activations, put=dense)
            collector.finish()
            reports += [self._prune_linear(name, linears[name], collector) for names in stage for name in names]
        engine.store.save(index, _layer_report(layer, linears, reports, time.perf_counter() - start))
        if not dense and index + 1 < len(engine.decoder.layers):
            engine.stream(index, layer, activations, put=True)
        log.info(
            "layer %d/%d  relative error %.4g  sparsity %.3f  %.1f s",
            index + 1,
            len(engine.decoder.layers),
            sum(report["relative_error"] for report in reports) / len(reports),
            sum(report["sparsity"] for report in reports) / len(reports),
            time.perf_counter() - start,
        )

    def _prune_linear(self, name: str, linear: nn.Module, collector: InputCollector) -> dict[str, Any]:
        """Prune one linear in place and report on it."""
        start = time.perf_counter()
        pattern = self.plan[name]
        W = weight_OI(linear).contiguous()
        check_weight(name, W)
        # The clone is for pruners that work in place.
        pruned = self.pruner.prune_linear(W.clone(), name, pattern) if pattern.sparsity else W
        self.pruner.clear_linear_activations(name)
        pruned = self._checked(pruned, W, name, pattern)
        error = relative_error(W, pruned, collector.sample(name))
        weight_OI(linear).copy_(pruned)  # from here on W is the pruned weight too, where it is a view
        return {
            "name": name,
            "pattern": str(pattern),
            "sparsity": 1 - int(pruned.count_nonzero()) / pruned.numel(),
            "relative_error": error,
            "seconds": time.perf_counter() - start,
            **self.pruner.notes.pop(name, {}),
        }

    def _checked(self, pruned: Tensor, W: Tensor, name: str, pattern: SparsityPattern) -> Tensor:
        """The pruner's answer in the dtype of `W`. Raises ValueError, naming pruner and linear, when it breaks the contract."""
        method = type(self.pruner).__name__
        if not isinstance(pruned, Tensor) or pruned.shape != W.shape:
            found = tuple(pruned.shape) if isinstance(pruned, Tensor) else type(pruned).__name__
            raise ValueError(f"{name}: {method} returned {found} instead of a weight {tuple(W.shape)}")
        pruned = pruned.detach().to(W)
        if not pruned.isfinite().all():
            raise ValueError(f"{name}: {method} returned NaN or infinite weights")
        try:
            pattern.check(pruned)
        except PatternError as error:
            raise ValueError(f"{name}: the weight that {method} returned {error}") from None
        return pruned


def relative_error(W: Tensor, pruned: Tensor, X: Tensor) -> float:
    """||X (pruned - W)^T||^2 / ||X W^T||^2 for weights (O, I) and inputs X (tokens, I), as ALPS reports it (arXiv:2406.07831)."""
    change = X @ (pruned.float() - W.float()).t()
    output = X @ W.float().t()
    return float(change.square().sum() / output.square().sum().clamp_min(torch.finfo(torch.float32).tiny))


def _layer_report(
    layer: nn.Module, linears: dict[str, nn.Module], reports: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """What the record needs to know of a finished decoder layer: reports by linear, zeros and parameters in all."""
    return {"linears": reports, **count_zeros(layer, linears), "seconds": seconds}


def count_zeros(layer: nn.Module, linears: dict[str, nn.Module]) -> dict[str, int]:
    """Zeros and sizes of a fetched decoder layer and of its linears' weights."""
    weights = [linear.weight for linear in linears.values()]
    return {
        "zeros": sum(parameter.numel() - int(parameter.count_nonzero()) for parameter in layer.parameters()),
        "size": sum(parameter.numel() for parameter in layer.parameters()),
        "linear_zeros": sum(weight.numel() - int(weight.count_nonzero()) for weight in weights),
        "linear_size": sum(weight.numel() for weight in weights),
    }
