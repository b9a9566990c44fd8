"""Files that the collector writes: tables by suffix, plots of each kind, published figures, references."""

import json
import re
from pathlib import Path

import pytest
from conftest import CONF
from omegaconf import OmegaConf
from support.records import collect, config, write_record, write_runs

from nnprune.report import bibliography
from nnprune.report.metrics import describe, higher_is_better

FILTERED = ["--models", "opt-125m", "--pruners", "wanda,sparsegpt", "--sparsities", "0.50"]


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "outputs")


@pytest.mark.parametrize("suffix", ["md", "tex", "csv", "json"])
def test_the_suffix_names_the_format(runs, tmp_path, suffix):
    path = tmp_path / f"table.{suffix}"
    assert collect(runs, *FILTERED, "-o", path) == (0, f"{path}: written\n", "")
    text = path.read_text(encoding="utf-8")
    signs = {"md": "| **Wanda** | 50% | 38.78 |", "tex": r"Wanda & 50\% & 38.78 \\", "csv": ",wanda,0.5,", "json": '"wanda"'}
    assert (signs[suffix] in text or "opt-125m,wanda,0.5" in text) and "magnitude" not in text.lower() and "97.11" not in text
    other = tmp_path / "other.txt"
    collect(runs, *FILTERED, "-o", other, "--format", {"md": "markdown", "tex": "latex"}.get(suffix, suffix))
    assert other.read_text(encoding="utf-8") == text


def test_a_table_of_methods_for_each_model(runs):
    status, out, err = collect(runs, "--layout", "methods", "--costs")
    assert (status, err) == (0, "")
    assert out.count("| Method | 50% | 2:4 | Seconds | GiB |") == 2
    assert "demo_perplexity, opt-125m: 8 record(s) used" in out and "demo_perplexity, opt-350m: 7 record(s) used" in out


def test_costs_of_different_machines_are_named(tmp_path):
    from nnprune.records import read_all
    from nnprune.report.frame import to_frame
    from nnprune.report.tables import build_methods_table

    write_record(tmp_path / "o" / "a")
    write_record(tmp_path / "o" / "b", pruner="ria")
    found = read_all(tmp_path / "o")[0]
    for record, gpu in zip(found, ("A", "B"), strict=True):
        record["machine"] = {"gpu": gpu, "host_bytes": 7}
    frame, _ = to_frame(found)
    warnings = build_methods_table(frame, "demo_perplexity", "demo", costs=True).warnings
    assert warnings == ["costs: the runs are of 2 different machines, so their seconds and memory do not compare"]
    assert build_methods_table(frame, "demo_perplexity", "demo").warnings == []
    found[1]["machine"] = {"gpu": "A", "host_bytes": 8}  # after another start of it
    assert build_methods_table(to_frame(found)[0], "demo_perplexity", "demo", costs=True).warnings == []


@pytest.mark.parametrize("kind", ["sparsity", "pareto"])
def test_kinds_of_plots(runs, tmp_path, kind):
    for sparsity in ("0.6", "0.7"):  # so that there are lines too
        write_record(runs / sparsity, "opt-125m", "wanda", sparsity, 60.0, 27.65, seconds={"total": 3.0})
    path = tmp_path / "figure.svg"
    status, out, err = collect(runs, "--plot", path, "--kind", kind)
    assert (status, err) == (0, "") and out.startswith(f"{path}: demo_perplexity against")
    titles = re.findall(r"<!-- (opt-.*?) -->", path.read_text(encoding="utf-8"))
    if kind == "sparsity":  # lines and bars for the one, bars alone for the other
        assert titles == ["opt-125m", "opt-125m", "opt-350m"]
    else:
        assert titles[:4] == ["opt-125m, 50%", "opt-125m, 60%", "opt-125m, 70%", "opt-125m, 2:4"] and len(titles) == 6


PUBLISHED = """\
model,method,sparsity,metric,value,source
opt-125m,Wanda,0.5,demo_perplexity,40,a paper
opt-125m,sparsegpt,50e-2,demo_perplexity,38.31,a paper
opt-125m,dense,0,demo_perplexity,27.66,a paper
opt-350m,wanda,2:4,demo_perplexity,100,"another, <b>"
opt-13b,RIA,2:4,demo_perplexity,12.25,
opt-125m,wanda,0.5,other_perplexity,1,
"""


