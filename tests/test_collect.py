"""The collector: records in, the README's tables and the exports out."""

import csv
import io
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from nnprune import collect
from nnprune.records import RunRecord, read_all
from nnprune.report import frame as frame_module
from nnprune.report import labels, tables

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "collect.py"

DENSE = {"opt-125m": 27.65, "opt-350m": 22.02}
RUNS = {  # (pruner, sparsity): perplexity of opt-125m, of opt-350m
    ("dense", "dense"): (27.65, 22.02),
    ("sparsegpt", "0.5"): (38.31, 32.31),
    ("wanda", "0.5"): (38.78, 36.52),
    ("magnitude", "0.5"): (197.38, 97.11),
    ("wanda", "2:4"): (79.65, 113.17),
    ("sparsegpt_nnpruning", "2:4"): (61.0, None),
    ("magnitude", "2:4"): (1597.4, 999.996),
    ("alps", "2:4"): (60.004, 60.0),
}
TABLE = """\
| Method | Sparsity | opt-125m | opt-350m |
| :--- | :--- | :--- | :--- |
| **Dense** | 0% | 27.65 | 22.02 |
| | | | |
| **Magnitude** | 50% | 197.38 | 97.11 |
| **Wanda** | 50% | 38.78 | 36.52 |
| **SparseGPT** | 50% | **38.31** | **32.31** |
| | | | |
| **Magnitude** | 2:4 | 1.6e3 | 1.0e3 |
| **Wanda** | 2:4 | 79.65 | 113.17 |
| **ALPS** | 2:4 | **60.00** | **60.00** |
| **SparseGPT (nn-pruning)** | 2:4 | 61.00 | -- |
"""
README = """\
# A readme

```markdown
<!-- nnprune:table metric=only_an_example -->
```

<!-- nnprune:table metric=demo_perplexity -->
old
<!-- /nnprune:table -->
between
<!-- nnprune:table metric=demo_perplexity models=opt-350m,opt-125m pruners=wanda sparsities=0.50 -->
<!-- /nnprune:table -->
the end
"""


def write_record(folder, model="demo", pruner="wanda", sparsity="0.5", value=21.98, dense=15.0, **changes):
    count = len(list(folder.parent.iterdir())) if folder.parent.is_dir() else 0
    fields = {
        "status": "completed",
        "fingerprint": f"{count:012x}",
        "metrics": {"demo_perplexity": value},
        "dense_metrics": {"demo_perplexity": dense},
        "linear_sparsity": 0.5,
        "seconds": {"total": 12.25},
        "peak_host_bytes": 2**40 + 1,
        "finished": "2026-11-21T20:00:00+00:00",
    }
    return RunRecord(model=model, pruner=pruner, sparsity=sparsity, **(fields | changes)).write(folder)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)  # some hundred small files
    folder = tmp_path / "outputs"
    for (pruner, sparsity), values in RUNS.items():
        for (model, dense), value in zip(DENSE.items(), values, strict=True):
            if value is not None:
                write_record(folder / f"{model}-{pruner}-{sparsity}", model, pruner, sparsity, value, dense)
    return folder


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    return path


@pytest.fixture
def call(runs, capsys):
    def run(*argv, records=runs):
        status = collect.main(["--records", str(records), *map(str, argv)])
        return status, *capsys.readouterr()

    return run


def test_layout_bold_missing_and_large_values(call):
    assert call("--metric", "demo_perplexity") == (0, TABLE + "\ndemo_perplexity: 15 record(s) used\n\n", "")


def test_readme_is_rewritten_and_stays_put(call, readme):
    status, out, err = call("--readme", readme)
    text = readme.read_text(encoding="utf-8")
    assert (status, err) == (0, "")
    assert TABLE in out and "15 record(s) used" in out and "4 record(s) used" in out
    assert f"demo_perplexity -->\n\n{TABLE}\n<!-- /nnprune:table -->\nbetween\n" in text
    second = "| **Dense** | 0% | 22.02 | 27.65 |\n| | | | |\n| **Wanda** | 50% | 36.52 | 38.78 |\n\n<!-- /nnprune"
    assert second in text  # its own order of models, its own pruners and sparsities; alone, so nothing in bold
    assert text.startswith(README[: README.index("old")]) and text.endswith("the end\n")
    assert "already up to date" in call("--readme", readme)[1]
    assert readme.read_text(encoding="utf-8") == text
    assert [path.name for path in sorted(readme.parent.iterdir())] == ["README.md", "outputs"]  # no temporary file


