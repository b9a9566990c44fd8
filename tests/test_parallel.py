"""Several processes, one model: they find what one finds, end together, and one may resume what several began."""

import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from support.engine import IDS, Witness, engine_of, prune, recover
from support.families import FAMILIES, MIXTURES
from support.ranks import on_ranks

from nnprune.engine import parallel
from nnprune.engine.experts import Routing
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.evaluation import Evaluator, Perplexity
from nnprune.method import Method
from nnprune.patterns import NM
from nnprune.pruners.wanda import Wanda
from nnprune.run import run, run_grid
from nnprune.statistics import Hessian, Means, Moments, SquaredNorm

X = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
KINDS = (Hessian, Means, Moments, SquaredNorm)


def accumulated(kind, *batches):
    statistic = kind()
    for inputs in batches:
        statistic.add(inputs)
    return statistic


def reduce_statistics():
    rank = parallel.rank()
    assert parallel.world_size() == 3
    assert parallel.all_reduce(torch.tensor(rank + 1.0)) == 6
    assert torch.equal(parallel.concatenated(X[: 2 * rank]), torch.cat([X[:2], X[:4]]))
    assert torch.equal(parallel.broadcast(torch.tensor(rank), 2), torch.tensor(2))
    batches = [[X[:25]], [], [X[25:]]][rank]
    for kind in KINDS:
        statistic = accumulated(kind, *batches)
        statistic.all_reduce(parallel.all_reduce, torch.empty(8, 16))
        torch.testing.assert_close(statistic.mean(), accumulated(kind, X).mean())
        assert statistic.num_tokens == len(X)


def test_processes_have_the_statistics_of_one_even_without_tokens_of_their_own():
    assert on_ranks(reduce_statistics, num_ranks=3) == [0, 0, 0]


def test_one_process_is_alone():
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    one = torch.ones(2)
    assert parallel.all_reduce(one) is one and torch.equal(one, torch.ones(2))
    assert parallel.concatenated(one) is one and parallel.gather("mine") == ["mine"]
    assert parallel.share(5) == parallel.share(5, whole=True) == slice(0, 5)


