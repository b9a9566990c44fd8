"""Collects the inputs of the linears of a decoder layer: which linears share an input, and its statistics.

Letters: N samples, B batch, T tokens, I input features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnprune.checks import finite, read_together
from nnprune.engine import parallel
from nnprune.engine.experts import Routing, Statistics, pool_key, share_tokens
from nnprune.engine.input_groups import NONFINITE_INPUTS, NONFINITE_WEIGHT, observed
from nnprune.method import Method
from nnprune.model.decoder import StopForward
from nnprune.model.weight_views import WeightView
from nnprune.pruners.base import Pruner
from nnprune.statistics import CrossProduct, InputStatistic, Means

SAMPLED_TOKENS = 512  # from the first rows of the calibration: the relative error of each linear is measured on them


class InputCollector:
    """Collects the inputs of groups of linears while forwards run.

    Args:
        statistics: the kinds to accumulate: one of each serves all linears of a group, and all pruners that ask for it.
        pruners: those among them that collect their own statistics are shown the input of every linear.
        groups: from `input_groups`; only these are observed.
        weights: name -> weight, for at least the names in `groups`.
        seq_len: T.
        reference: the weights of the dense layer, if that is another module.
        first_row: index in the calibration of the first row of this process.
        routing: which tokens experts are calibrated with.
        pooled: first linears of groups of experts that are not collected now, but share tokens with those that are.
    """

    def __init__(
        self,
        statistics: Iterable[type[InputStatistic]],
        pruners: Sequence[Pruner],
        groups: list[list[str]],
        weights: dict[str, WeightView],
        seq_len: int,
        reference: dict[str, WeightView] | None = None,
        first_row: int = 0,
        routing: Routing = Routing(),  # noqa: B008 -- frozen
        pooled: Sequence[str] = (),
    ) -> None:
        self.groups = groups
        self.weights = weights
        self.seq_len = seq_len
        self._num_sampled = max(num_sampled_rows(seq_len) - first_row, 0)

        def new(names: Sequence[str]) -> Statistics:
            has_bias = any(weights[name].bias is not None for name in names)
            return {kind: kind() for kind in kinds if kind is not Means or has_bias}

        kinds = list(statistics)
        self.statistics = {names[0]: new(names) for names in groups}
        self.notes: dict[str, dict[str, int]] = {}  # first linear of an expert's group -> tokens, for the record
        self._routing = routing
        self._experts = {names[0]: weights[names[0]].expert for names in groups if weights[names[0]].expert}
        self._pools: dict[tuple, Statistics] = {}
        self._pool_of = {name: self._pools.setdefault(pool_key(weights[name].expert), new([name])) for name in pooled}
        self._pruners = [pruner for pruner in pruners if not pruner.shares_statistics]
        self._reference = reference
        self._reference_inputs: dict[str, Tensor] = {}  # of the current rows
        self._in_reference = self._stop_reference = False
        self._samples: dict[str, list[Tensor]] = {name: [] for name in (*self.statistics, *pooled)}
        self._totals: dict[str, Tensor] = {}  # sums that reveal NaNs in groups without a statistic
        self._squared_outputs: dict[str, Tensor] = {}
        self._rows = slice(0, 0)
        self._counted: dict[tuple, int] = {}  # (consumer, linear) -> rows counted so far

    @property
    def pairs(self) -> bool:
        """Whether a statistic compares inputs with those of the dense layer, so that `run_reference` must precede `run`."""
        return any(CrossProduct in kinds for kinds in self.statistics.values())

    @property
    def split(self) -> int:
        """Rows at the start that no batch may hold together with others: where experts are sampled, whose tokens do not tell their row."""
        return self._num_sampled if self._experts else 0

    @contextmanager
    def observing(self, stop: bool) -> Iterator[None]:
        """Observe forwards inside; `stop` ends those of `run` after the input of the last group, unless there are experts, which
        compute in any order or not at all."""
        seen = [name for names in self.groups for name in (names if self._pruners else names[:1])]
        last = None if self._experts else seen[-1]
        seen += self._pool_of

        def see(name: str, X: Tensor) -> None:
            if self._in_reference and not self.weights[name].expert:
                self._reference_inputs[name] = X
            elif self._in_reference:
                return
            else:
                self._add(name, X)
            if name == last and (self._stop_reference if self._in_reference else stop):
                raise StopForward

        with ExitStack() as stack:
            for weights in (self.weights, self._reference):
                if weights is not None:
                    stack.enter_context(self._routing.applied(weights))
                    stack.enter_context(observed({name: weights[name] for name in seen}, see))
            yield

    def run(self, rows: slice, forward: Callable[[], Tensor]) -> Tensor | None:
        """Observe the forward of `rows`, and return its output unless it was stopped.

        Rows come in order. A batch that ran out of memory may be repeated in smaller batches: no row is counted twice.
        """
        self._rows = rows
        with suppress(StopForward):
            return forward()

    def run_reference(self, forward: Callable[[], Tensor], stop: bool) -> Tensor | None:
        """Observe the dense layer's forward of the rows that `run` is called with next; `stop` ends it after the last group."""
        self._in_reference, self._stop_reference, self._reference_inputs = True, stop, {}
        try:
            return self.run(self._rows, forward)
        finally:
            self._in_reference = False

    def finish(self) -> None:
        """Call after the last row. Raises ValueError, naming a linear, for NaN or infinite weights or inputs."""
        self._reference_inputs = {}
        if parallel.is_distributed():
            self._exchange()
        self.notes = share_tokens(self.statistics, self._experts, self._pools, self._routing)
        for pruner in self._pruners:
            for names in self.groups:
                for name in names if names[0] in self._experts else ():
                    if (id(pruner), name) not in self._counted:
                        _show(pruner, name, self.sample(names)[None])
        # Weights first: one that is not finite makes the inputs of later linears so.
        checks: dict[tuple, Tensor] = {
            (NONFINITE_WEIGHT, name): finite(self.weights[name].read()) for names in self.groups for name in names
        }
        for leader, statistics in self.statistics.items():
            checks |= {(NONFINITE_INPUTS, leader, kind): statistic.finite() for kind, statistic in statistics.items()}
            if leader in self._totals:
                checks[NONFINITE_INPUTS, leader] = self._totals[leader].isfinite()
        for (message, name, *_), is_fine in read_together(checks).items():
            if not is_fine:
                raise ValueError(message.format(name))

    def _exchange(self) -> None:
        """Make statistics, pools, samples and totals those of the rows of all processes."""
        for name, pool in {id(pool): (name, pool) for name, pool in self._pool_of.items()}.values():
            _reduce(pool, self.weights[name].read())
        for name, samples in self._samples.items():
            weight = self.weights[name].read()
            none = weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
            self._samples[name] = [parallel.concatenated(torch.cat([none, *samples]))]
            if name in self.statistics:
                _reduce(self.statistics[name], weight)
            if self.statistics.get(name) == {}:
                self._totals[name] = parallel.all_reduce(self._totals.get(name, none.sum()))

    def sample(self, names: list[str]) -> Tensor:
        """Some inputs (tokens, I) of the group `names`, float32: the same tokens for every batch size and pruner. Of an expert, those
        that it received of the same rows, in any order, or, if there are none, those of the first of its siblings that has some."""
        samples = self._samples[names[0]]
        if names[0] in self._experts and not sum(map(len, samples)):
            siblings = (self._samples[name] for name in self._siblings(names[0]))
            samples = next((found for found in siblings if sum(map(len, found))), samples)
        return torch.cat(samples).float()

    def _siblings(self, name: str) -> list[str]:
        """The linears with a sample that have the part of the linear `name` in an expert of its mixture, in order of the experts."""
        experts = {one: expert for one in self._samples if (expert := self.weights[one].expert)}
        names = [one for one, expert in experts.items() if pool_key(expert) == pool_key(experts[name])]
        return sorted(names, key=lambda one: experts[one].number)

    def record_of(self, name: str) -> dict[str, Any]:
        """What the record says of a linear of an expert beside its figures: the tensor that holds it, and its tokens."""
        if self.weights[name].expert is None:
            return {}
        leader = next(names[0] for names in self.groups if name in names)
        return {"tensor": self.weights[name].key, **self.notes.get(leader, {})}

    def squared_output(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, called once per linear and cached: the squared output of its dense weight, which all tasks share."""
        if name not in self._squared_outputs:
            self._squared_outputs[name] = compute()
        return self._squared_outputs[name]

    def _add(self, name: str, X: Tensor) -> None:
        """Add the inputs X (tokens, I) of the current rows to statistics, sample and pruners, each of which counts a row once."""
        if pool := self._pool_of.get(name):
            for kind, statistic in pool.items():
                statistic.add(X, *self._others(kind, name, X), until=self._rows.stop, source=name)
            self._once(("sample", name), lambda: self._add_sample(name, X))
            pooled = [one for one in self._siblings(name) if one in self._pool_of and self._samples[one]]
            for later in pooled[1:]:  # they only stand in for starved experts, for which the first one is enough
                self._samples[later] = []
            return
        if name in self.statistics:
            for kind, statistic in self.statistics[name].items():
                statistic.add(X, *self._others(kind, name, X), until=self._rows.stop)
            self._once(("sample", name), lambda: self._add_sample(name, X))
        by_row = X[None] if self.weights[name].expert else X.unflatten(0, (-1, self.seq_len))
        for pruner in self._pruners:
            self._once((id(pruner), name), partial(_show, pruner, name, by_row))

    def _others(self, kind: type[InputStatistic], name: str, X: Tensor) -> list[Tensor]:
        """What a statistic wants of the dense layer. Its router may send other tokens to an expert: there X stands for them."""
        return [self._reference_inputs.get(name, X)] if kind in (CrossProduct, Means) and self.pairs else []

    def _once(self, key: tuple, count: Callable[[], None]) -> None:
        """Call `count` unless it has counted these rows already."""
        if self._counted.get(key, 0) < self._rows.stop:
            count()
            self._counted[key] = self._rows.stop

    def _add_sample(self, name: str, X: Tensor) -> None:
        if self.statistics.get(name) == {}:
            self._totals[name] = self._totals.get(name, 0) + X.sum(dtype=torch.float32)
        if self.weights[name].expert:
            if self._rows.stop <= self._num_sampled:  # else none of the batch's rows is among the first ones: see `split`
                self._samples[name].append(X.clone())
            return
        rows = X.unflatten(0, (-1, self.seq_len))[: max(self._num_sampled - self._rows.start, 0)]
        if len(rows):
            stride = max(self.seq_len * num_sampled_rows(self.seq_len) // SAMPLED_TOKENS, 1)
            self._samples[name].append(rows[:, stride - 1 :: stride].reshape(-1, X.shape[-1]).clone())


def _reduce(statistics: Statistics, weight: Tensor) -> None:
    """Sum statistics over all processes, in the same order on all."""
    for kind in sorted(statistics, key=lambda kind: kind.__name__):
        statistics[kind].all_reduce(parallel.all_reduce, weight)


def _show(pruner: Pruner, name: str, X: Tensor) -> None:
    """Show X (B, T, I) to a pruner that collects its own statistics. Out of memory is fatal: it may have counted X in part."""
    try:
        pruner.add_linear_activations(name, X)
    except torch.OutOfMemoryError as error:
        reason = f"{type(pruner).__name__} ran out of device memory while it collected inputs"
        raise ValueError(f"{name}: {reason}; lower runtime.batch_tokens") from error


def num_sampled_rows(seq_len: int) -> int:
    """Rows of T tokens needed for the tokens on which relative errors are measured."""
    return -(-SAMPLED_TOKENS // seq_len)


def rows_needed(methods: Sequence[Method], ids: Tensor) -> Tensor:
    """The rows of ids that these methods calibrate with, from those of the calibration (N, T): if none uses inputs, enough to measure
    errors; all, and those that the recovery adds, otherwise."""
    if not any(method.needs_calibration for method in methods):
        return ids[: num_sampled_rows(ids.shape[1])]
    return methods[0].recovery.calibration(ids)