@pytest.fixture
def methods(tmp_path):
    folder = tmp_path / "methods"
    for seed, value in enumerate((20.0, 22.0)):
        write_record(
            folder / f"r{seed}",
            pruner="wanda_refit",
            value=value,
            seconds={"total": 4.0 + seed},
            peak_host_bytes=(seed + 1) * 2**30,
            **config(seed),
        )
    write_record(folder / "w", value=25.0, seconds={"total": 2.0}, peak_host_bytes=2**29, peak_device_bytes=3 * 2**30)
    write_record(folder / "w24", sparsity="2:4", value=50.0, seconds={"total": 3.0}, peak_host_bytes=None)
    write_record(folder / "own", pruner="mine+layer", sparsity="2:4", value=40.0, seconds={"total": 1234.5})
    write_record(folder / "b", pruner="best", sparsity="0.7", value=21.0, seconds={}, peak_host_bytes=None)
    write_record(folder / "other", model="opt-125m", pruner="ria", value=1.0)
    return folder


def methods_table(call, tmp_path, folder, options):
    path = tmp_path / "methods.md"
    path.write_text(f"<!-- nnprune:table metric=demo_perplexity {options} -->\n<!-- /nnprune:table -->\n", encoding="utf-8")
    status, out, err = call("--readme", path, records=folder)
    assert status == 0
    return out.split("\ndemo_perplexity")[0], err


def test_layout_of_methods(call, tmp_path, methods):
    table, err = methods_table(call, tmp_path, methods, "models=demo layout=methods costs=true")
    assert err == ""
    assert (
        table
        == """\
| Method | 50% | 70% | 2:4 | Seconds | GiB | GiB of device |
| :--- | :--- | :--- | :--- | :--- | :--- | :--- |
| **Dense** | 15.00 | 15.00 | 15.00 | -- | -- | -- |
| | | | | | | |
| **Wanda** | 25.00 | -- | 50.00 | 2.5 | 0.5 | 3.0 |
| **Wanda + refit** | **21.0 ± 1.4** | -- | -- | 4.5 | 2.0 | -- |
| **best** | -- | 21.00 | -- | -- | -- | -- |
| **mine + layer** | -- | -- | **40.00** | 1234 | 1024 | -- |
"""
    )


def test_layout_of_methods_is_filtered(call, tmp_path, methods):
    options = "layout=methods models=demo pruners=wanda,wanda_refit,ria sparsities=0.50,4:8"
    table, err = methods_table(call, tmp_path, methods, options)
    assert table.splitlines()[0] == "| Method | 50% |"
    assert table.splitlines()[4:] == ["| **Wanda** | 25.00 |", "| **Wanda + refit** | **21.0 ± 1.4** |"]
    assert err.splitlines() == [
        "warning: pruners=ria: no record with demo_perplexity has it",
        "warning: sparsities=4:8: no record with demo_perplexity has it",
    ]


def test_relative_to_a_method(call, tmp_path):
    folder = tmp_path / "relative"
    for seed, x in enumerate((1.0, 2.0)):  # ln(perplexity / 15) of SparseGPT; the dense perplexity is 15
        write_record(folder / f"s{seed}", pruner="sparsegpt", value=15 * math.exp(x), **config(seed))
        write_record(folder / f"a{seed}", pruner="alps", value=15 * math.exp(x * (0.5 + 0.25 * seed)), **config(seed))
        write_record(folder / f"w{seed}", value=15 * math.exp(2 * x), sparsity="2:4", **config(seed))
    write_record(folder / "s24", pruner="sparsegpt", value=15 * math.e, sparsity="2:4", **config(0))
    write_record(folder / "b24", pruner="best", value=15 * math.exp(0.25), sparsity="2:4", **config(0))
    table, err = methods_table(call, tmp_path, folder, "models=demo layout=methods relative=sparsegpt pruners=alps,wanda,best")
    assert err == ""
    assert table.splitlines()[2:] == [
        "| **Dense** | 0.00 | 0.00 |",
        "| | | |",
        "| **Wanda** | -- | -- |",  # a seed of Wanda at 2:4 has nothing to stand beside
        "| **SparseGPT** | 1.00 ± 0.00 | 1.00 |",
        "| **ALPS** | **0.6 ± 0.2** | -- |",
        "| **best** | -- | **0.25** |",
    ]


