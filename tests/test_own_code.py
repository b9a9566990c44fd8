"""The code and the settings of what a user wrote are part of a run: other ones make another experiment."""

import importlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nnprune.run
from nnprune.experiment import identity
from nnprune.experiment.build import build
from nnprune.experiment.own_objects import code_of, settings_of, state_of
from nnprune.run import run


def test_the_code_of_a_method_is_what_its_classes_use(tiny_config):
    experiment = build(tiny_config("pruner=sparsegpt", "allocation=owl"))
    files = identity.own_code(experiment).keys()
    assert {"pruners/sparsegpt.py", "pruners/stacked.py", "solvers/cholesky.py", "allocations/owl.py", "updates.py"} <= files
    assert not {"pruners/wanda.py", "run.py", "experiment/job.py", "engine/pruning_pass.py"} & files


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (("recover=layer",), set()),
        (("recover=window", "recover.logits_epochs=0"), {"window.py"}),
        (("recover=window",), {"window.py", "logits.py"}),
        (("recover=layer_model",), {"distillation.py", "logits.py"}),
    ],
)
def test_the_code_of_what_tunes_several_layers(settings, wanted, tiny_config):
    identity.own_code(build(tiny_config("recover=window")))  # an earlier run of this process
    files = identity.own_code(build(tiny_config(*settings)))
    assert {name.removeprefix("engine/") for name in files if name.startswith("engine/")} == wanted


OWN = """
from nnprune.pruners.base import ScorePruner
from {helper} import SIGN

class Mine(ScorePruner):
    def __init__(self, weight=1):
        self.weight = weight

    def score(self, W, module_name):
        return SIGN * W.abs().float() * (self.weight if not callable(self.weight) else self.weight(1))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`mine(sign)`: the class, which uses a module of its author's, written anew."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(sign):
        for name, code in {"helper_of_reuse": f"SIGN = {sign}\n", "own_of_reuse": OWN.format(helper="helper_of_reuse")}.items():
            (tmp_path / f"{name}.py").write_text(code)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return importlib.import_module("own_of_reuse").Mine

    return make


def test_an_own_recovery_before_distillation_is_part_of_it(tmp_path, monkeypatch, tiny_config):
    monkeypatch.syspath_prepend(tmp_path)
    found = set()
    for docstring in ("one", "another"):
        code = f"from nnprune.recovery import Reconstruction\nclass Mine(Reconstruction):\n    '''{docstring}'''\n"
        (tmp_path / "own_recovery.py").write_text(code)
        sys.modules.pop("own_recovery", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.add(build(tiny_config("recover=layer_model", "recover.layers._target_=own_recovery.Mine")).fingerprint)
    assert len(found) == 2


LAZY = """
from nnprune.pruners.base import ScorePruner

class Mine(ScorePruner):
    def score(self, W, module_name):
        {import_}
        return W
