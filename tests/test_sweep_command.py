"""The command line: sweeps, launchers, spellings of sparsity, experiments as data."""

import json

import pytest
from conftest import HANGS, compose_config
from omegaconf import OmegaConf

from nnprune.experiment.command_line import rewrite
from nnprune.run import CONF


@pytest.fixture
def tiny(tiny_model_dir, small_text):
    """The arguments of runs of the tiny model."""
    return [
        *("model=local", f"model.path={tiny_model_dir}", "calibration=text", f"calibration.path={small_text}"),
        *("calibration.num_samples=2", "calibration.seq_len=32", "evaluation=text", f"evaluation.path={small_text}"),
        *("evaluation.seq_len=32", "evaluation.max_windows=2"),
    ]


def records_in(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in folder.rglob("result.json")}


def test_sweep_skip_and_failure_from_the_command_line(run_cli, tiny, tmp_path):
    """Also from another folder, as an installed program would be used."""
    outputs = tmp_path / "records"
    sweep = ["-m", "pruner=magnitude,wanda", "sparsity=0.7,2:4,dense", f"outputs={outputs}", *tiny]
    first = run_cli(*sweep, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    found = records_in(outputs)
    cells = {(record["pruner"], record["sparsity"]) for record in found.values()}
    assert cells == {(pruner, spec) for pruner in ("magnitude", "wanda") for spec in ("0.7", "2:4")} | {("dense", "dense")}
    dense = next(record for record in found.values() if record["pruner"] == "dense")
    for record in found.values():
        assert record["status"] == "completed"
        assert record["dense_metrics"] == dense["metrics"]
    assert "text_perplexity" in first.stdout
    stamps = {path: path.stat().st_mtime_ns for path in outputs.rglob("result.json")}
    second = run_cli(*sweep, "pruner=magnitude", "sparsity=0.7,2:4,0.65,7:8,3:7", cwd=tmp_path)
    assert second.returncode == 1  # 7 divides no width of the model
    assert second.stdout.count("finished already, nothing to do") == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    found = records_in(outputs)
    assert {record["sparsity"] for record in found.values()} == {"0.7", "2:4", "dense", "0.65", "7:8", "3:7"}
    failed = [record for record in found.values() if record["status"] == "failed"]
    assert {record["sparsity"] for record in failed} == {"3:7"}
    assert all("does not divide" in record["error"] for record in failed)
    assert [line.startswith("Error: sparsity=3:7: ") for line in second.stderr.splitlines()] == [True], "one a failed run"
    assert "sweep: 5 runs, 2 done, 2 skipped, 1 failed" in second.stdout


def test_a_sweep_whose_outputs_cannot_be_written_says_so_in_one_line(run_cli, tmp_path):
    (tmp_path / "file").touch()
    result = run_cli("-m", "sparsity=0.5,2:4", f"outputs={tmp_path / 'file' / 'records'}")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert str(tmp_path / "file" / "records") in result.stderr
    assert "cannot be written (Not a directory); set outputs=DIR" in result.stderr


def test_readme_experiment_is_the_nine_cells_and_dense():
    params = OmegaConf.load(CONF / "experiment" / "readme_table.yaml").hydra.sweeper.params
    assert params.sparsity.split(",") == ["dense", "0.5", "2:4", "4:8"]
    assert params.pruner.split(",") == ["magnitude", "wanda", "sparsegpt"]


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_take_any_sparsity(launcher, run_cli, tiny, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher", reason="needs the launcher's extra")
    outputs = tmp_path / "records"
    workers = "hydra.launcher.n_jobs=2" if launcher == "joblib" else f"hydra.launcher.timeout_min={HANGS // 60}"
    result = run_cli(
        "-m", f"hydra/launcher={launcher}", workers, "pruner=magnitude", "sparsity=0.65,3:4", f"outputs={outputs}", *tiny
    )
    assert result.returncode == 0, result.stderr
    assert {record["sparsity"] for record in records_in(outputs).values()} == {"0.65", "3:4", "dense"}
    assert "sweep: 2 runs, 2 done\n#  sparsity  text_perplexity\n0  0.65 " in result.stdout
    logs = "".join([result.stdout, *(path.read_text() for path in outputs.rglob("*_log.out"))])
    assert "\n[1] layer 1/2" in logs


def test_minus_m_may_stand_anywhere():
    for arguments in (
        ["-m", "seed=0,1", "pruner=wanda"],
        ["seed=0,1", "--multirun", "pruner=wanda"],
        ["seed=0,1", "pruner=wanda", "-m"],
    ):
        assert rewrite(arguments) == ["-m", "seed=0,1", "pruner=wanda"]


@pytest.mark.parametrize("group", [path.name for path in CONF.iterdir() if path.is_dir()])
def test_every_option_composes(group):
    for path in (CONF / group).glob("*.yaml"):
        cfg = compose_config(f"{group}={path.stem}")
        OmegaConf.to_container(cfg, resolve=True)
        if group == "model" and path.stem != "demo":
            assert cfg.calibration.dataset == "allenai/c4"
            assert list(cfg.evaluation.datasets) == ["wikitext2"]


def test_several_evaluations_at_once():
    cfg = compose_config("evaluation=[wikitext2,c4,ptb,demo]")
    assert list(cfg.evaluation.datasets) == ["wikitext2", "c4", "ptb", "demo"]
    cfg = compose_config("model=opt-125m", "evaluation=[wikitext2,c4]")
    assert list(cfg.evaluation.datasets) == ["wikitext2", "c4"]
