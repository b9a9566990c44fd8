"""The pass over the decoder layers: collect the inputs of each linear, prune it, hand the outputs on.

All hidden states pass through a layer together, so that each layer is fetched once a run: those of the calibration, of the
windows that measure the dense model, and of those that measure the pruned one.

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
from nnprune.engine.input_collector import InputCollector, rows_needed
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.propagation import Propagation
from nnprune.engine.prune_linears import count_zeros, prune_linears
from nnprune.engine.stopwatch import Stopwatch
from nnprune.method import Method
from nnprune.patterns import SparsityPattern

log = logging.getLogger(__name__)


@dataclass(eq=False)
class PruneTask:
    """A method and what it is to do with the model: one cell of a results table.

    Args:
        method: what it does to a layer.
        plan: linear name -> pattern, for every linear of the decoder layers.
        finished: the layers that it has pruned.
    """

    method: Method
    plan: dict[str, SparsityPattern]
    finished: LayerFiles


class PruningPass:
    """One pass over a model's layers, which prunes those that no layer file holds yet.

    Args:
        engine: the model and its layers.
        tasks: what to prune; more than one, a grid, only in dense propagation, where all see the same inputs.
        propagate: what later linears see, as Propagation has it.
        watch: times the stages.
    """

    def __init__(
        self, engine: LayerwiseEngine, tasks: Sequence[PruneTask], propagate: str, watch: Stopwatch | None = None
    ) -> None:
        assert len(tasks) <= 1 or propagate == "dense"
        self.engine = engine
        self.store = engine.store
        self.tasks = list(tasks)
        self.num_tasks = len(tasks)
        self.propagate = propagate
        self.watch = watch or Stopwatch()

    @torch.no_grad()
    def run(
        self, ids: Tensor, dense: Sequence[HiddenStates] | None = None, pruned: Sequence[HiddenStates] = ()
    ) -> list[dict[str, int]]:
        """Prune every layer that is not finished with calibration ids (N, T); take hidden states `dense` through the dense layers, and
        `pruned` through the pruned ones.

        Returns the zeros and sizes of all dense layers, as from `count_zeros`, unless `dense` is None. A grid continues without a
        task whose method fails.
        """
        engine = self.engine
        unfinished = [index for index in range(engine.num_layers) if self._todo(index)]
        last = max(unfinished, default=-1)
        counts: list[dict[str, int]] = []
        if not unfinished and dense is None and not pruned:
            return counts
        num_finished = min(unfinished, default=engine.num_layers) if self.tasks else 0
        if num_finished:
            log.info("resuming after %d finished decoder layers", num_finished)
        bar = engine.progress(engine.num_layers, "decoder layers")
        with self._propagation(ids, last) as propagation, logging_redirect_tqdm(), bar:
            for index in range(engine.num_layers):
                try:
                    if dense is not None:
                        layer = self._advance(index, dense, "dense_evaluation", pruned=False)
                        counts.append(count_zeros(layer, engine.decoder.weights(index)))
                    if index <= last:
                        self._visit(index, last, propagation)
                    if pruned:
                        self._advance(index, pruned, "evaluation", pruned=True)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(f"in decoder layer {index + 1} of {engine.num_layers}") from None
                self.store.release(index)
                bar.update()
        return counts

    def _todo(self, index: int) -> list[PruneTask]:
        return [task for task in self.tasks if index not in task.finished]

    @contextmanager
    def _propagation(self, ids: Tensor, last: int) -> Iterator[Propagation | None]:
        if last < 0:
            yield None
            return
        methods = [task.method for task in self.tasks]
        ids = rows_needed(methods, ids)
        with ExitStack() as stack:
            calibration = stack.enter_context(self.engine.hidden_states(ids, "calibration"))
            reference = None
            if any(method.needs_reference for method in methods):
                reference = stack.enter_context(self.engine.hidden_states(ids, "reference"))
            propagation = Propagation(self.engine, self.propagate, calibration, reference, self.watch)
            stack.callback(propagation.invalidate)
            yield propagation

    def _advance(self, index: int, states: Sequence[HiddenStates], stage: str, pruned: bool) -> nn.Module:
        with self.watch.stage(stage):
            layer = self.store.fetch(index, pruned)
            for one in states:
                one.advance(index, layer)
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
            propagation.hand_on(index, [task.method for task in self._todo(index + 1)])
        if not reports:  # no cell of the grid is left
            return
        log.info(
            "layer %d/%d  relative error %.4g  sparsity %.3f  %.1f s",
            index + 1,
            self.engine.num_layers,
            sum(report["relative_error"] for report in reports) / len(reports),
            sum(report["sparsity"] for report in reports) / len(reports),
            time.perf_counter() - start,
        )

    def _prune(self, index: int, last: int, propagation: Propagation, todo: list[PruneTask]) -> list[dict[str, Any]]:
        """Prune layer `index` for all tasks that lack it. Returns the reports of their linears."""
        layer = self.store.fetch(index, pruned=False)
        start = time.perf_counter()
        recovered: dict[str, Any] = {}
        if todo[0].method.recovery.epochs_before:
            with self.watch.stage("calibration"):
                propagation.advance_reference(index, layer)
            recovered["before"] = self._tune(index, layer, propagation, todo[0].method.recovery.epochs_before)
        reports: list[dict[str, Any]] = []
        for collector in propagation.collectors(index, layer, [task.method for task in todo], hand_on=index < last):
            self.store.prefetch(index + 1)
            if self.num_tasks > 1:
                reports += self._prune_in_turn(index, layer, collector, todo, start)
                continue
            with self.watch.stage("prune"):
                reports += prune_linears(todo[0].method, todo[0].plan, collector, self.store.stored_dtype)
        if self.num_tasks == 1:
            if epochs := todo[0].method.recovery.epochs_after:
                recovered["after"] = self._tune(index, layer, propagation, epochs)
            self._finish(index, layer, todo[0], reports, start, **({"recovered": recovered} if recovered else {}))
            self.store.adopt(index)
        return reports

    def _prune_in_turn(
        self, index: int, layer: nn.Module, collector: InputCollector, todo: list[PruneTask], start: float
    ) -> list[dict[str, Any]]:
        """Prune the dense layer `index` by one task of a grid after the other. Returns the reports of their linears."""
        weights = self.engine.decoder.weights(index)
        dense = {name: weight.read().clone() for name, weight in weights.items()}
        reports: list[dict[str, Any]] = []
        for task in todo:
            try:
                with self.watch.stage("prune"):
                    own = prune_linears(task.method, task.plan, collector, self.store.stored_dtype)
                self._finish(index, layer, task, own, start)
                reports += own
            except ValueError as error:
                log.warning("warning: a cell leaves the grid and runs alone later (%s)", error)
                self.tasks.remove(task)
            for name, weight in dense.items():
                weights[name].write(weight)
        return reports

    def _tune(self, index: int, layer: nn.Module, propagation: Propagation, num_epochs: int) -> dict[str, Any]:
        """Tune layer `index` towards the reference, which has passed through it already."""
        calibration, reference = propagation.calibration, propagation.reference
        propagation.invalidate()
        with self.watch.stage("recover"):
            return self.tasks[0].method.recovery.tune(
                index,
                layer,
                partial(calibration.run, index),
                calibration.activations,
                reference.activations,
                num_epochs,
            )

    def _finish(
        self, index: int, layer: nn.Module, task: PruneTask, reports: list[dict[str, Any]], start: float, **more: Any
    ) -> None:
        """Write the layer as it is now as finished by a task."""
        self.store.round(index)  # the weights handed on are those that are saved
        with self.watch.stage("prune"):
            counts = count_zeros(layer, self.engine.decoder.weights(index))
            seconds = time.perf_counter() - start
            report = {"linears": reports, **counts, "seconds": seconds, "num_cells": self.num_tasks, **more}
        with self.watch.stage("write"):
            task.finished.write(index, self.store.stored_state(index), report)
