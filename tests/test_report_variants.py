"""Runs that differ in a setting: how they are named, set side by side and drawn."""

import csv
import io
import json

import pytest
from support.records import collect, config, write_record

SPARSEGPT = {"_target_": "nnprune.pruners.sparsegpt.SparseGPT"}


def rows_of(folder, *options):
    status, out, err = collect(folder, "--metric", "demo_perplexity", *options)
    assert status == 0, err
    cells = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| **")]
    return {row[0]: row[2:] for row in cells}, err


@pytest.fixture
def dampings(tmp_path):
    """SparseGPT with three dampings, two seeds each, on two patterns; and Wanda, which has none."""
    folder = tmp_path / "o"
    for place, damping in enumerate((0.01, 0.1, 1e-05)):
        for seed in (0, 1):
            for sparsity, shift in (("0.5", 0), ("2:4", 10)):
                settings = config(seed, pruner={**SPARSEGPT, "damping": damping})
                value, name = 20.0 + place + shift + seed / 10, f"{damping}-{seed}-{sparsity[0]}"
                write_record(folder / name, pruner="sparsegpt", sparsity=sparsity, value=value, **settings)
    write_record(folder / "wanda", value=30.0, **config(0, pruner={"_target_": "nnprune.pruners.wanda.Wanda"}))
    return folder


def test_rows_are_in_the_order_of_the_numbers(dampings):
    rows, err = rows_of(dampings, "--sparsities", "0.5")
    assert err == ""
    assert list(rows.items()) == [
        ("Dense", ["15.00"]),
        ("Wanda", ["30.00"]),
        ("SparseGPT (damping=1e-05)", ["22.05 ± 0.07"]),
        ("SparseGPT (damping=0.01)", ["20.05 ± 0.07"]),
        ("SparseGPT (damping=0.1)", ["21.05 ± 0.07"]),
    ]


def test_a_table_by_a_setting(dampings):
    status, out, err = collect(dampings, "--by", "pruner.damping", "--sparsities", "0.5")
    assert status == 0 and err == "warning: --by pruner.damping: not shown are runs without this setting, of wanda\n"
    assert out.splitlines()[:5] == [
        "| Method | Sparsity | damping=1e-05 | damping=0.01 | damping=0.1 |",
        "| :--- | :--- | :--- | :--- | :--- |",
        "| **Dense** | 0% | 15.00 | 15.00 | 15.00 |",
        "| | | | | |",
        "| **SparseGPT** | 50% | 22.05 ± 0.07 | 20.05 ± 0.07 | 21.05 ± 0.07 |",
    ]
    rows = list(csv.DictReader(io.StringIO(collect(dampings, "--by", "pruner.damping", "--format", "csv")[1])))
    assert {row["pruner.damping"] for row in rows} == {"1e-05", "0.01", "0.1", ""}
    assert {row["variant"] for row in rows} == {"damping=1e-05", "damping=0.01", "damping=0.1", ""}


def test_a_plot_by_a_setting(dampings, tmp_path):
    status, out, err = collect(dampings, "--by", "pruner.damping", "--plot", tmp_path / "d.png")
    assert (status, out) == (0, f"{tmp_path / 'd.png'}: demo_perplexity by pruner.damping\n") and "of wanda" in err
    status, _, err = collect(dampings, "--by", "pruner._target_", "--plot", tmp_path / "d.png")
    assert status == 2 and "is no number; make a table of it" in err


def test_names_are_short_where_they_can_be(tmp_path):
    settings = [
        {"pruner": {**SPARSEGPT, "damping": 0.1}, "target": {"damping": 0.1}},
        {"pruner": {**SPARSEGPT, "damping": 0.2}, "target": {"damping": 0.1}},
        {"pruner": {**SPARSEGPT, "damping": 0.2}, "target": {"damping": 0.3}},
    ]
    for number, one in enumerate(settings):
        write_record(tmp_path / "o" / f"{number}", pruner="sparsegpt", value=20.0 + number, **config(0, **one))
    assert list(rows_of(tmp_path / "o")[0])[1:] == [
        "SparseGPT (pruner.damping=0.1, target.damping=0.1)",
        "SparseGPT (pruner.damping=0.2, target.damping=0.1)",
        "SparseGPT (pruner.damping=0.2, target.damping=0.3)",
    ]


