"""Tables by model and by method, as Markdown and LaTeX."""

import math

import pytest
from support.records import collect, config, demo_table, write_record, write_runs

from nnprune.records import read_all
from nnprune.report import frame as frame_module
from nnprune.report import plots, tables
from nnprune.report.numbers import format_mean, format_value
from nnprune.report.rendering import to_latex


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
    write_record(
        folder / "w",
        value=25.0,
        seconds={"total": 11.0, "dense_evaluation": 9.0},
        peak_host_bytes=2**29,
        peak_device_bytes=3 * 2**30,
    )
    write_record(folder / "w24", sparsity="2:4", value=50.0, seconds={"total": 3.0}, peak_host_bytes=None)
    write_record(folder / "own", pruner="mine+layer", sparsity="2:4", value=40.0, seconds={"total": 1234.5})
    write_record(folder / "b", pruner="best", sparsity="0.7", value=21.0, seconds={}, peak_host_bytes=None)
    write_record(folder / "other", model="opt-125m", pruner="ria", value=1.0)
    return folder


def methods_table(tmp_path, folder, options):
    path = tmp_path / "methods.md"
    path.write_text(f"<!-- nnprune:table metric=demo_perplexity {options} -->\n<!-- /nnprune:table -->\n", encoding="utf-8")
    status, out, err = collect(folder, "--readme", path)
    assert status == 0
    return out.split("\ndemo_perplexity")[0], err


def test_layout_of_methods(tmp_path, methods):
    table, err = methods_table(tmp_path, methods, "models=demo layout=methods costs=true")
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


def test_layout_of_methods_is_filtered(tmp_path, methods):
    options = "layout=methods models=demo pruners=wanda,wanda_refit,ria sparsities=0.50,4:8"
    table, err = methods_table(tmp_path, methods, options)
    assert table.splitlines()[0] == "| Method | 50% |"
    assert table.splitlines()[4:] == ["| **Wanda** | 25.00 |", "| **Wanda + refit** | **21.0 ± 1.4** |"]
    assert err.splitlines() == [
        "warning: pruners=ria: no record with demo_perplexity has it",
        "warning: sparsities=4:8: no record with demo_perplexity has it",
    ]


def test_relative_to_a_method(tmp_path):
    folder = tmp_path / "relative"
    for seed, x in enumerate((1.0, 2.0)):  # ln(perplexity / 15) of SparseGPT; the dense perplexity is 15
        write_record(folder / f"s{seed}", pruner="sparsegpt", value=15 * math.exp(x), **config(seed))
        write_record(folder / f"a{seed}", pruner="alps", value=15 * math.exp(x * (0.5 + 0.25 * seed)), **config(seed))
        write_record(folder / f"w{seed}", value=15 * math.exp(2 * x), sparsity="2:4", **config(seed))
    write_record(folder / "s24", pruner="sparsegpt", value=15 * math.e, sparsity="2:4", **config(0))
    write_record(folder / "b24", pruner="best", value=15 * math.exp(0.25), sparsity="2:4", **config(0))
    table, err = methods_table(tmp_path, folder, "models=demo layout=methods relative=sparsegpt pruners=alps,wanda,best")
    assert err == ""
    assert table.splitlines()[2:] == [
        "| **Dense** | 0.00 | 0.00 |",
        "| | | |",
        "| **Wanda** | -- | -- |",  # a seed of Wanda at 2:4 has nothing to stand beside
        "| **SparseGPT** | 1.00 ± 0.00 | 1.00 |",
        "| **ALPS** | **0.6 ± 0.2** | -- |",
        "| **best** | -- | **0.25** |",
    ]


def test_layout_of_methods_without_records(tmp_path, methods):
    table, err = methods_table(tmp_path, methods, "layout=methods models=opt-13b costs=true")
    assert table.endswith("| **Dense** | -- | -- |\n") and "models=opt-13b: no record" in err


def test_layout_of_methods_in_latex(methods):
    frame, _ = frame_module.to_frame(read_all(methods)[0])
    latex = to_latex(tables.build_methods_table(frame, "demo_perplexity", "demo", costs=True))
    assert r"\caption{Demo perplexity, lower is better: demo}" in latex and r"\label{tab:demo-perplexity-demo}" in latex
    assert r"\begin{tabular}{lrrrrrr}" in latex
    assert r"Wanda + refit & \textbf{21.0 $\pm$ 1.4} & -- & -- & 4.5 & 2.0 & -- \\" in latex


