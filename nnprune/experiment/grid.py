"""`grid=true`: prunes several cells of a results table in one pass over the model.

In dense propagation no method changes the inputs that another sees. So the calibration passes through the layers once, each
statistic is accumulated once, and each Hessian is factorised once per method. Every cell writes layer files to its own folder;
its ordinary run then finds all layers finished.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from omegaconf import DictConfig

from nnprune.engine.layer_files import Background, LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import locked
from nnprune.experiment.job import Job
from nnprune.experiment.plans import PlanRequest, make_plans
from nnprune.experiment.preparation import SCRATCH, check_shapes, skeleton

log = logging.getLogger(__name__)


def check_grid(cfgs: Sequence[DictConfig]) -> None:
    """Raise ValueError unless the cells of a grid see the same inputs."""
    propagate = next((cfg.propagate for cfg in cfgs if cfg.propagate != "dense"), "dense")
    if propagate != "dense":
        raise ValueError(
            f"propagate={propagate}: the cells of grid=true share the inputs of their linears, which only propagate=dense gives; "
            "set propagate=dense or leave grid=true out"
        )


def check_cells(experiments: Sequence[Experiment]) -> None:
    """Raise ValueError if layers of a cell are to be tuned, each after it is pruned: the pass over all cells does not."""
    for experiment in experiments:
        if experiment.method.recovery.is_on:
            raise ValueError(
                f"grid=true: prunes all cells in one pass, and {experiment.label} tunes layers (recover); leave one of the two out"
            )


def prune_grid(experiments: Sequence[Experiment]) -> None:
    """Prune the unfinished layers of all cells of a grid in one pass. The cells share model and calibration."""
    first = experiments[0]
    with ExitStack() as stack:
        for folder in sorted({experiment.folder for experiment in experiments}):
            stack.enter_context(locked(folder))
        model = skeleton(first, first.source.config())
        fitting = []
        for experiment in experiments:
            with suppress(ValueError):  # the cell's own run reports it
                check_shapes(experiment, model)
                fitting.append(experiment)
        experiments = fitting
        if not experiments:
            return
        job = Job(experiments[0], [experiment.method for experiment in experiments])
        decoder = job.engine.decoder
        folders = [experiment.folder / SCRATCH for experiment in experiments]
        requests = [PlanRequest(one.allocation, one.pattern, folder) for one, folder in zip(experiments, folders, strict=True)]
        plans = make_plans(job.engine, job.calibration_ids, requests, job.stopwatch)
        thread = Background()
        tasks = [
            PruneTask(experiment.method, plan, LayerFiles(folder, decoder.path, thread=thread))
            for experiment, plan, folder in zip(experiments, plans, folders, strict=True)
        ]
        log.info("grid: %d cells in one pass", len(tasks))
        PruningPass(job.engine, tasks, "dense").run(job.calibration_ids)
