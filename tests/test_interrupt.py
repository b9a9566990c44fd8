"""Ctrl-C and SIGTERM: one line says where the run stopped, and the same command continues."""

from conftest import compose_config

from nnprune.run import run

PRUNER = """
import os
import signal

import torch
from nnprune import Pruner

signal.signal(signal.SIGINT, signal.default_int_handler)  # as from a terminal: what a shell runs in the background ignores it


class Interrupted(Pruner):
    def prune_linear(self, W, module_name, pattern):
        if ".1." in module_name and "SIGNAL" in os.environ:
            os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        return torch.where(pattern.mask(W.abs()), W, 0)
"""


def test_interrupted_run_says_where_and_resumes(run_cli, tiny_model_dir, small_text, tmp_path, monkeypatch, caplog):
    (tmp_path / "interrupted.py").write_text(PRUNER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        *("model=local", f"model.path={tiny_model_dir}", "pruner=custom", "pruner._target_=interrupted.Interrupted"),
        *("calibration=text", f"calibration.path={small_text}", "calibration.num_samples=2", "calibration.seq_len=32"),
        *("evaluation=text", f"evaluation.path={small_text}", "evaluation.seq_len=32", "evaluation.max_windows=2"),
        "runtime.resume=true",
    ]
    caplog.set_level("INFO", "nnprune")
    whole = run(compose_config(*arguments, f"outputs={tmp_path / 'whole'}"))
    for name in ("SIGINT", "SIGTERM"):
        monkeypatch.setenv("SIGNAL", name)
        stopped = run_cli(*arguments, f"outputs={tmp_path / name}")
        assert stopped.returncode == 130, stopped.stderr
        assert "interrupted in decoder layer 2 of 2: run the same command again to resume" in stopped.stdout
        assert "Traceback" not in stopped.stdout + stopped.stderr
        monkeypatch.delenv("SIGNAL")
        caplog.clear()
        resumed = run(compose_config(*arguments, f"outputs={tmp_path / name}"))
        assert "resuming after 1 finished decoder layers" in caplog.text
        assert resumed.metrics == whole.metrics
