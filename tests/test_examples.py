"""The scripts of examples/ on the demo, with a short text in place of its own, from a copy of the folder."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, ROOT

from nnprune.records import read_all


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return shutil.copytree(ROOT / "examples", tmp_path_factory.mktemp("copy") / "examples")


@pytest.fixture(scope="module")
def quick(small_text):
    """Settings of a run of well under a second; what it measures is still called demo_perplexity."""
    calibration = [f"calibration.path={small_text}", "calibration.num_samples=2", "calibration.seq_len=64"]
    evaluation = [f"evaluation.datasets.demo.path={small_text}", "evaluation.seq_len=64", "evaluation.max_windows=4"]
    return [*calibration, *evaluation, "runtime.device=cpu"]


def run(script: Path, *arguments: str) -> str:
    """What a script prints, with the `python` of these tests."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": search, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def saved(examples, quick):
    """The model that deploy.sh leaves, and what it printed."""
    printed = run(examples / "deploy" / "deploy.sh", *quick)
    [model] = (examples / "deploy").glob("outputs/demo/2of4/sparsegpt-*/model")
    return model, printed


def test_the_model_of_other_settings_is_checked(examples, quick, tmp_path):
    folder = shutil.copytree(examples / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns("outputs"))
    assert "36 linears have 2:4, zeros as recorded" in run(folder / "deploy.sh", *quick, "seed=1", "update=refit")


def test_a_pruner_of_ones_own_against_sparsegpt(examples, quick, monkeypatch):
    folder = examples / "own_pruner"
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", str(folder / "tiny")])
    runpy.run_path(str(folder / "make_tiny_model.py"))
    run(folder / "sweep.sh", *quick)
    records, problems = read_all(folder / "outputs")
    pruned = {(one["model"], one["pruner"], one["sparsity"]) for one in records if one["sparsity"] != "dense"}
    assert pruned == {(m, p, s) for m in ("demo", "tiny") for p in ("sparsegpt", "mine") for s in ("0.5", "2:4", "4:8")}
    assert not problems
    table = (folder / "table.tex").read_text()
    assert table.count("SparseGPT &") == table.count("mine &") == 3
    assert (folder / "plot.png").stat().st_size > 10_000


def test_a_2_4_model_is_saved_checked_and_loaded(saved, examples):
    _, printed = saved
    assert "36 linears have 2:4, zeros as recorded" in printed
    assert "FAULT" not in printed
    assert "36 linears, at most 2 nonzeros in 4 weights" in printed
    assert (examples / "deploy" / "masks.safetensors").is_file()


def test_the_saved_model_is_measured_with_a_task_of_ones_own(saved, examples, quick):
    pytest.importorskip("lm_eval")
    settings = [one for one in quick if not one.startswith("evaluation")]
    printed = run(examples / "deploy" / "measure.sh", *settings)
    assert "measuring the saved model with demo_sentences" in printed
    [record] = [one for one in read_all(examples / "deploy" / "outputs")[0] if one["sparsity"] == "2:4"]
    [accuracy] = [
        value for name, value in record["metrics"].items() if name.startswith("demo_sentences") and "stderr" not in name
    ]
    assert 0 <= accuracy <= 1


def test_a_tracked_sweep_is_read_back_from_mlflow(examples, quick):
    pytest.importorskip("mlflow")
    printed = run(examples / "tracking" / "sweep.sh", *quick)
    assert printed.count("magnitude") >= 2 and printed.count("wanda") >= 2


def test_fine_tuning_lowers_the_perplexity_and_keeps_the_zeros(saved, monkeypatch, capsys, tmp_path):
    options = ["--steps", "6", "--batch", "4", "--seq-len", "64", "-o", str(tmp_path / "tuned")]
    monkeypatch.setattr(sys, "argv", ["finetune_sparse.py", str(saved[0]), *options])
    runpy.run_path(str(ROOT / "examples" / "finetune_sparse.py"), run_name="__main__")
    before, after, zeros, _ = capsys.readouterr().out.splitlines()
    assert float(after.split()[2]) < float(before.split()[2])
    assert zeros == "zeros kept: True"
    assert (tmp_path / "tuned" / "model.safetensors").is_file()


def test_the_notebook_runs(quick, monkeypatch, tmp_path):
    """Its code, cell after cell; it has no outputs, which would be of another version."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for cell in cells:
        assert not cell["outputs"]
        exec("".join(cell["source"]), names)
        names["QUICK"] = quick  # in place of the first cell's
    assert len(names["records"]) == 3
