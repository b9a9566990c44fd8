"""The benchmark of a CUDA device, rehearsed on the CPU."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the installed package

from benchmarks import device
from benchmarks.device_kernels import TOLERANCE


def rehearse(tmp_path, *arguments):
    """Exit status, and what the JSON file holds."""
    path = tmp_path / "device.json"
    status = device.main(["--device=cpu", "--shape=tiny", f"--json={path}", *arguments])
    return status, json.loads(path.read_text())


def test_every_part_in_this_process_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    few = ("sparsegpt 2:4", "wanda 2:4")
    monkeypatch.setattr(device, "RUNS", {row: device.RUNS[row] for row in few})
    monkeypatch.setattr(device, "LIMITS", ((8, "wanda 2:4"),))
    status, found = rehearse(tmp_path, "--parts=kernels,settings,whole,memory")
    assert (status, found["failed"]) == (0, {})
    assert {"Hessian", "squared norms"} <= found["parts"]["kernels"]["all"].keys()
    assert set(found["parts"]["settings"]) == set(few)
    for section in ("settings", "whole"):
        for row, measured in found["parts"][section].items():
            assert measured["seconds"].keys() >= {"load", "calibration", "prune", "write"}, row
            assert measured["flops_per_second"]["calibration"] > 0
    assert "error" not in found["parts"]["memory"]["8 GiB, wanda 2:4"]
    shown = capsys.readouterr().out
    assert all(f"| {row} |" in shown for row in (*few, "8 GiB, wanda 2:4", "Hessian"))


def test_what_the_budget_does_not_hold_is_skipped_and_said(tmp_path, capsys):
    status, found = rehearse(tmp_path, "--budget=0", "--parts=compare,whole")
    assert (status, found["parts"]) == (0, {})
    shown = capsys.readouterr().out
    assert "compare: official skipped: needs about 6 s, and " in shown
    assert "compare: llmcompressor skipped: " in shown
    assert found["skipped"].keys() >= {"compare: nnprune", "compare: official", "whole: sparsegpt 2:4", "whole: wanda 2:4"}


def test_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def fail(row, num_layers):
        raise RuntimeError("of no use")

    monkeypatch.setattr(device.Bench, "prune", lambda self, *arguments: fail(*arguments))
    status, found = rehearse(tmp_path, "--parts=kernels,whole")
    assert status == 1
    assert found["failed"] == {f"whole: {row}": "RuntimeError: of no use" for row in ("sparsegpt 2:4", "wanda 2:4")}
    assert all(check["error"] < TOLERANCE for check in found["parts"]["kernels"]["all"].values())
    assert "whole: wanda 2:4 failed: RuntimeError: of no use" in capsys.readouterr().out


def test_a_kernel_that_differs_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "check_kernels", lambda spec: [("Hessian", {"error": 2 * TOLERANCE})])
    assert rehearse(tmp_path, "--parts=kernels")[0] == 1


def test_a_part_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        device.parse_args(["--device=cpu", "--parts=kernel"])
    assert "there is no kernel; there are kernels, " in capsys.readouterr().err


def test_a_memory_limit_is_the_setting_that_a_run_keeps(tmp_path, monkeypatch):
    """A limit set in PyTorch beforehand would be taken back at the start of the run."""
    bench = device.Bench(SimpleNamespace(device="cuda", shape="tiny"), tmp_path)
    monkeypatch.setattr(bench, "prune", lambda row, num_layers, more: {"asked": more})
    assert bench.limited(12, "sparsegpt 2:4") == {"asked": ("runtime.device_memory=12GiB",)}
