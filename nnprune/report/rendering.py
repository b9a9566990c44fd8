"""Tables (tables.py) as Markdown, LaTeX, CSV and JSON. Names are escaped here and nowhere before."""

import csv
import io
import json
import re

from nnprune.report.escaping import escape_latex, escape_markdown
from nnprune.report.tables import Table

WHOLE_MODEL = "Whole-model"
"""Heading of the methods that tune the whole model, which do not compare with those that hold a layer at a time."""


def to_markdown(table: Table) -> str:
    """A GitHub table, each line ended by a newline. Names are escaped: each row has as many cells as the head."""
    width = len(table.head) + len(table.columns)
    lines = [[*table.head, *map(escape_markdown, table.columns)], [":---"] * width]
    for i, block in enumerate(table.blocks):
        heading = f"*{WHOLE_MODEL}*" if i == table.whole_model else ""
        lines += [[heading, *[""] * (width - 1)]] if i else []
        for row in block:
            name, *extra_head = map(escape_markdown, row.head)
            cells = [f"**{text}**" if best else text for text, best in zip(row.cells, row.best, strict=True)]
            lines.append([f"**{name}**", *extra_head, *cells])
    return "".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) + "\n" for line in lines)


def to_latex(table: Table) -> str:
    """A booktabs table; `\\usepackage{booktabs}` is all it needs."""
    alignment = "l" * len(table.head) + "r" * len(table.columns)
    head = " & ".join(map(escape_latex, [*table.head, *table.columns]))
    lines = [r"\begin{table}", r"  \centering", rf"  \caption{{{escape_latex(table.title)}}}",
             rf"  \label{{tab:{re.sub('[^a-z0-9]+', '-', table.caption.lower()).strip('-')}}}",
             rf"  \begin{{tabular}}{{{alignment}}}", r"    \toprule", rf"    {head} \\"]  # fmt: skip
    for i, block in enumerate(table.blocks):
        lines.append(r"    \midrule")
        if i == table.whole_model:
            lines.append(rf"    \multicolumn{{{len(alignment)}}}{{l}}{{\textit{{{WHOLE_MODEL}}}}} \\")
        for row in block:
            texts = [text.replace("±", r"$\pm$") for text in row.cells]
            cells = [rf"\textbf{{{t}}}" if best else t for t, best in zip(texts, row.best, strict=True)]
            lines.append("    " + " & ".join([*map(escape_latex, row.head), *cells]) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def to_csv(table: Table) -> str:
    """A row a line of the table, cells as text."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[*table.head, *table.columns], *_rows(table)])
    return text.getvalue()


def to_json(table: Table) -> str:
    """A JSON list with an object for each row, cells as text."""
    names = [*table.head, *table.columns]
    return json.dumps([dict(zip(names, row, strict=True)) for row in _rows(table)], indent=2) + "\n"


def _rows(table: Table) -> list[list[str]]:
    return [[*row.head, *row.cells] for block in table.blocks for row in block]


FORMATS = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv, "json": to_json}
