"""Prunes the linears of a fetched decoder layer, checks the results and measures their errors.

Letters: O output features, I input features.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nnprune.allocations.base import Plan
from nnprune.checks import deferring, finite, read_together
from nnprune.engine import parallel
from nnprune.engine.experts import Statistics
from nnprune.engine.input_collector import InputCollector
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.model.weight_views import WeightView
from nnprune.patterns import PatternError, zeros_in, zeros_on_device
from nnprune.pruners.base import Pruner
from nnprune.runtime import Runtime
from nnprune.solvers.layer_error import relative_error, squared_output
from nnprune.statistics import InputStatistic, Means

log = logging.getLogger(__name__)


def prune_linears(
    method: Method,
    plan: Plan,
    collector: InputCollector,
    stored_dtype: torch.dtype,
    runtime: Runtime,
    keep_statistics: bool = False,
) -> list[dict[str, Any]]:
    """Prune in place all linears whose inputs were collected, and return a report on each, as in `RunRecord.per_linear`.

    Several processes prune some of the groups each; a pruner that collects its own statistics has them on rank 0.

    Args:
        method: how.
        plan: a pattern for each linear.
        collector: what it holds of a group is freed once that is pruned, unless other methods need it: `keep_statistics`.
        stored_dtype: pruned weights are rounded to it before they are checked and measured.
        runtime: says whether the linears of a group are pruned one by one; from when the device runs out of memory they are.

    Raises:
        ValueError: naming the linear: a weight that is not finite, or a pruner that breaks its contract.
    """
    ranks = [0] * len(collector.groups)
    if method.pruner.shares_statistics:
        ranks = parallel.assign([_cost(collector, names) for names in collector.groups])
    with parallel.together():
        own = []
        for names, rank in zip(collector.groups, ranks, strict=True):
            prune = partial(_prune_together, method, plan, collector, names[0], stored_dtype=stored_dtype)
            for part in _parts(method, collector, names) if rank == parallel.rank() else ():
                own += _prune_group(prune, method, collector.statistics[names[0]], part, runtime)
            if not keep_statistics:
                collector.statistics[names[0]] = {}
    if not parallel.is_distributed():
        return list(chain(*own))
    for names, rank in zip(collector.groups, ranks, strict=True):
        for name in names:
            for tensor in collector.weights[name].tensors():
                tensor.copy_(parallel.broadcast(tensor.contiguous(), rank))
    reports = {report["name"]: report for report in chain(*chain(*parallel.gather(own)))}
    return [reports[name] for names in collector.groups for name in names]


def _corrects_bias(method: Method, collector: InputCollector, name: str) -> bool:
    return method.corrects_biases and collector.weights[name].bias is not None


def _parts(method: Method, collector: InputCollector, names: list[str]) -> list[list[str]]:
    """Linears that share an input: those whose bias is corrected, which are pruned from the centred statistics, and the others."""
    parts: dict[bool, list[str]] = {}
    for name in names:
        parts.setdefault(_corrects_bias(method, collector, name), []).append(name)
    return list(parts.values())


def _prune_group(
    prune: Callable[[list[str]], list[dict[str, Any]]],
    method: Method,
    statistics: Statistics,
    names: list[str],
    runtime: Runtime,
) -> list[list[dict[str, Any]]]:
    """`prune` linears that share `statistics`, together, or one by one if `runtime` says so or the device runs out of memory."""
    if not runtime.one_by_one and len(names) > 1:
        try:
            return [prune(names)]
        except torch.OutOfMemoryError:
            if not method.pruner.shares_statistics:  # it may have consumed its own
                raise
        # Out of the except block, where the traceback would keep the failed attempt's tensors alive.
        log.warning("warning: out of device memory, going on with one linear at a time")
        runtime.one_by_one = True
        for statistic in statistics.values():
            statistic.forget()
    return [prune([name]) for name in names]


def _cost(collector: InputCollector, names: list[str]) -> int:
    """Multiplications, up to a factor, to factorise the Hessian (I, I) of linears that share it and to prune their rows with it."""
    num_inputs = collector.weights[names[0]].shape[1]
    return num_inputs**2 * (num_inputs + sum(collector.weights[name].shape[0] for name in names))


def _prune_together(
    method: Method, plan: Plan, collector: InputCollector, leader: str, names: list[str], *, stored_dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Prune the linears `names`, all or some of the group whose first one is `leader`; the biases of all or of none are corrected.

    The host waits for the device once, at the end. Only if a factorisation has failed it is all done again, with a look at each.
    """
    start = time.perf_counter()
    pruner, statistics, sample = method.pruner, collector.statistics[leader], collector.sample([leader])
    weights = {name: collector.weights[name].read().contiguous() for name in names}
    biases: dict[str, Tensor] = {}
    if _corrects_bias(method, collector, names[0]):
        means = statistics[Means]
        assert isinstance(means, Means)
        statistics = {kind: statistic.centred(means) for kind, statistic in statistics.items()}
        biases = {name: collector.weights[name].bias for name in names if plan[name].sparsity}
    if pruner.shares_statistics and pruner.statistic is not None:
        pruner.statistics.update(dict.fromkeys(names, statistics[pruner.statistic]))
    context: AbstractContextManager[list[Tensor]]
    for context in (deferring(), nullcontext([])):
        found: dict[tuple, Tensor] = {}
        with context as failures:
            pruned = _prune_weights(method, weights, plan, statistics, found)
        pruned = {name: _fitting(pruner, pruned[name], W, name, stored_dtype) for name, W in weights.items()}
        _measure(pruned, plan, "last", found)
        corrected = {
            name: method.corrected_bias(bias, weights[name], pruned[name], means).to(stored_dtype).to(bias)
            for name, bias in biases.items()
        }
        notes = {}
        for name, W in weights.items():
            dense_output = collector.squared_output(name, partial(squared_output, W, sample))
            shift = corrected[name].float() - biases[name].float() if name in corrected else None
            found["error", name] = relative_error(W, pruned[name], sample, dense_output, shift)
            found["zeros", name] = zeros_on_device(pruned[name])
            change = {} if shift is None else {"bias_change": shift.norm()}
            notes[name] = pruner.notes.pop(name, {}) | method.update.notes.pop(name, {}) | change
            found |= {("note", name, key): value for key, value in notes[name].items() if isinstance(value, Tensor)}
        numbers = read_together(found | {("failed", place): flag for place, flag in enumerate(failures)})
        if not any(numbers["failed", place] for place in range(len(failures))):
            break
        for statistic in statistics.values():
            statistic.forget()
    _judge(method, plan, weights, numbers)
    for name, bias in corrected.items():
        biases[name].copy_(bias)
    seconds, size = time.perf_counter() - start, sum(W.numel() for W in weights.values())
    reports = []
    for name, W in pruned.items():
        pruner.clear_linear_activations(name)
        collector.weights[name].write(W)
        report = {"name": name, "pattern": str(plan[name]), "sparsity": numbers["zeros", name] / W.numel()}
        report |= {"relative_error": numbers["error", name], **collector.record_of(name), **notes[name]}
        report |= {key: numbers["note", name, key] for key in notes[name] if ("note", name, key) in numbers}
        reports.append(report | {"seconds": seconds * W.numel() / size})  # the group's time, divided by size
    return reports


