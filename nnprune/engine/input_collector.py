"""The inputs of the linears of a decoder layer: which linears share one, and how pruners and statistics get to see them.

Letters: N samples, B batch, T tokens, I input features.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor

from nnprune.checks import is_finite
from nnprune.engine import parallel
from nnprune.method import Method
from nnprune.model.decoder import StopForward
from nnprune.model.weight_views import WeightView
from nnprune.pruners.base import Pruner
from nnprune.statistics import CrossProduct, InputStatistic

SAMPLED_TOKENS = 512
"""Tokens, from the first rows of the calibration, on which the relative error of each linear is measured."""

PROBE_TOKENS = 8
"""Tokens of the forward that shows which linears share an input."""


def input_groups(weights: dict[str, WeightView], forward: Callable[[], object]) -> list[list[str]]:
    """Names of the linears that receive the same input tensor (q, k and v; gate and up), in the order of their use.

    Found by the input's identity in one forward of their decoder layer, in which values do not matter. Raises ValueError
    for a linear that the forward never reaches.
    """
    groups: dict[tuple, list[str]] = {}
    alive: list[Tensor] = []  # a freed input could lend its address to the next one

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


class InputCollector:
    """Sees the inputs of groups of linears while forwards run.

    One statistic of a kind and group serves all linears of the group and all pruners that ask for it. A pruner that
    collects on its own is shown every linear's input.

    Args:
        statistics: the kinds to accumulate.
        own: pruners that collect by themselves.
        groups: as from `input_groups`; only these are looked at.
        weights: name -> weight, for at least the names in `groups`.
        seq_len: T.
        reference: the same of the dense layer, where that is another module.
    """

    def __init__(
        self,
        statistics: Iterable[type[InputStatistic]],
        own: Sequence[Pruner],
        groups: list[list[str]],
        weights: dict[str, WeightView],
        seq_len: int,
        reference: dict[str, WeightView] | None = None,
    ) -> None:
        self.groups = groups
        self.weights = weights
        self.seq_len = seq_len
        self.statistics = {names[0]: {kind: kind() for kind in statistics} for names in groups}
        self._own = [pruner for pruner in own if not pruner.shares_statistics]
        self._reference = reference
        self._reference_inputs: dict[str, Tensor] | None = None  # of the rows at hand
        self._remembers = self._stops_reference = False
        self._samples: dict[str, list[Tensor]] = {names[0]: [] for names in groups}
        self._totals: dict[str, Tensor] = {}  # sums that show NaNs, where no statistic does
        self._outputs: dict[str, float] = {}
        self._rows = slice(0, 0)
        self._counted: dict[tuple, int] = {}  # consumer and linear -> rows it has counted

    @property
    def pairs(self) -> bool:
        """Whether a statistic compares inputs with those of the dense layer, so that `reference` comes before `rows`."""
        return any(CrossProduct in kinds for kinds in self.statistics.values())

    @contextmanager
    def watching(self, stop: bool) -> Iterator[None]:
        """Within it, forwards inside `rows` are seen; `stop` ends each of them once the last group has been."""
        watched = [name for names in self.groups for name in (names if self._own else names[:1])]

        def see(name: str, X: Tensor) -> None:
            if self._remembers:
                self._reference_inputs[name] = X
                if self._stops_reference and name == watched[-1]:
                    raise StopForward
            else:
                self._see(name, X)
                if stop and name == watched[-1]:
                    raise StopForward

        with ExitStack() as stack:
            for weights in (self.weights, self._reference):
                if weights is not None:
                    stack.enter_context(_observed({name: weights[name] for name in watched}, see))
            yield

    @contextmanager
    def rows(self, rows: slice) -> Iterator[None]:
        """The rows of the forward within it, which may end by StopForward. Rows come in order; a batch that failed
        halfway may come again, in smaller batches, and what had been seen of it is not counted twice."""
        self._rows = rows
        with suppress(StopForward):
            yield

    @contextmanager
    def reference(self, stop: bool) -> Iterator[None]:
        """The forward within it, of the dense layer, shows the reference inputs of the rows to come; `stop` ends it once the
        last group has been seen."""
        self._remembers, self._stops_reference, self._reference_inputs = True, stop, {}
        try:
            with suppress(StopForward):
                yield
        finally:
            self._remembers = False

    def finish(self) -> None:
        """To be called after the last row. Raises ValueError, naming a linear, for NaN or infinite inputs."""
        self._reference_inputs = None
        for leader, statistics in self.statistics.items():
            if parallel.world_size() > 1:
                for statistic in statistics.values():
                    statistic.all_reduce(parallel.all_reduce)
            finite = all(statistic.is_finite() for statistic in statistics.values())
            if not finite or (leader in self._totals and not self._totals[leader].isfinite()):
                raise ValueError(f"{leader}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16")

    def sample(self, names: list[str]) -> Tensor:
        """Some inputs (tokens, I) of the group `names`, float32, the same tokens whatever the batch size and pruner."""
        return torch.cat(self._samples[names[0]]).float()

    def squared_output(self, name: str, compute: Callable[[], float]) -> float:
        """What `compute()` found, the first time, for the dense weight of linear `name` on its sample: cells share it."""
        if name not in self._outputs:
            self._outputs[name] = compute()
        return self._outputs[name]

    def _see(self, name: str, X: Tensor) -> None:
        """Show the inputs X (tokens, I) of the current rows to all that collect them, each of which counts a row once."""
        if name in self._samples:
            for kind, statistic in self.statistics[name].items():
                others = [self._reference_inputs[name]] if kind is CrossProduct else []
                statistic.add(X, *others, until=self._rows.stop)
            if not self.statistics[name]:
                self._once(("total", name), lambda: self._add_total(name, X))
            self._once(("sample", name), lambda: self._sample(name, X.unflatten(0, (-1, self.seq_len))))
        for pruner in self._own:
            self._once((id(pruner), name), lambda pruner=pruner: self._show(pruner, name, X.unflatten(0, (-1, self.seq_len))))

    def _once(self, key: tuple, count: Callable[[], None]) -> None:
        """Call `count` unless it has counted these rows already."""
        if self._counted.get(key, 0) < self._rows.stop:
            count()
            self._counted[key] = self._rows.stop

    def _add_total(self, name: str, X: Tensor) -> None:
        self._totals[name] = self._totals.get(name, 0) + X.sum(dtype=torch.float32)

    @staticmethod
    def _show(pruner: Pruner, name: str, X: Tensor) -> None:
        """Show X (B, T, I) to a pruner that collects by itself. If it runs out of memory itself, what it has counted is unknown."""
        try:
            pruner.add_linear_activations(name, X)
        except torch.OutOfMemoryError as error:
            reason = f"{type(pruner).__name__} ran out of device memory while it collected inputs"
            raise ValueError(f"{name}: {reason}; lower runtime.batch_tokens") from error

    def _sample(self, name: str, X: Tensor) -> None:
        rows = X[: max(num_sampled_rows(self.seq_len) - self._rows.start, 0)]
        if len(rows):
            stride = max(self.seq_len * num_sampled_rows(self.seq_len) // SAMPLED_TOKENS, 1)
            self._samples[name].append(rows[:, stride - 1 :: stride].reshape(-1, X.shape[-1]).clone())


def num_sampled_rows(seq_len: int) -> int:
    """How many rows of T tokens hold the tokens that relative errors are measured on."""
    return -(-SAMPLED_TOKENS // seq_len)


def rows_needed(methods: Sequence[Method], ids: Tensor) -> Tensor:
    """Rows of calibration ids (N, T) for these methods: all, or just enough to measure errors where none looks at inputs."""
    return ids if any(method.needs_calibration for method in methods) else ids[: num_sampled_rows(ids.shape[1])]


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the linear, for NaN or infinity in its weight."""
    if not is_finite(weight):
        raise ValueError(f"{name}: its weight holds NaN or infinite values; the checkpoint is damaged, get it again")


@contextmanager
def refuse_nonfinite(weights: dict[str, WeightView]) -> Iterator[None]:
    """Raise ValueError, naming the first culprit, for NaN or infinity in `weights` or in what they receive."""
    for name, weight in weights.items():
        check_weight(name, weight.read())

    def check(name: str, X: Tensor) -> None:
        if not is_finite(X):
            raise ValueError(f"{name}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16")

    with _observed(weights, check):
        yield


@contextmanager
def _observed(weights: dict[str, WeightView], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, X)` with the inputs X (tokens, I) of each weight. StopForward leaves the forward, not this context."""
    handles = [weight.observe(partial(see, name)) for name, weight in weights.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
