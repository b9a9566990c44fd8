"""Makes plans (linear -> pattern), after an importance pass over the dense model if the allocation needs one.

The measured numbers are saved in the folder of each run, so that a resumed run has the same plan.

Letters: N samples, T tokens, L decoder layers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from nnprune.allocations.base import Allocation, Plan
from nnprune.engine import parallel
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.patterns import SparsityPattern
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)

JOURNAL = "allocation.json"


@dataclass
class PlanRequest:
    """A request for the plan of one run.

    Args:
        allocation: makes the plan.
        pattern: the pattern of the whole model.
        folder: holds the measured numbers until the record is written.
    """

    allocation: Allocation
    pattern: SparsityPattern
    folder: Path

    @property
    def key(self) -> str:
        """The allocation's key for what it measures."""
        return self.allocation.key(self.pattern)

    @parallel.on_rank_0
    def saved(self) -> list[float] | None:
        """The numbers (L,) of an earlier importance pass; None without one."""
        return (read_journal(self.folder / JOURNAL) or {}).get(self.key)

    @parallel.on_rank_0
    def save(self, measured: list[float]) -> None:
        """Save the numbers (L,) of an importance pass."""
        write_journal(self.folder / JOURNAL, {self.key: measured})


def make_plans(engine: LayerwiseEngine, ids: Tensor, requests: Sequence[PlanRequest], stopwatch: Stopwatch) -> list[Plan]:
    """The plan of each request. Those that need an importance pass and have no saved numbers share one, with calibration ids (N, T)."""
    measured = [request for request in requests if request.allocation.looks_at != "nothing"]
    if missing := [request for request in measured if request.saved() is None]:
        with stopwatch.stage("allocation"):
            measures = {request.key: partial(request.allocation.measure, pattern=request.pattern) for request in missing}
            needs_inputs = any(request.allocation.looks_at == "inputs" for request in missing)
            found = run_importance_pass(engine, ids if needs_inputs else None, measures)
            for request in missing:
                request.save(found[request.key])
    plans = []
    shapes = engine.decoder.shapes_by_layer()
    for request in requests:
        plan = request.allocation.plan(request.pattern, shapes, request.saved() if request in measured else ())
        if request in measured:
            sparsities = [float(pattern.sparsity) for pattern in plan.values()]
            log.info("%s: sparsities from %.3f to %.3f", request.key, min(sparsities), max(sparsities))
        plans.append(plan)
    return plans
