"""The benchmark of a CUDA device, rehearsed on the CPU."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # `benchmarks` is no part of the installed package

from benchmarks import device
from benchmarks.device_goals import goal_rows
from benchmarks.device_kernels import TOLERANCE


def rehearse(tmp_path, *arguments):
    """Exit status, and what the JSON file holds."""
    path = tmp_path / "device.json"
    status = device.main(["--device=cpu", "--shape=tiny", f"--json={path}", *arguments])
    return status, json.loads(path.read_text())


def test_every_part_in_this_process_is_measured_and_shown(tmp_path, monkeypatch, capsys):
    few = ("sparsegpt 2:4", "wanda 2:4", "alps 2:4")
    monkeypatch.setattr(device, "RUNS", {row: device.RUNS[row] for row in few})
    monkeypatch.setattr(device, "LIMITS", ((8, "wanda 2:4"),))
    status, found = rehearse(tmp_path, "--parts=kernels,settings,whole,memory")
    assert (status, found["failed"]) == (0, {})
    assert {"Hessian", "squared norms"} <= found["parts"]["kernels"]["all"].keys()
    assert set(found["parts"]["settings"]) == set(few)
    assert found["parts"]["whole"].pop("sparsegpt 2:4, saved")["disk_seconds"] > 0
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
    def fail(row, num_layers, more=()):
        raise RuntimeError("of no use")

    monkeypatch.setattr(device.Bench, "prune", lambda self, *arguments: fail(*arguments))
    status, found = rehearse(tmp_path, "--parts=kernels,whole")
    assert status == 1
    assert found["failed"] == {f"whole: {row}": "RuntimeError: of no use" for row in device.WHOLE}
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


def test_goals_say_what_was_measured_met_and_left_out():
    whole = {"wanda 2:4": {"seconds": {"total": 12.0}}, "alps 2:4": {"seconds": {"total": 61.0}}}
    settings = {row: {"seconds": {"prune": prune, "total": 20.0}} for row, prune in (("sparsegpt 2:4", 2), ("alps 2:4", 3))}
    compare = {"nnprune": {"seconds": {"prune": 3.0}}, "official": {"seconds": {"prune": 36.0}}}
    memory = {"12 GiB, sparsegpt 2:4": {"error": "out of memory"}, "12 GiB, alps 2:4": {"seconds": {"total": 24.0}}}
    rows = goal_rows({"whole": whole, "settings": settings, "compare": compare, "memory": memory})
    found = {what: tuple(rest) for what, *rest in rows}
    assert found["wanda 2:4, all layers, s"] == ("at most 15", "12.00", "yes")
    assert found["alps 2:4, all layers, s"] == ("at most 60", "61.00", "no")
    assert found["official / nnprune, few layers"] == ("at least 10", "12.00", "yes")
    assert found["alps / sparsegpt, pruning"] == ("at most 2", "1.50", "yes")
    assert found["sparsegpt in 12 GiB / without a limit"] == ("at most 1.4", "--", "not measured")
    assert found["alps in 12 GiB / without a limit"] == ("at most 1.4", "1.20", "yes")
    assert {row[-1] for row in goal_rows({"whole": whole}, is_rehearsal=True)} == {"rehearsal", "not measured"}
