"""The plans of runs: which linear gets which pattern, for allocations that look at the dense model first.

What an importance pass measured is written to the folder of each run, so that a resumed run has the same plan.

Letters: N samples, T tokens, L decoder layers.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from nnprune.allocations.base import Allocation, Plan
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.importance_pass import run_importance_pass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.patterns import SparsityPattern
from nnprune.records import read_journal, write_journal

log = logging.getLogger(__name__)

JOURNAL = "allocation.json"


@dataclass
class Planned:
    """What to make a plan of.

    Args:
        allocation: the method.
        pattern: what the whole model is to have.
        folder: where its run keeps what is measured until its record is written.
    """

    allocation: Allocation
    pattern: SparsityPattern
    folder: Path

    @property
    def key(self) -> str:
        """Names what is measured."""
        return self.allocation.key(self.pattern)

    def measured(self) -> list[float] | None:
        """The numbers (L,) that an earlier importance pass left, if one did."""
        return (read_journal(self.folder / JOURNAL) or {}).get(self.key)

    def keep(self, measured: list[float]) -> None:
        """Write down the numbers (L,) of an importance pass."""
        write_journal(self.folder / JOURNAL, {self.key: measured})


def make_plans(engine: LayerwiseEngine, ids: Tensor, cells: Sequence[Planned], watch: Stopwatch) -> list[Plan]:
    """A plan for each cell, after one importance pass with calibration ids (N, T) for all that need one and have none yet."""
    surveyed = [cell for cell in cells if cell.allocation.looks_at != "nothing"]
    if todo := [cell for cell in surveyed if cell.measured() is None]:
        with watch.stage("allocation"):
            measures = {cell.key: partial(cell.allocation.measure, pattern=cell.pattern) for cell in todo}
            needs_inputs = any(cell.allocation.looks_at == "inputs" for cell in todo)
            found = run_importance_pass(engine, ids if needs_inputs else None, measures)
            for cell in todo:
                cell.keep(found[cell.key])
    plans = []
    shapes = engine.decoder.shapes_by_layer()
    for cell in cells:
        plan = cell.allocation.plan(cell.pattern, shapes, cell.measured() if cell in surveyed else ())
        if cell in surveyed:
            sparsities = [float(pattern.sparsity) for pattern in plan.values()]
            log.info("%s: sparsities from %.3f to %.3f", cell.key, min(sparsities), max(sparsities))
        plans.append(plan)
    return plans
