"""A batch that is retried for lack of device memory counts once in everything that collects inputs, whatever failed."""

import pytest
import torch
from support.devices import set_work_sizes
from support.engine import IDS, engine_of, prune
from support.families import FAMILIES
from torch import nn

from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import InputCollector
from nnprune.model.weight_views import weight_views
from nnprune.patterns import NM
from nnprune.pruners.base import BaseActAwareUnstructuredPruner, Pruner
from nnprune.runtime import Runtime
from nnprune.statistics import CrossProduct, Hessian, Moments, SquaredNorm


class Recorder(Pruner):
    """Keeps what it was given."""

    def __init__(self, kind):
        self.statistic = kind
        self.seen = {}

    def prune_linear(self, W, module_name, pattern):
        statistic = self.statistics[module_name]
        self.seen[module_name] = (statistic.mean(), statistic.num_tokens)
        return torch.where(pattern.mask(W.abs()), W, 0)


class Own(BaseActAwareUnstructuredPruner):
    """Counts tokens by itself; may run out of memory once, or always."""

    def __init__(self, fails=False):
        self.counts, self.fails = {}, fails

    def add_linear_activations(self, module_name, X):
        if self.fails:
            raise torch.OutOfMemoryError
        self.counts[module_name] = self.counts.get(module_name, 0) + X.shape[0] * X.shape[1]

    def clear_linear_activations(self, module_name):
        pass

    def prune_linear_unstruct(self, W, module_name, k):
        raise NotImplementedError

    def prune_linear_nm(self, W, module_name, n, m):
        return torch.where(NM(n, m).mask(W.abs()), W, 0)


def fail_once(original, at):
    """`original`, which runs out of memory at its call number `at`."""
    calls = [0]

    def failing(*arguments, **options):
        calls[0] += 1
        if calls[0] == at:
            raise torch.OutOfMemoryError
        return original(*arguments, **options)

    return failing


def pruned(folder, pruner, propagate="dense"):
    engine = engine_of(FAMILIES["llama"](), folder, batch_tokens=64)
    prune(engine, pruner, dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), IDS, propagate)
    return pruner


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [Hessian, Moments, SquaredNorm])
def test_a_statistic_that_runs_out_of_memory_counts_each_token_once(kind, at, tmp_path, monkeypatch):
    set_work_sizes(monkeypatch, strip=16, mirrored=16)  # several parts of a small sum
    wanted = pruned(tmp_path / "a", Recorder(kind)).seen
    monkeypatch.setattr(kind, "_accumulate", staticmethod(fail_once(kind._accumulate, at)))
    found = pruned(tmp_path / "b", Recorder(kind)).seen
    assert found.keys() == wanted.keys()
    for name, (mean, num_tokens) in wanted.items():
        torch.testing.assert_close(found[name][0], mean, msg=name)
        assert found[name][1] == num_tokens == IDS.numel()


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_sample_that_runs_out_of_memory_is_taken_once(at, tmp_path, monkeypatch):
    samples = []
    finish = InputCollector.finish

    def watched(self):
        samples.append({names[0]: self.sample(names) for names in self.groups})
        return finish(self)

    monkeypatch.setattr(InputCollector, "finish", watched)
    own = Own()
    pruned(tmp_path / "a", own)
    wanted, counts = [*samples], own.counts
    samples.clear()
    monkeypatch.setattr(InputCollector, "_add_sample", fail_once(InputCollector._add_sample, at))
    own = Own()
    pruned(tmp_path / "b", own)
    assert own.counts == counts and set(counts.values()) == {IDS.numel()}
    for one, other in zip(wanted, samples, strict=True):
        for name, X in one.items():
            assert torch.equal(other[name], X), name


def test_a_pruner_that_runs_out_of_memory_itself_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\..*: Own ran out of device memory .*; lower runtime\.batch_tokens"):
        pruned(tmp_path, Own(fails=True))


class Integers:
    """A decoder whose hidden states are small whole numbers: their sums are exact in any order."""

    def embed(self, ids):
        return ((ids[..., None] + 1) * torch.arange(1, 33) % 7).float()


class Sums(Own):
    """Sums up by itself what it was shown of each linear."""

    def __init__(self):
        super().__init__()
        self.sums = {}

    def add_linear_activations(self, module_name, X):
        super().add_linear_activations(module_name, X)
        self.sums[module_name] = self.sums.get(module_name, 0) + X.double().sum((0, 1))


def collected(folder, kinds, batch_tokens, pruners=()):
    """What is collected of two linears in one pass over five rows of 16 tokens; the dense model's inputs are larger by 1."""
    layer, dense = (nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 8)}) for _ in range(2))
    views, reference = weight_views(layer, "l"), weight_views(dense, "l")
    collector = InputCollector(kinds, pruners, [["l.a"], ["l.b"]], views, seq_len=16, reference=reference)
    runtime = Runtime(device="cpu", batch_tokens=batch_tokens)
    with HiddenStates(Integers(), runtime, IDS, folder / "hidden.bin") as states, torch.no_grad():

        def step(rows, hidden):
            collector.run_reference(lambda: (dense["a"](hidden + 1), dense["b"](2 * hidden + 1)), stop=False)
            collector.run(rows, lambda: (layer["a"](hidden), layer["b"](2 * hidden)))

        with collector.observing(stop=False):
            states.each_batch(step)
        collector.finish()
    assert runtime.batch_tokens == 32
    return collector


KINDS = [SquaredNorm, Moments, Hessian, CrossProduct]
FAILURES = [(kind, "_accumulate", at) for kind in KINDS for at in (1, 2)] + [
    (InputCollector, "_add_sample", at) for at in (1, 2)
]


@pytest.mark.parametrize(("owner", "name", "at"), FAILURES)
def test_whatever_ran_out_of_memory_sums_are_exact(owner, name, at, tmp_path, monkeypatch):
    set_work_sizes(monkeypatch, strip=16, mirrored=16)  # several parts of a small sum
    monkeypatch.setattr("nnprune.engine.input_collector.SAMPLED_TOKENS", 48)
    failing = fail_once(getattr(owner, name), at)
    monkeypatch.setattr(owner, name, staticmethod(failing) if name == "_accumulate" else failing)
    pruners = [Sums(), Sums()]
    collector = collected(tmp_path, KINDS, 64, pruners)
    hidden = Integers().embed(IDS).flatten(0, 1)
    for leader, X in {"l.a": hidden, "l.b": 2 * hidden}.items():
        found = collector.statistics[leader]
        assert {kind: statistic.num_tokens for kind, statistic in found.items()} == dict.fromkeys(KINDS, 80)
        assert torch.equal(found[SquaredNorm].mean(), X.square().sum(0) / 80)
        assert torch.equal(found[Moments].mean(), torch.stack([X.sum(0), X.square().sum(0)]) / 80)
        assert torch.equal(found[Hessian].mean(), X.t() @ X / 80)
        assert torch.equal(found[CrossProduct].mean(), (X + 1).t() @ X / 80)
        assert torch.equal(collector.sample([leader]), X[:48])
        for pruner in pruners:
            assert pruner.counts[leader] == 80
            assert torch.equal(pruner.sums[leader], X.double().sum(0))


def test_the_sum_that_reveals_nans_counts_once_too(tmp_path, monkeypatch):
    monkeypatch.setattr(InputCollector, "_add_sample", fail_once(InputCollector._add_sample, 2))
    totals = collected(tmp_path, [], 64)._totals
    hidden = Integers().embed(IDS)
    assert {name: float(total) for name, total in totals.items()} == {
        "l.a": float(hidden.sum()),
        "l.b": float(2 * hidden.sum()),
    }
