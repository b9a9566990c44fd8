"""Metrics of a user's own, by `_target_`: measured, recorded, and part of the identity."""

import importlib
import sys

import pytest

from nnprune.experiment.build import build
from nnprune.run import run

MODULE = """
import torch
from nnprune.evaluation import Evaluator


class TopOne(Evaluator):
    def __init__(self, rows=3):
        self.rows, self.seq_len = rows, 16

    def prepare(self, tokenizer):
        return torch.arange(self.rows * 16).view(self.rows, 16) % 200

    def measure(self, ids, logits):
        hits = sum(float((scores.argmax(-1) == ids[row, tokens]).sum()) for row, tokens, scores in logits)
        return {"top_one": hits / ids.numel(), "tokens": float(ids.numel())}
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "evaluator_of_a_user.py"
    path.write_text(MODULE)
    monkeypatch.delitem(sys.modules, "evaluator_of_a_user", raising=False)  # of another test
    importlib.invalidate_caches()
    return path


OWN = "+evaluation.datasets.mine._target_=evaluator_of_a_user.TopOne"


def test_own_metrics_are_recorded_beside_perplexity(module, tiny_config):
    record = run(tiny_config("pruner=wanda", OWN, "+evaluation.datasets.mine.rows=5"))
    assert record.metrics.keys() == record.dense_metrics.keys() == {"text_perplexity", "top_one", "tokens"}
    assert record.metrics["tokens"] == 80
    assert 0 <= record.metrics["top_one"] <= 1
    assert record.evaluation_hashes.keys() == {"text", "mine"}


def test_settings_and_code_of_an_evaluator_are_identity(module, tiny_config):
    cfgs = [tiny_config(OWN), tiny_config(OWN, "+evaluation.datasets.mine.rows=5")]
    found = {build(cfg).evaluations["mine"] for cfg in cfgs}
    module.write_text(MODULE + "\n# edited\n")
    importlib.reload(sys.modules["evaluator_of_a_user"])
    found.add(build(cfgs[0]).evaluations["mine"])
    assert len(found) == 3
    assert len({build(cfg).fingerprint for cfg in (*cfgs, tiny_config())}) == 1, "the pruned model is the same"


ANOTHER = "+evaluation.datasets.other._target_=evaluator_of_a_user.TopOne"
TWICE = (
    r"evaluation.datasets: mine and other both give the metric top_one, of different values; let `measure` name it otherwise"
)


@pytest.mark.parametrize("settings", [("pruner=wanda",), ("sparsity=0",)], ids=["pruned", "dense"])
def test_a_metric_that_two_evaluators_give_is_refused(settings, module, tiny_config):
    module.write_text(MODULE.replace("/ ids.numel()", "+ self.rows").replace("float(ids.numel())", "16.0"))
    record = run(tiny_config(*settings, OWN))  # what an earlier run measured counts too
    with pytest.raises(ValueError, match=TWICE):
        run(tiny_config(*settings, OWN, ANOTHER, "+evaluation.datasets.other.rows=5"))
    assert run(tiny_config(*settings, OWN)).metrics == record.metrics, "nothing of it was written"
    assert run(tiny_config(*settings, ANOTHER)).metrics == record.metrics, "the same figures are no contradiction"


def test_a_metric_that_is_added_to_a_saved_model_twice_is_refused(module, tiny_config):
    first = run(tiny_config("pruner=wanda", "save=true", OWN))
    with pytest.raises(ValueError, match=TWICE):
        run(tiny_config("pruner=wanda", "save=true", OWN, ANOTHER, "+evaluation.datasets.other.rows=5"))
    assert run(tiny_config("pruner=wanda", "save=true", OWN)).metrics == first.metrics


def test_two_texts_of_one_name_are_refused(tiny_config, small_text):
    with pytest.raises(ValueError, match=r"evaluation.datasets.text: evaluation.path has this name; call one otherwise"):
        build(tiny_config(f"+evaluation.datasets.text.path={small_text}"))


def test_something_else_is_an_error(tiny_config):
    with pytest.raises(ValueError, match=r"evaluation\.datasets\.mine\._target_: .* is no Evaluator"):
        build(tiny_config("+evaluation.datasets.mine._target_=pathlib.Path"))