def test_a_class_stands_for_the_options_that_only_it_has(tmp_path):
    updates = [{"_target_": "nnprune.updates.Update"}, {"_target_": "nnprune.updates.Refit", "tolerance": 0.1}]
    for number, update in enumerate(updates):
        write_record(tmp_path / "o" / f"{number}", value=20.0 + number, **config(0, update=update))
    assert list(rows_of(tmp_path / "o")[0])[1:] == ["Wanda (update=Refit)", "Wanda (update=Update)"]


def test_what_differs_between_models_or_labels_only_is_in_no_name(tmp_path):
    write_record(tmp_path / "o" / "a", **config(0, propagate="pruned"))
    write_record(tmp_path / "o" / "b", model="opt-125m", **config(0, propagate="dense"))
    write_record(tmp_path / "o" / "c", pruner="mine", value=22.0, **config(0, propagate="dense"))
    assert list(rows_of(tmp_path / "o")[0]) == ["Dense", "Wanda", "mine"]


def test_hostile_settings_and_labels_do_not_merge(tmp_path):
    write_record(tmp_path / "o" / "a", value=20.0, **config(0, pruner={"alpha": "|x\n"}))
    write_record(tmp_path / "o" / "b", value=21.0, **config(0, pruner={"alpha": 1}))
    write_record(tmp_path / "o" / "c", pruner="wanda (alpha=1)", value=22.0, **config(0))
    write_record(tmp_path / "o" / "d", pruner="Wanda (alpha=1)", value=23.0, **config(0))
    rows = json.loads(collect(tmp_path / "o", "--format", "json")[1])
    assert sorted(row["variant"] for row in rows) == ["", "", "alpha=1", "alpha=|x\n"]
    table = collect(tmp_path / "o", "--metric", "demo_perplexity")[1]
    names = [line.split("** | ")[0] for line in table.splitlines() if "50%" in line]
    assert len(names) == len(set(names)) == 4 and r"| **Wanda (alpha=\|x )" in names


def test_a_hash_that_is_new_each_time_makes_no_row(tmp_path):
    for number in range(2):
        write_record(tmp_path / "o" / f"{number}", value=20.0 + number, **config(0, pruner={"state_hash": f"{number}"}))
    rows, err = rows_of(tmp_path / "o")
    assert list(rows) == ["Dense", "Wanda"] and "2 experiments compete" in err


def test_relative_to_a_pruner_with_variants_takes_the_newest(dampings):
    status, out, err = collect(dampings, "--layout", "methods", "--relative", "sparsegpt", "--sparsities", "0.5")
    assert (status, err) == (0, "")
    assert "| **SparseGPT (damping=1e-05)** | 1.00 ± 0.00 |" in out


def test_relative_to_a_pruner_with_variants_takes_the_one_with_all_seeds(tmp_path):
    folder = tmp_path / "o"
    for seed in range(2):
        write_record(folder / f"s{seed}", pruner="sparsegpt", value=30.0, **config(seed, pruner={"damping": 0.01}))
        write_record(folder / f"w{seed}", value=60.0, **config(seed))
    later = {"finished": "2026-11-21T21:00:00+00:00"}
    write_record(folder / "other", pruner="sparsegpt", value=20.0, **config(0, pruner={"damping": 0.1}), **later)
    out = collect(folder, "--layout", "methods", "--relative", "sparsegpt")[1]
    assert (
        "| **SparseGPT (damping=0.01)** | **1.00 ± 0.00** |" in out or "| **SparseGPT (damping=0.01)** | 1.00 ± 0.00 |" in out
    )
    assert "| **Wanda** | 2.00 ± 0.00 |" in out


def test_linears_that_are_left_out_and_plans_are_named(tmp_path):
    write_record(tmp_path / "o" / "a", pruner="sparsegpt", **config(0, prune={"include": "*.fc*", "exclude": None}))
    for number, pattern in enumerate(("2:4", "4:8")):
        plan = {"_target_": "nnprune.allocations.by_name.ByName", "patterns": {"*.fc1": pattern}}
        write_record(tmp_path / "o" / f"{number}", sparsity="dense", value=20.0 + number, **config(0, allocation=plan))
    rows, err = rows_of(tmp_path / "o")
    assert "SparseGPT (include=*.fc*)" in {name.replace("\\", "") for name in rows} and err == ""
    assert len(rows) == 4, "dense, one for each plan, and that with include"


