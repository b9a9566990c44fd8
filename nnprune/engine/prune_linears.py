"""Prunes the linears of a fetched decoder layer, checks the results and measures their errors.

Letters: O output features, I input features.
"""

import time
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnprune.allocations.base import Plan
from nnprune.checks import is_finite
from nnprune.engine import parallel
from nnprune.engine.input_collector import InputCollector, check_weight
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.model.weight_views import WeightView
from nnprune.patterns import PatternError, SparsityPattern, zeros_in, zeros_on_device
from nnprune.pruners.base import Pruner
from nnprune.solvers.layer_error import relative_error, squared_output
from nnprune.statistics import InputStatistic


def prune_linears(
    method: Method,
    plan: Plan,
    collector: InputCollector,
    stored_dtype: torch.dtype,
    one_by_one: bool = False,
    keep_statistics: bool = False,
) -> list[dict[str, Any]]:
    """Prune in place all linears whose inputs were collected, and return a report on each, as in `RunRecord.per_linear`.

    Several processes prune some of the groups each; a pruner that collects its own statistics has them on rank 0.

    Args:
        method: how.
        plan: a pattern for each linear.
        collector: what it holds of a group is freed once that is pruned, unless other methods need it: `keep_statistics`.
        stored_dtype: pruned weights are rounded to it before they are checked and measured.
        one_by_one: the linears of a group one after the other, which takes less memory, not together.

    Raises:
        ValueError: naming the linear: a weight that is not finite, or a pruner that breaks its contract.
    """
    ranks = [0] * len(collector.groups)
    if method.pruner.shares_statistics:
        ranks = parallel.assign([_cost(collector, names) for names in collector.groups])
    with parallel.together():
        own = []
        for names, rank in zip(collector.groups, ranks, strict=True):
            if rank == parallel.rank():
                for part in [[name] for name in names] if one_by_one else [names]:
                    own.append(_prune_together(method, plan, collector, names[0], part, stored_dtype))
            if not keep_statistics:
                collector.statistics[names[0]] = {}
    if not parallel.is_distributed():
        return list(chain(*own))
    for names, rank in zip(collector.groups, ranks, strict=True):
        for name in names:
            collector.weights[name].write(parallel.broadcast(collector.weights[name].read().contiguous(), rank))
    reports = {report["name"]: report for report in chain(*chain(*parallel.gather(own)))}
    return [reports[name] for names in collector.groups for name in names]


def _cost(collector: InputCollector, names: list[str]) -> int:
    """Multiplications, up to a factor, to factorise the Hessian (I, I) of linears that share it and to prune their rows with it."""
    num_inputs = collector.weights[names[0]].shape[1]
    return num_inputs**2 * (num_inputs + sum(collector.weights[name].shape[0] for name in names))