def test_figures_with_a_spread():
    texts = {(46.78, 0.43): "46.8 ± 0.4", (3.834, 0.0): "3.83 ± 0.00", (636.49, 12.3): "636 ± 12", (46.78, 1.44): "46.8 ± 1.4"}
    texts |= {
        (1934.0, 120.0): "1.9e3 ± 0.1e3",
        (69760.0, 499.0): "7.0e4 ± 499",
        (1900.0, 0.52): "1.9e3 ± 0.5",
        (4724.0, 0.0): "4.7e3 ± 0",
    }
    texts |= {(math.inf, math.nan): "inf", (46.784, math.nan): "46.78", (0.0, 0.0): "0.00 ± 0.00"}
    texts |= {(0.00123, 0.0001): "0.0012 ± 0.0001", (0.00123, 0.0): "0.00123 ± 0.00000", (0.05, 0.2): "0.1 ± 0.2"}
    texts |= {(1.5e-5, 2e-6): "1.50e-5 ± 0.2e-5", (0.05, 0.02): "0.05 ± 0.02"}
    assert {key: format_mean(*key) for key in texts} == texts


def test_small_figures_keep_three_significant_digits():
    texts = {0.00123: "0.00123", -0.0456: "-0.0456", 0.1: "0.10", 0.0: "0.00", 0.00001234: "1.23e-5", 999.996: "1.0e3"}
    assert {value: format_value(value) for value in texts} == texts


@pytest.mark.parametrize(("metric", "best"), [("top_one", None), ("top_one_accuracy", "ria"), ("top_one_loss", "wanda")])
def test_only_a_metric_of_known_direction_has_a_best_value(tmp_path, metric, best):
    for pruner, value in (("wanda", 0.011), ("ria", 0.012)):
        write_record(tmp_path / "o" / pruner, pruner=pruner, metrics={metric: value}, dense_metrics={metric: 0.2})
    frame, _ = frame_module.to_frame(read_all(tmp_path / "o")[0])
    block = tables.build_table(frame, metric).blocks[1]
    marked = {row.head[0].lower(): row.best == [True] for row in block}
    assert marked == {pruner: pruner == best for pruner in ("wanda", "ria")}
    plots.plot(frame, metric, "pareto")


def test_latex(tmp_path):
    runs = write_runs(tmp_path / "outputs")
    write_record(runs / "odd", model="a_b", pruner="my_50%_pruner")
    out = collect(runs, "--format", "latex")[1]
    assert (
        r"\caption{Demo perplexity, lower is better}" in out
        and r"\label{tab:demo-perplexity}" in out
        and r"\begin{tabular}{llrrr}" in out
    )
    body = out[out.index(r"\toprule") : out.index(r"\bottomrule")]
    rows = [line.strip().removesuffix(r" \\").split(" & ") for line in body.splitlines() if " & " in line]
    assert rows[0] == ["Method", "Sparsity", r"a\_b", "opt-125m", "opt-350m"]
    assert rows[4] == ["SparseGPT", r"50\%", "--", r"\textbf{38.31}", r"\textbf{32.31}"]
    assert rows[5][:2] == [r"my\_50\%\_pruner", r"50\%"] and {len(row) for row in rows} == {5}
    assert body.count(r"\midrule") == 3


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["sparsegpt", "SparseGPT"], ["sparsegpt", "SparseGPT"]),
        (["wanda+refit", "wanda_refit"], ["wanda+refit", "wanda_refit"]),
        (["mine", "mine ", "mi\u200bne"], ["mi\\\\u200bne", "mine", "mine (2)"]),
        (["Dense", "ria"], ["RIA", "Dense (2)"]),
        (["dense"], ["dense"]),  # a pruned run labelled so
    ],
)
def test_two_pruners_have_two_rows_with_two_names(tmp_path, labels, names):
    for number, label in enumerate(labels):
        write_record(tmp_path / "o" / str(number), pruner=label, value=20.0 + number)
    table, err = demo_table(tmp_path / "o")
    rows = [line.split(" | ")[0].strip("| *") for line in table.splitlines()[2:] if line.strip("| ")]
    assert (rows[0], sorted(rows[1:]), err) == ("Dense", sorted(names), "")
    latex = collect(tmp_path / "o", "--metric", "demo_perplexity", "--format", "latex")[1]
    assert len({line.split(" & ")[0] for line in latex.splitlines() if "50\\%" in line}) == len(labels)
    methods = methods_table(tmp_path, tmp_path / "o", "models=demo layout=methods")[0]
    assert len(set(methods.splitlines())) == len(labels) + 4  # head, rule, dense, blank