def test_a_setting_that_an_earlier_record_lacks_makes_no_row_unless_it_changed_something(tmp_path):
    calibration = {"_target_": "nnprune.calibration.TextCalibration", "num_samples": 8}
    earlier = config(0, calibration=calibration, update={"_target_": "nnprune.updates.Update"})
    write_record(tmp_path / "o" / "a", value=20.0, finished="2026-11-20T20:00:00+00:00", **earlier)
    auto = {"_target_": "nnprune.updates.Update", "bias": "auto"}
    later = config(0, calibration={**calibration, "min_tokens_per_expert": 256, "route": "own"}, update=auto)
    write_record(tmp_path / "o" / "b", value=21.0, **later)
    assert rows_of(tmp_path / "o")[0]["Wanda"] == ["21.00"]
    linears = [{"name": "fc1", "bias_change": 0.5}, {"name": "fc2"}]
    write_record(tmp_path / "o" / "c", value=22.0, per_linear=linears, **later)
    rows = rows_of(tmp_path / "o")[0]
    assert rows["Wanda (bias=true)"] == ["22.00"] and rows["Wanda (bias=false)"] == ["21.00"]
    write_record(tmp_path / "o" / "d", value=23.0, **config(0, calibration={**calibration, "route": "all"}, update=auto))
    assert {"Wanda (route=all, bias=false)", "Wanda (route=own, bias=true)"} < set(rows_of(tmp_path / "o")[0])


LONG = "a_rather_long_folder_name_for_calibration_texts"


@pytest.mark.parametrize(
    ("group", "values", "shown"),
    [
        ("pruner._target_", ("my_v1.MyPruner", "my_v2.MyPruner"), ("pruner=my_v1.MyPruner", "pruner=my_v2.MyPruner")),
        (
            "calibration.path",
            (f"{LONG}/one.txt", f"{LONG}/two.txt"),
            ("path=...er_name_for_calibration_texts/one.txt", "path=...er_name_for_calibration_texts/two.txt"),
        ),
        ("pruner.files", (f"{LONG}/1/{LONG}", f"{LONG}/2/{LONG}"), (f"files={LONG}/1/{LONG}", f"files={LONG}/2/{LONG}")),
        ("pruner.alpha", ("1", 1), ('alpha="1"', "alpha=1")),
    ],
)
def test_values_that_look_alike_when_they_are_short_are_told_apart(tmp_path, group, values, shown):
    name, key = group.split(".")
    for number, value in enumerate(values):
        write_record(tmp_path / "o" / f"{number}", value=20.0 + number, **config(0, **{name: {key: value}}))
    rows, err = rows_of(tmp_path / "o")
    names = [row.replace("\\", "") for row in list(rows)[1:]]
    assert err == "" and set(names) == {f"Wanda ({one})" for one in shown}
    status, out, _ = collect(tmp_path / "o", "--metric", "demo_perplexity", "--by", group)
    assert status == 0 and len(out.splitlines()[0].split(" | ")) == 2 + len(values)
    lines = list(csv.DictReader(io.StringIO(collect(tmp_path / "o", "--by", group, "--format", "csv")[1])))
    assert group.endswith("alpha") or {line[group] for line in lines} == set(values), "whole, for programs"


def test_text_with_what_stands_between_settings_does_not_look_like_two(tmp_path):
    for number, pruner in enumerate(({"a": "1, b=2"}, {"a": 1, "b": 2})):
        write_record(tmp_path / "o" / f"{number}", value=20.0 + number, **config(0, pruner=pruner))
    assert set(rows_of(tmp_path / "o")[0]) == {"Dense", 'Wanda (a="1, b=2")', "Wanda (a=1, b=2)"}


def test_a_column_of_different_models_is_named(tmp_path):
    for pruner, model_hash in (("wanda", "a"), ("ria", "b"), ("magnitude", None)):
        write_record(tmp_path / "o" / pruner, model="hf", pruner=pruner, model_hash=model_hash)
    _, err = rows_of(tmp_path / "o")
    line = "hf: the records are of 2 different models of this name, so they do not compare; tell them apart with model.name"
    assert err == f"warning: {line}\n"
    assert rows_of(tmp_path / "o", "--pruners", "wanda,magnitude")[1] == ""
