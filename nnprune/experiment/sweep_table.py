"""What came of each run of a sweep: a line in the sweep's folder, whatever process it ran in, and a table of all at the end."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nnprune.records import RunRecord
from nnprune.report.metrics import higher_is_better

FILE = "outcomes.jsonl"
STATUSES = ("done", "skipped", "failed")
SETTINGS = ("model", "pruner", "sparsity")
BOLD, PLAIN = "\033[1m", "\033[0m"

folder: Path | None = None
"""Of the sweep that this process has started."""


class SweepTable(Callback):
    """Remembers the folder of a sweep, for `show`, as nothing but a callback learns of it under every launcher and sweeper."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        global folder
        folder = Path(config.hydra.sweep.dir)


def objective(cfg: DictConfig, record: RunRecord) -> tuple[str, float | None]:
    """Name and value of the metric that a sweeper optimises: `objective`, or the first perplexity, or the first metric, of the
    evaluations that `cfg` asks for: a record may hold others.

    None if it was not measured.
    """
    entries = {entry["name"]: entry for entry in record.evaluations.values()}
    asked = [metric for name in _evaluations(cfg.evaluation) if name in entries for metric in entries[name]["metrics"]]
    name = cfg.objective or next((one for one in asked if one.endswith("perplexity")), next(iter(asked), ""))
    return name, record.metrics.get(name)


def _evaluations(settings: Mapping[str, Any]) -> list[str]:
    """The names of the evaluators that nnprune/evaluation/evaluation.py makes of these settings."""
    tasks = settings.get("tasks") or []
    texts = [*(settings.get("datasets") or {}), *(["text"] if settings.get("path") else [])]
    return [*texts, *([tasks] if isinstance(tasks, str) else tasks)]


def is_in_sweep() -> bool:
    """Whether this process is running a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def number_lines() -> str:
    """Let all lines of this process, one of several that run a sweep's jobs, begin with the job's number, which is returned; and
    let it show no progress bars, which would overwrite each other's."""
    os.environ["TQDM_DISABLE"] = "1"
    prefix = f"[{HydraConfig.get().job.num}] "
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    return prefix


def note(cfg: DictConfig, status: str, record: RunRecord | None = None, error: str = "") -> None:
    """Add a run to the outcomes of its sweep, if it is part of one."""
    if not is_in_sweep():
        return
    job = HydraConfig.get()
    typed = {key.lstrip("+~"): value for key, _, value in (one.partition("=") for one in job.overrides.task) if key != "grid"}
    cell = {key: value for key, value in (cfg.grid or {}).items() if isinstance(value, str)}  # a list is of all cells
    settings = typed | cell
    option = settings.get("pruner")
    name, value = objective(cfg, record) if record else (cfg.objective or "", None)
    settings |= {
        "model": record.model if record else str(OmegaConf.select(cfg, "model.name") or OmegaConf.select(cfg, "model.path")),
        "pruner": record.pruner if record else str(cfg.label),
        "sparsity": record.sparsity if record else str(cfg.sparsity),
    }
    row = {
        "job": job.job.num,
        "cell": str(cfg.grid or ""),
        "settings": settings,
        "option": option,
        "status": status,
        "metric": name,
        "value": value,
    }
    row |= {"error": error, "whole_model": bool(record and record.whole_model)}
    with (Path(job.runtime.output_dir) / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def note_failure(cfg: DictConfig, error: str) -> None:
    """Add a failed job to the outcomes of its sweep, unless a run of it is there as failed."""
    if is_in_sweep() and all(row["status"] != "failed" for row in _rows(Path(HydraConfig.get().runtime.output_dir))):
        note(cfg, "failed", error=error)


def show() -> None:
    """Print the table of the sweep that this process has started, if any run of it has ended."""
    rows = _rows(folder) if folder else []
    if not rows:
        return
    counts = [f"{number} {status}" for status in STATUSES if (number := sum(row["status"] == status for row in rows))]
    print(f"\nsweep: {len(rows)} runs, {', '.join(counts)}", *_lines(rows, sys.stdout.isatty()), sep="\n", flush=True)


def _rows(root: Path) -> list[dict[str, Any]]:
    """The last outcome of each run, by number of the job and the cell of its grid: one that was preempted has several."""
    rows = {}
    for path in root.rglob(FILE):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows[row["job"], row["cell"]] = row
    return sorted(rows.values(), key=lambda row: row["job"])


def _lines(rows: list[dict[str, Any]], is_terminal: bool) -> list[str]:
    """The table: what differs between the runs, the metric, and what came out; the best of each model and sparsity in bold."""
    if len({row["settings"]["pruner"] for row in rows}) == 1 < len({row["option"] for row in rows}):  # all have one `label`
        rows = [{**row, "settings": row["settings"] | {"pruner": row["option"]}} for row in rows]
    keys = dict.fromkeys(key for row in rows for key in (*SETTINGS, *row["settings"]))
    varying = [key for key in keys if len({row["settings"].get(key) for row in rows}) > 1]
    metrics = list(dict.fromkeys(row["metric"] for row in rows if row["value"] is not None))
    table, bold = [["#", *varying, *metrics, ""]], {0: False}
    for row in rows:
        values = [f"{row['value']:.4g}" if row["metric"] == metric and row["value"] is not None else "--" for metric in metrics]
        outcome = f"failed: {row['error']}" if row["status"] == "failed" else row["status"]
        table.append([str(row["job"]), *(row["settings"].get(key, "--") for key in varying), *values, outcome])
        bold[len(table) - 1] = is_terminal and _is_best(row, rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    texts = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
    return [f"{BOLD}{text}{PLAIN}" if bold[place] else text for place, text in enumerate(texts)]


def _is_best(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether no other of several runs of the same model and sparsity has a better value: a higher accuracy, or a lower loss; none has
    where it is not known which is better. Those that tune the whole model have only each other as rivals."""

    def group(one: dict[str, Any]) -> tuple:
        return one["metric"], one["whole_model"], one["settings"]["model"], one["settings"]["sparsity"]

    rivals = [one["value"] for one in rows if one["value"] is not None and group(one) == group(row)]
    is_higher = higher_is_better(row["metric"])
    best = max if is_higher else min
    return is_higher is not None and row["value"] is not None and len(rivals) > 1 and row["value"] == best(rivals)
