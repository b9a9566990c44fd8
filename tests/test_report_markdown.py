"""Marked tables in Markdown files, and names that could break them."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.records import collect, write_record, write_runs

from nnprune.report.escaping import UNNAMED, escape_markdown, visible
from nnprune.report.labels import pretty_pruner

MARKED = "# Head\n\n<!-- nnprune:table metric=demo_perplexity -->\nold\n<!-- /nnprune:table -->\n\nThe end.\n"


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "outputs")


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
def test_readme_errors_are_one_line_and_write_nothing(runs, tmp_path, text, message):
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    status, out, err = collect(runs, "--readme", readme)
    assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert readme.read_text(encoding="utf-8") == text


def cells_of(line):
    """The cells of a row of a GitHub table as a reader sees them: bars behind a backslash separate nothing."""
    assert line.startswith("|") and line.endswith("|")
    return [shown(cell.strip()) for cell in re.findall(r"((?:\\.|[^\\|])*)\|", line[1:])]


def shown(cell):
    cell = cell.removeprefix("**").removesuffix("**")
    cell = cell.replace("&lt;", "<").replace("&amp;", "&")
    return re.sub(r"\\([\\`*\[\]|~$_])", r"\1", cell)


@settings(max_examples=50)
@given(label=st.text(st.characters(exclude_categories=["Cs"]), max_size=30), model=st.text("ab|\\`<>!-$_*&\n ", max_size=30))
@example(label="a|b", model="`code|")
@example(label="a\\", model="\\|")
@example(label="a\nb\r\nc\x0bd\x85e\u2028f", model="x\n<!-- /nnprune:table -->\ny")
@example(label="<!-- nnprune:table metric=x -->", model="<!-- /nnprune:table -->")
@example(label="&lt;b&gt; &amp; &#124;", model="**bold** _it_ __x__ ~~no~~ $x$")
@example(label="```", model="[a](b)")
@example(label="", model=" ")
def test_any_label_is_one_row_of_the_table_and_a_second_rewrite_changes_nothing(label, model):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_record(root / "o" / "a", model=model, pruner=f"{label}", value=20.0)
        write_record(root / "o" / "b", model=model, pruner="ria", value=30.0)
        readme = root / "README.md"
        readme.write_text(MARKED)
        assert collect(root / "o", "--readme", readme)[0] == 0
        text = readme.read_text()
        assert text.startswith(MARKED[: MARKED.index("old")]) and text.endswith("\n<!-- /nnprune:table -->\n\nThe end.\n")
        assert text.count("nnprune:table") == 2 + label.count("nnprune:table") + model.count("nnprune:table")
        assert len(re.findall("<!--", text)) == 2
        assert collect(root / "o", "--readme", readme, "--check")[0] == 0
        collect(root / "o", "--readme", readme)
        assert readme.read_text() == text
    rows = [cells_of(line) for line in text.split("\n") if line.startswith("|")]
    assert {len(row) for row in rows} == {3} and len(rows) == 6
    assert rows[0][2] == (visible(model) or UNNAMED)
    names = [row[0] for row in rows if row[2] in ("20.00", "**20.00**")]
    if pretty_pruner(label) == label and label not in ("Dense", "RIA"):
        assert names == [visible(label) or UNNAMED]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("best_fast", "best_fast"),
        ("_private__x_", r"\_private\_\_x\_"),
        ("a|b\\|", r"a\|b\\\|"),
        ("`x`", r"\`x\`"),
        ("*a* ~b~ $c$ [d](e)", r"\*a\* \~b\~ \$c\$ \[d\](e)"),
        ("<!-- nnprune:table -->", "&lt;!-- nnprune:table -->"),
        ("R&D &lt; &#124;", "R&amp;D &amp;lt; &amp;#124;"),
        (" a \r\n\tb\x00\u202e", r"a b\\x00\\u202e"),
    ],
)
def test_escapes(text, escaped):
    assert escape_markdown(text) == escaped


def test_a_file_that_is_no_text_or_cannot_be_written(runs, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_bytes(b"\xff\xfe")
    status, out, err = collect(runs, "--readme", readme)
    assert (status, out, err) == (2, "", f"nnprune-collect: --readme {readme}: is no UTF-8 text; name a Markdown file\n")
    readme.write_text(MARKED)

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.fsync", refuse)
    status, _, err = collect(runs, "--readme", readme)
    assert (status, err) == (
        2,
        f"nnprune-collect: {readme}: cannot be written (Permission denied); make it writable, or make room\n",
    )
    assert readme.read_text() == MARKED
