"""Accuracies of tasks in tables: in per cent, with their standard errors, the highest in bold, and their mean."""

import pytest
from support.records import collect, config, write_record

TASKS = ("arc_easy", "piqa")
DENSE = {"arc_easy_acc": 0.7, "arc_easy_acc_stderr": 0.01, "piqa_acc": 0.8, "piqa_acc_stderr": 0.02}


def write(folder, pruner, arc, piqa=None, **changes):
    metrics = {"arc_easy_acc": arc, "arc_easy_acc_stderr": 0.03}
    if piqa is not None:
        metrics |= {"piqa_acc": piqa, "piqa_acc_stderr": 0.04}
    measured = (task for task in TASKS if f"{task}_acc" in metrics)
    evaluations = {task: {"name": task, "metrics": {f"{task}_acc": metrics[f"{task}_acc"]}} for task in measured}
    fields = {"metrics": metrics, "dense_metrics": DENSE, "evaluations": evaluations}
    return write_record(folder, pruner=pruner, **(fields | changes))


@pytest.fixture
def records(tmp_path):
    write(tmp_path / "o" / "a", "wanda", 0.6, 0.5)
    write(tmp_path / "o" / "b", "magnitude", 0.4, 0.65)
    write(tmp_path / "o" / "c", "ria", 0.3)
    return tmp_path / "o"


def tasks_table(records, tmp_path, metrics):
    readme = tmp_path / "T.md"
    readme.write_text(f"<!-- nnprune:table layout=tasks models=demo metric={metrics} -->\n<!-- /nnprune:table -->\n")
    status, _, err = collect(records, "--readme", readme)
    return status, [line for line in readme.read_text().splitlines() if line.startswith("|")], err


def test_tasks_are_columns_with_their_mean(records, tmp_path):
    status, table, err = tasks_table(records, tmp_path, "arc_easy_acc,piqa_acc")
    assert status == 0, err
    assert table[0] == "| Method | Sparsity | arc_easy | piqa | Mean |"
    assert table[2] == "| **Dense** | 0% | 70.00 | 80.00 | 75.00 |"
    assert table[4:] == [
        "| **Magnitude** | 50% | 40.0 ± 3.0 | **65.0 ± 4.0** | 52.5 ± 2.5 |",
        "| **Wanda** | 50% | **60.0 ± 3.0** | 50.0 ± 4.0 | **55.0 ± 2.5** |",
        "| **RIA** | 50% | 30.0 ± 3.0 | -- | -- |",
    ]


def test_methods_that_tune_the_whole_model_have_a_block_of_their_own(records, tmp_path):
    write(records / "d", "magnitude+model", 0.9, 0.9, whole_model=True)
    table = tasks_table(records, tmp_path, "arc_easy_acc,piqa_acc")[1]
    assert "**60.0 ± 3.0**" in table[5] and table[7] == "| *Whole-model* | | | | |"
    assert table[8:] == ["| **Magnitude + distillation** | 50% | 90.0 ± 3.0 | 90.0 ± 4.0 | 90.0 ± 2.5 |"]


def test_metrics_of_two_directions_have_no_mean(tmp_path):
    metrics = {"arc_easy_acc": 0.5, "demo_perplexity": 9.0}
    write_record(tmp_path / "o" / "a", metrics=metrics, dense_metrics=metrics)
    status, _, err = tasks_table(tmp_path / "o", tmp_path, "arc_easy_acc,demo_perplexity")
    assert status == 2 and "have no mean" in err


def test_the_mean_of_a_records_tasks_is_a_metric(records):
    table = collect(records, "--metric", "mean_acc")[1]
    assert "| **Dense** | 0% | 75.00 |" in table and "| **Wanda** | 50% | **55.0 ± 2.5** |" in table and "RIA" not in table
    text = collect(records, "--format", "csv")[1]
    head, *lines = (line.split(",") for line in text.splitlines())
    values = {(line[head.index("pruner")], line[head.index("metric")]): line for line in lines}
    assert float(values["wanda", "arc_easy_acc"][head.index("stderr")]) == 0.03, "fractions, as in records"
    assert not [metric for _, metric in values if metric.endswith("_stderr")]


def test_several_seeds_show_their_own_deviation(tmp_path):
    for seed, value in enumerate((0.5, 0.54)):
        write(tmp_path / "o" / str(seed), "wanda", value, 0.5, **config(seed))
    assert "52.0 ± 2.8" in collect(tmp_path / "o", "--metric", "arc_easy_acc")[1]


def test_metrics_of_opposite_or_unknown_directions(tmp_path):
    for pruner, one in (("wanda", 0.5), ("ria", 0.6)):
        metrics = {"a_acc": one, "b_perplexity": 20.0, "top_one": one}
        write_record(tmp_path / "o" / pruner, pruner=pruner, metrics=metrics, dense_metrics=metrics)
    status, _, err = collect(tmp_path / "o", "--layout", "tasks", "--metric", "a_acc,b_perplexity")
    assert status == 2 and "higher is better for some only" in err
    status, out, _ = collect(tmp_path / "o", "--layout", "tasks", "--metric", "a_acc,top_one")
    assert status == 0 and "| **RIA** | 50% | 60.00 | 0.60 |" in out, "nothing is marked"
