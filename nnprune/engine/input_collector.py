"""Collects the inputs of the linears of a decoder layer: which linears share an input, and its statistics.

Letters: N samples, B batch, T tokens, I input features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn

from nnprune.checks import is_finite
from nnprune.engine import parallel
from nnprune.engine.hidden_states import HiddenStates
from nnprune.method import Method
from nnprune.model.decoder import StopForward
from nnprune.model.weight_views import WeightView
from nnprune.pruners.base import Pruner
from nnprune.statistics import CrossProduct, InputStatistic

SAMPLED_TOKENS = 512  # from the first rows of the calibration: the relative error of each linear is measured on them
PROBE_TOKENS = 8  # of the forward that shows which linears share an input
NONFINITE_INPUTS = "{}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16"


def input_groups(weights: dict[str, WeightView], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the linears that receive the same input tensor (q, k and v; gate and up), in order of use.

    Inputs are compared by identity in one forward of the decoder layer, where values do not matter. Raises ValueError for a
    linear that the forward never reaches.
    """
    groups: dict[tuple, list[str]] = {}
    alive: list[Tensor] = []  # a freed input's address could be reused by the next one

    def note(name: str, X: Tensor) -> None:
        alive.append(X)
        names = groups.setdefault((X.data_ptr(), X.shape, X.stride(), X._version), [])
        if name not in names:
            names.append(name)

    with _observed(weights, note):
        forward()
    if unused := set(weights) - {name for names in groups.values() for name in names}:
        raise ValueError(f"{min(unused)}: never receives an input, so it cannot be pruned with this model's own forward")
    return list(groups.values())


def layer_groups(states: HiddenStates, index: int, layer: nn.Module) -> list[list[str]]:
    """The `input_groups` of decoder layer `index`, fetched as `layer`, which is run on a few tokens."""
    return input_groups(states.decoder.weights(index), lambda: states.run(index, layer, states.probe(PROBE_TOKENS)))


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
    ) -> None:
        self.groups = groups
        self.weights = weights
        self.seq_len = seq_len
        self._num_sampled = max(num_sampled_rows(seq_len) - first_row, 0)
        self.statistics = {names[0]: {kind: kind() for kind in statistics} for names in groups}
        self._pruners = [pruner for pruner in pruners if not pruner.shares_statistics]
        self._reference = reference
        self._reference_inputs: dict[str, Tensor] = {}  # of the current rows
        self._in_reference = self._stop_reference = False
        self._samples: dict[str, list[Tensor]] = {names[0]: [] for names in groups}
        self._totals: dict[str, Tensor] = {}  # sums that reveal NaNs in groups without a statistic
        self._squared_outputs: dict[str, Tensor] = {}
        self._rows = slice(0, 0)
        self._counted: dict[tuple, int] = {}  # (consumer, linear) -> rows counted so far

    @property
    def pairs(self) -> bool:
        """Whether a statistic compares inputs with those of the dense layer, so that `run_reference` must precede `run`."""
        return any(CrossProduct in kinds for kinds in self.statistics.values())

    @contextmanager
    def observing(self, stop: bool) -> Iterator[None]:
        """Observe forwards inside; `stop` ends those of `run` after the input of the last group."""
        observed = [name for names in self.groups for name in (names if self._pruners else names[:1])]

        def see(name: str, X: Tensor) -> None:
            if self._in_reference:
                self._reference_inputs[name] = X
            else:
                self._add(name, X)
            if name == observed[-1] and (self._stop_reference if self._in_reference else stop):
                raise StopForward

        with ExitStack() as stack:
            for weights in (self.weights, self._reference):
                if weights is not None:
                    stack.enter_context(_observed({name: weights[name] for name in observed}, see))
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
        """Call after the last row. Raises ValueError, naming a linear, for NaN or infinite inputs."""
        self._reference_inputs = {}
        if parallel.is_distributed():
            self._exchange()
        for leader, statistics in self.statistics.items():
            finite = all(statistic.is_finite() for statistic in statistics.values())
            if not finite or (leader in self._totals and not self._totals[leader].isfinite()):
                raise ValueError(NONFINITE_INPUTS.format(leader))

    def _exchange(self) -> None:
        """Make statistics, samples and totals those of the rows of all processes."""
        for leader, statistics in self.statistics.items():
            weight = self.weights[leader].read()
            for kind in sorted(statistics, key=lambda kind: kind.__name__):  # in the same order on all
                statistics[kind].all_reduce(parallel.all_reduce, weight)
            none = weight.new_zeros(0, weight.shape[1], dtype=torch.float32)
            self._samples[leader] = [parallel.concatenated(torch.cat([none, *self._samples[leader]]))]
            if not statistics:
                self._totals[leader] = parallel.all_reduce(self._totals.get(leader, none.sum()))

    def sample(self, names: list[str]) -> Tensor:
        """Some inputs (tokens, I) of the group `names`, float32: the same tokens for every batch size and pruner."""
        return torch.cat(self._samples[names[0]]).float()

    def squared_output(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, called once per linear and cached: the squared output of its dense weight, which all tasks share."""
        if name not in self._squared_outputs:
            self._squared_outputs[name] = compute()
        return self._squared_outputs[name]

    def _add(self, name: str, X: Tensor) -> None:
        """Add the inputs X (tokens, I) of the current rows to statistics, sample and pruners, each of which counts a row once."""
        if name in self._samples:
            for kind, statistic in self.statistics[name].items():
                others = [self._reference_inputs[name]] if kind is CrossProduct else []
                statistic.add(X, *others, until=self._rows.stop)
            self._once(("sample", name), lambda: self._add_sample(name, X.unflatten(0, (-1, self.seq_len))))
        for pruner in self._pruners:
            self._once((id(pruner), name), partial(_show, pruner, name, X.unflatten(0, (-1, self.seq_len))))

    def _once(self, key: tuple, count: Callable[[], None]) -> None:
        """Call `count` unless it has counted these rows already."""
        if self._counted.get(key, 0) < self._rows.stop:
            count()
            self._counted[key] = self._rows.stop

    def _add_sample(self, name: str, X: Tensor) -> None:
        if not self.statistics[name]:
            self._totals[name] = self._totals.get(name, 0) + X.sum(dtype=torch.float32)
        rows = X[: max(self._num_sampled - self._rows.start, 0)]
        if len(rows):
            stride = max(self.seq_len * num_sampled_rows(self.seq_len) // SAMPLED_TOKENS, 1)
            self._samples[name].append(rows[:, stride - 1 :: stride].reshape(-1, X.shape[-1]).clone())


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
    """The rows of calibration ids (N, T) that these methods need: all, or, if none uses inputs, enough to measure errors."""
    return ids if any(method.needs_calibration for method in methods) else ids[: num_sampled_rows(ids.shape[1])]


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the linear, for NaN or infinity in its weight."""
    if not is_finite(weight):
        raise ValueError(f"{name}: its weight holds NaN or infinite values; the checkpoint is damaged, get it again")


@contextmanager
def refuse_nonfinite(weights: dict[str, WeightView]) -> Iterator[None]:
    """Raise ValueError, naming the linear, for NaN or infinity in `weights` or, in forwards inside, in their inputs."""
    for name, weight in weights.items():
        check_weight(name, weight.read())

    def check(name: str, X: Tensor) -> None:
        if not is_finite(X):
            raise ValueError(NONFINITE_INPUTS.format(name))

    with _observed(weights, check):
        yield


@contextmanager
def _observed(weights: dict[str, WeightView], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, X)` with the inputs X (tokens, I) of each weight in forwards inside."""
    handles = [weight.observe(partial(see, name)) for name, weight in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
