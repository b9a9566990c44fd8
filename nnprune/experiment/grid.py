"""Many cells of a results table in one pass over the model: `grid=true`.

In dense propagation no method changes the inputs of another. So the calibration passes through the layers once, each statistic is
accumulated once, each hessian is factorised once per method, and every cell writes its layer files to its own folder. Then each
cell is an ordinary run that resumes after its last layer.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from omegaconf import DictConfig

from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import locked
from nnprune.experiment.job import SCRATCH, Job, check_shapes, skeleton
from nnprune.experiment.plans import Planned, make_plans
from nnprune.model.decoder import Decoder

log = logging.getLogger(__name__)


def check_grid(cfgs: Sequence[DictConfig]) -> None:
    """Raise ValueError when the cells of a grid do not see the same inputs."""
    propagate = cfgs[0].propagate
    if propagate != "dense":
        raise ValueError(
            f"propagate={propagate}: the cells of grid=true share the inputs of their linears, which only propagate=dense gives; "
            "set propagate=dense or leave grid=true out"
        )


def prune_grid(experiments: Sequence[Experiment]) -> None:
    """Prune what the cells of a grid have not pruned yet, in one pass. All have the same model and calibration."""
    first = experiments[0]
    with ExitStack() as stack:
        for folder in sorted({experiment.folder for experiment in experiments}):
            stack.enter_context(locked(folder))
        shapes = skeleton(first, first.source.config())
        experiments = [experiment for experiment in experiments if _fits(experiment, shapes)]
        if not experiments:
            return
        job = Job(experiments[0])
        decoder = job.engine.decoder
        wanted = [Planned(one.allocation, one.pattern, one.folder / SCRATCH) for one in experiments]
        plans = make_plans(job.engine, job.calibration_ids, wanted, job.watch)
        cells = [
            PruneTask(experiment.method, plan, LayerFiles(experiment.folder / SCRATCH, decoder.path))
            for experiment, plan in zip(experiments, plans, strict=True)
        ]
        log.info("grid: %d cells in one pass", len(cells))
        PruningPass(job.engine, cells, "dense").run(job.calibration_ids)


def _fits(experiment: Experiment, decoder: Decoder) -> bool:
    """Whether the model can have what a cell asks for; if not, the cell's own run says why."""
    try:
        check_shapes(experiment, decoder)
    except ValueError:
        return False
    return True