def test_published_figures_beside_ours(runs, tmp_path):
    path = tmp_path / "published.csv"
    path.write_text(PUBLISHED, encoding="utf-8")
    status, out, err = collect(runs, "--beside", path)
    assert (status, err) == (0, "")
    assert [line for line in out.splitlines() if line.startswith("| **")] == [
        "| **opt-125m** | Dense | 0% | a paper | 27.65 | 27.66 | -0.0% |",
        "| **opt-125m** | Wanda | 50% | a paper | 38.78 | 40.00 | -3.0% |",
        "| **opt-125m** | SparseGPT | 50% | a paper | 38.31 | 38.31 | +0.0% |",
        "| **opt-350m** | Wanda | 2:4 | another, &lt;b> | 113.17 | 100.00 | +13.2% |",
        "| **opt-13b** | RIA | 2:4 | | -- | 12.25 | -- |",
    ]
    filtered = collect(runs, "--beside", path, "--models", "opt-350m", "--format", "json")[1]
    assert json.loads(filtered) == [
        {"Model": "opt-350m", "Method": "Wanda", "Sparsity": "2:4", "Ours": "113.17", "Published": "100.00"}
        | {"Difference": "+13.2%", "Source": "another, <b>"}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory; name a CSV file"),
        (
            "model,method,sparsity,value\n",
            "has no column metric; its first line is model,method,sparsity,metric,value[,source]",
        ),
        (PUBLISHED + "a,b,0.5,c,x\n", "published.csv:8: value=x: is no number"),
        (PUBLISHED + "a,b,50,c,1\n", "published.csv:8: sparsity=50.0: is neither dense, a fraction below 1, nor N:M"),
        (PUBLISHED + "a,b\n", "published.csv:8: has more or fewer values"),
        ("model,method,sparsity,metric,value\na,b,0.5,c,1\n", "has figures of c, and ours are demo_perplexity"),
    ],
)
def test_published_figures_that_are_wrong(runs, tmp_path, text, message):
    path = tmp_path / "published.csv"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    status, out, err = collect(runs, "--beside", path)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_references_of_the_methods_shown(tmp_path):
    window = {"_target_": "nnprune.recovery.Reconstruction", "num_layers": 2, "logits_epochs": 0}
    best = {"pruner": {"_target_": "nnprune.pruners.alps.ALPS"}, "recover": window}
    plain = {"target": {"_target_": "nnprune.targets.Target"}}
    write_record(tmp_path / "o" / "best", pruner="best", **config(0, **best, **plain))
    write_record(tmp_path / "o" / "mine", pruner="mine", **config(0, pruner={"_target_": "my_pruner.Wanda"}))
    status, out, err = collect(tmp_path / "o", "--bibtex")
    keys = re.findall(r"^@\w+{(\w+),$", out, re.MULTILINE)
    assert status == 0 and keys == ["meng2024alps", "guo2024ebft", "shin2024rethinking"]
    assert err == "warning: --bibtex: my_pruner.Wanda has no reference here; cite its own\n"
    path = tmp_path / "methods.bib"
    assert collect(tmp_path / "o", "--bibtex", "--pruners", "best", "-o", path) == (0, f"{path}: written\n", "")
    assert path.read_text(encoding="utf-8") == out


def test_every_method_has_its_reference_or_needs_none():
    text = Path(bibliography.__file__).with_name("methods.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+{(\w+),$", text, re.MULTILINE)
    assert len(keys) == len(set(keys)) == text.count("\n}\n") == len(set(bibliography.entries().values()))
    assert text.count("{") == text.count("}")
    targets = [OmegaConf.load(p).get("_target_") for group in bibliography.GROUPS for p in (CONF / group).glob("*.yaml")]
    named = {target.rpartition(".")[2] for target in targets if target and target != "???" and not target.startswith("?")}
    assert named <= {*bibliography.entries(), *bibliography.NO_REFERENCE}
    assert {key.partition(" ")[0] for key in bibliography.entries()} <= named, "an entry of a class that no option names"


def test_metrics():
    assert [describe(name) for name in ("wikitext2_perplexity", "arc_easy_acc_norm", "my_task_acc", "odd")] == [
        "WikiText-2 perplexity, lower is better",
        "ARC-Easy normalised accuracy, higher is better",
        "my task accuracy, higher is better",
        "odd",
    ]


def test_the_direction_of_a_metric_is_known_or_not():
    higher = "mean_acc truthfulqa_gen_bleu_max cnn_rougeL squad_em squad_f1 cola_mcc gsm8k_strict-match_exact_match acc_norm"
    lower = "c4_perplexity wikitext_bits_per_byte wikitext_word_perplexity my_loss truthfulqa_brier_score wmt_ter"
    unknown = "top_one scaled crows_likelihood_diff macc gloss tokens"
    assert {higher_is_better(metric) for metric in higher.split()} == {True}
    assert {higher_is_better(metric) for metric in lower.split()} == {False}
    assert {higher_is_better(metric) for metric in unknown.split()} == {None}