def test_close_sparsities_and_similar_models_are_told_apart(tmp_path):
    write_record(tmp_path / "o" / "a", sparsity="0.5")
    write_record(tmp_path / "o" / "b", sparsity="0.50000001")
    write_record(tmp_path / "o" / "c", model="demo\n")
    table, err = demo_table(tmp_path / "o")
    assert err == ""
    assert "| **Wanda** | 0.5 | 21.98 | 21.98 |" in table
    assert "| **Wanda** | 0.50000001 | 21.98 | -- |" in table
    assert table.startswith("| Method | Sparsity | demo | demo (2) |\n")


def test_latex_specials(tmp_path):
    write_record(tmp_path / "o" / "a", model="[a]", pruner="\\^~{}%#&_$")
    write_record(tmp_path / "o" / "b", model="[a]", pruner="*star")
    latex = collect(tmp_path / "o", "--metric", "demo_perplexity", "--format", "latex")[1]
    assert r"\textbackslash{}\textasciicircum{}\textasciitilde{}\{\}\%\#\&\_\$ & 50\% & " in latex
    assert r"{*}star & 50\%" in latex  # \\* is a command of its own
    assert r"Method & Sparsity & {[}a] \\" in latex


@pytest.fixture
def whole_model(tmp_path):
    """The best figures are of methods that tune the whole model."""
    folder = tmp_path / "whole"
    for sparsity in ("0.5", "2:4"):
        for pruner, value in {"magnitude": 40.0, "sparsegpt": 30.0, "alps+model": 20.0, "alps+layer_model": 19.0}.items():
            write_record(folder / f"{pruner}-{sparsity}", "demo", pruner, sparsity, value, whole_model="model" in pruner)
    return folder


def test_methods_that_tune_the_whole_model_have_a_block_of_their_own(tmp_path, whole_model):
    table, err = methods_table(tmp_path, whole_model, "models=demo layout=methods costs=true")
    costs = "| 12 | 1024 |"
    assert err == "" and table.splitlines()[2:] == [
        "| **Dense** | 15.00 | 15.00 | -- | -- |",
        "| | | | | |",
        f"| **Magnitude** | 40.00 | 40.00 {costs}",
        f"| **SparseGPT** | **30.00** | **30.00** {costs}",
        "| *Whole-model* | | | | |",
        f"| **ALPS + layer + distillation** | **19.00** | **19.00** {costs}",
        f"| **ALPS + distillation** | 20.00 | 20.00 {costs}",
    ]
    names = [line.split(" | ")[0].strip("| *") for line in demo_table(whole_model)[0].splitlines()[3:]]
    one_shot, whole = ["Magnitude", "SparseGPT"], ["ALPS + layer + distillation", "ALPS + distillation"]
    assert names == ["", *one_shot, "", *one_shot, "Whole-model", *whole, "", *whole]
    latex = collect(whole_model, "--layout", "methods", "--format", "latex")[1].splitlines()
    heading = latex.index(r"    \multicolumn{3}{l}{\textit{Whole-model}} \\")
    assert latex[heading - 1] == r"    \midrule" and r"ALPS + distillation & 20.00" in latex[heading + 2]
    assert r"SparseGPT & \textbf{30.00}" in latex[heading - 2]


def test_without_others_the_whole_model_block_is_below_the_dense_row(tmp_path, whole_model):
    options = "models=demo layout=methods pruners=alps+model"
    lines = methods_table(tmp_path, whole_model, options)[0].splitlines()
    assert lines[3:] == ["| *Whole-model* | | |", "| **ALPS + distillation** | 20.00 | 20.00 |"]
