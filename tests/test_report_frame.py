"""Which records the collector uses, which of them it shows, and what it says of the others."""

import json
import re
from pathlib import Path

import pytest
from support.records import collect, config, demo_table, write_record, write_runs

from nnprune import records
from nnprune.report import frame as frame_module


def test_seeds_of_one_experiment_are_one_cell(tmp_path):
    folder = tmp_path / "o"
    for seed, value in enumerate((46.4, 46.8, 47.2)):  # how it was run does not count
        write_record(folder / f"s{seed}", value=value, **config(seed, runtime={"device": f"cuda:{seed}"}, outputs=f"o{seed}"))
    for seed, value in enumerate((46.81, 46.79)):
        write_record(folder / f"m{seed}", pruner="magnitude", value=value, **config(seed))
    write_record(folder / "one", pruner="sparsegpt", value=46.82, **config(0))
    status, out, err = collect(folder, "--metric", "demo_perplexity")
    assert (status, err) == (0, "")
    assert "| **Magnitude** | 50% | **46.80 ± 0.01** |" in out  # a tie: means are the same to two decimals
    assert "| **Wanda** | 50% | **46.8 ± 0.4** |" in out
    assert "| **SparseGPT** | 50% | 46.82 |" in out
    assert "demo_perplexity: 6 record(s) used" in out
    latex = collect(folder, "--metric", "demo_perplexity", "--format", "latex")[1]
    assert r"& \textbf{46.8 $\pm$ 0.4} \\" in latex
    objects = json.loads(collect(folder, "--format", "json")[1])
    wanda = [item for item in objects if item["pruner"] == "wanda"]
    assert [(item["seed"], item["num_seeds"], item["value"]) for item in wanda] == [
        ("0", 3, 46.4),
        ("1", 3, 46.8),
        ("2", 3, 47.2),
    ]
    assert {round(item["mean"], 9) for item in wanda} == {46.8} and {round(item["std"], 9) for item in wanda} == {0.4}
    [single] = [item for item in objects if item["pruner"] == "sparsegpt"]
    assert (single["num_seeds"], single["mean"], single["std"]) == (1, 46.82, None)


def test_the_newest_record_of_a_seed_counts(tmp_path):
    folder, times = tmp_path / "o", [f"2026-11-21T20:0{i}:00+00:00" for i in range(3)]
    write_record(folder / "a", value=10.0, finished=times[0], **config(0))
    write_record(folder / "b", value=20.0, finished=times[1], **config(1))
    write_record(folder / "c", value=30.0, finished=times[2], fingerprint="cccccccccccc", **config(0))
    _, out, err = collect(folder, "--metric", "demo_perplexity")
    assert "| **Wanda** | 50% | 25.0 ± 7.1 |" in out
    # One config and seed, but another fingerprint: something that no config shows has changed.
    assert "2 experiments compete (000000000000, cccccccccccc); shown is the newest, cccccccccccc (2 seeds)" in err


@pytest.mark.parametrize(
    "what", [{"dtype": "float32"}, {"model_hash": "b"}, {"commits": {"model": "b"}}, {"seedless_fingerprint": "b"}]
)
def test_seeds_of_other_things_are_not_averaged(what, tmp_path):
    folder = tmp_path / "o"
    same = {"dtype": "bfloat16", "model_hash": "a", "commits": {"model": "a"}, "seedless_fingerprint": "a"}
    for seed, value in enumerate((10.0, 20.0)):
        write_record(folder / f"{seed}", value=value, **same, **config(seed))
    write_record(folder / "2", value=60.0, finished="2026-11-21T19:00:00+00:00", **(same | what), **config(2))
    _, out, err = collect(folder, "--metric", "demo_perplexity")
    assert "| **Wanda** | 50% | 15.0 ± 7.1 |" in out and "2 experiments compete" in err


def test_seeds_that_other_code_of_nnprune_pruned_are_named(tmp_path):
    for seed, code in enumerate(({}, {"engine/a.py": "1", "updates.py": "1"}, {"engine/a.py": "2", "updates.py": "1"})):
        write_record(tmp_path / "o" / f"{seed}", value=20.0 + seed, code=code, **config(seed))
    err = collect(tmp_path / "o", "--metric", "demo_perplexity")[2]
    line = "demo / wanda / 0.5: other code of nnprune pruned some of its seeds (engine/a.py), so they may not compare"
    assert err == f"warning: {line}\n"


