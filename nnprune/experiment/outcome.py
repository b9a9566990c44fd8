"""The outcome of a run: the record of a failure, and one line about either."""

import logging
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import run_folder
from nnprune.records import RecordError, RunRecord, fingerprint, read, with_stderr

log = logging.getLogger(__name__)


def record_failure(cfg: DictConfig, experiment: Experiment | None, error: Exception) -> None:
    """Write a record with status "failed" in place of the run's own, if anything can be written there."""
    log.debug("failed", exc_info=True)
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    outputs = ""
    with suppress(OmegaConfBaseException):  # such as ${oc.env:X} with X unset
        outputs = OmegaConf.select(cfg, "outputs")
    if not outputs or not isinstance(outputs, str):
        return
    model, pattern, label = config.get("model") or {}, str(config.get("sparsity")), str(config.get("label") or "custom")
    name = str(model.get("name") or Path(str(model.get("path"))).name)
    config["sparsity"], config["grid"] = {"pattern": pattern}, None
    identity = {key: value for key, value in config.items() if key not in ("runtime", "outputs", "objective", "tracking")}
    record = RunRecord("failed", fingerprint(identity), name, label, pattern, config=config, error=f"{error}")
    folder = run_folder(outputs, name, pattern, label, record.fingerprint)
    if experiment is not None:
        record.fingerprint, record.sparsity, folder = experiment.fingerprint, str(experiment.pattern), experiment.folder
    with suppress(OSError):
        if _is_replaceable(folder):
            record.write(folder)
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        error.add_note(f"the traceback is in {folder / 'run.log'}")


def _is_replaceable(folder: Path) -> bool:
    """Whether a failure may be recorded in this folder: only the record of an earlier failure is replaced."""
    try:
        record = read(folder)
    except RecordError:
        return False
    return record is None or record.status == "failed"


def one_line(error: Exception) -> str:
    """The message of an error, on one line."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(text.split())


def summary(record: RunRecord) -> str:
    """One line with model, pruner, sparsity, metrics and, but for a cell of a grid, time."""
    figures = [
        f"{name} {float(value):.4g}"
        + (f" ± {float(stderr):.2g}" if stderr is not None else "")
        + (f" (dense {float(record.dense_metrics[name]):.4g})" if record.pruner != "dense" else "")
        for name, (value, stderr) in with_stderr(record.metrics).items()
    ]
    parts = [record.model, record.pruner, record.sparsity, ", ".join(figures) or "not evaluated"]
    if "total" in record.seconds:
        parts.append(f"{record.seconds['total']:.1f} s")
    return "  ".join(parts)