"""


@pytest.mark.parametrize(
    "import_", ["from lazy_package.inner import power", "import lazy_package.inner", "from lazy_package import inner"]
)
@pytest.mark.parametrize("edited", ["inner", "__init__", "last"])
def test_a_module_that_a_method_will_import_is_part_of_it(import_, edited, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "lazy_package"
    package.mkdir()
    (tmp_path / "lazy_of_reuse.py").write_text(LAZY.format(import_=import_))
    for name, code in {"__init__": "", "inner": "from .last import power", "last": "power = 1"}.items():
        (package / f"{name}.py").write_text(code)
    sys.modules.pop("lazy_of_reuse", None)
    importlib.invalidate_caches()
    kind = importlib.import_module("lazy_of_reuse").Mine
    first = code_of(kind)
    (package / f"{edited}.py").write_text("power = 2")
    second = code_of(kind)
    assert first != second == code_of(kind)
    assert "lazy_package" not in sys.modules
    importlib.import_module("lazy_package.inner")
    assert code_of(kind) == second, "what the run has imported"
    for name in ("lazy_package", "lazy_package.inner", "lazy_package.last"):
        sys.modules.pop(name, None)


def test_a_module_that_an_own_pruner_uses_is_part_of_it(mine, tiny_config):
    settings = ("pruner=custom", "pruner._target_=own_of_reuse.Mine")
    found = []
    for sign in (1, -1):
        mine(sign)
        found.append(run(tiny_config(*settings)).metrics["text_perplexity"])
    assert found[0] != found[1]


def test_seeds_of_an_edited_pruner_or_of_another_text_are_not_averaged(mine, tmp_path, tiny_config):
    def seedless(*settings):
        return build(tiny_config("pruner=custom", "pruner._target_=own_of_reuse.Mine", *settings)).seedless_fingerprint

    mine(1)
    first = seedless("seed=1")
    assert first == seedless("seed=2") == seedless("seed=1", "calibration.seed=7")
    assert first != seedless("seed=1", "+pruner.weight=2")
    mine(-1)
    assert first != seedless("seed=0")
    text = tmp_path / "calibration.txt"
    found = []
    for content in ("one " * 500, "another " * 500):
        text.write_text(content)
        found.append(seedless("calibration=text", f"calibration.path={text}"))
    assert found[0] != found[1]


def test_a_record_names_the_experiment_of_its_seeds(tiny_config):
    records = [run(tiny_config(f"seed={seed}")) for seed in (0, 1)]
    assert records[0].seedless_fingerprint == records[1].seedless_fingerprint is not None
    assert records[0].fingerprint != records[1].fingerprint


SMALL = [f"calibration.{key}" for key in ("num_samples=2", "seq_len=32")]
IN_NO_FILE = [eval(f"lambda x: {sign}x", {"__name__": "__main__"}) for sign in "+-"]  # as in a notebook
SMALL += [f"evaluation.{key}" for key in ("max_windows=1", "seq_len=32")]


@pytest.mark.parametrize(
    "one", [torch.ones(1), torch.float32, np.float32(1), IN_NO_FILE[0]], ids=["tensor", "dtype", "numpy", "code"]
)
def test_what_an_object_holds_is_part_of_it(one, mine, tmp_path, caplog):
    other = (
        {torch.float32: torch.float64}.get(one) if isinstance(one, torch.dtype) else IN_NO_FILE[1] if callable(one) else -one
    )
    kind = mine(1)

    def fingerprint(held):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nnprune.run.run", lambda cfg, pruner: build(cfg, pruner).fingerprint)
            return nnprune.run.prune(kind(held), overrides=[*SMALL, f"outputs={tmp_path}"])

    assert fingerprint(one) != fingerprint(other)
    is_code = callable(one) and not isinstance(one, torch.dtype)
    assert (fingerprint(one) == fingerprint(one)) != is_code
    assert ("weight of Mine cannot be hashed" in caplog.text) == is_code


def test_equal_tensors_are_one_experiment_in_any_process():
    held = SimpleNamespace(scores=torch.arange(6.0).view(2, 3), half=torch.ones((), dtype=torch.bfloat16))
    same = SimpleNamespace(scores=torch.arange(12.0)[:6].view(2, 3).clone(), half=torch.ones(2, dtype=torch.bfloat16)[0])
    assert state_of(held) == state_of(same) is not None
    assert state_of(SimpleNamespace(scores=held.scores.T.contiguous(), half=held.half)) != state_of(held)


def test_equal_sets_are_one_experiment_in_any_process():
    code = "from types import SimpleNamespace as S; from nnprune.experiment.own_objects import state_of; "
    code += "words = 'q_proj k_proj v_proj out_proj'.split(); "
    code += "print(state_of(S(skip=set(words))), state_of(S(skip=[frozenset(words)])), state_of(S(skip=set(words[1:]))))"
    found = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert found[0].stdout == found[1].stdout and len(set(found[0].stdout.split())) == 3, found[0].stderr


def test_a_function_counts_by_its_file_and_in_none_it_is_new_each_time(mine, tmp_path, monkeypatch, caplog):
    def state(code):
        (tmp_path / "functions_of_reuse.py").write_text(code)
        sys.modules.pop("functions_of_reuse", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        return state_of(SimpleNamespace(weight=importlib.import_module("functions_of_reuse").weight))

    monkeypatch.syspath_prepend(tmp_path)
    first = state("def weight(x):\n    return x\n")
    assert state("def weight(x):\n    return -x\n") != first == state("def weight(x):\n    return x\n")
    assert not caplog.messages
    namespace = {"__name__": "__main__"}
    exec("def weight(x):\n    return x\n", namespace)  # as a cell of a notebook does
    held = SimpleNamespace(weight=namespace["weight"])
    assert state_of(held) != state_of(held)
    assert "weight of SimpleNamespace cannot be hashed (weight has no place in a file)" in caplog.text


def test_fields_in_slots_are_settings():
    @dataclass(slots=True)
    class Mine:
        alpha: float
        scores: torch.Tensor

    one = Mine(0.5, torch.ones(2))
    assert settings_of(one) == {"alpha": 0.5} and state_of(one) != state_of(Mine(0.5, torch.zeros(2)))


def test_a_file_that_a_setting_names_is_part_of_it(mine, tiny_config, tmp_path):
    mine(1)
    scores = tmp_path / "scores.txt"
    cfg = tiny_config("pruner=custom", "pruner._target_=own_of_reuse.Mine", f"+pruner.weight={scores}")
    absent = build(cfg).fingerprint
    found = {absent}
    for text in ("one", "two"):
        scores.write_text(text)
        found.add(build(cfg).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize("setting", ["weight=[1,{file}]", "weight={{a:{{b:{file}}}}}"])
def test_files_in_lists_and_dictionaries_are_part_of_it(setting, mine, tiny_config, tmp_path):
    mine(1)
    file = tmp_path / "scores.txt"
    cfg = tiny_config("pruner=custom", "pruner._target_=own_of_reuse.Mine", f"+pruner.{setting.format(file=file)}")
    found = set()
    for text in ("one", "two"):
        file.write_text(text)
        found.add(build(cfg).fingerprint)
    assert len(found) == 2 and build(cfg).fingerprint in found


def test_a_path_that_a_pruner_holds_counts_by_its_content(tmp_path):
    held = SimpleNamespace(file=tmp_path / "scores.txt")
    found = {state_of(held)}
    for text in ("one", "two"):
        held.file.write_text(text)
        found.add(state_of(held))
    assert len(found) == 3


PARTS = {
    "calibration": "from nnprune.calibration import TextCalibration\nclass Mine(TextCalibration):\n"
    "    def __init__(self, file, **settings):\n        super().__init__(**settings)\n    '{word}'\n",
    "evaluation.datasets.mine": "from nnprune.evaluation import Evaluator\nclass Mine(Evaluator):\n"
    "    def __init__(self, file):\n        self.file, self.words = file, {{'one', 'other'}}\n"
    "    def prepare(self, tokenizer):\n        '{word}'\n    def measure(self, ids, logits):\n        return {{}}\n",
}


@pytest.mark.parametrize("key", PARTS)
def test_code_and_files_of_an_own_calibration_or_evaluator_are_part_of_it(key, tmp_path, monkeypatch, tiny_config):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "words.txt"
    cfg = tiny_config(f"++{key}._target_=own_part.Mine", f"+{key}.file={file}")

    def names(word, text):
        (tmp_path / "own_part.py").write_text(PARTS[key].format(word=word))
        file.write_text(text)
        sys.modules.pop("own_part", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        experiment = build(cfg)
        return experiment.fingerprint, experiment.evaluations.get("mine")

    found = [names("one", "one"), names("two", "one"), names("one", "two")]
    assert len(set(found)) == 3 and names("one", "one") == found[0]
    assert len({fingerprint for fingerprint, _ in found}) == (3 if key == "calibration" else 1)


def test_a_class_that_exec_made_is_in_no_file(mine, tiny_config, caplog):
    kind = mine(1)
    namespace = {"__name__": kind.__module__}
    exec(OWN.format(helper="helper_of_reuse"), namespace)
    assert code_of(namespace["Mine"]) != code_of(namespace["Mine"])
    assert "the code of Mine is in no file, so this run will not be reused, nor averaged" in caplog.text
    assert code_of(kind) == code_of(kind)