def _prune_together(
    method: Method, plan: Plan, collector: InputCollector, leader: str, names: list[str], stored_dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Prune the linears `names`, all or some of the group whose first one is `leader`."""
    start = time.perf_counter()
    pruner, sample = method.pruner, collector.sample([leader])
    weights = {name: collector.weights[name].read().contiguous() for name in names}
    for name, W in weights.items():
        check_weight(name, W)
    statistics = collector.statistics[leader]
    if pruner.shares_statistics and pruner.statistic is not None:
        pruner.statistics.update(dict.fromkeys(names, statistics[pruner.statistic]))
    pruned = weights | _prune_weights(method, {name: weights[name] for name in names if plan[name].sparsity}, plan, statistics)
    figures = []
    for name, W in weights.items():
        pruner.clear_linear_activations(name)
        weight = _checked(pruner, pruned[name], W, name, plan[name], stored_dtype)
        dense_output = collector.squared_output(name, partial(squared_output, W, sample))
        error = relative_error(W, weight, sample, dense_output)
        collector.weights[name].write(weight)  # if W is a view, it holds the pruned weight from here on
        figures.append(torch.stack([zeros_on_device(weight).double() / weight.numel(), error]))
    figures = torch.stack(figures).tolist()  # waits for the device once
    seconds = time.perf_counter() - start
    size = sum(W.numel() for W in weights.values())
    reports = []
    for (name, W), (sparsity, error) in zip(weights.items(), figures, strict=True):
        report = {"name": name, "pattern": str(plan[name]), "sparsity": sparsity, "relative_error": error}
        report |= pruner.notes.pop(name, {}) | method.update.notes.pop(name, {})
        reports.append(report | {"seconds": seconds * W.numel() / size})  # the group's time, divided by size
    return reports


def _prune_weights(
    method: Method, weights: dict[str, Tensor], plan: Plan, statistics: dict[type[InputStatistic], InputStatistic]
) -> dict[str, Tensor]:
    """The weights (O, I) of linears that share an input, pruned by `method`, not checked yet."""
    if not weights:
        return {}
    # With a target or an update, float32 until the end: a later step could not undo the rounding of an earlier one.
    dense = weights if method.is_plain else {name: W.float() for name, W in weights.items()}
    targets = method.target.weights(dense, statistics)
    del dense
    pruned = method.pruner.prune_group(targets, {name: plan[name] for name in targets})
    if method.is_plain:
        return pruned
    pruned = {name: _checked(method.pruner, pruned[name], W, name, plan[name]) for name, W in targets.items()}
    return method.update.update_group(pruned, targets, statistics.get(method.update.statistic))


def _checked(
    pruner: Pruner, pruned: Tensor, W: Tensor, name: str, pattern: SparsityPattern, stored_dtype: torch.dtype | None = None
) -> Tensor:
    """A pruner's result in the dtype of `W`, rounded to `stored_dtype` if given. Raises ValueError, naming pruner and linear, if it
    breaks the contract."""
    method = type(pruner).__name__
    if not isinstance(pruned, Tensor) or pruned.shape != W.shape:
        found = tuple(pruned.shape) if isinstance(pruned, Tensor) else type(pruned).__name__
        raise ValueError(f"{name}: {method} returned {found} instead of a weight {tuple(W.shape)}")
    pruned = pruned.detach().to(stored_dtype).to(W)
    if not is_finite(pruned):
        raise ValueError(f"{name}: {method} returned NaN or infinite weights")
    try:
        pattern.check(pruned)
    except PatternError as error:
        raise ValueError(f"{name}: the weight that {method} returned {error}") from None
    return pruned


def count_zeros(layer: nn.Module, weights: dict[str, WeightView]) -> dict[str, int]:
    """Count zeros and parameters: `zeros` and `size` of a fetched decoder layer, `linear_zeros` and `linear_size` of `weights`, its
    weights that can be pruned."""
    inside = {weight.parameter for weight in weights.values()}
    others = [parameter for parameter in layer.parameters() if parameter not in inside]
    linears = [weight.read() for weight in weights.values()]
    linear_size = sum(map(torch.numel, linears))
    zeros = torch.stack([zeros_on_device(tensor) for tensor in (*linears, *others)]).tolist()
    linear_zeros = sum(zeros[: len(linears)])
    size = linear_size + sum(map(torch.numel, others))
    return {"zeros": sum(zeros), "size": size, "linear_zeros": linear_zeros, "linear_size": linear_size}


def fractions_of_zeros(decoder: Decoder, layers: list[dict[str, int]]) -> tuple[float, float]:
    """The sparsity of the linears, and of the whole model with tied parameters counted once.

    `layers` holds the counts of each decoder layer, from `count_zeros`.
    """
    inside = set(decoder.layers.parameters())
    outside = [parameter for parameter in decoder.model.parameters() if parameter not in inside]
    totals = {key: sum(counts[key] for counts in layers) for key in ("zeros", "size", "linear_zeros", "linear_size")}
    zeros = totals["zeros"] + sum(map(zeros_in, outside))
    size = totals["size"] + sum(map(torch.numel, outside))
    return totals["linear_zeros"] / totals["linear_size"], zeros / size
