"""Tracking with the programs themselves, each without a server: MLflow's database, TensorBoard's event files, wandb offline."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from nnprune.experiment.build import build
from nnprune.records import RESULT_FILE, read_all
from nnprune.run import run
from nnprune.tracking.mlflow import _key


def test_a_sweep_of_two_processes_is_read_back_through_mlflow(run_cli, tiny_config, tiny_model_dir, small_text, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the launcher's extra")
    outputs = tmp_path / "outputs"
    arguments = [
        *("model=local", f"model.path={tiny_model_dir}", "calibration=text", f"calibration.path={small_text}"),
        *("calibration.num_samples=6", "calibration.seq_len=32", "evaluation=text", f"evaluation.path={small_text}"),
        *("evaluation.seq_len=32", "evaluation.max_windows=5", f"outputs={outputs}", "tracking=mlflow"),
    ]
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    result = run_cli("-m", *parallel, *arguments, "pruner=magnitude,wanda")
    assert result.returncode == 0, result.stderr
    assert "warning: tracking" not in result.stdout

    client = mlflow.MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("nnprune").experiment_id])
    records = {record["pruner"]: record for record in read_all(outputs)[0]}
    assert sorted(one.info.run_name for one in found) == [f"tiny-opt {name} 0.5" for name in ("magnitude", "wanda")]
    for one in found:
        record = records[one.info.run_name.split()[1]]
        assert one.info.status == "FINISHED"
        assert one.data.metrics["text_perplexity"] == record["metrics"]["text_perplexity"]
        assert one.data.params["calibration.num_samples"] == "6"
        errors = client.get_metric_history(one.info.run_id, "layer_relative_error")
        assert [error.step for error in errors] == [1, 2]
        kept = client.download_artifacts(one.info.run_id, RESULT_FILE, str(tmp_path))
        assert json.loads(Path(kept).read_text())["fingerprint"] == record["fingerprint"]

    run(
        tiny_config("pruner=wanda", "label=wanda", "tracking=mlflow", "evaluation.max_windows=1")
    )  # prunes again, and continues its own
    again = client.search_runs([found[0].info.experiment_id])
    assert [one.info.run_id for one in again] == [one.info.run_id for one in found]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("allocation.patterns.*.self_attn.*", "allocation.patterns._.self_attn._"),
        (r"allocation.patterns.re:.*\.(q|k)_proj", "allocation.patterns.re:.__._q_k__proj"),
        ("evaluation.datasets.my text/../a//b", "evaluation.datasets.my text/_/a/_/b"),
        ("seed", "seed"),
        ("x" * 300, "x" * 250),
    ],
)
def test_mlflow_takes_every_name_of_a_setting(name, key):
    assert _key(name) == key
    if find_spec("mlflow"):
        from mlflow.utils import validation

        validation._validate_param_name(key)
        validation._validate_metric_name(key)


def test_tensorboard_event_files(tiny_config):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = tiny_config("pruner=magnitude", "tracking=tensorboard")
    record = run(cfg)
    events = EventAccumulator(str(build(cfg).folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("layer/relative_error")] == [1, 2]
    assert events.Scalars("text_perplexity")[0].value == pytest.approx(record.metrics["text_perplexity"])
    assert record.fingerprint in str(events.Tensors("record/text_summary"))


def test_wandb_offline(tiny_config):
    pytest.importorskip("wandb")
    cfg = tiny_config("pruner=magnitude", "tracking=wandb", "tracking.mode=offline")
    record = run(cfg)
    [path] = build(cfg).folder.glob("wandb/offline-run-*/run-*.wandb")
    content = path.read_bytes()
    assert str(record.metrics["text_perplexity"]).encode() in content
    assert b"layer/relative_error" in content