def test_layout_of_methods_without_records(call, tmp_path, methods):
    table, err = methods_table(call, tmp_path, methods, "layout=methods models=opt-13b costs=true")
    assert table.endswith("| **Dense** | -- | -- |\n") and "models=opt-13b: no record" in err


def test_layout_of_methods_in_latex(methods):
    frame, _ = frame_module.to_frame(read_all(methods)[0])
    latex = tables.to_latex(tables.build_methods_table(frame, "demo_perplexity", "demo", costs=True))
    assert r"\caption{demo\_perplexity, demo}" in latex and r"\begin{tabular}{lrrrrrr}" in latex
    assert r"Wanda + refit & \textbf{21.0 $\pm$ 1.4} & -- & -- & 4.5 & 2.0 & -- \\" in latex


def test_check(call, readme):
    assert call("--readme", readme, "--check")[0] == 1
    assert readme.read_text(encoding="utf-8") == README
    call("--readme", readme)
    assert call("--readme", readme, "--check")[:2] == (0, "README.md: 2 table(s) match the records\n")
    readme.write_text(readme.read_text(encoding="utf-8").replace("197.38", "197.39"), encoding="utf-8")
    status, out, _ = call("--readme", readme, "--check")
    assert status == 1
    assert "-| **Magnitude** | 50% | 197.39 | 97.11 |\n+| **Magnitude** | 50% | 197.38 | 97.11 |" in out


def test_default_files_are_updated_and_checked_together(call, readme, monkeypatch):
    monkeypatch.chdir(readme.parent)
    assert call()[1].endswith("README.md: 2 table(s) rewritten\n")
    methods = readme.parent / "docs" / "methods.md"
    methods.parent.mkdir()
    methods.write_text("nothing to fill yet\n", encoding="utf-8")
    assert call("--check")[:2] == (0, "README.md: 2 table(s) match the records\n")
    marker = "<!-- nnprune:table metric=demo_perplexity models=opt-125m layout=methods -->\n"
    methods.write_text(marker, encoding="utf-8")
    assert call()[2] == "collect.py: docs/methods.md:1: table without an end; add <!-- /nnprune:table --> below it\n"
    methods.write_text(marker + "<!-- /nnprune:table -->\n", encoding="utf-8")
    status, out, _ = call("--check")
    assert status == 1 and out.startswith("--- docs/methods.md\n") and "README.md" not in out
    out = call()[1]
    assert out.endswith("docs/methods.md: 1 table(s) rewritten\nREADME.md: 2 table(s) already up to date\n")
    assert "| **Wanda** | 38.78 | 79.65 |" in methods.read_text(encoding="utf-8")
    assert call("--check")[:2] == (0, "README.md, docs/methods.md: 3 table(s) match the records\n")
    readme.write_text(README.replace("metric=demo_perplexity -->", "metric=nothing -->"), encoding="utf-8")
    methods.write_text(marker + "<!-- /nnprune:table -->\n", encoding="utf-8")
    assert call()[0] == 2 and "Wanda" not in methods.read_text(encoding="utf-8")  # all files or none


def test_line_ends_are_kept(call, readme):
    readme.write_bytes(README.replace("\n", "\r\n").encode())
    call("--readme", readme)
    content = readme.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 20
    assert call("--readme", readme, "--check")[0] == 0


