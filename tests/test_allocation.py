"""Allocations: the rules of every plan, each method's formula by hand, bad settings."""

import importlib
import itertools
import math
import shutil
import sys

import pytest
import torch
from conftest import compose_config
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.presets import MEASURED
from support.runs import refuse

from nnprune.allocations.alphapruning import AlphaPruning, hill_alpha
from nnprune.allocations.base import DenseLayer, mean, mixed_nm, spread, within
from nnprune.allocations.by_error import ByError
from nnprune.allocations.dlp import DLP
from nnprune.allocations.owl import OWL
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.pruners.wanda import Wanda
from nnprune.run import CONF, run

NAMES = sorted(path.stem for path in (CONF / "allocation").glob("*.yaml"))
NUMBER = st.floats(1e-3, 1e3)
LAYERS = st.lists(st.tuples(NUMBER, st.integers(1, 10**6)), min_size=1, max_size=12)


def make(name):
    return instantiate(compose_config(f"allocation={name}").allocation, _convert_="all")


DEFAULTS = {name: make(name) for name in MEASURED}


# The rules of every plan


@settings(max_examples=60)
@given(st.lists(st.tuples(st.floats(-2, 3), st.integers(1, 10**6)), min_size=1, max_size=12), st.floats(0, 0.99))
def test_clipping_keeps_the_mean(layers, target):
    wanted, sizes = zip(*layers, strict=True)
    kept = within(wanted, sizes, target, 0, 0.99)
    assert all(0 <= one <= 0.99 for one in kept)
    assert mean(kept, sizes) == pytest.approx(target, abs=1e-12)
    order = sorted(range(len(wanted)), key=lambda layer: wanted[layer])
    assert [kept[layer] for layer in order] == sorted(kept)


def test_what_needs_no_clipping_stays_as_it_is():
    assert within([0.4, 0.6], [5, 5], 0.5, 0, 0.99) == [0.4, 0.6]
    assert within([0.9, 1.3, 0.5], [1, 1, 1], 0.9, 0, 0.99) == pytest.approx([0.99, 0.99, 0.72])


@settings(max_examples=60)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.integers(2, 16), st.data())
def test_mixed_nm_has_the_mean_exactly(wanted, m, data):
    n = data.draw(st.integers(1, m - 1))
    patterns = mixed_nm(wanted, [4096] * len(wanted), NM(n, m))
    assert sum(pattern.n for pattern in patterns) == n * len(wanted)
    assert all(pattern.m == m and 0 < pattern.n < m for pattern in patterns)
    pairs = itertools.permutations(zip(wanted, patterns, strict=True), 2)
    assert all(one.n >= other.n for (low, one), (high, other) in pairs if low < high - 1e-6)


@settings(max_examples=60)
@given(LAYERS, st.sampled_from(["2:4", "4:8", "3:5"]))
def test_mixed_nm_of_layers_of_different_size_is_exact_or_refused(layers, spec):
    pattern, (importance, sizes) = parse_pattern(spec), zip(*layers, strict=True)
    try:
        patterns = mixed_nm(spread(importance, sizes, pattern.sparsity, 0.3), sizes, pattern)
    except ValueError as error:
        assert len(set(sizes)) > 1
        assert f"sparsity={spec}: decoder layers of" in str(error)
    else:
        assert sum(one.n * size for one, size in zip(patterns, sizes, strict=True)) == pattern.n * sum(sizes)


def test_mixed_nm_by_hand():
    assert mixed_nm([0.5, 0.42, 0.58], [7] * 3, NM(4, 8)) == [NM(4, 8), NM(5, 8), NM(3, 8)]
    assert mixed_nm([0.45, 0.48, 0.57], [7] * 3, NM(4, 8)) == [NM(4, 8), NM(4, 8), NM(4, 8)]  # 4.4, 4.16, 3.44
    assert mixed_nm([0.2, 0.8], [7] * 2, NM(2, 4)) == [NM(3, 4), NM(1, 4)]
    assert mixed_nm([-1.0, 2.0, 0.5], [7] * 3, NM(2, 4)) == [NM(3, 4), NM(1, 4), NM(2, 4)]
    assert mixed_nm([0.3, 0.6], [2, 4], NM(2, 4)) == [NM(2, 4), NM(2, 4)]


