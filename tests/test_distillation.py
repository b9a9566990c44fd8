"""recover=model: gradients through the whole model, what is kept of it, and what a kill leaves."""

import copy
import logging
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.engine import IDS, engine_of, prune, through_layers
from support.families import FAMILIES, HYBRIDS, MIXTURES, larger
from support.ranks import on_ranks
from support.runs import failure, kill, run_until_killed
from torch.nn.functional import kl_div

import nnprune.engine.stopwatch
import nnprune.experiment.preparation
from nnprune.engine import logits, parallel
from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.distillation import DistillationPass, Student
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.stopwatch import Stopwatch
from nnprune.evaluation import Perplexity
from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import CostEstimate
from nnprune.patterns import NM
from nnprune.pruners.magnitude import Magnitude
from nnprune.recovery import Distillation
from nnprune.recovery.divergence import divergence
from nnprune.recovery.tuning import Tuning
from nnprune.run import run

ALL = FAMILIES | HYBRIDS | MIXTURES
SETTINGS = ("pruner=wanda", "sparsity=2:4", "recover=model", "recover.epochs=2", "recover.batch_tokens=64")


def engines(name, folder):
    """The engines of a dense model, with weights large enough for logits that differ, and of the same model pruned."""
    model = larger(ALL[name]())
    dense, pruned = engine_of(copy.deepcopy(model), folder / "dense"), engine_of(model, folder / "pruned")
    for engine in (dense, pruned):
        check_consistency(engine)
    prune(pruned, Magnitude(), dict.fromkeys(pruned.decoder.shapes(), NM(2, 4)), IDS)
    return dense, pruned


