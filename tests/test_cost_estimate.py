"""plan=true: what a run will take, without its weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import nnprune.experiment.cost_estimate
from nnprune.experiment.build import build
from nnprune.experiment.cost_estimate import PROCESS_BYTES, CostEstimate
from nnprune.run import run, show_plan


def estimate(tiny_config, *overrides):
    return CostEstimate([build(tiny_config(*overrides))])


def test_stages(tiny_config):
    assert {"data", "calibration", "prune", "evaluation", "dense_evaluation"} <= estimate(tiny_config).seconds.keys()
    tuned = estimate(tiny_config, "pruner=alps", "recover=layer").seconds
    assert tuned["recover"] > 0 and tuned["calibration"] > 0
    assert estimate(tiny_config, "allocation=owl").seconds["allocation"] > 0
    dense = estimate(tiny_config, "sparsity=dense").seconds
    assert dense["dense_evaluation"] > 0 and dense["evaluation"] == 0 and "prune" not in dense
    run(tiny_config("sparsity=dense"))
    assert estimate(tiny_config).seconds["dense_evaluation"] == 0, "the dense model is not measured twice"


def test_no_weights_are_read(tiny_config, tiny_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, folder / "model.safetensors")
    assert estimate(tiny_config, f"model.path={folder}").problems == []


def test_memory_counts_what_rests_there(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.cost_estimate, "resident_host_bytes", lambda: 0)
    host = estimate(tiny_config, "runtime=cpu", "pruner=wanda")
    disk = estimate(tiny_config, "runtime=low_memory", "pruner=wanda", "save=true")
    layer = sum(parameter.nbytes for parameter in host.decoder.layers[0].parameters())
    shell = sum(parameter.nbytes for parameter in host.decoder.model.parameters()) - 2 * layer
    activations = (6 + 5 + 5) * 32 * 32 * 4
    forward = 128 * (4 * (4 * 32 + 64 + 32 + 4 * 32) + 4 * 64)
    copies = 4 * 8 * 3 * 32 * 32  # of the widest group: q, k and v
    statistics = 8 * (3 * 32 + 64)
    workspace = statistics + max(forward, copies)
    assert host.host_bytes == PROCESS_BYTES + activations + 2 * layer + shell + workspace
    assert disk.host_bytes == PROCESS_BYTES + shell + 3 * layer + workspace
    assert disk.disk_bytes == activations + 2 * layer + shell


def test_a_solver_takes_more_than_scores(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.experiment.cost_estimate, "resident_host_bytes", lambda: 0)
    wanda, sparsegpt, best = (
        estimate(tiny_config, f"pruner={name}", "runtime.batch_tokens=32") for name in ("wanda", "sparsegpt", "best_fast")
    )
    matrices = 4 * (3 * 32 * 32 + 64 * 64)
    assert sparsegpt.host_bytes - wanda.host_bytes >= 2 * matrices
    assert best.host_bytes - wanda.host_bytes >= 3 * 6 * 32 * 32 * 4, "the reference, and a shortcut for both streams"


def test_a_grid_collects_once_and_writes_each_cell(tiny_config):
    cells = [build(tiny_config(f"pruner={name}", "propagate=dense")) for name in ("magnitude", "wanda", "sparsegpt")]
    one, grid = CostEstimate(cells[:1]), CostEstimate(cells)
    assert grid.disk_bytes == 3 * one.disk_bytes
    assert grid.lines()[0] == "grid: 3 cells"
    assert {"calibration", "prune", "write", "evaluation"} <= grid.seconds.keys()


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
        show_plan([tiny_config(*overrides)])


@pytest.mark.parametrize("grid", [[], ["grid=true", "pruner=magnitude,wanda", "propagate=dense"]], ids=["run", "grid"])
def test_from_outside(grid, run_cli, tiny_model_dir, small_text, tmp_path):
    result = run_cli(
        *("plan=true", "model=local", f"model.path={tiny_model_dir}", "calibration=random", "calibration.num_samples=2"),
        *("calibration.seq_len=32", "evaluation=none", f"outputs={tmp_path / 'outputs'}", *grid),
    )
    assert result.returncode == 0, result.stderr
    assert "calibration" in result.stdout
    assert ("grid: 2 cells" in result.stdout) == bool(grid)
    assert "peak: host" in result.stdout
    assert not (tmp_path / "outputs").exists(), "a plan leaves nothing behind"