def test_newest_wins_silently_within_an_experiment_and_aloud_between(call, runs):
    same = {"fingerprint": "aaaaaaaaaaaa"}
    write_record(runs / "a", value=2.0, finished="2026-11-21T22:00:00+02:00", **same)  # 20:00 UTC: the older
    write_record(runs / "b", value=3.0, finished="2026-11-21T21:00:00+00:00", **same)
    status, out, err = call("--metric", "demo_perplexity")
    assert "| **Wanda** | 50% | 3.00 |" in out and err == ""
    write_record(runs / "c", value=4.0, finished="2026-11-21T20:30:00+00:00", fingerprint="cccccccccccc")
    status, out, err = call("--metric", "demo_perplexity")
    assert (status, err.count("\n")) == (0, 1) and "| **Wanda** | 50% | 3.00 |" in out
    assert re.search(r"demo / wanda / 0.5: 2 experiments compete .*newest, aaaaaaaaaaaa: .*b.result.json", err)


def config(seed, calibration_seed=None, **more):
    calibration = {"num_samples": 8, "seed": seed if calibration_seed is None else calibration_seed}
    return {"config": {"seed": seed, "calibration": calibration, **more}}


def test_seeds_of_one_experiment_are_one_cell(call, tmp_path):
    folder = tmp_path / "o"
    for seed, value in enumerate((46.4, 46.8, 47.2)):  # how it was run does not count
        write_record(folder / f"s{seed}", value=value, **config(seed, runtime={"device": f"cuda:{seed}"}, outputs=f"o{seed}"))
    for seed, value in enumerate((46.81, 46.79)):
        write_record(folder / f"m{seed}", pruner="magnitude", value=value, **config(seed))
    write_record(folder / "one", pruner="sparsegpt", value=46.82, **config(0))
    status, out, err = call("--metric", "demo_perplexity", records=folder)
    assert (status, err) == (0, "")
    assert "| **Magnitude** | 50% | **46.80 ± 0.01** |" in out  # a tie: means are the same to two decimals
    assert "| **Wanda** | 50% | **46.8 ± 0.4** |" in out
    assert "| **SparseGPT** | 50% | 46.82 |" in out
    assert "demo_perplexity: 6 record(s) used" in out
    latex = call("--metric", "demo_perplexity", "--format", "latex", records=folder)[1]
    assert r"& \textbf{46.8 $\pm$ 0.4} \\" in latex
    objects = json.loads(call("--format", "json", records=folder)[1])
    wanda = [item for item in objects if item["pruner"] == "wanda"]
    assert [(item["seed"], item["num_seeds"], item["value"]) for item in wanda] == [
        ("0", 3, 46.4),
        ("1", 3, 46.8),
        ("2", 3, 47.2),
    ]
    assert {round(item["mean"], 9) for item in wanda} == {46.8} and {round(item["std"], 9) for item in wanda} == {0.4}
    [single] = [item for item in objects if item["pruner"] == "sparsegpt"]
    assert (single["num_seeds"], single["mean"], single["std"]) == (1, 46.82, None)


def test_the_newest_record_of_a_seed_counts(call, tmp_path):
    folder, times = tmp_path / "o", [f"2026-11-21T20:0{i}:00+00:00" for i in range(3)]
    write_record(folder / "a", value=10.0, finished=times[0], **config(0))
    write_record(folder / "b", value=20.0, finished=times[1], **config(1))
    write_record(folder / "c", value=30.0, finished=times[2], fingerprint="cccccccccccc", **config(0))
    _, out, err = call("--metric", "demo_perplexity", records=folder)
    assert "| **Wanda** | 50% | 25.0 ± 7.1 |" in out
    # One config and seed, but another fingerprint: something that no config shows has changed.
    assert "2 experiments compete (000000000000, cccccccccccc); shown is the newest, cccccccccccc (2 seeds)" in err


@pytest.mark.parametrize(
    "other",
    [
        config(2, pruner={"alpha": 0.7}),
        {"config": {**config(2)["config"], "calibration": {"num_samples": 16, "seed": 2}}},
        {**config(2), "evaluation_hashes": {"demo": "feedfeedfeedfeed"}},
    ],
)
def test_what_differs_in_more_than_the_seed_is_not_averaged(call, tmp_path, other):
    folder = tmp_path / "o"
    for seed in (0, 1):
        write_record(folder / f"s{seed}", value=20.0 + seed, finished="2026-11-21T20:01:00+00:00", **config(seed))
    write_record(folder / "other", value=99.0, finished="2026-11-21T20:00:00+00:00", **other)
    _, out, err = call("--metric", "demo_perplexity", records=folder)
    assert "| **Wanda** | 50% | 20.5 ± 0.7 |" in out and "2 experiments compete" in err
    write_record(folder / "other", value=99.0, finished="2026-11-21T20:02:00+00:00", **other)
    assert "| **Wanda** | 50% | 99.00 |" in call("--metric", "demo_perplexity", records=folder)[1]


