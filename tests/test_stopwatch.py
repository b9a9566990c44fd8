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
