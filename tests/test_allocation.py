"""Allocations: the rules of every plan, each method's formula by hand, the survey of the dense model, plans from files."""

import itertools
import json
import math

import pytest
import torch
from conftest import compose_config
from families import FAMILIES
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import engine_of, random_ids
from test_grid import stripped

import nnprune.finished
import nnprune.survey
from nnprune.allocations.alphapruning import AlphaPruning, hill_alpha
from nnprune.allocations.base import DenseLayer, mean, mixed_nm, spread, within
from nnprune.allocations.by_error import ByError
from nnprune.allocations.dlp import DLP
from nnprune.allocations.from_file import FromFile
from nnprune.allocations.owl import OWL
from nnprune.decoder import weight_OI
from nnprune.experiment import build
from nnprune.loading import ModelSource
from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.pruners.wanda import Wanda
from nnprune.run import CONF, run, run_grid, show_plan

NAMES = sorted(path.stem for path in (CONF / "allocation").glob("*.yaml"))
MEASURED = [name for name in NAMES if name not in ("uniform", "file")]
NUMBER = st.floats(1e-3, 1e3)
LAYERS = st.lists(st.tuples(NUMBER, st.integers(1, 10**6)), min_size=1, max_size=12)


def make(name):
    return instantiate(compose_config(f"allocation={name}").allocation, _convert_="all")


BRIEF = ("pruner=magnitude", "evaluation.max_windows=1")
DEFAULTS = {name: make(name) for name in MEASURED}


def refuse(*_, **__):
    raise AssertionError("this work was not to be done")


# The rules of every plan


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.integers(2, 16), st.data())
def test_mixed_nm_has_the_mean_exactly(wanted, m, data):
    n = data.draw(st.integers(1, m - 1))
    patterns = mixed_nm(wanted, [4096] * len(wanted), NM(n, m))
    assert sum(pattern.n for pattern in patterns) == n * len(wanted)
    assert all(pattern.m == m and 0 < pattern.n < m for pattern in patterns)
    pairs = itertools.permutations(zip(wanted, patterns, strict=True), 2)
    assert all(one.n >= other.n for (low, one), (high, other) in pairs if low < high - 1e-6)


@settings(deadline=None, max_examples=60)
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


@settings(deadline=None, max_examples=40)
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


# The survey


class Look(OWL):
    """Remembers what it is shown."""

    def measure(self, layer, pattern):
        self.__dict__.setdefault("seen", []).append(layer)
        return 1.0


@torch.no_grad()
def test_the_survey_shows_the_dense_model(tmp_path):
    ids, look = random_ids(rows=5, seq_len=16), Look()
    model, names, expected = FAMILIES["opt"](), [], {}
    for name, linear in model.named_modules():
        if "layers." in name and isinstance(linear, torch.nn.Linear):
            names.append(name)
            linear.register_forward_pre_hook(
                lambda _, args, name=name: expected.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
            )
    model(ids)
    for linear in model.modules():
        linear._forward_pre_hooks.clear()
    engine = engine_of(model, tmp_path, batch_tokens=32, activations="disk")
    nnprune.survey.survey(engine, ids, {"look": lambda layer: look.measure(layer, None)})
    assert [name for layer in look.seen for name in layer.weights] == names
    for layer in look.seen:
        for name, W in layer.weights.items():
            assert torch.equal(W, weight_OI(model.get_submodule(name)))
            X = expected[name]
            torch.testing.assert_close(layer.squared_norms[name], X.square().mean(0))
            torch.testing.assert_close(layer.samples[name], X)
            torch.testing.assert_close(layer.score(name), W.abs() * X.square().mean(0).sqrt())
    assert not list(tmp_path.glob("activations*"))
    look.seen.clear()
    nnprune.survey.survey(engine, None, {"look": lambda layer: look.measure(layer, None)})
    assert [name for layer in look.seen for name in layer.weights] == names
    assert not any(layer.samples for layer in look.seen)


