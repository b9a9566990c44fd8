"""What a user's code refers to when it runs is part of a run: closures, attributes of classes, globals, and code edited since."""

import importlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nnprune.experiment.own_objects import code_of

RUN_TIME = """
from functools import cached_property, wraps
import torch
from nnprune.pruners.base import ScorePruner
import run_time_helper

POWER = 1

def doubled(W):
    return W ** POWER

def twice(factor):
    def decorate(method):
        @wraps(method)
        def changed(*args):
            return factor * method(*args)
        return changed
    return decorate

def make(alpha, rule=lambda x: x):
    class Made(ScorePruner):
        def score(self, W, module_name):
            return rule(W.abs().float() ** alpha)
    return Made

def decorated(alpha):
    class Made(ScorePruner):
        @torch.no_grad()
        @twice(alpha)
        def score(self, W, module_name):
            return super().score(W, module_name)
    return Made

def with_default(alpha):
    class Made(ScorePruner):
        def score(self, W, module_name, *, power=alpha):
            return W ** power
    return Made

class Base(ScorePruner):
    alpha = 1
    skip = {"one", "other"}

    @cached_property
    def power(self):
        return run_time_helper.SIGN

    def score(self, W, module_name):
        return doubled(W) ** self.alpha

class Derived(Base):
    pass
"""


@pytest.fixture
def at_run_time(tmp_path, monkeypatch):
    """A module whose classes depend on what happens when it runs."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, code in {"run_time_helper": "SIGN = 1\n", "run_time_of_reuse": RUN_TIME}.items():
        (tmp_path / f"{name}.py").write_text(code)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module("run_time_of_reuse")


def test_the_values_in_a_closure_are_part_of_a_class(at_run_time, caplog):
    for make in (at_run_time.make, at_run_time.decorated, at_run_time.with_default):
        assert code_of(make(0.5)) == code_of(make(0.5)) != code_of(make(-3.0)), make
    rules = [lambda x: -x, lambda x: x]
    assert len({code_of(at_run_time.make(1, rule)) for rule in rules}) == 2
    assert not caplog.messages


def test_what_is_set_in_a_class_or_module_at_run_time_is_part_of_it(at_run_time, monkeypatch):
    one = code_of(at_run_time.Derived)
    assert one == code_of(at_run_time.Derived)
    found = {one}
    for owner, name, value in (
        *((at_run_time.Base, "alpha", value) for value in (2, torch.ones(1), np.ones(1), [1], at_run_time.make(1))),
        (at_run_time.Base, "skip", {"one"}),
        (at_run_time.Derived, "alpha", 1.0),
        (at_run_time, "POWER", 2),
        (at_run_time, "doubled", lambda W: W),
        (at_run_time.run_time_helper, "SIGN", 2),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value, raising=False)
            found.add(code_of(at_run_time.Derived))
    assert len(found) == 11 and one == code_of(at_run_time.Derived)


@pytest.mark.parametrize(
    ("old", "new"), [("W ** POWER", "W * POWER"), ("POWER = 1", "POWER = 2"), ("doubled(W) **", "doubled(W) *")]
)
def test_code_that_was_edited_after_its_import_is_neither_version(old, new, at_run_time, tmp_path):
    file = tmp_path / "run_time_of_reuse.py"
    file.write_text(RUN_TIME.replace(old, new))
    stale = code_of(at_run_time.Derived)
    loaded = importlib.reload(at_run_time)
    edited = code_of(loaded.Derived)
    file.write_text(RUN_TIME)
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert len({stale, edited, code_of(importlib.reload(loaded).Derived)}) == 3


def test_code_has_the_same_hash_in_any_process(at_run_time, tmp_path):
    code = "from nnprune.experiment.own_objects import code_of; import run_time_of_reuse as m; "
    code += "print(code_of(m.Derived), code_of(m.make(0.5)), code_of(m.decorated(0.5)))"
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    kinds = (at_run_time.Derived, at_run_time.make(0.5), at_run_time.decorated(0.5))
    assert found == [" ".join(map(code_of, kinds)) + "\n"] * 2
