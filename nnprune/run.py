"""The entry point: `python -m nnprune.run`, the console script `nnprune`, and `nnprune.prune(...)`. The order of steps only."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nnprune import __version__
from nnprune.checks import quoted
from nnprune.experiment import command_line, sparsity_options, sweep_table
from nnprune.experiment.command_errors import explain, where_raised
from nnprune.experiment.command_line import CONF, composed, grid_cells, is_grid, label_of, rewrite
from nnprune.records import RESULT_FILE, RunRecord

log = logging.getLogger("nnprune")
sparsity_options.register()

INTERRUPTED = 130
"""Exit status after Ctrl-C."""


class RunFailed(HydraException):
    """One line for the user."""


def run(cfg: DictConfig, pruner: Any = None, keep_layers: bool = False) -> RunRecord:
    """Prune and evaluate as `cfg` says, with `pruner` in place of the config's if given, and return the record.

    A finished run is not repeated, and an interrupted one resumes from its layer files; `keep_layers` keeps them despite
    overwrite=true. An error is recorded before it is raised.
    """
    # Imported here because torch takes seconds to import, which --help and mistyped options do not need.
    from nnprune.engine import parallel
    from nnprune.experiment.build import build
    from nnprune.experiment.folder import locked, logged
    from nnprune.experiment.job import Job
    from nnprune.experiment.outcome import one_line, record_failure, summary
    from nnprune.experiment.reuse import add_evaluations, reusable_record
    from nnprune.experiment.tracked import tracked
    from nnprune.model.push import push_model

    experiment = None
    try:
        with parallel.together():
            experiment = build(cfg, pruner)
        with parallel.together(), locked(experiment.folder), logged(experiment.folder), tracked(experiment) as tracking:
            record, status = reusable_record(experiment, keep_layers), "done"
            if record is None:
                tracking.begin()
                record = Job(experiment).run()
                add_evaluations(experiment, record)  # of the saved model as a whole
                log.info(summary(record))
            elif add_evaluations(experiment, record):
                log.info(summary(record))
            else:
                status = "skipped"
                log.info("finished already, nothing to do (overwrite=true runs it again): %s", summary(record))
            log.info("record: %s", experiment.folder / RESULT_FILE)
            tracking.finish(record)
            if push := experiment.config["push"]:
                parallel.on_rank_0(push_model)(experiment.folder / "model", push)
    except Exception as error:
        if parallel.rank() == 0:
            record_failure(cfg, experiment, error)
            sweep_table.note(cfg, "failed", error=one_line(error))
        raise
    if parallel.rank() == 0:
        sweep_table.note(cfg, status, record)
    return record


def run_grid(cfgs: Sequence[DictConfig]) -> list[RunRecord]:
    """Prune with several methods and patterns in one pass over a model, then evaluate and record each as `run` does.

    `cfgs` may differ in pruner and sparsity only. The first error of a cell is raised after all cells are done.
    """
    from nnprune.engine import parallel
    from nnprune.experiment.build import build
    from nnprune.experiment.folder import locked
    from nnprune.experiment.grid import check_cells, check_grid, prune_grid
    from nnprune.experiment.outcome import one_line
    from nnprune.experiment.reuse import reusable_record

    check_grid(cfgs)
    unfinished = []
    for cfg in cfgs:
        try:
            with parallel.together():
                experiment = build(cfg)
        except ValueError:  # reported and recorded by its own run below
            continue
        check_cells([experiment])
        with locked(experiment.folder):
            if not experiment.is_dense and reusable_record(experiment) is None:
                unfinished.append(experiment)
    if unfinished:
        prune_grid(unfinished)
    records, failures = [], []
    for cfg in cfgs:
        try:
            records.append(run(cfg, keep_layers=True))
        except Exception as error:  # of a method, whatever it is: the other cells go on
            failures.append(error)
    for failure in failures[1:]:
        log.error("Error: %s", one_line(failure))
    if failures:
        raise failures[0]
    return records


def show_estimate(cfgs: Sequence[DictConfig]) -> None:
    """Print a cost estimate of a run or a grid, without loading weights. Raises ValueError if it does not fit this machine."""
    from nnprune.experiment.build import build
    from nnprune.experiment.cost_estimate import CostEstimate
    from nnprune.experiment.grid import check_cells, check_grid

    cells = [build(cfg) for cfg in cfgs]
    if len(cfgs) > 1:
        check_grid(cfgs)
        check_cells(cells)
        log.info("grid: %d cells", len(cfgs))
    estimate = CostEstimate(cells)
    log.info("%-18s%10s", "stage", "seconds")
    for stage, seconds in {**estimate.seconds, "total": sum(estimate.seconds.values())}.items():
        log.info("%-18s%10.1f", stage, seconds)
    peaks = {"host": estimate.host_bytes, "device": estimate.device_bytes, "disk": estimate.disk_bytes}
    log.info("peak: %s", ", ".join(f"{place} {num_bytes / 2**30:.2f} GiB" for place, num_bytes in peaks.items() if num_bytes))
    if estimate.problems:
        raise ValueError("; ".join(estimate.problems))


def prune(pruner: Any, model_name: str = "demo", sparsity: float | str = 0.5, overrides: Sequence[str] = ()) -> RunRecord:
    """Prune a model with a pruner object and return the record.

    Args:
        pruner: an instance of a subclass of Pruner.
        model_name: "demo", a local directory or a hub id; the latter two calibrate on C4 and evaluate on WikiText-2.
        sparsity: a fraction of zeros such as 0.5, or N:M such as "2:4".
        overrides: further settings as on the command line, such as "calibration.num_samples=32"; none of pruner, sparsity, grid,
            plan and experiment, nor a model if `model_name` is given.

    Raises:
        ValueError: an invalid setting, with the remedy.
    """
    from nnprune.engine import parallel
    from nnprune.experiment.overrides import check_overrides
    from nnprune.experiment.own_objects import settings_of, state_of

    parallel.start()
    if isinstance(pruner, str | type):
        raise ValueError(f"pruner={quoted(pruner)}: must be an object, such as nnprune.pruners.wanda.Wanda()")
    is_demo = model_name == "demo"
    check_overrides(overrides, has_model=not is_demo)
    kind = "demo" if is_demo else "local" if Path(model_name).is_dir() else "hub"
    plain, method, state = settings_of(pruner), type(pruner), state_of(pruner)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg, choices = composed([f"model={kind}", "pruner=custom", *overrides])
        cfg.sparsity = str(sparsity)
        if not is_demo:
            cfg.model.path = str(model_name)
        cfg.pruner = {
            "_target_": f"{method.__module__}.{method.__qualname__}",
            **plain,
            **({"state_hash": state} if state else {}),
        }
        cfg.label = cfg.label or label_of(cfg, choices, overrides)
    return run(cfg, pruner)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _main(cfg: DictConfig) -> float | None:
    """Run one job. Returns its objective, for a sweeper; None if it has none or failed."""
    from nnprune.engine import parallel
    from nnprune.experiment.outcome import one_line

    is_alone = command_line.failures is not None or not sweep_table.is_in_sweep()
    prefix = "" if is_alone else sweep_table.number_lines()
    try:
        if not cfg.label:
            chosen = HydraConfig.get()
            cfg.label = label_of(cfg, chosen.runtime.choices, chosen.overrides.task)
        if cfg.plan and parallel.is_distributed():
            raise ValueError("plan=true: estimates the cost of one process; run it without torchrun")
        if cfg.plan:
            show_estimate(grid_cells(cfg) if is_grid(cfg) else [cfg])
            return None
        with parallel.together():
            records = run_grid(grid_cells(cfg)) if is_grid(cfg) else [run(cfg)]
        return sweep_table.objective(cfg, records[0])[1] if len(records) == 1 else None
    except KeyboardInterrupt as interrupt:
        log.error("interrupted%s: run the same command again to resume", f" {interrupt}" if str(interrupt) else "")
        sys.exit(INTERRUPTED)
    except (HydraException, OmegaConfBaseException) as error:  # of a grid's cell, or of ${...}
        failure = explain(error, sys.argv[1:], CONF)
    except Exception as error:
        (place, is_users), failure = where_raised(error), one_line(error)
        if is_users or not isinstance(error, ValueError | OSError):  # else what a user can fix by a setting
            logged = "; ".join(
                note for note in getattr(error, "__notes__", []) if "\n" not in note
            )  # not another rank's traceback
            more = f"; {logged}" if logged else "" if is_users else f"\n{traceback.format_exc()}"
            failure = f"{type(error).__name__}: {failure} ({place}){more}"
    print(f"{prefix}Error: {failure}", file=sys.stderr)
    if parallel.rank() == 0:
        sweep_table.note_failure(cfg, failure)
    parallel.wait()  # torchrun ends all processes when one has ended: not before the first has printed
    if command_line.failures is None:
        raise RunFailed(failure)  # without what led to it: Hydra keeps it for the whole sweep, and so the model
    command_line.failures.append(failure)
    return None


def main() -> None:
    """Run the command line."""
    if "--version" in sys.argv[1:]:
        print(f"nnprune {__version__}")
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # by torchrun; otherwise torch need not be imported yet
        from nnprune.engine import parallel

        parallel.start()
        if parallel.rank():
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- what Hydra and libraries print
    sys.path.append(os.getcwd())  # to import a user's own pruner from the current folder; last, so that it shadows nothing
    typed, command_line.failures, sweep_table.folder = sys.argv[1:], [], None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Slurm sends it before it preempts a job
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it raises its errors, for us to explain, instead of printing them
    try:
        sys.argv[1:] = rewrite(typed)
        _main()
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        sys.exit(f"Error: {explain(error, typed, CONF)}")
    except KeyboardInterrupt:  # before or between runs
        sys.exit(INTERRUPTED)
    finally:
        sweep_table.show()
    sys.exit(int(bool(command_line.failures)))


if __name__ == "__main__":
    main()
