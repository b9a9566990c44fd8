"""hydra/launcher=slurm on a Slurm of one node: a sweep, and jobs that Slurm stops and queues again."""

import json
import os

import pytest
from conftest import compose_config
from support.slurm import MISSING, PATH, CannotStart, slurm

from nnprune.run import run

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the launcher's extra")
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian: slurm-wlm, munge)")

PRUNER = """
import os
import subprocess
import time

import torch
from nnprune import Pruner

COMMANDS = {"preempted": ["scontrol", "requeue"], "timed out": ["scancel", "--signal=USR2"]}


class Stopped(Pruner):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def prune_linear(self, W, module_name, pattern):
        if ".1." in module_name and "SLURM_JOB_ID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
            array, task = os.environ["SLURM_ARRAY_JOB_ID"], os.environ["SLURM_ARRAY_TASK_ID"]
            subprocess.run([*COMMANDS[self.how], f"{array}_{task}"], check=True)
            time.sleep(60)  # until this process is ended
            raise AssertionError("still here")
        return torch.where(pattern.mask(W.abs()), W, 0)
"""


@pytest.fixture
def slurm_conf(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PATH", PATH)
    try:
        with slurm(tmp_path_factory.mktemp("slurm")) as conf:
            monkeypatch.setenv("SLURM_CONF", str(conf))
            yield conf
    except CannotStart as reason:
        pytest.skip(str(reason))


def test_jobs_of_a_sweep_that_are_stopped_are_queued_again_and_resume(
    slurm_conf, run_cli, tiny_model_dir, small_text, tmp_path, monkeypatch
):
    (tmp_path / "stopped.py").write_text(PRUNER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        *("model=local", f"model.path={tiny_model_dir}", "pruner=custom", "pruner._target_=stopped.Stopped"),
        *("calibration=text", f"calibration.path={small_text}", "calibration.num_samples=2", "calibration.seq_len=32"),
        *("evaluation=text", f"evaluation.path={small_text}", "evaluation.seq_len=32", "evaluation.max_windows=2"),
        "runtime.resume=true",
    ]
    resources = ("gpus_per_node=null", "cpus_per_task=1", "mem_gb=1", "timeout_min=5")
    launcher = ["hydra/launcher=slurm", *(f"hydra.launcher.{setting}" for setting in resources)]
    result = run_cli("-m", *arguments, "+pruner.how=preempted,timed out", *launcher, f"outputs={tmp_path / 'outputs'}")
    logs = [path.read_text() for path in tmp_path.rglob("*_log.out")]
    assert result.returncode == 0, "\n".join([result.stderr, *logs])
    assert ["resuming after 1 finished decoder layers" in log for log in logs] == [True, True]
    assert sorted("this job is timed-out" in log for log in logs) == [False, True]
    records = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/0.5/*/result.json")]
    whole = run(compose_config(*arguments, "+pruner.how=never", f"outputs={tmp_path / 'whole'}"))
    assert [record["metrics"] for record in records] == [whole.metrics, whole.metrics]
