"""The entry point: `python -m nnprune.run`, the console script `nnprune`, and `nnprune.prune(...)`. The order of steps only."""

import logging
import os
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from nnprune.experiment.command_line import GRID, check_outputs_of_sweep, gather_grid, is_grid, rewrite_sparsity
from nnprune.records import RESULT_FILE, RunRecord, fingerprint, read_completed

log = logging.getLogger("nnprune")

PACKAGE = Path(__file__).parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())

BESIDE = {"allocation": "uniform", "target": "dense", "update": "none", "recover": "none"}
"""Groups that change a method, and what leaves it as it is."""


class RunFailed(CompactHydraException):
    """One line for the user instead of a traceback, which is in the run's log."""


def run(cfg: DictConfig, pruner: Any = None) -> RunRecord:
    """Prune and evaluate as `cfg` says, with `pruner` in place of the config's if given, and return the record.

    A finished run is not repeated, and an interrupted one goes on where it stopped. Whatever fails is recorded before it
    is raised.
    """
    from nnprune.experiment.build import build
    from nnprune.experiment.folder import locked, logged
    from nnprune.experiment.job import Job

    experiment = None
    try:
        experiment = build(cfg, pruner)
        with locked(experiment.folder), logged(experiment.folder):
            record = _finished(experiment)
            if record is None:
                record = Job(experiment).run()
                log.info(_summary(record))
            else:
                log.info("finished already, nothing to do (overwrite=true runs it again): %s", _summary(record))
            log.info("record: %s", experiment.folder / RESULT_FILE)
            return record
    except Exception as error:
        _record_failure(cfg, experiment, error)
        raise


def run_grid(cfgs: Sequence[DictConfig]) -> list[RunRecord]:
    """Prune with several methods and patterns in one pass over a model, then evaluate and record each as `run` does.

    `cfgs` differ in pruner and sparsity only. Raises what `run` raises, for the first cell that fails, once the others are
    done.
    """
    from nnprune.experiment.build import build
    from nnprune.experiment.folder import locked
    from nnprune.experiment.grid import check_grid, prune_grid

    experiments = [build(cfg) for cfg in cfgs]
    check_grid(experiments)
    unfinished = []
    for experiment in experiments:
        with locked(experiment.folder):
            if not experiment.is_dense and _finished(experiment) is None:
                unfinished.append(experiment)
    if unfinished:
        prune_grid(unfinished)
    records, failures = [], []
    for cfg in cfgs:
        cfg.overwrite = False  # what there was is gone already, and the finished layers are new
        try:
            records.append(run(cfg))
        except (ValueError, OSError) as error:
            failures.append(error)
            log.error("error: %s", error)
    if failures:
        raise failures[0]
    return records


def show_plan(cfgs: Sequence[DictConfig]) -> None:
    """Print what a run, or a grid of several, would take, without loading weights. Raises ValueError when it does not fit on this
    machine."""
    from nnprune.experiment.build import build
    from nnprune.experiment.cost_estimate import CostEstimate

    cells = [build(cfg) for cfg in cfgs]
    if len(cells) > 1:
        from nnprune.experiment.grid import check_grid

        check_grid(cells)
    estimate = CostEstimate(cells)
    if len(cells) > 1:
        log.info("grid: %d cells", len(cells))
    for stage, seconds in {"stage": "seconds", **estimate.seconds, "total": sum(estimate.seconds.values())}.items():
        log.info(f"{stage:<18}{seconds:>10}" if isinstance(seconds, str) else f"{stage:<18}{seconds:>10.1f}")
    peaks = {"host": estimate.host_bytes, "device": estimate.device_bytes, "disk": estimate.disk_bytes}
    log.info("peak: %s", ", ".join(f"{place} {num_bytes / 2**30:.2f} GiB" for place, num_bytes in peaks.items()))
    if estimate.problems:
        raise ValueError("; ".join(estimate.problems))


def prune(pruner: Any, model_name: str = "demo", sparsity: float | str = 0.5, overrides: Sequence[str] = ()) -> RunRecord:
    """Prune a model with a pruner object and return the record.

    Args:
        pruner: an instance of a subclass of Pruner.
        model_name: "demo", a local directory or a hub id; the latter two calibrate on C4 and evaluate on WikiText-2.
        sparsity: a fraction of zeros such as 0.5, or N:M such as "2:4".
        overrides: further settings as on the command line, such as "calibration.num_samples=32".

    Raises:
        ValueError: a setting that cannot be, with the remedy.
    """
    is_demo = model_name == "demo"
    kind = "demo" if is_demo else "local" if Path(model_name).is_dir() else "hub"
    settings = rewrite_sparsity([f"model={kind}", "pruner=custom", *overrides])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", settings)
    cfg.sparsity.pattern = str(sparsity)
    if not is_demo:
        cfg.model.path = str(model_name)
    plain = {key: value for key, value in vars(pruner).items() if _is_plain(value)}
    kind = type(pruner)
    cfg.pruner = {"_target_": f"{kind.__module__}.{kind.__qualname__}", **plain}
    return run(cfg, pruner)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> None:
    failure = None
    try:
        if cfg.label is None:
            chosen = HydraConfig.get()
            cfg.label = _label(cfg, chosen.runtime.choices, chosen.overrides.task)
        if cfg.plan:
            show_plan(_cells(cfg) if is_grid(cfg) else [cfg])
        elif is_grid(cfg):
            run_grid(_cells(cfg))
        else:
            run(cfg)
    except (ValueError, OSError) as error:  # what a user can mend
        failure = " ".join(_one_line(error).split())
        log.error("error: %s", failure)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        log.error("unexpected error\n%s", traceback.format_exc())  # as text: a kept log record would keep the model alive too
    if failure:  # raised out here: Hydra keeps it for the whole sweep, and a traceback would keep the model alive
        raise RunFailed(failure)


