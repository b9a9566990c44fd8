"""A batch that is retried for lack of device memory counts once in everything that collects inputs, whatever failed."""

import pytest
import torch
from support.engine import IDS, engine_of, prune
from support.families import FAMILIES

from nnprune.engine.input_collector import InputCollector
from nnprune.patterns import NM
from nnprune.pruners.base import BaseActAwareUnstructuredPruner, Pruner
from nnprune.statistics import Hessian, Moments, SquaredNorm


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
    monkeypatch.setattr("nnprune.statistics.STRIP", 16)  # several parts of a small sum
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
    monkeypatch.setattr(InputCollector, "_sample", fail_once(InputCollector._sample, at))
    own = Own()
    pruned(tmp_path / "b", own)
    assert own.counts == counts and set(counts.values()) == {IDS.numel()}
    for one, other in zip(wanted, samples, strict=True):
        for name, X in one.items():
            assert torch.equal(other[name], X), name


def test_a_pruner_that_runs_out_of_memory_itself_ends_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\..*: Own ran out of device memory .*; lower runtime\.batch_tokens"):
        pruned(tmp_path, Own(fails=True))
