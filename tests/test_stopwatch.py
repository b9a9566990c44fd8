"""Seconds by stage."""

import nnprune.engine.stopwatch
from nnprune.engine.stopwatch import Stopwatch


def test_a_stage_within_another_counts_for_itself_alone(monkeypatch):
    times = iter([0, 1, 3, 7, 12, 100])
    monkeypatch.setattr(nnprune.engine.stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    with watch.stage("outer"), watch.stage("inner"):
        pass
    assert watch.seconds == {"outer": 2 + 5, "inner": 4}
    assert watch.total() == {"outer": 7, "inner": 4, "total": 100}


def test_waiting_for_another_run_takes_no_time(monkeypatch):
    times = iter([0, 1, 2, 1002, 1003, 1004])
    monkeypatch.setattr(nnprune.engine.stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    with watch.stage("prune"), watch.stopped():
        pass
    assert watch.total() == {"prune": 1 + 1, "total": 4}


def test_a_process_that_continues_adds_its_time_to_that_of_the_one_before(monkeypatch):
    times = iter([1000, 1001, 1005, 1010])
    monkeypatch.setattr(nnprune.engine.stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.resume({"prune": 20, "load": 3, "evaluation": 5, "dense_evaluation": 7, "total": 40})
    with watch.stage("prune"):
        pass
    assert watch.total() == {"prune": 24, "load": 3, "total": 40 - 5 - 7 + 10}, "evaluations begin anew"
