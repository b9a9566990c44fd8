"""The collector's commands: tables on stdout, documents rewritten and checked, exports, errors."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.records import collect, write_record, write_runs

from nnprune.report import frame as frame_module

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "collect.py"
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


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "outputs")


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    return path


def test_layout_bold_missing_and_large_values(runs):
    assert collect(runs, "--metric", "demo_perplexity") == (0, TABLE + "\ndemo_perplexity: 15 record(s) used\n\n", "")


def test_readme_is_rewritten_and_stays_put(runs, readme):
    status, out, err = collect(runs, "--readme", readme)
    text = readme.read_text(encoding="utf-8")
    assert (status, err) == (0, "")
    assert TABLE in out and "15 record(s) used" in out and "4 record(s) used" in out
    assert f"demo_perplexity -->\n\n{TABLE}\n<!-- /nnprune:table -->\nbetween\n" in text
    second = "| **Dense** | 0% | 22.02 | 27.65 |\n| | | | |\n| **Wanda** | 50% | 36.52 | 38.78 |\n\n<!-- /nnprune"
    assert second in text  # its own order of models, its own pruners and sparsities; alone, so nothing in bold
    assert text.startswith(README[: README.index("old")]) and text.endswith("the end\n")
    assert "already up to date" in collect(runs, "--readme", readme)[1]
    assert readme.read_text(encoding="utf-8") == text
    assert [path.name for path in sorted(readme.parent.iterdir())] == ["README.md", "outputs"]  # no temporary file


def test_check(runs, readme):
    assert collect(runs, "--readme", readme, "--check")[0] == 1
    assert readme.read_text(encoding="utf-8") == README
    collect(runs, "--readme", readme)
    assert collect(runs, "--readme", readme, "--check")[:2] == (0, "README.md: 2 table(s) match the records\n")
    readme.write_text(readme.read_text(encoding="utf-8").replace("197.38", "197.39"), encoding="utf-8")
    status, out, _ = collect(runs, "--readme", readme, "--check")
    assert status == 1
    assert "-| **Magnitude** | 50% | 197.39 | 97.11 |\n+| **Magnitude** | 50% | 197.38 | 97.11 |" in out


def test_default_files_are_updated_and_checked_together(runs, readme, monkeypatch):
    monkeypatch.chdir(readme.parent)
    assert collect(runs)[1].endswith("README.md: 2 table(s) rewritten\n")
    methods = readme.parent / "docs" / "methods.md"
    methods.parent.mkdir()
    methods.write_text("nothing to fill yet\n", encoding="utf-8")
    assert collect(runs, "--check")[:2] == (0, "README.md: 2 table(s) match the records\n")
    marker = "<!-- nnprune:table metric=demo_perplexity models=opt-125m layout=methods -->\n"
    methods.write_text(marker, encoding="utf-8")
    assert (
        collect(runs)[2] == "nnprune-collect: docs/methods.md:1: table without an end; add <!-- /nnprune:table --> below it\n"
    )
    methods.write_text(marker + "<!-- /nnprune:table -->\n", encoding="utf-8")
    status, out, _ = collect(runs, "--check")
    assert status == 1 and out.startswith("--- docs/methods.md\n") and "README.md" not in out
    out = collect(runs)[1]
    assert out.endswith("docs/methods.md: 1 table(s) rewritten\nREADME.md: 2 table(s) already up to date\n")
    assert "| **Wanda** | 38.78 | 79.65 |" in methods.read_text(encoding="utf-8")
    assert collect(runs, "--check")[:2] == (0, "README.md, docs/methods.md: 3 table(s) match the records\n")
    readme.write_text(README.replace("metric=demo_perplexity -->", "metric=nothing -->"), encoding="utf-8")
    methods.write_text(marker + "<!-- /nnprune:table -->\n", encoding="utf-8")
    assert collect(runs)[0] == 2 and "Wanda" not in methods.read_text(encoding="utf-8")  # all files or none


def test_a_folder_without_marked_tables_gets_them_printed(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert collect(runs) == (0, TABLE + "\ndemo_perplexity: 15 record(s) used\n\n", "")
    (tmp_path / "README.md").write_text("a project of its own\n", encoding="utf-8")
    assert collect(runs)[0] == 0 and collect(runs, "--check")[0] == 2
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "a project of its own\n"


def test_line_ends_are_kept(runs, readme):
    readme.write_bytes(README.replace("\n", "\r\n").encode())
    collect(runs, "--readme", readme)
    content = readme.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 20
    assert collect(runs, "--readme", readme, "--check")[0] == 0


def test_csv_and_json_parse_back(runs):
    rows = list(csv.DictReader(io.StringIO(collect(runs, "--format", "csv")[1])))
    objects = json.loads(collect(runs, "--format", "json")[1])
    assert len(rows) == len(objects) == 15
    assert list(rows[0]) == list(objects[0]) == [*frame_module.COLUMNS, "num_seeds", "mean", "std", "variant"]
    for row, item in zip(rows, objects, strict=True):
        assert row["path"] == item["path"] and float(row["value"]) == item["value"]
    one = next(item for item in objects if (item["pruner"], item["model"]) == ("alps", "opt-125m"))
    assert (one["value"], one["dense_value"], one["sparsity"]) == (60.004, 27.65, "2:4")
    assert (one["peak_host_bytes"], one["seconds"]) == (2**40 + 1, 12.25)


def test_values_that_json_lacks_become_null(tmp_path):
    write_record(tmp_path / "o" / "a", peak_host_bytes=None, metrics={"demo_perplexity": None, "arc_acc": 0.25})
    write_record(tmp_path / "o" / "b", pruner="magnitude", metrics={"demo_perplexity": 20.0, "arc_acc": 0.125})
    by_metric = {r["metric"]: r for r in json.loads(collect(tmp_path / "o", "--format", "json")[1])[:2]}
    assert by_metric["demo_perplexity"]["value"] is by_metric["arc_acc"]["peak_host_bytes"] is None
    out = collect(tmp_path / "o", "--format", "markdown")[1]
    assert (
        "| **Wanda** | 50% | -- |" in out and "| **Wanda** | 50% | **25.00** |" in out
    )  # more accuracy is better, in per cent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metric", "perplexty"], "--metric perplexty: no record has this metric; known: demo_perplexity"),
        (["--plot", "figure.docx"], "unknown suffix '.docx'; use one of .png"),
        (["--plot", "nowhere/figure.png"], "the folder nowhere does not exist"),
        (["--format", "xml"], "--format: invalid choice: 'xml'"),
        (["--check", "--metric", "demo_perplexity"], "--check compares whole files"),
        (["--check", "--by", "pruner.alpha"], "--check compares whole files: leave out --by"),
        (["--check", "--html", "a.html"], "--check and --html do not go together"),
        (["--format", "csv", "--plot", "a.png"], "--format and --plot do not go together"),
        (["--html", "a.html", "-o", "b.md"], "--output and --html do not go together"),
        (["--bibtex", "--by", "pruner.alpha"], "--by and --bibtex do not go together"),
        (["--metric", "demo_perplexity", "--readme", "a.md"], "--readme is for rewriting"),
        (["--kind", "pareto"], "--kind and tables do not go together"),
        (["--costs"], "--costs is for --layout methods"),
        (["--layout", "models", "--relative", "wanda"], "--relative is for --layout methods"),
        (["--layout", "methods", "--relative", "ria"], "--relative ria: no record has this pruner; known: alps, dense"),
        (["--by", "pruner.alpha", "--layout", "methods"], "--by and --layout do not go together"),
        (["--by", "seed"], "--by seed: runs that differ in it alone are averaged; --format csv has a row for each"),
        (["--by", "pruner.alpha"], "--by pruner.alpha: no record has this setting; those in which records differ: none"),
        (["-o", "table.docx"], "-o table.docx: unknown suffix '.docx'; use one of .md, .tex, .csv, .json"),
        (["-o", "nowhere/table.md"], "-o nowhere/table.md: the folder nowhere does not exist"),
        (["--html", "nowhere/report.html"], "--html nowhere/report.html: the folder nowhere does not exist"),
        (["--models", "demo", "--html", "report.html"], "--html: no record passes --models"),
        (["--layout", "methods", "-o", "table.csv"], "csv and json have a row for each record; leave --layout out"),
        (["--readme", "nowhere.md"], "--readme nowhere.md: No such file"),
        (["--records", "nowhere"], "--records nowhere: no such folder"),
    ],
)
def test_usage_errors_are_one_line(runs, argv, message):
    status, out, err = collect(runs, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err


def test_filters_that_match_nothing(runs, readme):
    readme.write_text(README.replace("models=opt-350m,opt-125m", "models=opt-350m,opt-13b"), encoding="utf-8")
    status, out, err = collect(runs, "--readme", readme)
    assert status == 0 and "| **Wanda** | 50% | 36.52 | -- |" in out
    assert err == "warning: models=opt-13b: no record with demo_perplexity has it\n"


def test_as_a_program_without_records_and_without_torch(tmp_path):
    code = f"import sys, runpy; sys.argv = ['c', '--records', {str(tmp_path)!r}]\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "finally: assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("nnprune-collect: no completed records under ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("program", [[str(SCRIPT)], ["-m", "nnprune.collect"]], ids=["script", "module"])
def test_records_and_files_are_those_of_the_current_folder(tmp_path, program):
    write_record(tmp_path / "outputs" / "a", value=12.34)
    (tmp_path / "README.md").write_text(README.split("between")[0], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("README.md: 1 table(s) rewritten\n")
    assert "| **Wanda** | 50% | 12.34 |" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_terminal_of_another_encoding(tmp_path):
    write_record(tmp_path / "outputs" / "a", pruner="größe")
    command = [sys.executable, str(SCRIPT), "--metric", "demo_perplexity"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"| **gr\xf6\xdfe** | 50% | 21.98 |" in done.stdout


ODD_NAMES = ["a,b", 'say "x"', "two\nlines", "carriage\rreturn", "carriage\r\nline", " spaces ", "-1", "=1+1", "ünï", "", "nan"]


def test_any_name_survives_csv_and_json(tmp_path):
    for number, name in enumerate(ODD_NAMES):
        write_record(tmp_path / "o" / f"{number:02}", pruner=name, model=name[::-1])
    rows = list(csv.DictReader(io.StringIO(collect(tmp_path / "o", "--format", "csv")[1], newline="")))
    objects = json.loads(collect(tmp_path / "o", "--format", "json")[1])
    for found in (rows, objects):
        assert [row["pruner"] for row in found] == ODD_NAMES
        assert [row["model"] for row in found] == [name[::-1] for name in ODD_NAMES]