def _prune_weights(
    method: Method,
    weights: dict[str, Tensor],
    plan: Plan,
    statistics: dict[type[InputStatistic], InputStatistic],
    found: dict[tuple, Tensor],
) -> dict[str, Tensor]:
    """The weights (O, I) of linears that share an input, pruned by `method`. What comes before an update is measured in `found`."""
    chosen = {name: W for name, W in weights.items() if plan[name].sparsity}
    if not chosen:
        return weights
    # With a target or an update, float32 until the end: a later step could not undo the rounding of an earlier one.
    dense = chosen if method.is_plain else {name: W.float() for name, W in chosen.items()}
    targets = method.target.weights(dense, statistics)
    del dense
    pruned = method.pruner.prune_group(targets, {name: plan[name] for name in targets})
    if method.is_plain:
        return weights | pruned
    pruned = {name: _fitting(method.pruner, pruned[name], W, name) for name, W in targets.items()}
    _measure(pruned, plan, "first", found)
    return weights | method.update.update_group(pruned, targets, statistics.get(method.update.statistic))


def _measure(weights: dict[str, Tensor], plan: Plan, stage: str, found: dict[tuple, Tensor]) -> None:
    """Add to `found` what `_judge` needs to know of pruned weights."""
    for name, W in weights.items():
        found["finite", stage, name] = finite(W)
        found["measured", stage, name] = plan[name].measure(W)


def _judge(method: Method, plan: Plan, weights: dict[str, Tensor], numbers: dict[tuple, float]) -> None:
    """Raise ValueError, naming pruner and linear, if a pruned weight breaks the contract."""
    pruner = type(method.pruner).__name__
    for stage in ("first", "last"):
        for name, W in weights.items():
            if not numbers.get(("finite", stage, name), True):
                raise ValueError(f"{name}: {pruner} returned NaN or infinite weights")
            try:
                if ("measured", stage, name) in numbers:
                    plan[name].judge(int(numbers["measured", stage, name]), W.numel())
            except PatternError as error:
                raise ValueError(f"{name}: the weight that {pruner} returned {error}") from None


def _fitting(pruner: Pruner, pruned: Tensor, W: Tensor, name: str, stored_dtype: torch.dtype | None = None) -> Tensor:
    """A pruner's result in the dtype of `W`, rounded to `stored_dtype` if given. Raises ValueError, naming pruner and linear, if it
    has another shape."""
    if not isinstance(pruned, Tensor) or pruned.shape != W.shape:
        found = tuple(pruned.shape) if isinstance(pruned, Tensor) else type(pruned).__name__
        raise ValueError(f"{name}: {type(pruner).__name__} returned {found} instead of a weight {tuple(W.shape)}")
    return pruned.detach().to(stored_dtype).to(W)


def count_zeros(layer: nn.Module, weights: dict[str, WeightView]) -> dict[str, int]:
    """Count zeros and parameters: `zeros` and `size` of a fetched decoder layer, `linear_zeros` and `linear_size` of `weights`, its
    weights that can be pruned."""
    viewed: Counter[nn.Parameter] = Counter()
    for weight in weights.values():
        viewed[weight.parameter] += weight.read().numel()
    others = [
        parameter for parameter in layer.parameters() if parameter.numel() > viewed[parameter]
    ]  # some experts' are in `weights`
    linears = [weight.read() for weight in weights.values()]
    zeros = torch.stack([zeros_on_device(tensor) for tensor in (*linears, *others)]).tolist()
    linear_zeros, linear_size = sum(zeros[: len(linears)]), sum(map(torch.numel, linears))
    partly = sum(
        count
        for weight, count in zip(weights.values(), zeros, strict=False)
        if weight.parameter.numel() > viewed[weight.parameter]
    )
    size = sum(map(torch.numel, layer.parameters()))
    return {"zeros": sum(zeros) - partly, "size": size, "linear_zeros": linear_zeros, "linear_size": linear_size}


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
