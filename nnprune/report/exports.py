"""The collector's frame as CSV and JSON, a row for each record and metric. Names are as in the records."""

import csv
import json
import math

import pandas as pd

from nnprune.report.frame import OBJECTS


def to_csv(rows: pd.DataFrame) -> str:
    """CSV with a head, missing values empty."""
    rows = rows.drop(columns=OBJECTS)
    text = rows.to_csv(index=False)
    # Python's csv leaves a carriage return unquoted, and readers take it for the end of a row.
    return rows.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC) if "\r" in text else text


def to_json(rows: pd.DataFrame) -> str:
    """A JSON list of objects. NaN and infinities, which JSON has no numbers for, are null."""
    rows = rows.drop(columns=OBJECTS)
    finite = rows.astype(object).where(rows.notna() & ~rows.isin([math.inf, -math.inf]), None)
    return json.dumps(finite.to_dict("records"), indent=2) + "\n"  # DataFrame.to_json rounds to 10 digits


FORMATS = {"csv": to_csv, "json": to_json}