@pytest.mark.parametrize("num_rows", [0, 1, 2, 7, 8])
def test_each_row_has_one_rank_and_the_first_rank_has_the_first(num_rows, monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 4)
    rows = []
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        share = parallel.share(num_rows)
        assert share.stop - share.start <= -(-num_rows // 4)
        rows += range(num_rows)[share]
        assert rank or (share.stop > 0) == (num_rows > 0)
    assert rows == list(range(num_rows))


def test_tasks_are_shared_out_by_cost(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    assert parallel.assign([1, 1, 5, 3]) == [1, 1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_merge(kind):
    whole, first, second = (accumulated(kind, part) for part in (X, X[:7], X[7:]))
    first.merge(second)
    torch.testing.assert_close(first.mean(), whole.mean())
    assert first.num_tokens == whole.num_tokens
    empty = kind()
    empty.merge(whole)
    torch.testing.assert_close(empty.mean(), whole.mean())
    whole.add(X)
    torch.testing.assert_close(empty.mean(), first.mean())  # a merged sum is its own


def prune_llama(folder):
    """Write what pruners were shown, the reports of the layers and the weights of this rank."""
    rank = parallel.rank()
    witness, model = Witness(), FAMILIES["llama"]()
    engine = engine_of(model, folder / str(rank))
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    reports = prune(engine, Method(witness, recovery=recover(0, 1, num_layers=2, logits_epochs=1)), plan, IDS)
    torch.save((witness.seen, reports, model.state_dict()), folder / f"{rank}.pt")


def prune_mixture(folder):
    """Write what the pruner of this rank is given, from several passes through each layer."""
    witness, engine = Witness(), engine_of(MIXTURES["mixtral"](), folder / str(parallel.rank()))
    engine.routing, engine.runtime.statistics_bytes = Routing(min_tokens=60), 4 * 64**2
    task = PruneTask(Method(witness), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), engine.store.layer_files)
    PruningPass(engine, [task], "dense").run(IDS)
    torch.save(witness.seen, folder / f"{parallel.rank()}.pt")


def test_experts_get_the_pooled_tokens_of_all_processes(tmp_path):
    (tmp_path / "one").mkdir()
    prune_mixture(tmp_path / "one")
    expected = torch.load(tmp_path / "one" / "0.pt")
    assert on_ranks(prune_mixture, tmp_path) == [0, 0]
    found = torch.load(tmp_path / "0.pt") | torch.load(tmp_path / "1.pt")
    assert found.keys() == expected.keys() and any("experts" in name for name in found)
    for name, hessian in found.items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-3, atol=1e-5)


def test_ranks_share_out_linears_and_all_end_with_the_same_weights(tmp_path):
    (tmp_path / "one").mkdir()
    prune_llama(tmp_path / "one")
    expected, expected_reports, expected_weights = torch.load(tmp_path / "one" / "0.pt")
    assert on_ranks(prune_llama, tmp_path) == [0, 0]
    (first, reports, weights), (second, *others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(expected) == len(first) + len(second) == 21 and first and second
    for name, hessian in (first | second).items():
        torch.testing.assert_close(hessian, expected[name], rtol=1e-3, atol=1e-5)
    for report, of_second, of_one in zip(reports, others[0], expected_reports, strict=True):
        times = {"seconds": 0, "run_seconds": {}, "run_peaks": {}}
        assert report | times == of_second | times
        assert [linear["name"] for linear in report["linears"]] == [linear["name"] for linear in of_one["linears"]]
        for linear, one in zip(report["linears"], of_one["linears"], strict=True):
            assert linear["relative_error"] == pytest.approx(one["relative_error"], rel=1e-2)
        assert report["recovered"]["after"]["loss_after"] == pytest.approx(of_one["recovered"]["after"]["loss_after"], rel=1e-2)
    for name, weight in weights.items():
        assert torch.equal(weight, others[1][name]), name
        torch.testing.assert_close(weight, expected_weights[name], rtol=0, atol=2e-3)
    assert len(list(tmp_path.glob("?/layers/*.safetensors"))) == 3  # rank 0's


def masks(outputs):
    """Name -> mask of each matrix of the one saved model in `outputs`."""
    weights = {name: weight for path in outputs.rglob("model/*.safetensors") for name, weight in load_file(path).items()}
    return {name: weight != 0 for name, weight in weights.items() if weight.ndim == 2}


def assert_same(record, expected, outputs, expected_outputs):
    for ours, wanted in ((record["metrics"], expected.metrics), (record["dense_metrics"], expected.dense_metrics)):
        assert ours == pytest.approx(wanted, rel=2e-3)
    found, wanted = masks(outputs), masks(expected_outputs)
    same = sum(int((mask == found[name]).sum()) for name, mask in wanted.items())
    assert same >= 0.999 * sum(map(torch.numel, wanted.values()))


def record_in(outputs):
    [path] = (path for path in outputs.rglob("result.json") if "dense" not in str(path.relative_to(outputs)))
    return json.loads(path.read_text())


COMBINATIONS = [
    ("pruner=sparsegpt", "calibration.num_samples=1"),
    ("pruner=sparsegpt", "target=asymmetric", "propagate=sequential", "runtime=low_memory"),
    ("pruner=wanda", "allocation=owl", "recover=next_layer", "model.dtype=float32"),
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=" ".join)
def test_two_processes_prune_as_one(options, tiny_config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run(tiny_config(*options, "save=true", f"outputs={one}"))
    assert on_ranks(run, tiny_config(*options, "save=true", f"outputs={two}")) == [0, 0]
    record = record_in(two)
    assert_same(record, expected, two, one)
    assert record["fingerprint"] == expected.fingerprint
    assert any("2 processes" in note for note in record["notes"]) and not expected.notes
    assert not list(two.rglob("unfinished"))


def test_two_processes_prune_a_grid_as_one(tiny_config, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = ("propagate=dense", "sparsity=0.6", "evaluation.max_windows=1")
    expected = run(tiny_config("pruner=wanda", *common, f"outputs={one}"))
    cells = [tiny_config(f"pruner={pruner}", *common, f"outputs={two}") for pruner in ("magnitude", "wanda")]
    assert on_ranks(run_grid, cells) == [0, 0]
    records = [json.loads(path.read_text()) for path in two.rglob("result.json")]
    assert len(records) == 3
    [record] = (record for record in records if record["fingerprint"] == expected.fingerprint)
    assert record["metrics"] == pytest.approx(expected.metrics, rel=2e-3)
    assert any("1 other cells" in note for note in record["notes"])


@pytest.mark.parametrize(("runtime", "num_ranks"), [("cpu", 1), ("low_memory", 3)])
def test_another_number_of_processes_resumes_after_kill_9(runtime, num_ranks, tiny_config, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run(tiny_config("pruner=sparsegpt", f"runtime={runtime}", "save=true", f"outputs={one}"))
    cfg = tiny_config("pruner=sparsegpt", f"runtime={runtime}", "save=true", f"outputs={two}")
    write = LayerFiles.write

    def write_first(self, index, *arguments):
        if index:
            while not self._report_path(0).exists():  # a thread of the first process writes it
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, index, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LayerFiles, "write", write_first)
        assert on_ranks(run, cfg) == [-signal.SIGKILL] * 2
    assert len(list(two.rglob("layer-*.json"))) == 1
    if num_ranks == 1:
        run(cfg)
    else:
        assert on_ranks(run, cfg, num_ranks=num_ranks) == [0] * num_ranks
    assert_same(record_in(two), expected, two, one)


def test_a_process_that_dies_ends_the_others_with_a_line(tiny_config, monkeypatch, capfd):
    measure = Perplexity.measure

    def die(self, ids, logits):
        if parallel.rank():
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, ids, logits)

    monkeypatch.setattr(Perplexity, "measure", die)
    assert on_ranks(run, tiny_config("pruner=magnitude")) == [1, -signal.SIGKILL]
    assert "another process of this run has died; run the same command again to resume" in capfd.readouterr().err


class OwnStatistics(Wanda):
    """Collects its own statistics."""

    def add_linear_activations(self, module_name, X):
        assert parallel.rank() == 0
        super().add_linear_activations(module_name, X)


class NumRows(Evaluator):
    """An evaluator that needs all rows at once."""

    seq_len = 16

    def prepare(self, tokenizer):
        return torch.arange(48).view(3, 16)

    def measure(self, ids, logits):
        return {"rows": float(len({row for row, *_ in logits}))}


def test_what_cannot_be_shared_out_is_left_to_the_first_process(tiny_config, tmp_path):
    own = f"+evaluation.datasets.own._target_={__name__}.NumRows"
    expected = run(tiny_config(own, f"outputs={tmp_path / 'one'}"), OwnStatistics())
    assert on_ranks(run, tiny_config(own), OwnStatistics()) == [0, 0]
    record = record_in(tmp_path / "outputs")
    assert record["metrics"] == pytest.approx(expected.metrics, rel=1e-5) and record["metrics"]["rows"] == 3
