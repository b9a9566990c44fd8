"""What the linears of a decoder layer are fed: which of them share an input, and how a pruner gets to see it.

Letters: N samples, B batch, T tokens, I input features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nnprune.decoder import LayerCall, StopForward, run_layer
from nnprune.pruners.base import Pruner

SAMPLED_TOKENS = 512
"""Tokens, spread over the whole calibration, on which the relative error of each linear is measured."""


def input_groups(layer: nn.Module, linears: dict[str, nn.Module], hidden: Tensor, call: LayerCall) -> list[list[str]]:
    """Names of the linears that receive the same input tensor (q, k and v; gate and up), in the order of their use.

    Found by the input's identity in one forward. Raises ValueError for a linear that the forward never reaches.
    """
    groups: dict[tuple, list[str]] = {}
    alive: list[Tensor] = []  # a freed input could lend its address to the next one

    def note(name: str, X: Tensor) -> None:
        alive.append(X)
        names = groups.setdefault((X.data_ptr(), X.shape, X.stride(), X._version), [])
        if name not in names:
            names.append(name)

    with _hooks(linears, note):
        run_layer(layer, hidden, call)
    if unused := set(linears) - {name for names in groups.values() for name in names}:
        raise ValueError(f"{min(unused)}: never receives an input, so it cannot be pruned with this model's own forward")
    return list(groups.values())


class InputCollector:
    """Shows a pruner the inputs of groups of linears while forwards run.

    Args:
        pruner: sees each input once a group, or once a linear when it collects statistics of its own.
        groups: as from `input_groups`; only these are looked at.
        linears: name -> linear, for at least the names in `groups`.
        num_samples, seq_len: N and T.
    """

    def __init__(
        self, pruner: Pruner, groups: list[list[str]], linears: dict[str, nn.Module], num_samples: int, seq_len: int
    ) -> None:
        self.pruner = pruner
        self.groups = groups
        self.linears = linears
        self.seq_len = seq_len
        self.tokens_per_row = -(-SAMPLED_TOKENS // num_samples)
        self.group_of = {name: names for names in groups for name in names}
        self._samples: dict[str, list[Tensor]] = {names[0]: [] for names in groups}
        self._total: dict[str, Tensor] = {}  # sums that show NaNs, where no statistic does
        self._one_each = pruner.shares_statistics and pruner.statistic is not None

    @contextmanager
    def watching(self, stop: bool) -> Iterator[None]:
        """Within it, forwards are seen; `stop` ends each of them once the last group has been."""
        watched = [name for names in self.groups for name in (names[:1] if self.pruner.shares_statistics else names)]

        def see(name: str, X: Tensor) -> None:
            self._see(name, X)
            if stop and name == watched[-1]:
                raise StopForward

        with _hooks({name: self.linears[name] for name in watched}, see):
            yield

    def finish(self) -> None:
        """Share each group's statistic among its linears. Raises ValueError, naming a linear, for NaN or infinite inputs."""
        for names in self.groups:
            leader = names[0]
            statistic = self.pruner.statistics.get(leader) if self._one_each else None
            finite = statistic.is_finite() if statistic else bool(self._total[leader].isfinite())
            if not finite:
                raise ValueError(f"{leader}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16")
            if statistic:
                self.pruner.statistics.update(dict.fromkeys(names, statistic))

    def sample(self, name: str) -> Tensor:
        """Some inputs (tokens, I) of linear `name`, float32, the same tokens whatever the batch size."""
        return torch.cat(self._samples[self.group_of[name][0]]).float()

    def _see(self, name: str, X: Tensor) -> None:
        X = X.detach().reshape(-1, self.seq_len, X.shape[-1])  # some layers flatten their tokens
        if name in self._samples:
            stride = max(X.shape[1] // self.tokens_per_row, 1)
            self._samples[name].append(X[:, stride - 1 :: stride][:, : self.tokens_per_row].reshape(-1, X.shape[-1]).clone())
            if not self._one_each:
                self._total[name] = self._total.get(name, 0) + X.sum(dtype=torch.float32)
        if self.pruner.needs_calibration:
            self.pruner.add_linear_activations(name, X)


def check_weight(name: str, weight: Tensor) -> None:
    """Raise ValueError, naming the linear, for NaN or infinity in its weight."""
    if not weight.isfinite().all():
        raise ValueError(f"{name}: its weight holds NaN or infinite values; the checkpoint is damaged, get it again")


@contextmanager
def refuse_nonfinite(linears: dict[str, nn.Module]) -> Iterator[None]:
    """Raise ValueError, naming the first culprit, for NaN or infinity in the weights of `linears` or in what they receive."""
    for name, linear in linears.items():
        check_weight(name, linear.weight)

    def check(name: str, X: Tensor) -> None:
        if not X.isfinite().all():
            raise ValueError(f"{name}: its inputs hold NaN or infinite values; try model.dtype=float32 or bfloat16")

    with _hooks(linears, check):
        yield


@contextmanager
def _hooks(linears: dict[str, nn.Module], see) -> Iterator[None]:
    """Call `see(name, X)` before each linear's forward. StopForward leaves the forward, not this context."""
    handles = [
        linear.register_forward_pre_hook(lambda module, args, name=name: see(name, args[0])) for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