def measured(value, dense, windows):
    """A record's fields, of an evaluation of so many windows."""
    metrics = {"metrics": {"demo_perplexity": value}, "dense_metrics": {"demo_perplexity": dense}}
    entry = {"name": "demo", "settings": {"max_windows": windows}, "tokens": f"{windows}", "finished": None, **metrics}
    return {"value": value, "dense": dense, "evaluations": {f"{windows}": entry}}


def test_the_dense_figure_is_of_the_evaluation_of_the_runs_shown(tmp_path):
    folder = tmp_path / "o"
    write_record(folder / "w", **measured(20.0, 15.0, 64), **config(0))
    later = {"finished": "2026-11-21T21:00:00+00:00"}
    write_record(folder / "r", pruner="ria", **measured(18.0, 14.0, 8), **config(0), **later)
    write_record(folder / "d", pruner="dense", sparsity="dense", **measured(14.0, 14.0, 8), **config(0), **later)
    _, out, err = collect(folder, "--metric", "demo_perplexity", "--pruners", "wanda")
    assert "| **Dense** | 0% | 15.00 |" in out and err == ""
    _, out, err = collect(folder, "--metric", "demo_perplexity", "--pruners", "ria")
    assert "| **Dense** | 0% | 14.00 |" in out and err == ""
    assert "different settings of the evaluation" in collect(folder, "--metric", "demo_perplexity")[2]


def test_the_dense_figure_is_of_the_dtype_of_the_runs_shown(tmp_path):
    folder, later = tmp_path / "o", {"finished": "2026-11-21T21:00:00+00:00"}
    write_record(folder / "w", **measured(20.0, 15.0, 64), **config(0), dtype="bfloat16")
    write_record(
        folder / "d", pruner="dense", sparsity="dense", **measured(14.9, 14.9, 64), **config(0), dtype="float16", **later
    )
    assert "| **Dense** | 0% | 15.00 |" in collect(folder, "--metric", "demo_perplexity")[1]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (config(2, pruner={"alpha": 0.7}), "alpha=0.7"),
        ({"config": {**config(2)["config"], "calibration": {"num_samples": 16, "seed": 2}}}, "num_samples=16"),
    ],
)
def test_what_differs_in_a_setting_is_a_row_of_its_own(tmp_path, other, name):
    folder = tmp_path / "o"
    for seed in (0, 1):
        write_record(folder / f"s{seed}", value=20.0 + seed, **config(seed))
    write_record(folder / "other", value=99.0, **other)
    for age in ("2026-11-21T19:00:00+00:00", "2026-11-21T21:00:00+00:00"):  # whichever is newer
        write_record(folder / "other", value=99.0, finished=age, **other)
        status, out, err = collect(folder, "--metric", "demo_perplexity")
        assert (status, err) == (0, "")
        rows = dict(re.findall(r"\| \*\*(Wanda.*?)\*\* \| 50% \| (.*?) \|", out))
        plain = "Wanda (num_samples=8)" if "samples" in name else "Wanda"  # it has no alpha at all
        assert rows == {plain: "**20.5 ± 0.7**", f"Wanda ({name})": "99.00"}


def test_what_differs_in_its_evaluation_competes_and_is_not_averaged(tmp_path):
    folder, other = tmp_path / "o", {**config(2), "evaluation_hashes": {"demo": "feedfeedfeedfeed"}}
    for seed in (0, 1):
        write_record(folder / f"s{seed}", value=20.0 + seed, finished="2026-11-21T20:01:00+00:00", **config(seed))
    write_record(folder / "other", value=99.0, finished="2026-11-21T20:00:00+00:00", **other)
    _, out, err = collect(folder, "--metric", "demo_perplexity")
    assert "| **Wanda** | 50% | 20.5 ± 0.7 |" in out and "2 experiments compete" in err
    write_record(folder / "other", value=99.0, finished="2026-11-21T20:02:00+00:00", **other)
    assert "| **Wanda** | 50% | 99.00 |" in collect(folder, "--metric", "demo_perplexity")[1]


