"""The pass over the decoder layers: collect the inputs of each linear, prune it, hand the outputs on.

Everything that has to go through the layers travels together, so that each layer is read once a run: the calibration, the
windows that measure the dense model, and those that measure the pruned one.

Letters: N samples, T tokens, D hidden.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import rows_needed
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.propagation import Propagation
from nnprune.engine.prune_linears import count_zeros, prune_linears
from nnprune.engine.stopwatch import Stopwatch
from nnprune.method import Method
from nnprune.patterns import SparsityPattern

log = logging.getLogger(__name__)


@dataclass
class PruneTask:
    """A method and what it shall make of the model: one cell of a results table.

    Args:
        method: what it does to a layer.
        plan: linear name -> pattern, for every linear of the decoder layers.
        finished: the layers that it has pruned.
    """

    method: Method
    plan: dict[str, SparsityPattern]
    finished: LayerFiles


class PruningPass:
    """One pass over a model's layers, from the last finished one on.

    Args:
        engine: the model and its layers.
        cells: what to prune; more than one only in dense propagation, where all see the same inputs.
        propagate: what later linears see, as Propagation has it.
        watch: told how long each stage takes.
    """

    def __init__(
        self, engine: LayerwiseEngine, cells: Sequence[PruneTask], propagate: str, watch: Stopwatch | None = None
    ) -> None:
        assert len(cells) <= 1 or propagate == "dense"
        self.engine = engine
        self.store = engine.store
        self.cells = cells
        self.propagate = propagate
        self.watch = watch or Stopwatch()

    @torch.no_grad()
    def run(
        self, ids: Tensor, dense: Sequence[HiddenStates] | None = None, pruned: Sequence[HiddenStates] = ()
    ) -> list[dict[str, int]]:
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
        with self._propagation(ids, last) as propagation, logging_redirect_tqdm(), bar:
            for index in range(engine.num_layers):
                if dense is not None:
                    layer = self._advance(index, dense, "dense_evaluation", pruned=False)
                    counts.append(count_zeros(layer, engine.decoder.weights(index)))
                if index <= last:
                    self._visit(index, last, propagation)
                if pruned:
                    self._advance(index, pruned, "evaluation", pruned=True)
                self.store.release(index)
                bar.update()
        return counts

    def _todo(self, index: int) -> list[PruneTask]:
        return [cell for cell in self.cells if index not in cell.finished]

    @contextmanager
    def _propagation(self, ids: Tensor, last: int) -> Iterator[Propagation | None]:
        if last < 0:
            yield None
            return
        methods = [cell.method for cell in self.cells]
        ids = rows_needed(methods, ids)
        with ExitStack() as stack:
            calibration = stack.enter_context(self.engine.hidden_states(ids, "calibration"))
            reference = None
            if any(method.needs_reference for method in methods):
                reference = stack.enter_context(self.engine.hidden_states(ids, "reference"))
            propagation = Propagation(self.engine, self.propagate, calibration, reference, self.watch)
            stack.callback(propagation.invalidate)
            yield propagation

    def _advance(self, index: int, streams: Sequence[HiddenStates], stage: str, pruned: bool) -> nn.Module:
        with self.watch.stage(stage):
            layer = self.store.fetch(index, pruned)
            for stream in streams:
                stream.advance(index, layer)
        return layer

    def _visit(self, index: int, last: int, propagation: Propagation) -> None:
        """Prune layer `index` where that is still to do, and leave the calibration at the input of the next layer."""
        todo = self._todo(index)
        if not todo:
            propagation.skip(index)
            return
        start = time.perf_counter()
        reports = self._prune(index, last, propagation, todo)
        if self.propagate != "dense" and index < last:
            propagation.hand_on(index, [cell.method for cell in self._todo(index + 1)])
        log.info(
            "layer %d/%d  relative error %.4g  sparsity %.3f  %.1f s",
            index + 1,
            self.engine.num_layers,
            sum(report["relative_error"] for report in reports) / len(reports),
            sum(report["sparsity"] for report in reports) / len(reports),
            time.perf_counter() - start,
        )

    def _prune(self, index: int, last: int, propagation: Propagation, todo: list[PruneTask]) -> list[dict[str, Any]]:
        """Prune layer `index` for all cells that lack it. Returns the reports of their linears."""
        layer = self.store.fetch(index, pruned=False)
        weights = self.engine.decoder.weights(index)
        start = time.perf_counter()
        recovered: dict[str, Any] = {}
        if todo[0].method.recovery.epochs_before:
            with self.watch.stage("calibration"):
                propagation.advance_reference(index, layer)
            recovered["before"] = self._tune(index, layer, propagation, todo[0].method.recovery.epochs_before)
        dense = {name: weight.read().clone() for name, weight in weights.items()} if len(self.cells) > 1 else {}
        by_cell: list[list[dict[str, Any]]] = [[] for _ in todo]
        for collector in propagation.collectors(index, layer, [cell.method for cell in todo], hand_on=index < last):
            self.store.prefetch(index + 1)
            for cell, reports in zip(todo, by_cell, strict=True):
                with self.watch.stage("prune"):
                    reports += prune_linears(cell.method, cell.plan, collector, self.store.stored_dtype)
                if dense:
                    self._finish(index, layer, cell, reports, start)
                    for name, weight in dense.items():
                        weights[name].write(weight)
        if not dense:
            if epochs := todo[0].method.recovery.epochs_after:
                recovered["after"] = self._tune(index, layer, propagation, epochs)
            self._finish(index, layer, todo[0], by_cell[0], start, **({"recovered": recovered} if recovered else {}))
        return [report for reports in by_cell for report in reports]

    def _tune(self, index: int, layer: nn.Module, propagation: Propagation, num_epochs: int) -> dict[str, Any]:
        """Tune layer `index` towards the reference, which is behind it already."""
        calibration, reference = propagation.calibration, propagation.reference
        propagation.invalidate()
        with self.watch.stage("recover"):
            return self.cells[0].method.recovery.tune(
                index,
                layer,
                partial(calibration.run, index),
                calibration.activations,
                reference.activations,
                num_epochs,
            )

    def _finish(
        self, index: int, layer: nn.Module, cell: PruneTask, reports: list[dict[str, Any]], start: float, **more: Any
    ) -> None:
        """Write the layer as it is now as finished by a cell."""
        self.store.round(index)  # the weights handed on are those that are saved
        with self.watch.stage("prune"):
            counts = count_zeros(layer, self.engine.decoder.weights(index))
            seconds = time.perf_counter() - start
            report = {"linears": reports, **counts, "seconds": seconds, "num_cells": len(self.cells), **more}
        with self.watch.stage("write"):
            cell.finished.write(index, self.store.stored_state(index), report)
        if len(self.cells) == 1:
            self.store.adopt(index)
