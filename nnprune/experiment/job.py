"""One run after its settings are checked: token ids, model, one pass over the layers, record."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from nnprune.allocations.base import Plan
from nnprune.calibration import token_hash
from nnprune.engine import parallel
from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.prune_linears import fractions_of_zeros
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import locked
from nnprune.experiment.layer_reports import describe_layers
from nnprune.experiment.measurement import Measurement, check_metrics, evaluation_entry, rows_hash
from nnprune.experiment.plans import PlanRequest, make_plans
from nnprune.experiment.preparation import (
    SCRATCH,
    check_shapes,
    chosen_linears,
    distilling_pass,
    fit_memory,
    log_computing_dtype,
    open_engine,
    skeleton,
    token_ids,
    warn_of_demo_texts,
)
from nnprune.experiment.provenance import new_record, now
from nnprune.experiment.written_text import written_ids
from nnprune.method import Method
from nnprune.model.checkpoint import Checkpoint
from nnprune.model.export import check_names, save_model
from nnprune.model.loading import quieten_transformers
from nnprune.model.scales import scales_of
from nnprune.records import RecordError, RunRecord, read_completed
from nnprune.runtime import peaks

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]
"""Metric -> value, by fingerprint of the evaluation."""


class Job:
    """Prunes, measures and records one experiment, resuming after its last finished layer."""

    def __init__(self, experiment: Experiment, methods: Sequence[Method] = ()) -> None:
        quieten_transformers()
        self.experiment = experiment
        self.stopwatch = Stopwatch()
        self._peaks: dict[str, int] = {}
        experiment.runtime.start(experiment.config["seed"])
        warn_of_demo_texts(experiment)
        log_computing_dtype(experiment)
        with self.stopwatch.stage("data"):
            config = experiment.source.config()
            decoder = skeleton(experiment, config)
            check_shapes(experiment, decoder)  # before the texts are read
            self.calibration_ids, self.evaluation_ids = token_ids(experiment, config, experiment.source.tokenizer())
            if experiment.calibration.needs_model and not experiment.is_dense:
                with self.stopwatch.stage("generation"):
                    self.calibration_ids = written_ids(experiment, decoder, self.calibration_ids)
            self.evaluation_hashes = {key: rows_hash(rows) for key, rows in self.evaluation_ids.items()}
        with self.stopwatch.stage("load"):
            self.engine = open_engine(experiment, decoder)
            check_consistency(self.engine)
            windows = list(chain.from_iterable(self.evaluation_ids.values()))
            fit_memory(experiment, self.engine, methods or [experiment.method], self.calibration_ids, windows)
            if not experiment.is_dense:
                self.engine.decoder.keep(chosen_linears(experiment, self.engine.decoder))
            if experiment.config["save"]:
                self._check_that_it_can_be_saved()

    @cached_property
    def plan(self) -> Plan:
        """Linear name -> pattern, after an importance pass over the dense model where the allocation needs one."""
        request = PlanRequest(self.experiment.allocation, self.experiment.pattern, self.experiment.folder / SCRATCH)
        return make_plans(self.engine, self.calibration_ids, [request], self.stopwatch)[0]

    def run(self) -> RunRecord:
        """Prune and measure, or measure what an earlier record of the dense model lacks, write the record and return it."""
        experiment = self.experiment
        record = new_record(experiment)
        old = None if experiment.config["overwrite"] else _read(experiment.folder)
        if experiment.is_dense:
            record.add_evaluations(old.evaluations if old else {})
            _, metrics = self._run_pass(None, record, unmeasured(old, self.evaluation_hashes))
            record.add_evaluations(self.entries(metrics, metrics))
        else:
            record.calibration_hash = token_hash(self.calibration_ids)
            if old and old.prunes_as(record):
                record.add_evaluations(old.evaluations)  # those not asked for now are kept
            self._prune(record)
        check_metrics(record.evaluations, experiment.evaluations)
        if experiment.config["save"]:
            with self.stopwatch.stage("save"):
                self._save(record)
        else:  # a model that an earlier run saved is not the one that this record describes
            parallel.on_rank_0(shutil.rmtree)(experiment.folder / "model", ignore_errors=True)
        self._finish(record, experiment)
        return record

    def measure(self) -> dict[str, dict[str, float]]:
        """Fingerprint -> metrics of the model as it is."""
        return self._run_pass(None, new_record(self.experiment), list(self.evaluation_ids))[1]

    def entries(self, metrics: Metrics, dense_metrics: Metrics) -> dict[str, dict[str, Any]]:
        """What a record's `evaluations` holds of these metrics, by fingerprint."""
        evaluators, hashes = self.experiment.evaluation.evaluators, self.evaluation_hashes
        return {
            key: evaluation_entry(name, evaluators[name], hashes[key], metrics[key], dense_metrics[key])
            for name, key in self.experiment.evaluations.items()
            if key in metrics
        }

    def _prune(self, record: RunRecord) -> None:
        """Prune, and measure the pruned model for its `record` and, in the same pass, what the dense model's record lacks."""
        dense = self.experiment.dense()
        # If another process measures the same dense model, as in a parallel sweep, its record is read afterwards.
        with locked(dense.folder, wait=False) as is_locked:
            dense_record = _read(dense.folder)
            lacking = unmeasured(dense_record, self.evaluation_hashes)
            new = new_record(dense) if is_locked and (lacking or dense_record is None) else None
            metrics, dense_metrics = self._run_pass(record, new, lacking)
            if new:
                new.add_evaluations(dense_record.evaluations if dense_record else {})
                new.add_evaluations(self.entries(dense_metrics, dense_metrics))
                check_metrics(new.evaluations, dense.evaluations)
                self._finish(new, dense)
        dense_record = new or (self._await(dense) if lacking else dense_record)
        figures = {key: entry["metrics"] for key, entry in dense_record.evaluations.items()} if dense_record else {}
        record.add_evaluations(self.entries(metrics, figures))

    def _await(self, dense: Experiment) -> RunRecord | None:
        """The dense model's record once another process has measured it."""
        with self.stopwatch.stopped(), locked(dense.folder):
            record = _read(dense.folder)
        if unmeasured(record, self.evaluation_hashes):  # it failed
            del self.engine  # two models may not fit
            self._remember_peaks()  # the other job resets them
            with self.stopwatch.stage("dense_evaluation"):
                record = dense_record_of(self.experiment, self.evaluation_hashes)
            self.engine = open_engine(self.experiment, skeleton(self.experiment, self.experiment.source.config()))
        return record

    def _run_pass(self, pruned: RunRecord | None, dense: RunRecord | None, dense_keys: list[str]) -> tuple[Metrics, Metrics]:
        """One pass over the layers that fills in the sparsities of one or both records. Returns the metrics of the pruned and the
        dense model by fingerprint, those of the latter for `dense_keys`."""
        tasks, distilling = [], distilling_pass(self.experiment, self.engine, self.stopwatch) if pruned else None
        by_name = self.experiment.evaluation.evaluators
        evaluators = {key: by_name[name] for name, key in self.experiment.evaluations.items() if key in self.evaluation_ids}
        if pruned:
            self._count_earlier_processes()
        if pruned and not (distilling and distilling.is_finished):
            tasks.append(PruneTask(self.experiment.method, self.plan, self.engine.store.layer_files))
        with ExitStack() as stack:
            if distilling:
                stack.enter_context(distilling.dense_outputs(self.calibration_ids))
            ids = self.evaluation_ids
            with self.stopwatch.stage("evaluation"):
                measured = Measurement("pruned", evaluators if pruned else {}, ids, self.experiment.folder / SCRATCH)
                states = stack.enter_context(measured.hidden_states(self.engine))
            with self.stopwatch.stage("dense_evaluation"):
                dense_evaluators = {key: evaluators[key] for key in dense_keys} if dense else {}
                folder, is_saved = self.experiment.dense().folder / SCRATCH, self.experiment.home is not None
                measured_dense = Measurement("dense", dense_evaluators, ids, folder, is_saved)
                dense_states = stack.enter_context(measured_dense.hidden_states(self.engine))
            pruning = PruningPass(self.engine, tasks, self.experiment.config["propagate"], self.stopwatch)
            counts = pruning.run(self.calibration_ids, dense_states if dense else None, () if distilling else states)
            if distilling:
                distilling.run()
                PruningPass(self.engine, [], "pruned", self.stopwatch).run(self.calibration_ids, pruned=states)
            with self.stopwatch.stage("dense_evaluation"):
                dense_metrics = measured_dense.finish()
            with self.stopwatch.stage("evaluation"):
                metrics = measured.finish()
        self._check_source((pruned or dense).model_hash)
        if dense:
            dense.linear_sparsity, dense.model_sparsity = fractions_of_zeros(self.engine.decoder, counts)
        if pruned:
            describe_layers(pruned, self.experiment, self.engine, self.plan)
        return metrics, dense_metrics

    @parallel.on_rank_0
    def _check_source(self, digest: str | None) -> None:
        """Raise ValueError, and drop the layers, if the model that was read is not the one of this digest throughout."""
        source = self.experiment.source
        if source.digest() != digest:
            shutil.rmtree(self.experiment.folder / SCRATCH, ignore_errors=True)
            reason = "its files have changed during the run, which may have read layers of two models; run it again"
            raise ValueError(f"model.path={source.path}: {reason}")

    def _count_earlier_processes(self) -> None:
        """Add the seconds that an interrupted run took for the layers which are finished, and remember its peaks of memory."""
        reports = self.engine.store.layer_files.reports
        if reports:
            last = reports[max(reports)]
            self.stopwatch.resume(last.get("run_seconds", {}))  # a layer of a grid has none
            self._peaks = last.get("run_peaks", {})

    def _remember_peaks(self) -> None:
        self._peaks = {name: max(value, self._peaks.get(name, 0)) for name, value in peaks().items()}

    def _check_that_it_can_be_saved(self) -> None:
        source, decoder = self.experiment.source, self.engine.decoder
        checkpoint = self.engine.store.checkpoint or Checkpoint(source.files.weights(), decoder.model, source.label)
        views = (view for index in range(len(decoder.layers)) for view in decoder.weights(index).values())
        check_names(checkpoint, {view.key for view in views})

    @parallel.on_rank_0
    def _save(self, record: RunRecord) -> None:
        target, layer_files = self.experiment.folder / "model", self.engine.store.layer_files
        layers = [layer_files.path(index) for index in layer_files.reports]
        scales = scales_of(self.engine.decoder, layers, record)
        save_model(self.experiment.source, self.engine.decoder.model, layers, record, target, scales)
        record.saved_hash = self.experiment.saved_source().digest()
        log.info("model: %s", target)

    @parallel.on_rank_0
    def _finish(self, record: RunRecord, experiment: Experiment) -> None:
        """Write a record, and remove what only a resumed run would need."""
        runtime = self.experiment.runtime
        if experiment is self.experiment:
            record.seconds = self.stopwatch.total()
            if self.engine.store.layer_files.num_cells > 1:
                del record.seconds["total"]
            else:
                self._remember_peaks()
                record.peak_host_bytes = self._peaks["peak_host_bytes"]
                record.peak_device_bytes = self._peaks["peak_device_bytes"]
        else:  # the dense model, measured in the same pass
            record.seconds = dict.fromkeys(("dense_evaluation", "total"), self.stopwatch.seconds["dense_evaluation"])
        if runtime.batch_tokens != self.experiment.config["runtime"]["batch_tokens"]:
            record.notes.append(f"short of device memory: runtime.batch_tokens={runtime.batch_tokens}")
        if parallel.is_distributed():
            record.notes.append(f"computed by {parallel.world_size()} processes; peaks of memory are those of the first")
        record.finished = now()
        record.write(experiment.folder)
        shutil.rmtree(experiment.folder / SCRATCH, ignore_errors=True)


def unmeasured(dense: RunRecord | None, tokens: Mapping[str, str]) -> list[str]:
    """Fingerprints of the evaluations, with the hashes of their tokens, that a dense record lacks or has of other tokens."""
    known = dense.evaluations if dense else {}
    return [key for key, digest in tokens.items() if key not in known or known[key]["tokens"] != digest]


def dense_record_of(experiment: Experiment, tokens: Mapping[str, str]) -> RunRecord:
    """The record of the dense model with the evaluations of `experiment` whose hashes of tokens are given by fingerprint; what it lacks,
    or has of other tokens, is measured."""
    dense = experiment.dense()
    with locked(dense.folder):
        record = _read(dense.folder)
        if record is None or unmeasured(record, tokens):
            record = Job(dense).run()
        return record


@parallel.on_rank_0
def _read(folder: Path) -> RunRecord | None:
    """The completed record in a folder; None, with a warning, if it is damaged."""
    try:
        return read_completed(folder)
    except RecordError as error:
        log.warning("warning: %s; its figures are measured again", error)
        return None