@torch.no_grad()
def test_a_survey_refuses_what_is_not_finite(tmp_path):
    engine = engine_of(FAMILIES["opt"](), tmp_path)
    with pytest.raises(ValueError, match="of decoder layer 0 is nan"):
        nnprune.survey.survey(engine, None, {"look": lambda layer: math.nan})
    weight_OI(engine.decoder.linears(1)["model.decoder.layers.1.fc1"])[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.fc1: its weight holds NaN"):
        nnprune.survey.survey(engine, None, {"look": lambda layer: 1.0})


def patterns_of(record):
    return {linear["name"]: parse_pattern(linear["pattern"]) for linear in record.per_linear}


def mean_of(record):
    sizes = [32 * 64 if "fc" in linear["name"] else 32 * 32 for linear in record.per_linear]
    return mean([pattern.sparsity for pattern in patterns_of(record).values()], sizes)


@pytest.mark.parametrize("name", MEASURED)
def test_end_to_end(name, tiny_config, caplog):
    record = run(tiny_config("pruner=wanda", "sparsity=0.6", f"allocation={name}"))
    assert mean_of(record) == pytest.approx(0.6, abs=1e-11)
    assert len(set(patterns_of(record).values())) == 2
    assert record.seconds["allocation"] > 0
    assert record.linear_sparsity == pytest.approx(0.6, abs=0.02)  # rows of 32 round up
    mixed = run(tiny_config("sparsity=4:8", f"allocation={name}", "runtime=low_memory", *BRIEF))
    assert {pattern.n for pattern in patterns_of(mixed).values()} == {3, 5}
    assert mixed.linear_sparsity == 0.5
    assert "sparsities from" in caplog.text


def test_where_layers_rest_does_not_change_the_plan(tiny_config, tmp_path):
    more = ("allocation=by_error", *BRIEF)
    low = run(tiny_config("runtime=low_memory", *more))
    assert stripped(run(tiny_config(f"outputs={tmp_path / 'host'}", *more)).per_linear) == stripped(low.per_linear)


def test_uniform_and_dense_are_not_surveyed(tiny_config, monkeypatch):
    monkeypatch.setattr(nnprune.survey, "survey", refuse)
    record = run(tiny_config("sparsity=2:4", *BRIEF))
    assert set(patterns_of(record).values()) == {NM(2, 4)}
    assert "allocation" not in record.seconds
    run(tiny_config("sparsity=dense", "allocation=owl"))


def test_a_resumed_run_has_the_same_plan_without_a_survey(tiny_config, tmp_path, monkeypatch):
    whole = run(tiny_config("pruner=sparsegpt", "allocation=owl", f"outputs={tmp_path / 'whole'}"))
    cfg = tiny_config("pruner=sparsegpt", "allocation=owl")
    with monkeypatch.context() as patch:
        original, saved = nnprune.finished.save_file, []

        def save_file(state, path, **options):
            if saved:
                raise RuntimeError("cut")
            saved.append(path)
            original(state, path, **options)

        patch.setattr(nnprune.finished, "save_file", save_file)
        with pytest.raises(RuntimeError, match="cut"):
            run(cfg)
    scratch = build(cfg).folder / "unfinished"
    assert (scratch / "layer-0000.json").exists()
    assert len(json.loads((scratch / "allocation.json").read_text())["OWL(threshold=5.0, strength=0.08)"]) == 2
    monkeypatch.setattr(nnprune.survey, "survey", refuse)
    resumed = run(cfg)
    assert resumed.metrics == whole.metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)
    assert not scratch.exists()


def test_cells_of_a_grid_share_one_survey(tiny_config, tmp_path, monkeypatch):
    cells = [("magnitude", "0.6"), ("wanda", "0.6"), ("magnitude", "4:8")]

    def configs(*more):
        cell = ("allocation=by_error", "propagate=dense", "evaluation.max_windows=1", *more)
        return [tiny_config(f"pruner={pruner}", f"sparsity={sparsity}", *cell) for pruner, sparsity in cells]

    separate = [run(cfg) for cfg in configs(f"outputs={tmp_path / 'separate'}")]
    asked, original = [], nnprune.survey.survey
    monkeypatch.setattr(nnprune.survey, "survey", lambda *a: asked.append(list(a[2])) or original(*a))
    together = run_grid(configs())
    assert asked == [["ByError(strength=0.08) at 0.6", "ByError(strength=0.08) at 4:8"]]
    for one, other in zip(separate, together, strict=True):
        assert patterns_of(one) == patterns_of(other)
        assert one.linear_sparsity == other.linear_sparsity


