"""torchrun from outside: one log, one line for what failed, and the other runs of a sweep go on."""

import json
import os
import subprocess
import sys

import pytest
from conftest import HANGS, ROOT, compose_config

from nnprune.run import run

FAILING = """
import os
from nnprune.pruners.wanda import Wanda


class Failing(Wanda):
    def prune_linear(self, W, module_name, pattern):
        if os.environ["RANK"] == "1":
            raise RuntimeError("cannot do it")
        return super().prune_linear(W, module_name, pattern)
"""


def test_torchrun_goes_on_after_one_process_failed_and_the_first_logs(tiny_model_dir, small_text, tmp_path):
    (tmp_path / "failing_on_rank_1.py").write_text(FAILING)
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [
        *("model=local", f"model.path={tiny_model_dir}", "pruner=custom", "runtime.device=cpu"),
        *("calibration=text", f"calibration.path={small_text}", "calibration.num_samples=5", "calibration.seq_len=32"),
        *("evaluation=text", f"evaluation.path={small_text}", "evaluation.max_windows=5", "evaluation.seq_len=32"),
    ]
    own, wanda = "failing_on_rank_1.Failing", "nnprune.pruners.wanda.Wanda"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nnprune.run", "-m"]
    command += [f"pruner._target_={own},{wanda}", *settings, f"outputs={two}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert found.returncode != 0
    [line] = [line for line in found.stderr.splitlines() if "cannot do it" in line]
    assert line.startswith("Error: RuntimeError: rank 1: RuntimeError: cannot do it (")
    [log] = two.glob("*/0.5/Failing-*/run.log")
    assert 'raise RuntimeError("cannot do it")' in log.read_text()
    assert [found.stdout.count(line) for line in ("layer 2/2 ", "record: ")] == [1, 1]
    records = [json.loads(path.read_text()) for path in two.glob("*/0.5/*/result.json")]
    failed, completed = sorted(records, key=lambda record: record["error"] is None)
    assert failed["error"] == "rank 1: RuntimeError: cannot do it"
    expected = run(compose_config(*settings, f"pruner._target_={wanda}", f"outputs={one}"))
    assert completed["metrics"] == pytest.approx(expected.metrics, rel=2e-3)