@settings(max_examples=40)
@given(st.sampled_from(MEASURED), LAYERS, st.floats(0.001, 0.995))
def test_every_plan_has_the_sparsity_asked_for(name, layers, sparsity):
    measured, heights = zip(*layers, strict=True)
    shapes = [{f"{index}.a": (height, 3), f"{index}.b": (1, 2)} for index, height in enumerate(heights)]
    plan = DEFAULTS[name].plan(Unstructured(sparsity), shapes, measured)
    sizes = [math.prod(shape) for layer in shapes for shape in layer.values()]
    assert mean([pattern.sparsity for pattern in plan.values()], sizes) == pytest.approx(sparsity, abs=1e-11)
    for index in range(len(shapes)):
        assert plan[f"{index}.a"] == plan[f"{index}.b"], "one sparsity a decoder layer"


def test_equal_layers_get_equal_sparsity():
    for name in MEASURED:
        assert set(DEFAULTS[name].plan(Unstructured(0.7), [{"a": (2, 2)}, {"b": (2, 2)}], [3.0, 3.0]).values()) == {
            Unstructured(0.7)
        }


def test_a_strength_that_changes_nothing_or_too_much_is_told_of(caplog):
    shapes = [{"a": (2, 4)}, {"b": (2, 4)}]
    assert set(OWL().plan(NM(2, 4), shapes, [1, 2]).values()) == {NM(2, 4)}
    assert "no layer is moved away from 2:4" in caplog.text
    assert OWL(strength=0.3).plan(NM(2, 4), shapes, [1, 2]) == {"a": NM(1, 4), "b": NM(3, 4)}
    assert DLP(strength=0.4).plan(Unstructured(0.9), shapes, [1, 2])["b"] == Unstructured(0.99)
    assert "a layer would lose more than 0.99" in caplog.text


# The formulas


def dense_layer(**weights):
    """A layer whose inputs have the squared norms 1, 4, 9, ..."""
    weights = {name: torch.tensor(W) for name, W in weights.items()}
    norms = {name: torch.arange(1.0, W.shape[1] + 1).square() for name, W in weights.items()}
    generator = torch.Generator().manual_seed(0)
    return DenseLayer(weights, norms, {name: torch.randn(40, len(h), generator=generator) for name, h in norms.items()})


def test_owl():
    layer = dense_layer(a=[[1.0, -1.0], [2.0, 0.0]], b=[[0.0, 10.0]])
    # scores 1, 2, 2, 0, 0, 20: mean 25 / 6
    assert OWL(threshold=1).measure(layer, None) == 1 / 6
    assert OWL(threshold=5).measure(layer, None) == 0
    assert OWL(threshold=0.3).measure(layer, None) == 3 / 6
    assert OWL(strength=0.1).sparsities([0.2, 0.1, 0.4], [1, 1, 2], 0.7) == pytest.approx(
        [0.7 + 7 / 60 - 1 / 15, 0.7 + 7 / 60, 0.7 + 7 / 60 - 0.2]
    )


def test_dlp():
    layer = dense_layer(a=[[1.0, -1.0, 1.0], [2.0, 0.0, 0.0]], b=[[0.0, 10.0, 1.0]])
    # scores 1, 2, 3, 2, 0, 0 with the lower median 1; 0, 20, 3 with the median 3
    assert DLP().measure(layer, None) == pytest.approx((6 * 1 + 3 * 3) / 9)
    S = [1.0, 2.0, 5.0]
    importance = [1 - one / sum(S) for one in S]
    expected = [0.3 * (one - min(importance)) / (max(importance) - min(importance)) for one in importance]
    assert DLP(strength=0.15).sparsities(S, [1, 1, 1], 0.7) == pytest.approx([0.7 + sum(expected) / 3 - d for d in expected])


def test_by_error():
    layer = dense_layer(a=[[1.0, -1.0], [2.0, 0.5]], b=[[3.0, 1.0]])
    pruned = {"a": torch.tensor([[0.0, -1.0], [2.0, 0.0]]), "b": torch.tensor([[3.0, 0.0]])}
    errors = {}
    for name, W in layer.weights.items():
        X = layer.samples[name]
        errors[name] = float((X @ (pruned[name] - W).T).square().sum() / (X @ W.T).square().sum())
    expected = (4 * errors["a"] + 2 * errors["b"]) / 6
    assert ByError().measure(layer, Unstructured(0.5)) == pytest.approx(expected)
    assert ByError().sparsities([0.01, 0.1, 1.0], [1, 1, 1], 0.5) == pytest.approx([0.58, 0.5, 0.42])
    assert ByError().sparsities([0.0, 1.0], [1, 1], 0.5) == pytest.approx([0.58, 0.42])


