"""Runs of the program on tiny models: their errors, and what of their records can be compared."""

import multiprocessing
import os
import signal
import threading

import pytest
from tqdm import tqdm

from nnprune.experiment.measurement import Measurement
from nnprune.patterns import parse_pattern
from nnprune.records import read_all
from nnprune.run import run


def failure(cfg) -> str:
    """The error of a run: one line, and recorded."""
    with pytest.raises((ValueError, OSError)) as caught:
        run(cfg)
    message = str(caught.value.strerror if isinstance(caught.value, OSError) else caught.value)
    assert "\n" not in message.strip()
    records, problems = read_all(cfg.outputs)
    assert not problems
    assert [record["error"] for record in records if record["status"] == "failed"] == [str(caught.value)]
    return message


def stripped(linears):
    return [{**linear, "seconds": 0} for linear in linears]


def patterns_of(record):
    return {linear["name"]: parse_pattern(linear["pattern"]) for linear in record.per_linear}


BRIEF = ("pruner=magnitude", "evaluation.max_windows=1")


def refuse(*_, **__):
    raise AssertionError("this work was not to be done")


def watch_measurements(monkeypatch):
    """A list that grows with each measurement: "dense text", "pruned text"."""
    titles, finish = [], Measurement.finish

    def watched(self):
        titles.extend(f"{self.kind} {name}" for name in self._states)
        return finish(self)

    monkeypatch.setattr(Measurement, "finish", watched)
    return titles


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(cfg):
    """Run in a fork that ends with kill -9."""

    def run_alone():
        # tqdm's own lock is shared with forks: killed while they hold it, they would leave us waiting.
        tqdm.set_lock(threading.RLock())
        run(cfg)

    process = multiprocessing.get_context("fork").Process(target=run_alone)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