def test_a_seed_without_a_figure_is_not_left_out_of_the_mean(call, tmp_path):
    for seed, value in enumerate((20.0, "nan", 21.0)):
        write_record(tmp_path / "o" / f"s{seed}", value=value, **config(seed))
    assert "| **Wanda** | 50% | -- |" in call("--metric", "demo_perplexity", records=tmp_path / "o")[1]


def test_settings_that_do_not_tell_experiments_apart_are_those_of_the_fingerprint():
    from nnprune.experiment.build import NOT_SCIENCE

    assert set(frame_module.NOT_SCIENCE) == {*NOT_SCIENCE, "seed"}


def test_figures_with_a_spread():
    texts = {(46.78, 0.43): "46.8 ± 0.4", (3.834, 0.0): "3.83 ± 0.00", (636.49, 12.3): "636 ± 12", (46.78, 1.44): "46.8 ± 1.4"}
    texts |= {
        (1934.0, 120.0): "1.9e3 ± 0.1e3",
        (69760.0, 499.0): "7.0e4 ± 499",
        (1900.0, 0.52): "1.9e3 ± 0.5",
        (4724.0, 0.0): "4.7e3 ± 0",
    }
    texts |= {(math.inf, math.nan): "inf", (46.784, math.nan): "46.78"}
    assert {key: tables.format_mean(*key) for key in texts} == texts


