"""Records for the tests of the collector, and the collector's command line."""

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from nnprune.collect import main
from nnprune.records import RESULT_FILE, RunRecord

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


def write_record(
    folder: Path,
    model: str = "demo",
    pruner: str = "wanda",
    sparsity: str = "0.5",
    value: float | str = 21.98,
    dense: float = 15.0,
    **changes: Any,
) -> Path:
    """Write `folder`/result.json of a completed run; its fingerprint is the number of folders beside it."""
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
    return write_json(folder, asdict(RunRecord(model=model, pruner=pruner, sparsity=sparsity, **(fields | changes))))


def write_json(folder: Path, content: Any) -> Path:
    """Write any content as `folder`/result.json. No fsync, unlike `RunRecord.write`: these are hundreds of files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULT_FILE
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_runs(folder: Path) -> Path:
    """Write the records of RUNS below `folder`, and return it."""
    for (pruner, sparsity), values in RUNS.items():
        for (model, dense), value in zip(DENSE.items(), values, strict=True):
            if value is not None:
                write_record(folder / f"{model}-{pruner}-{sparsity}", model, pruner, sparsity, value, dense)
    return folder


def config(seed: int, calibration_seed: int | None = None, **more: Any) -> dict[str, Any]:
    """A record's `config` with these seeds."""
    calibration = {"num_samples": 8, "seed": seed if calibration_seed is None else calibration_seed}
    return {"config": {"seed": seed, "calibration": calibration, **more}}


def collect(records: Path, *argv: Any) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the collector with these records and options."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = main(["--records", str(records), *map(str, argv)])
    return status, out.getvalue(), err.getvalue()


def demo_table(records: Path) -> tuple[str, str]:
    """The Markdown table of demo_perplexity, and stderr."""
    status, out, err = collect(records, "--metric", "demo_perplexity")
    assert status == 0, err
    return out.split("\ndemo_perplexity")[0], err
