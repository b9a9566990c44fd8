"""plan=true: what a run will take, without its weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import nnprune.planner
import nnprune.probing
from nnprune.experiment import build
from nnprune.planner import Plan
from nnprune.run import run, show_plan


def stages(plan):
    return {stage.name: stage for stage in plan.stages}


def test_flops_by_hand(tiny_config):
    plan = Plan(build(tiny_config("pruner=sparsegpt")))
    linears = 4 * 32 * 32 + 2 * 32 * 64
    forward = 2 * linears + 2 * 32 * 32  # a token: products of the linears, and causal attention over 32 tokens
    gram = 2 * (3 * 32 * 32 + 64 * 64)  # four distinct inputs
    assert stages(plan)["calibration"].flops == 2 * 6 * 32 * (2 * forward + gram)
    assert stages(plan)["evaluation"].flops == 5 * 32 * (2 * forward + 2 * 264 * 32)
    assert stages(plan).keys() == {"dense_evaluation", "calibration", "prune", "evaluation"}
    assert all(stage.seconds > 0 for stage in plan.stages)
    sequential = Plan(build(tiny_config("pruner=sparsegpt", "propagate=sequential")))
    assert stages(sequential)["calibration"].flops == 2 * 6 * 32 * (forward + gram)  # each linear once
    assert stages(Plan(build(tiny_config("sparsity=dense")))).keys() == {"dense_evaluation"}


def test_the_dense_model_is_not_measured_twice(tiny_config):
    run(tiny_config("sparsity=dense"))
    assert "dense_evaluation" not in stages(Plan(build(tiny_config())))


def test_no_weights_are_read(tiny_config, tiny_model_dir, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}, folder / "model.safetensors")
    assert Plan(build(tiny_config(f"model.path={folder}"))).problems == []


def test_memory_counts_what_rests_there(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.probing, "peak_host_bytes", lambda: 0)  # the probe then counts its layer alone
    for module in (nnprune.planner, nnprune.probing):
        monkeypatch.setattr(module, "resident_host_bytes", lambda: 0)
    host = Plan(build(tiny_config("runtime=cpu")))
    disk = Plan(build(tiny_config("runtime=low_memory", "save=true")))
    layer = sum(parameter.nbytes for parameter in host.decoder.layers[0].parameters())
    shell = sum(parameter.nbytes for parameter in host.decoder.model.parameters()) - 2 * layer
    activations = (6 + 5 + 5) * 32 * 32 * 4
    logits = 10 * 32 * 264
    assert host.host_bytes == activations + 2 * layer + shell + logits
    assert disk.host_bytes == shell + logits + 2 * layer
    assert disk.disk_bytes == activations + 2 * layer + shell


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
    monkeypatch.setattr(f"nnprune.planner.{figure}", answer)
    with pytest.raises(ValueError, match=f"{key}: needs .*{remedy}"):
        show_plan(tiny_config(*overrides))


def test_from_outside(run_cli, tiny_model_dir, small_text, tmp_path):
    result = run_cli(
        *("plan=true", "model=local", f"model.path={tiny_model_dir}", "calibration=random", "calibration.num_samples=2"),
        *("calibration.seq_len=32", "evaluation=none", f"outputs={tmp_path / 'outputs'}"),
    )
    assert result.returncode == 0, result.stderr
    assert "calibration" in result.stdout
    assert "peak: host" in result.stdout
    assert not (tmp_path / "outputs").exists(), "a plan leaves nothing behind"


def test_a_plan_tells_of_recovery_and_the_reference(tiny_config):
    plain, tuned = (Plan(build(tiny_config("pruner=alps", f"recover={recover}"))) for recover in ("none", "layer"))
    stages = {stage.name: stage for stage in tuned.stages}
    assert stages["recover"].seconds > 0 and stages["recover"].flops > 0
    calibration = next(stage for stage in plain.stages if stage.name == "calibration")
    assert stages["calibration"].flops > 1.3 * calibration.flops  # the reference goes along
    assert "recover" not in {stage.name for stage in plain.stages}
