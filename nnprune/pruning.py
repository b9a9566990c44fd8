"""The pass over the decoder layers: collect the inputs of each linear, prune it, hand the outputs on.

Everything that has to go through the layers travels together, so that each layer is read once a run: the calibration, the
windows that measure the dense model, and those that measure the pruned one.

Letters: N samples, T tokens, D hidden.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from nnprune.finished import FinishedLayers
from nnprune.inputs import PROBE_TOKENS, InputCollector, input_groups, rows_needed
from nnprune.layerwise import LayerwiseEngine
from nnprune.linears import count_zeros, prune_linears
from nnprune.patterns import SparsityPattern
from nnprune.pruners.base import Pruner
from nnprune.stopwatch import Stopwatch
from nnprune.streams import Stream

log = logging.getLogger(__name__)

PROPAGATE = ("pruned", "dense", "sequential")


@dataclass
class Cell:
    """A method and what it shall make of the model: one cell of a results table.

    Args:
        pruner: the method.
        plan: linear name -> pattern, for every linear of the decoder layers.
        finished: the layers that it has pruned.
    """

    pruner: Pruner
    plan: dict[str, SparsityPattern]
    finished: FinishedLayers


class PruningPass:
    """One pass over a model's layers, from the last finished one on.

    Args:
        engine: the model and its layers.
        cells: what to prune; more than one only in dense propagation, where all see the same inputs.
        propagate: what later linears see. pruned: outputs of pruned layers; dense: of dense layers; sequential: of pruned
            layers, and within a layer of the linears already pruned.
        watch: told how long each stage takes.
    """

    def __init__(self, engine: LayerwiseEngine, cells: Sequence[Cell], propagate: str, watch: Stopwatch | None = None) -> None:
        assert len(cells) <= 1 or propagate == "dense"
        self.engine = engine
        self.store = engine.store
        self.cells = cells
        self.propagate = propagate
        self.watch = watch or Stopwatch()
        self._ahead: InputCollector | None = None  # what the next layer's linears have been seen to receive already

    @torch.no_grad()
    def run(self, ids: Tensor, dense: Sequence[Stream] | None = None, pruned: Sequence[Stream] = ()) -> list[dict[str, int]]:
        """Prune with calibration ids (N, T) every layer that is not finished; take `dense` streams through the dense
        layers, `pruned` ones through the pruned layers.

        Returns the zeros and sizes of all dense layers, as from `count_zeros`, unless `dense` is None.
        """
        engine = self.engine
        unfinished = [index for index in range(engine.num_layers) if self._todo(index)]
        last = max(unfinished, default=-1)
        counts: list[dict[str, int]] = []
        if not unfinished and dense is None and not pruned:
            return counts
        num_finished = min(unfinished, default=engine.num_layers) if self.cells else 0
        if num_finished:
            log.info("resuming behind %d finished decoder layers", num_finished)
        bar = engine.progress(engine.num_layers, "decoder layers")
        with self._calibration(ids, last) as calibration, logging_redirect_tqdm(), bar:
            for index in range(engine.num_layers):
                if dense is not None:
                    layer = self._advance(index, dense, "dense_evaluation", pruned=False)
                    counts.append(count_zeros(layer, engine.decoder.linears(index)))
                if index <= last:
                    self._visit(index, last, calibration)
                if pruned:
                    self._advance(index, pruned, "evaluation", pruned=True)
                self.store.release(index)
                bar.update()
        return counts

    def _todo(self, index: int) -> list[Cell]:
        return [cell for cell in self.cells if index not in cell.finished]

    def _calibration(self, ids: Tensor, last: int) -> AbstractContextManager[Stream | None]:
        if last < 0:
            return nullcontext()
        return self.engine.stream(rows_needed([cell.pruner for cell in self.cells], ids), "calibration")

    def _advance(self, index: int, streams: Sequence[Stream], stage: str, pruned: bool) -> nn.Module:
        with self.watch.stage(stage):
            layer = self.store.fetch(index, pruned)
            for stream in streams:
                stream.advance(index, layer)
        return layer

    def _visit(self, index: int, last: int, calibration: Stream) -> None:
        """Prune layer `index` where that is still to do, and leave the calibration at the input of the next layer."""
        if todo := self._todo(index):
            start = time.perf_counter()
            reports = self._prune(index, last, calibration, todo)
        elif self.propagate == "dense":
            with self.watch.stage("calibration"):
                calibration.advance(index, self.store.fetch(index, pruned=False))
        if self.propagate != "dense" and index < last:
            with self.watch.stage("calibration"):
                self._hand_on(index, calibration)
        if todo:
            seconds = time.perf_counter() - start
            log.info(
                "layer %d/%d  relative error %.4g  sparsity %.3f  %.1f s",
                index + 1,
                self.engine.num_layers,
                sum(report["relative_error"] for report in reports) / len(reports),
                sum(report["sparsity"] for report in reports) / len(reports),
                seconds,
            )

    def _prune(self, index: int, last: int, calibration: Stream, todo: list[Cell]) -> list[dict[str, Any]]:
        """Prune layer `index` for all cells that lack it. Returns the reports of their linears."""
        layer = self.store.fetch(index, pruned=False)
        linears = self.engine.decoder.linears(index)
        reports: list[dict[str, Any]] = []
        start = time.perf_counter()
        if self.propagate == "sequential":
            for names in self._groups(index, layer, calibration):
                with self.watch.stage("calibration"):
                    collector = self._collect(index, layer, calibration, [names], hand_on=False)
                collector.finish()
                with self.watch.stage("prune"):
                    reports += prune_linears(todo[0].pruner, todo[0].plan, collector, linears)
            self._finish(index, layer, todo[0], reports, start)
            return reports
        if self._ahead is None:
            with self.watch.stage("calibration"):
                groups = self._groups(index, layer, calibration)
                hand_on = self.propagate == "dense" and index < last
                self._ahead = self._collect(index, layer, calibration, groups, hand_on)
        collector, self._ahead = self._ahead, None
        collector.finish()
        self.store.prefetch(index + 1)
        dense = {name: linear.weight.clone() for name, linear in linears.items()} if len(self.cells) > 1 else {}
        for cell in todo:
            with self.watch.stage("prune"):
                cell_reports = prune_linears(cell.pruner, cell.plan, collector, linears)
            self._finish(index, layer, cell, cell_reports, start)
            reports += cell_reports
            for name, weight in dense.items():
                linears[name].weight.copy_(weight)
        return reports

    def _finish(self, index: int, layer: nn.Module, cell: Cell, reports: list[dict[str, Any]], start: float) -> None:
        """Write the layer as it is now as finished by a cell."""
        with self.watch.stage("prune"):
            counts = count_zeros(layer, self.engine.decoder.linears(index))
            seconds = time.perf_counter() - start
            report = {"linears": reports, **counts, "seconds": seconds, "num_cells": len(self.cells)}
        with self.watch.stage("write"):
            cell.finished.write(index, layer.state_dict(), report)
        if len(self.cells) == 1:
            self.store.adopt(index)

    def _collect(
        self, index: int, layer: nn.Module, calibration: Stream, groups: list[list[str]], hand_on: bool
    ) -> InputCollector:
        """See what `groups` of linears receive from the whole calibration, handing the layer's own outputs on if asked."""
        collector = self._collector(index, groups, calibration)

        def step(rows: slice, hidden: Tensor) -> Tensor | None:
            output = None
            with collector.rows(rows):
                output = calibration.run(index, layer, hidden)
            return output if hand_on else None

        with collector.watching(stop=not hand_on):
            calibration.each_batch(step)
        return collector

    def _hand_on(self, index: int, calibration: Stream) -> None:
        """Take the calibration through the pruned layer `index`, and each batch at once into the next layer's linears, so
        that the activations are read once a layer."""
        layer = self.store.fetch(index)
        if self.propagate == "sequential" or not self._todo(index + 1):
            calibration.advance(index, layer)
            return
        following = self.store.fetch(index + 1, pruned=False)
        collector = self._collector(index + 1, self._groups(index + 1, following, calibration), calibration)

        def step(rows: slice, hidden: Tensor) -> Tensor:
            output = calibration.run(index, layer, hidden)
            with collector.rows(rows):
                calibration.run(index + 1, following, output)
            return output

        with collector.watching(stop=True):
            calibration.each_batch(step)
        self._ahead = collector

    def _collector(self, index: int, groups: list[list[str]], calibration: Stream) -> InputCollector:
        pruners = [cell.pruner for cell in self._todo(index)]
        return InputCollector(pruners, groups, self.engine.decoder.linears(index), calibration.ids.shape[1])

    def _groups(self, index: int, layer: nn.Module, calibration: Stream) -> list[list[str]]:
        linears = self.engine.decoder.linears(index)
        hidden = calibration.probe(PROBE_TOKENS)
        return input_groups(linears, lambda: calibration.run(index, layer, hidden))