def test_a_seed_without_a_figure_is_not_left_out_of_the_mean(tmp_path):
    for seed, value in enumerate((20.0, "nan", 21.0)):
        write_record(tmp_path / "o" / f"s{seed}", value=value, **config(seed))
    assert "| **Wanda** | 50% | -- |" in collect(tmp_path / "o", "--metric", "demo_perplexity")[1]


def evaluated(**settings):
    """The evaluations of a record whose figures are those of `settings`."""
    entry = {"name": "demo", "settings": settings, "metrics": {"demo_perplexity": 20.0}, "dense_metrics": {}}
    return {"evaluations": {"0" * 12: entry}}


def test_figures_of_other_settings_of_the_evaluation_are_named(tmp_path):
    write_record(tmp_path / "o" / "a", value=20.0, **evaluated(seq_len=64))
    write_record(tmp_path / "o" / "b", pruner="ria", value=20.0, **evaluated(seq_len=64))
    assert not collect(tmp_path / "o", "--metric", "demo_perplexity")[2]
    write_record(tmp_path / "o" / "c", pruner="magnitude", value=30.0, **evaluated(seq_len=32))
    err = collect(tmp_path / "o", "--metric", "demo_perplexity")[2]
    assert "demo: records measured demo_perplexity with different settings of the evaluation, so they do not compare" in err


def test_nothing_is_relative_to_a_method_that_beats_the_dense_model(tmp_path):
    write_record(tmp_path / "o" / "a", pruner="sparsegpt", value=14.0, dense=15.0)
    write_record(tmp_path / "o" / "b", value=20.0, dense=15.0)
    out = collect(tmp_path / "o", "--layout", "methods", "--models", "demo", "--relative", "sparsegpt")[1]
    assert "| **SparseGPT** | -- |" in out and "| **Wanda** | -- |" in out


def test_methods_calibrated_on_other_tokens_than_the_one_they_are_relative_to_are_named(tmp_path):
    relative = ["--layout", "methods", "--models", "demo", "--relative", "sparsegpt"]
    for pruner, tokens in (("sparsegpt", "a"), ("wanda", "a"), ("magnitude", None)):
        write_record(tmp_path / "o" / pruner, pruner=pruner, value=20.0, calibration_hash=tokens)
    assert "calibrated" not in collect(tmp_path / "o", *relative)[2]
    write_record(tmp_path / "o" / "ria", pruner="ria", value=20.0, calibration_hash="b")
    err = collect(tmp_path / "o", *relative)[2]
    assert err.count("calibrated") == 1
    assert "demo / ria / 0.5: calibrated on other tokens than sparsegpt, so they do not compare" in err


def test_dense_comes_from_pruned_runs_too_and_disagreement_is_named(tmp_path):
    write_record(tmp_path / "o" / "a", value=20.0, dense=15.0)
    assert "| **Dense** | 0% | 15.00 |" in collect(tmp_path / "o", "--metric", "demo_perplexity")[1]
    write_record(tmp_path / "o" / "b", pruner="magnitude", value=30.0, dense=18.0)
    status, _, err = collect(tmp_path / "o", "--metric", "demo_perplexity")
    assert status == 0 and "demo: records disagree on dense demo_perplexity (15.00 to 18.00)" in err


def test_settings_in_which_seeds_may_differ_are_those_that_no_fingerprint_has():
    assert set(frame_module.SAME_EXPERIMENT) == {*records.NOT_SCIENCE, "seed"}


def test_experiments_that_compete_for_a_cell_are_named(tmp_path):
    runs = write_runs(tmp_path / "o")
    write_record(runs / "b", value=3.0, finished="2026-11-21T21:00:00+00:00", fingerprint="aaaaaaaaaaaa")
    write_record(runs / "c", value=4.0, finished="2026-11-21T22:30:00+02:00", fingerprint="cccccccccccc")  # 20:30 UTC: older
    table, err = demo_table(runs)
    assert "| **Wanda** | 50% | 3.00 |" in table and err.count("\n") == 1
    assert re.search(r"demo / wanda / 0.5: 2 experiments compete .*newest, aaaaaaaaaaaa: .*b.result.json", err)


