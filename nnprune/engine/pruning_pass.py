"""The pass over the decoder layers: collect the inputs of each linear, prune it, hand the outputs on.

All rows pass through the layers together, those of the calibration and of evaluations: a run loads each layer once.

Letters: N samples, T tokens, D hidden.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

from nnprune.allocations.base import Plan
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.experts import few_tokens
from nnprune.engine.hidden_states import HiddenStates
from nnprune.engine.input_collector import InputCollector, rows_needed
from nnprune.engine.layer_files import Carried, LayerFiles, writing
from nnprune.engine.propagation import Propagation
from nnprune.engine.prune_linears import count_zeros, prune_linears
from nnprune.engine.stopwatch import Stopwatch
from nnprune.engine.window import Window, num_kept_states
from nnprune.method import Method

log = logging.getLogger(__name__)


@dataclass(eq=False)
class PruneTask:
    """A method to prune the model with.

    Args:
        method: pruner, target, update and recovery.
        plan: a pattern for every linear of the decoder layers.
        layer_files: the layers pruned so far; the others are added.
    """

    method: Method
    plan: Plan
    layer_files: LayerFiles


class PruningPass:
    """One pass over a model's decoder layers that prunes those that are not among the layer files.

    Args:
        engine: the model and its layers.
        tasks: what to prune; more than one (a grid) only in dense propagation, where all see the same inputs.
        propagate: what later linears see: the `mode` of Propagation.
        stopwatch: times the stages.
    """

    def __init__(
        self, engine: LayerwiseEngine, tasks: Sequence[PruneTask], propagate: str, stopwatch: Stopwatch | None = None
    ) -> None:
        assert len(tasks) <= 1 or propagate == "dense"
        self.engine = engine
        self.store = engine.store
        self.tasks = list(tasks)
        self.num_tasks = len(tasks)
        self.propagate = propagate
        self.stopwatch = stopwatch or Stopwatch()
        self._num_final = 0  # layers that have been passed on

    @torch.no_grad()
    def run(
        self, ids: Tensor, dense: Sequence[HiddenStates] | None = None, pruned: Sequence[HiddenStates] = ()
    ) -> list[dict[str, int]]:
        """Prune every unfinished layer. A task of a grid whose method fails is dropped; the others continue.

        Args:
            ids: calibration ids (N, T).
            dense: hidden states to take through the dense layers; None: do not count zeros in dense layers either.
            pruned: hidden states to take through the pruned layers.

        Returns:
            The counts of each dense layer, from `count_zeros`; empty if `dense` is None.
        """
        engine = self.engine
        unfinished = [index for index in range(engine.num_layers) if self._unfinished_tasks(index)]
        last = max(unfinished, default=-1)
        counts: list[dict[str, int]] = []
        if not unfinished and dense is None and not pruned:
            return counts
        num_finished = min(unfinished, default=engine.num_layers) if self.tasks else 0
        is_of_grid = any(task.layer_files.num_cells > 1 for task in self.tasks)
        if num_finished and (unfinished or not is_of_grid):  # a grid has pruned what its cells measure
            log.info("resuming after %d finished decoder layers", num_finished)
        propagating = self._propagation(ids) if unfinished else nullcontext()
        bar = engine.progress(engine.num_layers, "decoder layers")
        with (
            writing([task.layer_files for task in self.tasks], self.stopwatch),
            propagating as propagation,
            logging_redirect_tqdm(),
            bar,
        ):
            for index in range(engine.num_layers):
                try:
                    if dense is not None:
                        layer = self._advance(index, dense, "dense_evaluation", pruned=False)
                        counts.append(count_zeros(layer, engine.decoder.all_weights(index)))
                    if index <= last:
                        self._prune_or_skip(index, last, propagation)
                    for final in self._final(index, propagation):
                        if pruned:
                            self._advance(final, pruned, "evaluation", pruned=True)
                        self.store.release(final)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(f"in decoder layer {index + 1} of {engine.num_layers}") from None
                bar.update()
        return counts

    def _final(self, index: int, propagation: Propagation | None) -> Iterator[int]:
        """The layers up to `index` that have become final."""
        stop = propagation.window.first if propagation and propagation.window.reports else index + 1
        while self._num_final < stop:
            yield self._num_final
            self._num_final += 1

    def _unfinished_tasks(self, index: int) -> list[PruneTask]:
        return [task for task in self.tasks if index not in task.layer_files]

    @contextmanager
    def _propagation(self, ids: Tensor) -> Iterator[Propagation]:
        """The calibration at the input of the first layer."""
        methods = [task.method for task in self.tasks]
        ids = rows_needed(methods, ids)
        whole = not all(method.pruner.shares_statistics for method in methods)  # what a pruner collects itself cannot be summed
        with ExitStack() as stack:
            calibration = stack.enter_context(self.engine.hidden_states(ids, "calibration", whole))
            reference = None
            if any(method.needs_reference for method in methods):
                reference = stack.enter_context(self.engine.hidden_states(ids, "reference", whole))
            num_kept = num_kept_states(methods[0].recovery, self.propagate)
            kept = [stack.enter_context(self.engine.hidden_states(ids, f"window-{place}", whole)) for place in range(num_kept)]
            window = Window(self.store, methods[0].recovery, calibration, reference, kept)
            propagation = Propagation(self.engine, self.propagate, calibration, reference, window, self.stopwatch)
            stack.callback(propagation.invalidate)
            yield propagation

    def _advance(self, index: int, all_states: Sequence[HiddenStates], stage: str, pruned: bool) -> nn.Module:
        with self.stopwatch.stage("load"):
            layer = self.store.fetch(index, pruned)
        if not pruned:
            self.store.prefetch(index + 1)
        with self.stopwatch.stage(stage):
            for states in all_states:
                states.advance(index, layer)
        return layer

    def _prune_or_skip(self, index: int, last: int, propagation: Propagation) -> None:
        """Prune layer `index` for the tasks that lack it, and take the calibration to the input of the next layer."""
        tasks = self._unfinished_tasks(index)
        if not tasks:
            propagation.skip(index)
            return
        files = tasks[0].layer_files
        if self.num_tasks == 1 and index in files.carried:
            propagation.window.open(index)
            propagation.restore(index, files.read_carried(index))
            self._add(index, last, files.carried[index], propagation.window, tasks[0])
            return
        start = time.perf_counter()
        reports = self._prune(index, last, propagation, tasks)
        if self.propagate != "dense" and index < last:
            propagation.hand_on(index, [task.method for task in self._unfinished_tasks(index + 1)])
        if not reports:  # all tasks failed, or
            if not self.engine.decoder.weights(index):
                log.info("layer %d/%d  no linear chosen", index + 1, self.engine.num_layers)
            return
        error, sparsity = (fmean(report[key] for report in reports) for key in ("relative_error", "sparsity"))
        seconds = time.perf_counter() - start
        text = "layer %d/%d  relative error %.4g  sparsity %.3f  %.1f s%s"
        shown = {"relative_error": error, "sparsity": sparsity, "seconds": seconds}
        figures = (index + 1, self.engine.num_layers, *shown.values())
        log.info(text, *figures, few_tokens(reports), extra={"layer": (index + 1, shown)})

    def _prune(self, index: int, last: int, propagation: Propagation, tasks: list[PruneTask]) -> list[dict[str, Any]]:
        """Prune layer `index` for `tasks`. Returns the reports of their linears."""
        with self.stopwatch.stage("load"):
            layer = self.store.fetch(index, pruned=False)
        start = time.perf_counter()
        recovered: dict[str, Any] = {}
        recovery, window = tasks[0].method.recovery, propagation.window
        if self.num_tasks == 1:
            window.open(index)
        if recovery.epochs_before:
            with self.stopwatch.stage("calibration"):
                propagation.advance_reference(index, layer)
            with self.stopwatch.stage("recover"):
                recovered["before"] = window.tune_dense(index, layer)
        collectors = propagation.collectors(index, layer, [task.method for task in tasks], hand_on=index < last)
        reports = self._prune_groups(index, layer, collectors, tasks, start)
        if self.num_tasks == 1:
            if recovery.epochs_after:
                propagation.invalidate()
                with self.stopwatch.stage("recover"):
                    recovered["after"] = window.tune()
            report = {"linears": reports, "seconds": time.perf_counter() - start}
            self._add(index, last, report | ({"recovered": recovered} if recovered else {}), window, tasks[0])
        return reports

    def _prune_groups(
        self, index: int, layer: nn.Module, collectors: Iterator[InputCollector], tasks: list[PruneTask], start: float
    ) -> list[dict[str, Any]]:
        """Prune the linears of each collector, and let go of all. Returns the reports of the linears."""
        reports: list[dict[str, Any]] = []
        for collector in collectors:
            self.store.prefetch(index + 1)
            if self.num_tasks > 1:
                reports += self._prune_tasks(index, layer, collector, tasks, start)
                continue
            with self.stopwatch.stage("prune"):
                reports += prune_linears(
                    tasks[0].method, tasks[0].plan, collector, self.store.stored_dtype, self.engine.runtime
                )
        return reports

    def _add(self, index: int, last: int, report: dict[str, Any], window: Window, task: PruneTask) -> None:
        """Add the report of the layer that was pruned last to the window, and write those layers that are final now."""
        window.reports[index] = report
        for final, report_of_final, carried in window.settle(is_last=index == last):
            self._write(final, self.store.fetch(final), task, report_of_final, carried)
            self.store.mark_pruned(final)

    def _prune_tasks(
        self, index: int, layer: nn.Module, collector: InputCollector, tasks: list[PruneTask], start: float
    ) -> list[dict[str, Any]]:
        """Prune the dense layer `index` for one task of a grid after the other. Returns the reports of their linears."""
        weights = self.engine.decoder.weights(index)
        dense = [(tensor, tensor.clone()) for weight in weights.values() for tensor in weight.tensors()]
        reports: list[dict[str, Any]] = []
        for task in tasks:
            try:
                with self.stopwatch.stage("prune"):
                    how = (self.store.stored_dtype, self.engine.runtime)
                    task_reports = prune_linears(task.method, task.plan, collector, *how, keep_statistics=True)
                self._write(index, layer, task, {"linears": task_reports, "seconds": time.perf_counter() - start})
                reports += task_reports
            except Exception as error:  # its own run reports it
                log.warning("warning: one cell is dropped from the grid and will run alone (%s)", error)
                self.tasks.remove(task)
            for tensor, value in dense:
                tensor.copy_(value)
        return reports

    def _write(
        self, index: int, layer: nn.Module, task: PruneTask, report: dict[str, Any], carried: Carried | None = None
    ) -> None:
        """Add the layer as it is now to the layer files of a task."""
        self.store.round(index)  # so that the outputs handed on are those of the saved weights
        with self.stopwatch.stage("prune"):
            counts = count_zeros(layer, self.engine.decoder.weights(index))
        with self.stopwatch.stage("write"):
            state = self.store.stored_state(index, copy=self.num_tasks > 1)  # the next task's layer is made of the same tensors
            report = {**report, **counts, "num_cells": self.num_tasks}
            if self.num_tasks == 1:  # the time of a grid is not that of a cell
                report |= self.stopwatch.so_far()
            task.layer_files.write(index, state, report, carried)