def test_a_cell_of_a_grid_that_cannot_be_is_found_before_weights_are_read(tiny_config, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", refuse)
    cfgs = [tiny_config("pruner=wanda", f"sparsity={spec}", "propagate=dense", "allocation=owl") for spec in ("0.5", "1:5")]
    with pytest.raises(ValueError, match=r"sparsity=1:5: .* has 32 inputs"):
        run_grid(cfgs)


@pytest.mark.parametrize("name", MEASURED)
def test_a_plan_of_a_run_tells_of_the_survey(name, tiny_config, caplog, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", refuse)
    caplog.set_level("INFO")
    show_plan(tiny_config(f"allocation={name}"))
    assert "\nallocation " in "\n" + "\n".join(caplog.messages)


# Plans from files


def test_the_plan_of_a_record_is_used_again(tiny_config, tmp_path):
    first = run(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=owl"))
    [path] = tmp_path.glob("outputs/tiny-opt/0.6/*/result.json")
    again = run(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=file", f"allocation.path={path}"))
    assert again.metrics == first.metrics
    assert stripped(again.per_linear) == stripped(first.per_linear)
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps(stripped(first.per_linear)))
    same = build(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=file", f"allocation.path={copy}"))
    assert same.fingerprint == again.fingerprint != first.fingerprint


def from_file(tiny_config, tmp_path, text, *more, name="plan.yaml"):
    (tmp_path / name).write_text(text)
    return tiny_config("allocation=file", f"allocation.path={tmp_path / name}", *more)


def test_the_last_key_that_fits_counts(tiny_config, tmp_path):
    text = '"*": 0.5\n0: 0.6\n"*.1.*": 0.4\n"*.0.fc1": dense\n"*.0.fc2": "1:4"\nmodel.decoder.layers.1.fc2: 0.45\n'
    found = patterns_of(run(from_file(tiny_config, tmp_path, text.replace('"*": 0.5\n', ""), *BRIEF, "sparsity=0.45")))
    layer = "model.decoder.layers."
    assert found[f"{layer}0.self_attn.q_proj"] == Unstructured(0.6)
    assert found[f"{layer}1.fc1"] == found[f"{layer}1.self_attn.q_proj"] == Unstructured(0.4)
    assert found[f"{layer}0.fc1"] == Unstructured(0.0)
    assert found[f"{layer}0.fc2"] == NM(1, 4)
    assert found[f"{layer}1.fc2"] == Unstructured(0.45)
    with pytest.raises(ValueError, match=r"\* decides nothing"):
        run(from_file(tiny_config, tmp_path, text, "sparsity=0.45"))


BAD_FILES = [
    ("plan.yaml", '"*.fc1": 0.5', "0.5", "no key fits model.decoder.layers.0.self_attn.k_proj", '"*": 0.5'),
    ("plan.yaml", '"*": 0.5\n2: 0.4', "0.5", "2 decides nothing", "take it out"),
    ("plan.yaml", '"*": 0.5\n"*.fc3": 0.4', "0.5", "*.fc3 decides nothing", "take it out"),
    ("plan.yaml", '"*": 50', "0.5", "*: sparsity=50", "for 50 % write 0.5"),
    ("plan.yaml", '"*": 2:4', "0.5", "*: sparsity=124", "quote it"),
    ("plan.yaml", '"*": [0.5]', "0.5", "*: [0.5]: not a pattern", "N:M such as 2:4"),
    ("plan.yaml", '"*": true', "0.5", "*: True: not a pattern", "N:M such as 2:4"),
    (
        "plan.yaml",
        '"*": "1:5"',
        "0.8",
        "1:5 for model.decoder.layers.0.self_attn.k_proj, which has 32 inputs",
        "does not divide",
    ),
    ("plan.yaml", "0: 0.5\n1: 0.6", "0.5", "has the mean sparsity 0.55", "set sparsity=0.55"),
    ("plan.yaml", '"*": 0.5', "2:4", "0.5, which is no N:4", "set sparsity to the plan's mean as a fraction"),
    ("plan.yaml", '0: "1:4"\n1: "2:4"', "2:4", "has the mean sparsity 0.625", "set sparsity=0.625"),
    ("plan.yaml", "a: [", "0.5", "is no JSON or YAML", "see conf/allocation/file.yaml"),
    ("plan.json", "{", "0.5", "is no JSON or YAML", "see conf/allocation/file.yaml"),
    ("plan.json", '{"per_linear": []}', "0.5", "tells of no linear", "completed run"),
    ("plan.json", "[1]", "0.5", "tells of no linear", "completed run"),
    ("plan.yaml", "", "0.5", "tells of no linear", "completed run"),
]


SIZES = {"self_attn.k_proj": (32, 32), "fc1": (64, 32), "fc2": (32, 64)}
SHAPES = [{f"model.decoder.layers.{index}.{name}": shape for name, shape in SIZES.items()} for index in range(2)]


@pytest.mark.parametrize("bad", BAD_FILES, ids=lambda bad: f"{bad[1]} {bad[3]}")
def test_bad_files(bad, tmp_path):
    name, text, sparsity, problem, remedy = bad
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"allocation\.path=") as caught:
        FromFile(tmp_path / name).check(parse_pattern(sparsity), SHAPES)
    assert problem in str(caught.value)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_plan_is_found_before_weights_are_read(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", refuse)
    with pytest.raises(ValueError, match=r"sparsity=0\.5: .* has the mean sparsity 0\.55; set sparsity=0\.55"):
        run(from_file(tiny_config, tmp_path, "0: 0.5\n1: 0.6"))


def test_a_mixed_nm_file(tiny_config, tmp_path):
    record = run(from_file(tiny_config, tmp_path, '0: "3:8"\n1: "5:8"', *BRIEF, "sparsity=4:8"))
    assert set(patterns_of(record).values()) == {NM(3, 8), NM(5, 8)}
    with pytest.raises(ValueError, match=r"pruner\.mask_columns=12: must be a multiple of 8"):
        options = ("pruner.mask_columns=12", "pruner.block_size=12")
        run(from_file(tiny_config, tmp_path, '0: "3:8"\n1: "2:4"', "sparsity=0.5625", *options))


# Settings


BAD_SETTINGS = [
    ("allocation=owl allocation.strength=0", "allocation.strength=0: ", "greater than 0 and less than 1"),
    ("allocation=owl allocation.threshold=x", "allocation.threshold=x: ", "greater than 0"),
    ("allocation=dlp allocation.strength=1", "allocation.strength=1: ", "less than 1"),
    ("allocation=alphapruning allocation.strength=true", "allocation.strength=True: ", "must be a number"),
    ("allocation=by_error allocation.strength=null", "allocation.strength=None: ", "must be a number"),
    ("allocation=owl +allocation.power=2", "allocation._target_=nnprune.allocations.owl.OWL: ", "argument 'power'"),
    ("allocation=owl allocation._target_=nnprune.pruners.wanda.Wanda ~allocation.threshold ~allocation.strength",
     "allocation._target_=nnprune.pruners.wanda.Wanda: ", "is no Allocation"),
    ("allocation=owl sparsity=1:2", "sparsity=1:2: OWL cannot vary it", "use allocation=uniform or a larger M"),
    ("allocation=owl sparsity=1:5", "sparsity=1:5: ", "choose another N:M"),
    ("allocation=file", "allocation.path=???: ", "add allocation.path="),
    ("allocation=file allocation.path=no.json", "allocation.path=no.json: cannot be read", "give a JSON or YAML file"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "start", "remedy"), BAD_SETTINGS, ids=[row[0] for row in BAD_SETTINGS])
def test_bad_settings(overrides, start, remedy, tiny_config, monkeypatch):
    monkeypatch.setattr(ModelSource, "load", refuse)
    with pytest.raises(ValueError) as caught:
        run(tiny_config(*overrides.split()))
    assert str(caught.value).startswith(start)
    assert remedy in str(caught.value)


def test_a_layer_without_linears_is_refused():
    with pytest.raises(ValueError, match="decoder layer without linears; use allocation=uniform"):
        OWL().check(Unstructured(0.5), [{"a": (2, 2)}, {}])


def test_options_and_the_code_of_an_own_allocation_are_science(tiny_config, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own = ("allocation=owl", "allocation._target_=my_allocation.Mine")
    found = {build(tiny_config()).fingerprint, build(tiny_config("allocation=owl")).fingerprint}
    found.add(build(tiny_config("allocation=owl", "allocation.strength=0.1")).fingerprint)
    for comment in ("one", "two"):
        (tmp_path / "my_allocation.py").write_text(
            f"# {comment}\nfrom nnprune.allocations.owl import OWL\n\n\nclass Mine(OWL):\n    pass\n"
        )
        found.add(build(tiny_config(*own)).fingerprint)
    assert len(found) == 5


def test_wanda_scores_are_those_of_the_survey():
    """Wanda's own score, from the statistic that the survey collects."""
    layer, wanda = dense_layer(a=[[1.0, -2.0]]), Wanda()
    wanda.add_linear_activations("a", torch.tensor([[[1.0, 2.0]]]))
    assert torch.equal(wanda.score(layer.weights["a"], "a"), layer.score("a"))
