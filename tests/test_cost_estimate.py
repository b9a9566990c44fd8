"""plan=true: what a run will take, without its weights. Never a test of seconds, but for which stages there are."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nnprune.experiment.cost_estimate
from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import CostEstimate, mean_passes
from nnprune.model.loading import ModelSource
from nnprune.recovery import Reconstruction
from nnprune.run import run, show_estimate

ROOT = Path(__file__).parent.parent

PLAN_AND_RUN = """
import multiprocessing, sys
from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import CostEstimate
from nnprune.run import run
sys.path.insert(0, "tests")
from conftest import compose_config
figures = {
    "predicted": lambda cfg: CostEstimate([build(cfg)]).host_bytes,
    "measured": lambda cfg: run(cfg).peak_host_bytes,
}
for name in figures:
    show = lambda: print(name, figures[name](compose_config("runtime.device=cpu", *sys.argv[1:])), flush=True)
    process = multiprocessing.get_context("fork").Process(target=show)
    process.start()
    process.join()
"""


def estimate(tiny_config, *overrides):
    return CostEstimate([build(tiny_config(*overrides))])


def predicted_and_measured(*overrides):
    """Bytes of the host that a plan says and that a run takes, each in a fork of an interpreter that did nothing but import."""
    command = [sys.executable, "-c", PLAN_AND_RUN, *overrides]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(predicted|measured) (\d+)$", result.stdout, re.MULTILINE))
    assert len(found) == 2, result.stderr
    return int(found["predicted"]), int(found["measured"])


def test_stages(tiny_config):
    seconds = estimate(tiny_config).seconds
    assert {"calibration", "prune", "evaluation", "dense_evaluation"} <= seconds.keys()
    assert all(seconds[stage] > 0 for stage in ("start", "data", "load"))
    tuned = estimate(tiny_config, "pruner=alps", "recover=layer").seconds
    assert tuned["recover"] > 0 and tuned["calibration"] > 0
    assert estimate(tiny_config, "allocation=owl").seconds["allocation"] > 0
    dense = estimate(tiny_config, "sparsity=dense").seconds
    assert dense["dense_evaluation"] > 0 and dense["evaluation"] == 0 and "prune" not in dense
    run(tiny_config("sparsity=dense"))
    assert estimate(tiny_config).seconds["dense_evaluation"] == 0, "the dense model is not measured twice"


def test_logits_are_counted(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.cost_estimate, "EPOCH_FORWARDS", 1e9)
    without, with_it = (estimate(tiny_config, "recover=window", f"recover.logits_epochs={n}").seconds for n in (0, 1))
    assert with_it["recover"] > 1e3 * without["recover"]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"epochs_before": 0, "epochs_after": 4}, 4),
        ({"epochs_before": 1, "epochs_after": 2}, 3),
        ({"epochs_before": 0, "epochs_after": 4, "num_layers": 2}, (4 + 8 + 8 + 8) / 4),
        ({"epochs_before": 1, "epochs_after": 4, "num_layers": 2}, (5 + 9 + 9 + 9) / 4),
        ({"epochs_before": 0, "epochs_after": 4, "num_layers": 2, "logits_epochs": 6}, (4 + 8 + 8 + 12) / 4),
        ({"epochs_before": 1, "epochs_after": 0, "logits_epochs": 6}, (1 + 1 + 1 + 6) / 4),
    ],
)
def test_passes_through_layers_that_are_tuned(settings, wanted):
    assert mean_passes(Reconstruction(**settings), 4) == wanted


def test_no_weights_are_read(tiny_config, tiny_model_dir, tmp_path, monkeypatch):
    for name in ("load", "checkpoint"):
        monkeypatch.setattr(ModelSource, name, lambda *_: pytest.fail("weights are asked for"))
    folder = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, folder / "model.safetensors")
    assert estimate(tiny_config, f"model.path={folder}").problems == []
    assert estimate(tiny_config, f"model.path={folder}", "runtime=low_memory").problems == []


def test_peak_host_memory_of_the_demo(tmp_path):
    brief = ["calibration.num_samples=8", "calibration.seq_len=256", "evaluation.max_windows=8", "evaluation.seq_len=256"]
    settings = [*brief, "pruner=best_fast", "runtime=low_memory", "runtime.threads=1", f"outputs={tmp_path}"]
    predicted, measured = predicted_and_measured(*settings)
    assert 0.95 * measured <= predicted <= 1.4 * measured


def test_the_disk_that_a_run_takes(tiny_config, monkeypatch):
    cfg = tiny_config("pruner=wanda", "runtime=low_memory", "save=true")
    plan, sizes = CostEstimate([build(cfg)]), []
    original = nnprune.engine.pruning_pass.PruningPass.run

    def measured(self, *args):
        sizes.append(sum(path.stat().st_size for path in Path(cfg.outputs).rglob("activations-*.bin")))
        return original(self, *args)

    monkeypatch.setattr(nnprune.engine.pruning_pass.PruningPass, "run", measured)
    record = run(cfg)
    assert record.status == "completed"
    model = build(cfg).folder / "model"
    weights = {name: tensor.nbytes for name, tensor in load_file(model / "model.safetensors").items()}
    layer_files = sum(size for name, size in weights.items() if ".layers." in name)  # until the model is saved
    calibration = 6 * 32 * 32 * 4  # its file is made within the pass
    assert plan.disk_bytes == sum(weights.values()) + layer_files + sizes[0] + calibration


def test_a_model_that_computes_in_another_dtype(tiny_config, monkeypatch):
    overrides = ("pruner=wanda", "runtime=low_memory")
    monkeypatch.setattr(nnprune.experiment.cost_estimate, "resident_host_bytes", lambda: 1 << 33)
    same = estimate(tiny_config, *overrides)
    monkeypatch.setattr(ModelSource, "stored_dtype", torch.bfloat16)
    monkeypatch.setattr(ModelSource, "computing_dtype", lambda *_: torch.float32)
    mixed = estimate(tiny_config, *overrides)
    assert mixed.disk_bytes - same.disk_bytes == -2 * same.in_layers, "layers are stored in 16 bits, activations are not"
    assert mixed.host_bytes == same.host_bytes, "what computes takes 32 bits in both"


def test_a_grid_agrees_with_its_runs(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.cost_estimate, "resident_host_bytes", lambda: 1 << 33)
    names = ("magnitude", "wanda", "sparsegpt")
    cells = [build(tiny_config(f"pruner={name}", "propagate=dense", "runtime.activations=disk")) for name in names]
    runs, grid = [CostEstimate([cell]) for cell in cells], CostEstimate(cells)
    layers = 4 * runs[0].in_layers
    activations = max(6, 2 * 5) * 32 * 32 * 4  # the calibration and the windows follow each other
    assert grid.disk_bytes == 3 * layers + activations
    assert [one.disk_bytes for one in runs] == [layers + (6 + 2 * 5) * 32 * 32 * 4] * 3
    assert grid.host_bytes >= max(one.host_bytes for one in runs) - 6 * 32 * 32 * 4
    assert grid.seconds.keys() == runs[-1].seconds.keys()
    assert grid.seconds["evaluation"] == pytest.approx(3 * grid.seconds["dense_evaluation"])


@pytest.mark.parametrize(
    ("figure", "overrides", "key", "remedy"),
    [
        ("available_host_bytes", [], "host memory", "set runtime=low_memory"),
        ("available_host_bytes", ["runtime=low_memory"], "host memory", "calibration.num_samples"),
        ("shutil.disk_usage", [], "disk", "set outputs to a larger disk"),
    ],
)
def test_what_cannot_fit_is_refused(figure, overrides, key, remedy, tiny_config, monkeypatch):
    answer = (lambda *_: type("Usage", (), {"free": 10})) if "disk" in figure else (lambda: 10)
    monkeypatch.setattr(f"nnprune.experiment.cost_estimate.{figure}", answer)
    with pytest.raises(ValueError, match=f"{key}.*: needs .*{remedy}"):
        show_estimate([tiny_config(*overrides)])


def test_what_is_shown_of_a_run(tiny_config, tmp_path, caplog):
    caplog.set_level("INFO", "nnprune")
    show_estimate([tiny_config()])
    assert any(line.startswith("calibration") for line in caplog.messages)
    assert caplog.messages[-1].startswith("peak: host") and "grid" not in caplog.text
    assert not (tmp_path / "outputs").exists(), "a plan leaves nothing behind"


def test_a_grid_from_outside(run_cli, tiny_model_dir, tmp_path):
    result = run_cli(
        *("plan=true", "model=local", f"model.path={tiny_model_dir}", "calibration=random", "calibration.num_samples=2"),
        *("calibration.seq_len=32", "evaluation=none", f"outputs={tmp_path / 'outputs'}"),
        *("grid=true", "pruner=magnitude,wanda", "propagate=dense"),
    )
    assert result.returncode == 0, result.stderr
    assert "calibration" in result.stdout
    assert "grid: 2 cells" in result.stdout
    assert "peak: host" in result.stdout
    assert not (tmp_path / "outputs").exists(), "a plan leaves nothing behind"