def test_unusable_files_are_reported_and_skipped(call, runs):
    whole = write_record(runs / "whole", value=5.0).read_text()
    for name, text in {
        "cut": whole[: len(whole) // 2],
        "foreign": '{"hello": 1}',
        "list": "[1, 2]",
        "binary": "\x00",
        "future": whole.replace('"schema_version": 1', '"schema_version": 99'),
    }.items():
        (runs / name).mkdir()
        (runs / name / "result.json").write_text(text)
    write_record(runs / "shape", metrics=[5.0])
    write_record(runs / "text", metrics={"demo_perplexity": "low"})
    write_record(runs / "failed", status="failed", metrics={}, error="ValueError: no\nluck", finished=None)
    write_record(runs / "ancient", model="other", finished="yesterday")
    status, out, err = call("--metric", "demo_perplexity")
    assert status == 0 and "| **Wanda** | 50% | 5.00 | 38.78 | 36.52 | 21.98 |" in out
    lines = err.splitlines()
    skipped = {re.search(r"outputs/(\w+)/result.json: skipped, ", line)[1]: line for line in lines}
    assert sorted(skipped) == ["binary", "cut", "failed", "foreign", "future", "list", "shape", "text"]
    assert len(lines) == len(skipped)
    assert skipped["failed"].endswith("failed run: ValueError: no luck")


def test_dense_comes_from_pruned_runs_too_and_disagreement_is_named(call, tmp_path):
    write_record(tmp_path / "o" / "a", value=20.0, dense=15.0)
    assert "| **Dense** | 0% | 15.00 |" in call("--metric", "demo_perplexity", records=tmp_path / "o")[1]
    write_record(tmp_path / "o" / "b", pruner="magnitude", value=30.0, dense=18.0)
    status, _, err = call("--metric", "demo_perplexity", records=tmp_path / "o")
    assert status == 0 and "demo: records disagree on dense demo_perplexity (15.00 to 18.00)" in err


def test_order_of_models_and_patterns():
    models = ["bloom-560m", "opt-13b", "opt-1.3b", "llama-2-7b", "opt-350m", "demo", "opt-125m", "Llama-3-8b"]
    ordered = ["demo", "bloom-560m", "llama-2-7b", "Llama-3-8b", "opt-125m", "opt-350m", "opt-1.3b", "opt-13b"]
    assert sorted(models, key=labels.model_key) == ordered
    sparsities = ["4:8", "2:4", "0.75", "3:4", "0.5", "odd", "0.625"]
    assert sorted(sparsities, key=labels.sparsity_key) == ["0.5", "0.625", "0.75", "3:4", "2:4", "4:8", "odd"]
    assert [labels.pretty_sparsity(s) for s in ("0.55", "0.625", "2:4")] == ["55%", "62.5%", "2:4"]


def test_order_and_names_of_methods():
    ordered = {
        "dense": "Dense",
        "magnitude": "Magnitude",
        "wanda": "Wanda",
        "wanda+refit": "Wanda + refit",
        "wanda_refit": "Wanda + refit",
        "wanda+refit+layer": "Wanda + refit + layer",
        "wanda+asymmetric": "Wanda + asymmetric",
        "ria": "RIA",
        "dsnot": "DSnoT",
        "swaps": "Swaps",
        "sparsegpt": "SparseGPT",
        "sparsegpt_refit": "SparseGPT + refit",
        "admm": "ADMM",
        "alps": "ALPS",
        "best_fast": "best_fast",
        "best_medium": "best_medium",
        "best": "best",
        "best+owl": "best + owl",
        "Alpha": "Alpha",
        "mine": "mine",
        "mine_refit": "mine_refit",
        "sparsegpt_nnpruning": "SparseGPT (nn-pruning)",
    }
    assert sorted(reversed(ordered), key=labels.pruner_key) == list(ordered)
    assert {label: labels.pretty_pruner(label) for label in ordered} == ordered


def test_csv_and_json_parse_back(call):
    rows = list(csv.DictReader(io.StringIO(call("--format", "csv")[1])))
    objects = json.loads(call("--format", "json")[1])
    assert len(rows) == len(objects) == 15
    assert list(rows[0]) == list(objects[0]) == frame_module.COLUMNS
    for row, item in zip(rows, objects, strict=True):
        assert row["path"] == item["path"] and float(row["value"]) == item["value"]
    one = next(item for item in objects if (item["pruner"], item["model"]) == ("alps", "opt-125m"))
    assert (one["value"], one["dense_value"], one["sparsity"]) == (60.004, 27.65, "2:4")
    assert (one["peak_host_bytes"], one["seconds_total"]) == (2**40 + 1, 12.25)


def test_values_that_json_lacks_become_null(call, tmp_path):
    write_record(tmp_path / "o" / "a", peak_host_bytes=None, metrics={"demo_perplexity": None, "arc_acc": 0.25})
    write_record(tmp_path / "o" / "b", pruner="magnitude", metrics={"demo_perplexity": 20.0, "arc_acc": 0.125})
    by_metric = {r["metric"]: r for r in json.loads(call("--format", "json", records=tmp_path / "o")[1])[:2]}
    assert by_metric["demo_perplexity"]["value"] is by_metric["arc_acc"]["peak_host_bytes"] is None
    out = call("--format", "markdown", records=tmp_path / "o")[1]
    assert "| **Wanda** | 50% | -- |" in out and "| **Wanda** | 50% | **0.25** |" in out  # more accuracy is better


def test_latex(call, runs):
    write_record(runs / "odd", model="a_b", pruner="my_50%_pruner")
    out = call("--format", "latex")[1]
    assert r"\caption{demo\_perplexity}" in out and r"\begin{tabular}{llrrr}" in out
    body = out[out.index(r"\toprule") : out.index(r"\bottomrule")]
    rows = [line.strip().removesuffix(r" \\").split(" & ") for line in body.splitlines() if " & " in line]
    assert rows[0] == ["Method", "Sparsity", r"a\_b", "opt-125m", "opt-350m"]
    assert rows[4] == ["SparseGPT", r"50\%", "--", r"\textbf{38.31}", r"\textbf{32.31}"]
    assert rows[5][:2] == [r"my\_50\%\_pruner", r"50\%"] and {len(row) for row in rows} == {5}
    assert body.count(r"\midrule") == 3


@pytest.mark.parametrize("content", ["runs", "nothing but the dense line", "seeds"])
def test_plot(call, runs, tmp_path, content):
    folder = runs if content == "runs" else tmp_path / "o"
    if content == "seeds":
        for seed, value in enumerate((1.0, 20.0, 90.0)):  # a spread below zero, which a logarithmic axis lacks
            write_record(folder / f"s{seed}", value=value, **config(seed))
            write_record(folder / f"p{seed}", sparsity="2:4", value=value + 5, **config(seed))
    elif content != "runs":
        write_record(folder / "a", pruner="dense", sparsity="dense", value=15.0)
    path = tmp_path / "figure.png"
    assert call("--plot", path, records=folder)[0] == 0
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert 600 < width < 3000 and 400 < height < 3000 and len(content) > 10_000


def test_plot_without_matplotlib(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = call("--plot", tmp_path / "figure.png")
    assert status == 2 and "pip install nnprune[dev]" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metric", "perplexty"], "--metric perplexty: no record has this metric; known: demo_perplexity"),
        (["--plot", "figure.docx"], "unknown suffix '.docx'; use one of .png"),
        (["--plot", "nowhere/figure.png"], "the folder nowhere does not exist"),
        (["--format", "xml"], "--format: invalid choice: 'xml'"),
        (["--check", "--metric", "demo_perplexity"], "--check compares whole files"),
        (["--format", "csv", "--plot", "a.png"], "--format and --plot do not go together"),
        (["--metric", "demo_perplexity", "--readme", "a.md"], "--readme is for rewriting"),
        (["--readme", "nowhere.md"], "--readme nowhere.md: No such file"),
        (["--records", "nowhere"], "--records nowhere: no such folder"),
    ],
)
def test_usage_errors_are_one_line(call, argv, message):
    status, out, err = call(*argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no table here\n", "no marked table; add <!-- nnprune:table metric=NAME -->"),
        ("<!-- nnprune:table metric=demo_perplexity -->\n", "README.md:1: table without an end"),
        ("<!-- /nnprune:table -->\n", "README.md:1: marker without its partner"),
        ("<!-- nnprune:table -->\n<!-- /nnprune:table -->\n", "names no metric"),
        ("<!-- nnprune:table metric=x model=y -->\n<!-- /nnprune:table -->\n", "'model=y' is not understood"),
        ("<!-- nnprune:table metric=x layout=rows -->\n", "'layout=rows' is not understood; use metric=NAME, models=A,B"),
        ("<!-- nnprune:table metric=x costs=1 -->\n", "'costs=1' is not understood"),
        ("<!-- nnprune:table metric=x costs=true -->\n", "README.md:1: costs=true adds columns to layout=methods"),
        ("<!-- nnprune:table metric=x relative=a -->\n", "README.md:1: relative=a is for layout=methods"),
        ("<!-- nnprune:table metric=x layout=methods models=a relative=a -->\n", "perplexities; x is none"),
        (
            "<!-- nnprune:table metric=demo_perplexity layout=methods models=a relative=b -->\n<!-- /nnprune:table -->\n",
            "README.md:1: relative=b: no record has this pruner; known: alps, dense, magnitude",
        ),
        ("<!-- nnprune:table metric=x layout=methods -->\n", "README.md:1: layout=methods shows one model"),
        ("<!-- nnprune:table metric=x layout=methods models=a,b -->\n", "README.md:1: layout=methods shows one model"),
        ("\n<!-- nnprune:table metric=x -->\n<!-- /nnprune:table -->\n", "README.md:2: metric=x: no record has this"),
    ],
)
def test_readme_errors_are_one_line_and_write_nothing(call, readme, text, message):
    readme.write_text(text, encoding="utf-8")
    status, out, err = call("--readme", readme)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert readme.read_text(encoding="utf-8") == text


def test_filters_that_match_nothing(call, readme):
    readme.write_text(README.replace("models=opt-350m,opt-125m", "models=opt-350m,opt-13b"), encoding="utf-8")
    status, out, err = call("--readme", readme)
    assert status == 0 and "| **Wanda** | 50% | 36.52 | -- |" in out
    assert err == "warning: models=opt-13b: no record with demo_perplexity has it\n"


def test_as_a_program_without_records_and_without_torch(tmp_path):
    code = f"import sys, runpy; sys.argv = ['c', '--records', {str(tmp_path)!r}]\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "finally: assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("collect.py: no completed records under ") and done.stderr.count("\n") == 1