@pytest.mark.parametrize("name", ["llama", "opt_post_norm_projected", "gemma2", "mixtral", "gemma4_text"])
def test_gradients_are_those_of_the_whole_model(name, tmp_path, monkeypatch):
    monkeypatch.setitem(logits.LOGITS, "cpu", 264 * 2 * 5)  # parts of five tokens
    dense, pruned = engines(name, tmp_path)
    model, rows = pruned.decoder.model.requires_grad_(True), [3, 1]
    with torch.no_grad():
        dense_logits = dense.decoder.model(IDS[rows]).logits
    expected = kl_div(model(IDS[rows]).logits.log_softmax(-1), dense_logits.softmax(-1), reduction="sum")
    expected.backward()
    layers = copy.deepcopy(pruned.decoder.layers)
    model.requires_grad_(False)
    with through_layers(dense, IDS, pruned=False) as outputs, torch.enable_grad():
        found = Student(pruned, outputs).compare(divergence, layers, rows)
        found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found > 0.01
    for (name, parameter), wanted in zip(layers.named_parameters(), pruned.decoder.layers.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert all(parameter.grad.any() for parameter in layers.parameters() if parameter.ndim > 1)


def test_gradients_of_a_mean_are_not_too_small_for_float16(tmp_path):
    found = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        engine = engine_of(larger(ALL["opt_post_norm_projected"]()).to(dtype), tmp_path / str(dtype))
        with through_layers(engine, IDS) as states, torch.enable_grad():
            dense = states.pick([3, 1])
            outputs = (dense + torch.randn(dense.shape)).requires_grad_()
            (states.compare_logits(divergence, outputs, dense) / 1e7).backward()
        found[dtype] = outputs.grad
    assert found[torch.float32].abs().mean() < 1e-8
    assert (found[torch.float16] - found[torch.float32]).norm() < 0.05 * found[torch.float32].norm()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the records of runs that nothing disturbs are, so that none is made twice."""
    return f"outputs={tmp_path_factory.mktemp('undisturbed')}"


PLAIN = ("pruner=wanda", "sparsity=2:4", "save=true")


def test_zeros_stay_and_the_record_tells_of_it(tiny_config, undisturbed):
    plain, record = run(tiny_config(*PLAIN, undisturbed)), run(tiny_config(*SETTINGS, "save=true", undisturbed))
    [report] = [entry["model"] for entry in record.recovered]
    assert record.whole_model and not plain.whole_model
    assert 0 < report["loss_after"] < report["loss_before"] and report["epoch"] in (1, 2)
    assert record.metrics != plain.metrics and record.seconds["recover"] > 0
    assert record.linear_sparsity == plain.linear_sparsity == 0.5
    assert [linear["sparsity"] for linear in record.per_linear] == [0.5] * 12
    root = Path(undisturbed.partition("=")[2])
    files = [next(root.rglob(f"*{one.fingerprint}/model/*.safetensors")) for one in (record, plain)]
    tuned, pruned = map(load_file, files)
    names = {linear["name"] for linear in record.per_linear}
    for name, weight in tuned.items():
        assert torch.equal(weight, pruned[name]) != (".layers." in name), name
        if name.removesuffix(".weight") in names:
            assert torch.equal(weight != 0, pruned[name] != 0), name


def test_without_a_better_epoch_the_weights_stay(tiny_config, undisturbed):
    record = run(tiny_config(*SETTINGS, "recover.lr=1e6"))
    assert record.recovered[0]["model"]["epoch"] == 0
    assert record.metrics == run(tiny_config(*PLAIN, undisturbed)).metrics


def test_it_follows_reconstruction(tiny_config, device):
    record = run(tiny_config("pruner=wanda", "sparsity=2:4", "recover=layer_model", "recover.layers.epochs_after=1"))
    first, second, model = record.recovered
    assert first["after"]["epoch"] in (0, 1) and second.keys() == {"after"} and model.keys() == {"model"}


def test_wherever_layers_are_offloaded(tiny_config, undisturbed, tmp_path):
    whole = run(tiny_config(*SETTINGS, "save=true", undisturbed))
    for place in ("device", "disk"):
        offload = (f"runtime.layers={place}", "runtime.activations=disk", "runtime.resume=false")
        record = run(tiny_config(*SETTINGS, *offload, f"outputs={tmp_path / place}"))
        assert (record.metrics, record.recovered) == (whole.metrics, whole.recovered)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_model(dtype, tiny_config, device):
    record = run(tiny_config(*SETTINGS, f"model.dtype={dtype}"))
    report = record.recovered[0]["model"]
    assert report["loss_after"] < report["loss_before"]


def in_the_second_epoch(patch):
    def die(each_epoch):
        return lambda epoch, loss: kill() if epoch == 2 else each_epoch(epoch, loss)

    original = Tuning.run
    patch.setattr(Tuning, "run", lambda *args, each_epoch, **more: original(*args, each_epoch=die(each_epoch), **more))


def between_tuned_layers(patch):
    original = LayerFiles._save

    def die(self, *args):
        original(self, *args)
        if self.folder.name == "distilled":
            kill()

    patch.setattr(LayerFiles, "_save", die)


def in_the_evaluation(patch):
    original = Perplexity.measure
    patch.setattr(Perplexity, "measure", lambda self, *args: original(self, *args) if dense.pop() else kill())
    dense = [False, True]


@pytest.mark.parametrize("moment", [in_the_second_epoch, between_tuned_layers, in_the_evaluation])
def test_a_killed_run_ends_with_the_bytes_of_another(moment, tiny_config, undisturbed, monkeypatch, caplog):
    whole = run(tiny_config(*SETTINGS, "save=true", undisturbed))
    cfg = tiny_config(*SETTINGS, "save=true")
    with monkeypatch.context() as patch:
        moment(patch)
        patch.setattr(nnprune.engine.stopwatch, "time", SimpleNamespace(perf_counter=partial(next, count(step=3600))))
        run_until_killed(cfg)
    assert len(list(Path(cfg.outputs).rglob("unfinished/layer-*.json"))) == 2
    caplog.clear()
    caplog.set_level(logging.INFO)
    resumed = run(cfg)
    assert not any(message.startswith("layer ") for message in caplog.messages), "pruned layers are not pruned again"
    assert any("epoch 1/2" in message for message in caplog.messages) == (moment is not in_the_evaluation)
    assert (resumed.metrics, resumed.recovered) == (whole.metrics, whole.recovered)
    stages = ("prune", "recover") if moment is in_the_evaluation else ("prune",)
    assert all(resumed.seconds[stage] > 3600 for stage in stages), "those of the killed process count"
    name = f"*{whole.fingerprint}/model/model.safetensors"
    files = [next(Path(root).rglob(name)) for root in (cfg.outputs, undisturbed.partition("=")[2])]
    assert files[0].read_bytes() == files[1].read_bytes()


def distil(folder):
    """Write the weights of this rank, and its report."""
    rank = parallel.rank()
    model = FAMILIES["llama"]()
    engine = engine_of(model, folder / str(rank))
    tuned = LayerFiles(folder / str(rank) / "tuned", engine.decoder.path)
    passing = DistillationPass(engine, Distillation(2, batch_tokens=32), tuned, Stopwatch())
    with passing.dense_outputs(IDS):
        prune(engine, Magnitude(), dict.fromkeys(engine.decoder.shapes(), NM(2, 4)), IDS)
        passing.run()
    torch.save((model.state_dict(), tuned.reports[0]["distilled"]), folder / f"{rank}.pt")


def test_several_processes_find_what_one_finds(tmp_path):
    (tmp_path / "one").mkdir()
    distil(tmp_path / "one")
    expected, report = torch.load(tmp_path / "one" / "0.pt")
    assert on_ranks(distil, tmp_path) == [0, 0]
    (first, first_report), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first_report["loss_before"] == pytest.approx(report["loss_before"], rel=1e-4)
    assert first_report["loss_after"] == pytest.approx(report["loss_after"], rel=1e-2)
    assert report["loss_after"] < report["loss_before"]
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-3)


def test_what_does_not_fit_is_refused_at_once(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.preparation, "available_host_bytes", lambda: 0)
    message = failure(tiny_config(*SETTINGS))
    assert message.startswith("recover=model: tunes the whole model at once, which needs ") and "set recover=layer" in message


def test_the_cost_estimate_counts_it(tiny_config):
    without, with_it = (CostEstimate([build(tiny_config(*one))]) for one in (SETTINGS[:2], SETTINGS))
    assert with_it.seconds["recover"] > 0 and "recover" not in without.seconds
    assert with_it.host_bytes - without.host_bytes > 16 * with_it.in_layers
    assert with_it.disk_bytes - without.disk_bytes == 4 * with_it.in_layers, "tuned layers have files of their own"


def test_the_estimate_counts_the_copies_that_layers_are_tuned_on(tiny_config):
    settings = ("pruner=wanda", "sparsity=2:4", "recover=layer_model")
    without, with_them = (
        CostEstimate([build(tiny_config(*settings, f"+recover.layers.num_copies={number}"))]).load for number in (0, 2)
    )
    assert with_them.calibration == 3 * without.calibration > 0


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("recover.epochs=0", "recover.epochs=0: must be a whole number"),
        ("recover.lr=0", "recover.lr=0: must be a number greater than 0"),
        ("recover.layers={_target_: nnprune.pruners.wanda.Wanda}", "recover.layers: must be a recovery of decoder layers"),
        ("calibration.num_samples=1", "calibration.num_samples=1: recover needs one sequence to tune on"),
    ],
)
def test_settings_that_cannot_be(setting, reason, tiny_config):
    assert failure(tiny_config(*SETTINGS, setting)).startswith(reason)