def test_alphapruning():
    logs = torch.tensor([0.0, 50.2, 50.7, 90.2, 100.0], dtype=torch.float64) / 10  # bins of 0.1 hold 1, 2, 1, 1
    alpha = 1 + 3 / (0.05 + 4 + 4.98)
    assert hill_alpha(logs.exp()) == pytest.approx(alpha)
    W = torch.diag((logs / 2).exp()).float()
    assert AlphaPruning().measure(DenseLayer({"a": W, "b": 3 * W}, {}, {}), None) == pytest.approx(alpha, rel=1e-3)
    assert AlphaPruning(strength=0.3).sparsities([2.0, 3.0, 4.0], [1, 1, 1], 0.6) == pytest.approx([0.42, 0.6, 0.78])
    pareto = (1 - torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)) ** (-1 / 1.5)
    assert hill_alpha(pareto) == pytest.approx(2.5, rel=0.02)
    with pytest.raises(ValueError, match=r"^x: its weight has no two different singular values .*use another allocation"):
        AlphaPruning().measure(DenseLayer({"x": torch.eye(4)}, {}, {}), None)


# Settings


BAD_SETTINGS = [
    ("allocation=owl allocation.strength=0", "allocation.strength=0: ", "greater than 0 and less than 1"),
    ("allocation=owl allocation.threshold=x", "allocation.threshold=x: ", "greater than 0"),
    ("allocation=dlp allocation.strength=1", "allocation.strength=1: ", "less than 1"),
    ("allocation=alphapruning allocation.strength=true", "allocation.strength=True: ", "must be a number"),
    ("allocation=by_error allocation.strength=null", "allocation.strength=None: ", "must be a number"),
    ("allocation=owl +allocation.power=2", "allocation.power=2: no such setting", "threshold, strength"),
    ("allocation=owl allocation._target_=nnprune.pruners.wanda.Wanda ~allocation.threshold ~allocation.strength",
     "allocation._target_=nnprune.pruners.wanda.Wanda: ", "is no Allocation"),
    ("allocation=owl sparsity=1:2", "sparsity=1:2: OWL cannot vary it", "use allocation=uniform or a larger M"),
    ("allocation=owl sparsity=1:5", "sparsity=1:5: ", "choose another N:M"),
    ("allocation=file", "allocation.path=???: ", "add allocation.path="),
    ("allocation=file allocation.path=no.json", "allocation.path=no.json: cannot be read", "give a JSON or YAML file"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "start", "remedy"), BAD_SETTINGS, ids=[row[0] for row in BAD_SETTINGS])
def test_bad_settings(overrides, start, remedy, tiny_config, monkeypatch):
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    with pytest.raises(ValueError) as caught:
        run(tiny_config(*overrides.split()))
    assert str(caught.value).startswith(start)
    assert remedy in str(caught.value)


def test_a_layer_without_linears_is_passed_over():
    shapes = [{"a": (2, 2)}, {}, {"b": (2, 2)}]
    OWL().check(Unstructured(0.5), shapes)
    assert OWL(strength=0.1).plan(Unstructured(0.5), shapes, [1.0, 2.0]) == {"a": Unstructured(0.6), "b": Unstructured(0.4)}


@pytest.mark.parametrize(
    ("group", "option", "base"),
    [("allocation", "owl", "nnprune.allocations.owl.OWL"), ("update", "refit", "nnprune.updates.Refit")],
)
def test_options_and_the_code_of_an_own_part_are_science(tiny_config, tmp_path, monkeypatch, group, option, base):
    monkeypatch.syspath_prepend(tmp_path)
    found = {build(tiny_config(*options)).fingerprint for options in ((), (f"{group}={option}",))}
    module, name = base.rsplit(".", 1)
    for comment in ("one", "two"):
        (tmp_path / f"my_{group}.py").write_text(
            f"# {comment}\nfrom {module} import {name}\n\n\nclass Mine({name}):\n    pass\n"
        )
        sys.modules.pop(f"my_{group}", None)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        found.add(build(tiny_config(f"{group}={option}", f"{group}._target_=my_{group}.Mine")).fingerprint)
    assert len(found) == 4
    assert build(tiny_config("allocation=owl", "allocation.strength=0.1")).fingerprint not in found


def test_wanda_scores_are_those_of_the_survey():
    """Wanda's own score, from the statistic that the survey collects."""
    layer, wanda = dense_layer(a=[[1.0, -2.0]]), Wanda()
    wanda.add_linear_activations("a", torch.tensor([[[1.0, 2.0]]]))
    assert torch.equal(wanda.score(layer.weights["a"], "a"), layer.score("a"))
