"""Which linears are pruned (`prune.include`, `prune.exclude`), and patterns by name: what is chosen, and that the rest stays as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine import IDS, Witness, engine_of, prune
from support.families import FAMILIES
from support.presets import MEASURED
from support.runs import BRIEF, patterns_of, refuse, stripped

from nnprune import check
from nnprune.allocations.base import mean
from nnprune.allocations.by_name import ByName
from nnprune.allocations.selection import Selection
from nnprune.experiment.build import build
from nnprune.model.loading import ModelSource
from nnprune.patterns import NM, Unstructured, parse_pattern
from nnprune.records import read
from nnprune.run import run, run_grid, show_estimate

LAYER = "model.decoder.layers."
SHORT = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2")
SIZES = {**dict.fromkeys(SHORT[:4], (32, 32)), "fc1": (64, 32), "fc2": (32, 64)}
SHAPES = [{f"{LAYER}{index}.{name}": shape for name, shape in SIZES.items()} for index in range(2)]
NAMES = [name for layer in SHAPES for name in layer]


def chosen(**settings):
    return {name for layer in Selection(**settings).cut(SHAPES) for name in layer}


def test_names_globs_and_regular_expressions():
    assert chosen() == set(NAMES)
    assert chosen(include="*.fc?") == {f"{LAYER}{index}.fc{number}" for index in (0, 1) for number in (1, 2)}
    assert chosen(include=[f"{LAYER}0.fc1", "*.1.*.q_proj"]) == {f"{LAYER}0.fc1", f"{LAYER}1.self_attn.q_proj"}
    assert chosen(include=r"re:.*\.(q|k)_proj", exclude=f"{LAYER}0.*") == {f"{LAYER}1.self_attn.{one}_proj" for one in "qk"}
    assert chosen(exclude=["*.self_attn.*", "*.1.fc[12]"]) == {f"{LAYER}0.fc1", f"{LAYER}0.fc2"}
    experts = [{f"model.layers.0.mlp.experts.{number}.up_proj": (4, 4) for number in range(12)}]
    assert list(Selection(include="*.experts.1.*").cut(experts)[0]) == ["model.layers.0.mlp.experts.1.up_proj"]


BAD = [
    (
        {"include": "*.mlp.*"},
        "prune.include=*.mlp.*: fits no linear of the model; there are model.decoder.layers.0.self_attn.k",
    ),
    (
        {"exclude": ["*.fc1", "fc2"]},
        "prune.exclude=fc2: fits no linear of the model; there are model.decoder.layers.0.self_attn.k",
    ),
    ({"include": "re:.*fc"}, "prune.include=re:.*fc: fits no linear"),
    ({"include": "re:(a"}, "prune.include=re:(a: is no regular expression"),
    ({"include": "*.fc1", "exclude": "*.fc*"}, "prune.exclude=['*.fc*']: leaves no linear to prune"),
    ({"include": []}, "prune.include=[]: must be names, globs"),
    ({"include": ""}, "prune.include=: must be names, globs"),
    ({"exclude": [3]}, "prune.exclude=[3]: must be names, globs"),
    ({"exclude": True}, "prune.exclude=True: must be names, globs"),
]


@pytest.mark.parametrize(("settings", "start"), BAD, ids=lambda row: str(row))
def test_bad_patterns(settings, start):
    with pytest.raises(ValueError) as caught:
        chosen(**settings)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_a_pattern_without_a_linear_is_told_before_weights_are_read(tiny_config, monkeypatch):
    monkeypatch.setattr(ModelSource, "checkpoint", refuse)
    for command in (run, lambda cfg: show_estimate([cfg])):
        with pytest.raises(ValueError, match=r"^prune\.include=\*\.fc3: fits no linear"):
            command(tiny_config("prune.include=*.fc3"))
    with pytest.raises(ValueError, match=r"^prune\.inclde=a: no such setting; did you mean include or exclude\?"):
        run(tiny_config("+prune.inclde=a"))
    with pytest.raises(ValueError, match=r"^prune=\*\.fc1: must be prune\.include="):
        run(tiny_config("prune=*.fc1"))


def test_only_what_is_set_is_part_of_a_run(tiny_config):
    plain = build(tiny_config())
    assert "prune" not in plain.config  # as in the records from before there was such a setting
    one, same = (build(tiny_config(f"prune.include={value}")) for value in ("*.fc1", "[*.fc1]"))
    assert one.config["prune"] == {"include": ["*.fc1"]}
    others = [build(tiny_config(*more)) for more in (["prune.exclude=*.fc1"], ["prune.include=[*.fc1,*.fc2]"])]
    assert one.fingerprint == same.fingerprint
    assert len({plain.fingerprint, one.fingerprint, *(other.fingerprint for other in others)}) == 4


MODES = [
    ("pruner=wanda", "propagate=dense"),
    ("pruner=sparsegpt", "runtime=low_memory"),
    ("pruner=sparsegpt", "propagate=sequential", "target=asymmetric", "update=refit"),
    ("pruner=wanda", "recover=next_layer", "recover.epochs_before=1", "target=asymmetric"),
    ("pruner=magnitude", "propagate=sequential", "recover=layer", "recover.epochs_after=1"),
]


@pytest.mark.parametrize("mode", MODES, ids=" ".join)
def test_the_rest_is_as_a_plan_that_leaves_it_dense(mode, tiny_config, tiny_model_dir):
    """And bit for bit as it was, unless it is tuned."""
    left = ("*.fc*",) if "propagate=dense" in mode else ("*.0.*", "*.v_proj")
    common = (*mode, "save=true", "evaluation.max_windows=2")
    part = run(tiny_config("sparsity=2:4", f"prune.exclude=[{','.join(left)}]", *common))
    dense_entries = ", ".join(f"{one}: dense" for one in left)
    whole = run(tiny_config("sparsity=2:4", "allocation=by_name", f"allocation.patterns={{{dense_entries}}}", *common))
    names = [linear["name"] for linear in part.per_linear]
    assert set(names) == chosen(exclude=list(left))
    assert set(patterns_of(part).values()) == {NM(2, 4)}
    assert part.linear_sparsity == 0.5
    assert part.metrics == whole.metrics
    assert part.model_sparsity == whole.model_sparsity < 0.5
    assert stripped(part.per_linear) == [one for one in stripped(whole.per_linear) if one["name"] in names]
    assert part.selection["linears"] == len(names) < part.selection["all_linears"] == 12
    assert part.selection["exclude"] == {one: len(chosen(include=one)) for one in left}
    [base], [saved], [other] = (
        list(Path(folder).glob("*.safetensors")) for folder in (tiny_model_dir, *folders(part, whole, tiny_config))
    )
    before, after, same = load_file(base), load_file(saved), load_file(other)
    for key, tensor in after.items():
        assert torch.equal(tensor, same[key]), key
        if key.removesuffix(".weight").removesuffix(".bias") not in names and "recover" not in " ".join(mode):
            assert torch.equal(tensor, before[key]), key


def folders(*records_and_config):
    *records, tiny_config = records_and_config
    root = Path(tiny_config().outputs)
    return [path.parent for record in records for path in root.glob(f"*/*/*-{record.fingerprint}/model/config.json")]


def test_nothing_is_collected_for_the_rest(tmp_path):
    all_of_it, some, names = Witness(), Witness(), set()
    for witness in (all_of_it, some):
        engine = engine_of(FAMILIES["llama"](), tmp_path / str(len(names)))
        names = names or {name for name in engine.decoder.shapes() if ".1." not in name and "mlp" not in name}
        if witness is some:
            engine.decoder.keep(names)
        prune(engine, witness, dict.fromkeys(engine.decoder.shapes(), Unstructured(0.0001)), IDS, "dense")
    assert set(some.seen) == names < set(all_of_it.seen)
    for name, hessian in some.seen.items():
        torch.testing.assert_close(hessian, all_of_it.seen[name])


@pytest.mark.parametrize("name", MEASURED)
def test_allocations_share_out_among_the_chosen(name, tiny_config):
    settings = ("pruner=wanda", "sparsity=0.6", f"allocation={name}", "evaluation.max_windows=1")
    record = run(tiny_config(*settings, "prune.include=*.fc*"))
    plan = patterns_of(record)
    assert set(plan) == chosen(include="*.fc*")
    assert len(set(plan.values())) == 2
    assert mean([float(one.sparsity) for one in plan.values()], [2048] * 4) == pytest.approx(0.6, abs=1e-11)


def test_an_importance_pass_goes_through_layers_without_any(tiny_config):
    plan = patterns_of(run(tiny_config("pruner=wanda", "sparsity=0.6", "allocation=owl", "prune.exclude=*.0.*")))
    assert set(plan) == chosen(exclude="*.0.*")
    assert set(plan.values()) == {Unstructured(0.6)}


def test_a_grid_and_the_record_of_the_dense_model(tiny_config, tmp_path):
    def configs(*more):
        return [tiny_config(f"pruner={one}", "propagate=dense", "prune.exclude=*.0.*", *more) for one in ("wanda", "magnitude")]

    separate = [run(cfg) for cfg in configs(f"outputs={tmp_path / 'separate'}")]
    for one, other in zip(separate, run_grid(configs()), strict=True):
        assert [stripped(one.per_linear), one.metrics, one.selection] == [
            stripped(other.per_linear),
            other.metrics,
            other.selection,
        ]
    [path] = tmp_path.glob("outputs/tiny-opt/dense/*/result.json")
    assert read(path.parent).linear_sparsity == read(next(tmp_path.glob("separate/tiny-opt/dense/*"))).linear_sparsity == 0


def test_check_knows_what_was_left_alone(tiny_config, capsys):
    record = run(tiny_config("sparsity=2:4", "prune.include=*.fc1", "save=true", *BRIEF))
    [model] = folders(record, tiny_config)
    assert check.main([str(model)]) == 0
    assert "2 of 12 linears have 2:4" in capsys.readouterr().out
    assert "the 2 of 12 linears that were pruned: 50.0000%" in (model / "README.md").read_text()
    state = load_file(model / "model.safetensors")
    state[f"{LAYER}0.fc2.weight"][0, 0] += 1
    save_file(state, model / "model.safetensors", {"format": "pt"})
    assert check.main([str(model)]) == 1
    assert f"{LAYER}0.fc2.weight differs from the base model's" in capsys.readouterr().out


def test_the_first_key_that_fits_counts(tiny_config, tmp_path):
    patterns = {"1": "dense", "re:.*[kq]_proj": "1:4", "*_proj": 0.5, f"{LAYER}0.fc1": "0.25"}
    plan = ByName(patterns).plan(NM(2, 4), SHAPES)
    wanted = {"k_proj": "1:4", "q_proj": "1:4", "v_proj": "0.5", "out_proj": "0.5", "fc1": "0.25", "fc2": "2:4"}
    assert plan == {name: parse_pattern("dense" if ".1." in name else wanted[name.split(".")[-1]]) for name in NAMES}
    (tmp_path / "plan.yaml").write_text('"*.fc1": "2:4"\n1: 0.25\n')
    more = ("allocation=by_name", "sparsity=dense", *BRIEF)
    cfg = tiny_config(*more, f"allocation.path={tmp_path / 'plan.yaml'}")
    record = run(cfg)
    assert record.sparsity == "dense"
    assert patterns_of(record)[f"{LAYER}1.fc1"] == NM(2, 4)
    assert patterns_of(record)[f"{LAYER}1.fc2"] == Unstructured(0.25)
    assert not patterns_of(record)[f"{LAYER}0.fc2"].sparsity
    typed = tiny_config(*more, 'allocation.patterns={*.fc1: "2:4", 1: 0.25}')
    turned = tiny_config(*more, 'allocation.patterns={1: 0.25, *.fc1: "2:4"}')
    assert build(typed).fingerprint == record.fingerprint != build(turned).fingerprint


BAD_PATTERNS = [
    ({}, "0.5", "allocation.path=None: give either patterns"),
    ({"patterns": {"*": 0.5}, "path": "x.yaml"}, "0.5", "allocation.patterns={'*': 0.5}: give either patterns"),
    (
        {"patterns": {"*": 0.5, "*.fc1": 0.6}},
        "0.5",
        "*.fc1 decides nothing: it fits no linear of the model, or earlier keys fit all",
    ),
    ({"patterns": {"*.mlp": 0.5}}, "0.5", "*.mlp decides nothing"),
    ({"patterns": {"*.fc1": 124}}, "0.5", "*.fc1: sparsity=124"),
    ({"patterns": {"*.fc1": "1:5"}}, "0.5", "1:5 for model.decoder.layers.0.fc1, which has 32 inputs"),
    ({"patterns": {"*.fc1": 0.5}}, "1:5", "sparsity=1:5: model.decoder.layers.0.self_attn.k_proj has 32 inputs"),
    ({"patterns": {"re:[": 0.5}}, "0.5", "is no regular expression"),
    ({"patterns": [0.5]}, "0.5", "tells of no linear"),
    ({"path": "no.yaml"}, "0.5", "allocation.path=no.yaml: cannot be read"),
]


@pytest.mark.parametrize(("settings", "sparsity", "problem"), BAD_PATTERNS, ids=lambda row: str(row))
def test_bad_patterns_by_name(settings, sparsity, problem):
    with pytest.raises(ValueError) as caught:
        ByName(**settings).check(parse_pattern(sparsity), SHAPES)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_decides_every_linear_need_not_fit_the_default():
    assert ByName({"*": 0.5}).check(NM(1, 5), SHAPES) == {Unstructured(0.5)}


def test_all_dense_is_the_dense_model(tiny_config):
    cfg = tiny_config("allocation=by_name", "allocation.patterns={*.fc1: dense}", "sparsity=dense")
    assert build(cfg).fingerprint == build(tiny_config("sparsity=dense")).fingerprint


def test_a_resumed_run_leaves_the_same_alone(tiny_config, tmp_path, monkeypatch):
    whole = run(tiny_config("pruner=sparsegpt", "prune.exclude=*.0.*", f"outputs={tmp_path / 'whole'}"))
    cfg = tiny_config("pruner=sparsegpt", "prune.exclude=*.0.*", "runtime.resume=true")
    with monkeypatch.context() as patch:
        patch.setattr("nnprune.experiment.job.fractions_of_zeros", refuse)
        with pytest.raises(AssertionError):
            run(cfg)
    report = json.loads((build(cfg).folder / "unfinished" / "layer-0000.json").read_text())
    assert report["content"]["report"]["linears"] == []
    resumed = run(cfg)
    assert resumed.metrics == whole.metrics
    assert stripped(resumed.per_linear) == stripped(whole.per_linear)