SAME = {"fingerprint": "aaaaaaaaaaaa"}
LATER = {**SAME, "finished": "2026-11-21T21:00:00+00:00"}


@pytest.mark.parametrize("change", [{"model": "other"}, {"pruner": "mine"}, {"model": "other", "pruner": "a\nb"}])
def test_one_run_under_two_names_is_shown_under_the_newer_and_said(tmp_path, change):
    write_record(tmp_path / "o" / "old", **SAME, **change)
    write_record(tmp_path / "o" / "new", **LATER)
    table, err = demo_table(tmp_path / "o")
    assert "| Method | Sparsity | demo |" in table and table.count("21.98") == 1
    names = f"{change.get('model', 'demo')} / {change.get('pruner', 'wanda')} / 0.5".replace("\n", " ")
    old, new = (tmp_path / "o" / name / "result.json" for name in ("old", "new"))
    assert err == (
        f"warning: {old}: not shown; {names} is the same run (fingerprint aaaaaaaaaaaa) as demo / wanda / 0.5, "
        f"which is shown: {new}\n"
    )


def test_one_run_made_twice_is_said_only_where_its_figures_differ(tmp_path):
    write_record(tmp_path / "o" / "copy", **SAME)
    write_record(tmp_path / "o" / "new", **LATER)
    assert demo_table(tmp_path / "o")[1] == ""
    write_record(tmp_path / "o" / "copy", value=22.5, **SAME)
    table, err = demo_table(tmp_path / "o")
    assert "21.98" in table and "22.5" not in table and err.count("\n") == 1
    assert re.search(r"copy/result.json: not shown; demo / wanda / 0.5 has a newer record .*new/result.json", err)


def test_a_pruned_run_labelled_dense_is_not_the_dense_model(tmp_path):
    write_record(tmp_path / "o" / "a", pruner="dense", value=30.0)
    table, err = demo_table(tmp_path / "o")
    assert table.splitlines()[2:] == ["| **Dense** | 0% | 15.00 |", "| | | |", "| **dense** | 50% | 30.00 |"] and err == ""


def test_links_are_followed_and_read_once(tmp_path):
    folder, elsewhere = tmp_path / "o", tmp_path / "elsewhere"
    write_record(elsewhere / "a", value=11.0)
    write_record(folder / "b", pruner="ria", value=12.0, fingerprint="bbbbbbbbbbbb")
    (folder / "disk").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "b")
    (folder / "b" / "loop").symlink_to(folder)
    for name, target in {"file": folder / "b" / "result.json", "dangling": tmp_path / "nothing", "device": "/dev/zero"}.items():
        (folder / name).mkdir()
        (folder / name / "result.json").symlink_to(target)
    table, err = demo_table(folder)
    assert "| **Wanda** | 50% | **11.00** |" in table and "| **RIA** | 50% | 12.00 |" in table
    assert sorted(line.removeprefix(f"warning: {folder}/") for line in err.splitlines()) == [
        f"again: skipped, is the same folder as {folder}/b",
        f"b/loop: skipped, is the same folder as {folder}",
        "dangling/result.json: skipped, cannot be read (No such file or directory)",
        "device/result.json: skipped, is no file",
        f"file/result.json: skipped, is the same file as {folder}/b/result.json",
    ]


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    write_record(tmp_path / "o" / "good")
    bad = write_record(tmp_path / "o" / "bad")
    read_text = Path.read_text

    def refuse(path, **options):
        if path == bad:
            raise PermissionError(13, "Permission denied")
        return read_text(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    table, err = demo_table(tmp_path / "o")
    assert "21.98" in table and err == f"warning: {bad}: skipped, cannot be read (Permission denied)\n"


def test_folders_with_odd_names(tmp_path):
    write_record(tmp_path / "o" / "line\nend")
    write_record(tmp_path / "o" / "bytes\udcff", pruner="ria")
    write_record(tmp_path / "o" / "bad\nname", status="failed", error="E: no")
    assert demo_table(tmp_path / "o")[1] == f"warning: {tmp_path}/o/bad name/result.json: skipped, failed run: E: no\n"
    assert r"bytes\udcff" in collect(tmp_path / "o", "--format", "csv")[1]