def _label(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """What to call the method: as its option of `pruner`, or as its class where that is the user's own, and with what was
    asked for beside it: wanda+refit."""
    name = choices["pruner"]
    if name == "custom":
        name = str(OmegaConf.select(cfg, "pruner._target_", default=name)).split(".")[-1]
    asked = {entry.partition("=")[0] for entry in overrides}
    return "+".join([name, *(choices[key] for key, plain in BESIDE.items() if key in asked and choices[key] != plain)])


def _cells(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the ordinary runs that a grid stands for."""
    hydra_config = HydraConfig.get()
    overrides = [entry for entry in hydra_config.overrides.task if entry.partition("=")[0] not in ("grid", *GRID)]
    pruners = cfg.grid.get("pruner") or [hydra_config.runtime.choices["pruner"]]
    patterns = cfg.grid.get("sparsity") or [cfg.sparsity.pattern]
    cells = []
    for pruner in pruners:
        for pattern in patterns:
            cell = compose("config", rewrite_sparsity([*overrides, f"pruner={pruner}", f"sparsity={pattern}"]))
            cell.label = cell.label or _label(cell, {**hydra_config.runtime.choices, "pruner": pruner}, overrides)
            cells.append(cell)
    return cells


def main() -> None:
    """Run what the command line says."""
    sys.path.insert(0, os.getcwd())  # a user's own pruner is imported from the folder they are in
    sys.argv[1:] = rewrite_sparsity(gather_grid(sys.argv[1:]))
    try:
        check_outputs_of_sweep(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
    _main()


def _finished(experiment: Any) -> RunRecord | None:
    """The record of this experiment if it is completed, to be kept, and has all that was asked for."""
    from nnprune.experiment.job import SCRATCH

    folder, config = experiment.folder, experiment.config
    if config["overwrite"]:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        (folder / RESULT_FILE).unlink(missing_ok=True)
        return None
    record = read_completed(folder)
    if record is None or (config["save"] and not (folder / "model").is_dir()):
        (folder / RESULT_FILE).unlink(missing_ok=True)
        return None
    return record


def _record_failure(cfg: DictConfig, experiment: Any, error: Exception) -> None:
    """Leave a record of status failed where the run's own would be, if anything can be written there."""
    from nnprune.experiment.build import run_folder

    log.debug("failed", exc_info=True)
    config = OmegaConf.to_container(cfg, resolve=False)
    if not config.get("outputs"):
        return
    model, sparsity = config.get("model") or {}, config.get("sparsity") or {}
    name = str(model.get("name") or Path(str(model.get("path"))).name)
    identity = {key: value for key, value in config.items() if key not in ("runtime", "outputs")}
    pattern, label = str(sparsity.get("pattern")), str(config.get("label") or "custom")
    record = RunRecord("failed", fingerprint(identity), name, label, pattern, config=config, error=f"{error}")
    folder = run_folder(str(config["outputs"]), name, pattern, label, record.fingerprint)
    if experiment is not None:
        record.fingerprint, record.sparsity, folder = experiment.fingerprint, str(experiment.pattern), experiment.folder
    try:
        if not (folder / RESULT_FILE).exists():  # never over a record that is there, readable or not
            record.write(folder)
        with (folder / "run.log").open("a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
    except OSError:
        pass


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _is_plain(value: Any) -> bool:
    """Whether an attribute of a pruner can be an option of it: numbers, text, and non-empty lists and dicts of such."""
    if isinstance(value, list | tuple | dict):
        entries = value.values() if isinstance(value, dict) else value
        return len(value) > 0 and all(map(_is_plain, entries))
    return isinstance(value, bool | int | float | str | None)


def _summary(record: RunRecord) -> str:
    """One line with what was asked for and what came out."""
    figures = [
        f"{name} {float(value):.4g}" + (f" (dense {float(record.dense_metrics[name]):.4g})" if record.pruner != "dense" else "")
        for name, value in record.metrics.items()
    ]
    seconds = record.seconds.get("total", 0)
    return f"{record.model}  {record.pruner}  {record.sparsity}  {', '.join(figures) or 'not evaluated'}  {seconds:.1f} s"


if __name__ == "__main__":
    main()
