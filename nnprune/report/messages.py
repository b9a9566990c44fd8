"""What the collector says: errors, warnings on stderr, tables on stdout."""

import sys

from nnprune.report.escaping import visible
from nnprune.report.rendering import to_markdown
from nnprune.report.tables import Table


class UsageError(Exception):
    """Wrong use: one line that names the fault and the remedy. Exit status 2."""


class NoRecordsError(Exception):
    """No record to show. Exit status 1."""


def warn(lines: list[str]) -> None:
    """Print each line once: two tables may share a cell."""
    for line in dict.fromkeys(lines):
        print(f"warning: {visible(line)}", file=sys.stderr)


def print_table(table: Table) -> None:
    print(to_markdown(table), f"\n{visible(table.caption)}: {table.num_records} record(s) used\n", sep="")
