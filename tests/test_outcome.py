"""What a run leaves: records are replaced by their successors only, failures are recorded, grids continue."""

import os
import signal
from pathlib import Path

import pytest
from support.runs import run_until_killed

from nnprune.evaluation import Perplexity
from nnprune.experiment.build import build
from nnprune.pruners.magnitude import Magnitude
from nnprune.records import RESULT_FILE, read, read_all, read_completed
from nnprune.run import run, run_grid


def records_by(field, outputs):
    """The records under `outputs` by one of their fields, and their statuses likewise."""
    records = {record[field]: record for record in read_all(Path(outputs))[0]}
    return records, {key: record["status"] for key, record in records.items()}


def stop(*_):
    raise RuntimeError("stopped")


@pytest.mark.parametrize("setting", ["overwrite=true", "save=true"])
def test_a_record_stays_until_its_successor_is_written(setting, tiny_config, monkeypatch):
    first = run(tiny_config("pruner=wanda"))
    cfg = tiny_config("pruner=wanda", setting)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(Perplexity, "measure", stop)
        run(cfg)
    assert read_completed(build(cfg).folder) == first, "a failed run left the old record"
    again = run(cfg)
    assert again.metrics == first.metrics
    assert not (build(cfg).folder / "unfinished").exists()


def test_scratch_of_a_finished_run_goes_on_the_next_call(tiny_config):
    cfg = tiny_config("pruner=wanda")
    run(cfg)
    scratch = build(cfg).folder / "unfinished"
    scratch.mkdir()
    (scratch / "layer-0000.json").write_text("{}")
    run(cfg)
    assert not scratch.exists()


def test_a_damaged_dense_record_is_measured_again(tiny_config, caplog):
    first = run(tiny_config("pruner=wanda"))
    [dense] = Path(tiny_config().outputs).glob("*/dense/*/result.json")
    dense.write_text("{")
    second = run(tiny_config("pruner=magnitude"))
    assert second.dense_metrics == first.dense_metrics
    assert "its figures are measured again" in caplog.text


def test_an_unresolvable_outputs_leaves_no_folder(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNPRUNE_MISSING", raising=False)
    before = set(tmp_path.iterdir())
    with pytest.raises(Exception, match="NNPRUNE_MISSING"):
        run(tiny_config("outputs=${oc.env:NNPRUNE_MISSING}"))
    assert set(tmp_path.iterdir()) == before


def test_one_cell_that_fails_does_not_stop_a_grid(tiny_config, monkeypatch):
    score = Magnitude.score

    def fail_on_one(self, W, module_name):
        if module_name.endswith("layers.1.fc1"):
            raise ValueError(f"{module_name}: not today")
        return score(self, W, module_name)

    monkeypatch.setattr(Magnitude, "score", fail_on_one)
    cfgs = [tiny_config(f"pruner={name}", f"label={name}", "propagate=dense") for name in ("magnitude", "wanda", "sparsegpt")]
    with pytest.raises(ValueError, match=r"layers\.1\.fc1: not today"):
        run_grid(cfgs)
    records, statuses = records_by("pruner", cfgs[0].outputs)
    assert statuses == {"magnitude": "failed", "wanda": "completed", "sparsegpt": "completed", "dense": "completed"}
    assert "not today" in records["magnitude"]["error"]
    monkeypatch.undo()
    assert run(tiny_config("pruner=wanda", "label=wanda", "propagate=dense")).metrics == records["wanda"]["metrics"]


def test_a_saved_model_does_not_outlive_its_record(tiny_config):
    run(tiny_config("pruner=wanda", "save=true"))
    cfg = tiny_config("pruner=wanda", "overwrite=true")
    assert (build(cfg).folder / "model").is_dir()
    run(cfg)
    assert not (build(cfg).folder / "model").exists()


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("setting", ["overwrite=true", "save=true"])
def test_a_run_that_is_killed_leaves_the_record_that_it_was_to_replace(setting, tiny_config, monkeypatch):
    first, folder = run(tiny_config("pruner=wanda")), build(tiny_config("pruner=wanda")).folder
    before = (folder / RESULT_FILE).read_bytes()
    cfg = tiny_config("pruner=wanda", setting)
    with monkeypatch.context() as patch:
        patch.setattr(Perplexity, "measure", kill)  # when all layers are pruned
        run_until_killed(cfg)
    assert (folder / RESULT_FILE).read_bytes() == before
    second = run(cfg)
    assert (folder / RESULT_FILE).read_bytes() != before
    assert second.metrics == first.metrics
    assert (folder / "model").is_dir() == (setting == "save=true")


def test_a_failure_makes_way_for_another_and_for_a_completed_run(tiny_config, monkeypatch):
    cfg = tiny_config("pruner=wanda")
    for reason in ("one", "two"):

        def fail(*_, reason=reason):
            raise ValueError(reason)

        with monkeypatch.context() as patch, pytest.raises(ValueError, match=reason):
            patch.setattr(Perplexity, "measure", fail)
            run(cfg)
        record = read(build(cfg).folder)
        assert record.status == "failed"
        assert reason in record.error
    assert run(cfg).status == read(build(cfg).folder).status == "completed"


def test_a_cell_that_the_model_cannot_have_does_not_stop_a_grid(tiny_config):
    cfgs = [tiny_config("pruner=wanda", f"sparsity={spec}", "propagate=dense") for spec in ("3:5", "2:4")]
    with pytest.raises(ValueError, match=r"sparsity=3:5: .* has 32 inputs"):
        run_grid(cfgs)
    records, statuses = records_by("sparsity", cfgs[0].outputs)
    assert statuses == {"3:5": "failed", "2:4": "completed", "dense": "completed"}
    assert "has 32 inputs" in records["3:5"]["error"]
    assert records["2:4"]["linear_sparsity"] == 0.5
