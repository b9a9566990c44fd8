"""One run after its settings are checked: token ids, model, one pass over the layers, record."""

import logging
import shutil
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnprune.allocations.base import Plan
from nnprune.allocations.uniform import Uniform
from nnprune.calibration import token_hash
from nnprune.engine import parallel
from nnprune.engine.consistency_check import check_consistency
from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.prune_linears import fractions_of_zeros
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.engine.stopwatch import Stopwatch
from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import locked
from nnprune.experiment.measurement import Measurement
from nnprune.experiment.plans import PlanRequest, make_plans
from nnprune.experiment.provenance import new_record
from nnprune.model.attention import use_kernel
from nnprune.model.decoder import Decoder
from nnprune.model.dtypes import name_of
from nnprune.model.export import save_model
from nnprune.model.loading import quieten_transformers
from nnprune.records import RecordError, RunRecord, read_completed
from nnprune.runtime import peak_device_bytes, peak_host_bytes

log = logging.getLogger(__name__)

SCRATCH = "unfinished"
"""Subfolder of a run's folder for what a resumed run needs, such as layer files; removed once the record is written."""


class Job:
    """Prunes, measures and records one experiment, resuming after its last finished layer."""

    def __init__(self, experiment: Experiment) -> None:
        quieten_transformers()
        self.experiment = experiment
        self.stopwatch = Stopwatch()
        experiment.runtime.start(experiment.config["seed"])
        _warn_of_demo_texts(experiment)
        _log_computing_dtype(experiment)
        with self.stopwatch.stage("data"):
            self.config = experiment.source.config()
            check_shapes(experiment, skeleton(experiment, self.config))  # before the texts are read
            self.tokenizer = experiment.source.tokenizer()
            self.calibration_ids, self.evaluation_ids = token_ids(experiment, self.config, self.tokenizer)
        with self.stopwatch.stage("load"):
            self.engine = _engine(experiment, self.config)
            check_consistency(self.engine)

    @cached_property
    def plan(self) -> Plan:
        """Linear name -> pattern, after an importance pass over the dense model where the allocation needs one."""
        request = PlanRequest(self.experiment.allocation, self.experiment.pattern, self.experiment.folder / SCRATCH)
        return make_plans(self.engine, self.calibration_ids, [request], self.stopwatch)[0]

    def run(self) -> RunRecord:
        """Prune and measure, write the record and return it."""
        experiment = self.experiment
        record = new_record(experiment)
        if experiment.is_dense:
            self._run_pass(None, record)
        else:
            record.calibration_hash = token_hash(self.calibration_ids)
            record.dense_metrics = self._prune(record).metrics
        if experiment.config["save"]:
            with self.stopwatch.stage("save"):
                self._save(record)
        else:  # a model that an earlier run saved is not the one that this record describes
            parallel.on_rank_0(shutil.rmtree)(experiment.folder / "model", ignore_errors=True)
        self._finish(record, experiment)
        return record

    def _prune(self, record: RunRecord) -> RunRecord:
        """Prune, and measure the pruned model for its `record`. Returns the record of the dense model: the existing one, or a new
        one measured in the same pass."""
        dense = self.experiment.dense()
        # If another process measures the same dense model, as in a parallel sweep, its record is read afterwards.
        with locked(dense.folder, wait=False) as is_locked:
            dense_record = _read_dense(dense.folder)
            new = new_record(dense) if is_locked and dense_record is None else None
            self._run_pass(record, new)
            if new:
                self._finish(new, dense)
        if dense_record or new:
            return dense_record or new
        with locked(dense.folder):
            dense_record = _read_dense(dense.folder)
            if dense_record is None:  # the other process failed
                self.engine = _engine(self.experiment, self.config)  # dense weights may no longer be in memory
                dense_record = new_record(dense)
                self._run_pass(None, dense_record)
                self._finish(dense_record, dense)
            return dense_record

    def _run_pass(self, pruned: RunRecord | None, dense: RunRecord | None) -> None:
        """One pass over the layers that fills in the metrics and sparsities of one or both records."""
        tasks, layer_files = [], self.engine.store.layer_files
        evaluators, ids = self.experiment.evaluation.evaluators, self.evaluation_ids
        if pruned:
            tasks.append(PruneTask(self.experiment.method, self.plan, layer_files))
        with ExitStack() as stack:
            with self.stopwatch.stage("evaluation"):
                measured = Measurement("pruned", evaluators if pruned else {}, ids, self.experiment.folder / SCRATCH)
                states = stack.enter_context(measured.hidden_states(self.engine))
            with self.stopwatch.stage("dense_evaluation"):
                folder = self.experiment.dense().folder / SCRATCH
                measured_dense = Measurement("dense", evaluators if dense else {}, ids, folder)
                dense_states = stack.enter_context(measured_dense.hidden_states(self.engine))
            pruning = PruningPass(self.engine, tasks, self.experiment.config["propagate"], self.stopwatch)
            counts = pruning.run(self.calibration_ids, dense_states if dense else None, states)
            with self.stopwatch.stage("dense_evaluation"):
                dense_metrics = measured_dense.finish()
            with self.stopwatch.stage("evaluation"):
                metrics = measured.finish()
        if dense:
            dense.metrics = dense.dense_metrics = dense_metrics
            dense.linear_sparsity, dense.model_sparsity = fractions_of_zeros(self.engine.decoder, counts)
        if pruned:
            pruned.metrics = metrics
            reports = [layer_files.reports[index] for index in range(self.engine.num_layers)]
            pruned.per_linear = [linear for report in reports for linear in report["linears"]]
            pruned.recovered = [report["recovered"] for report in reports if "recovered" in report]
            pruned.linear_sparsity, pruned.model_sparsity = fractions_of_zeros(self.engine.decoder, reports)
            if (num_cells := max(report["num_cells"] for report in reports)) > 1:
                pruned.notes.append(f"pruned in one pass with {num_cells - 1} other cells; `seconds` leaves that pass out")

    @parallel.on_rank_0
    def _save(self, record: RunRecord) -> None:
        keys = ("model", "pruner", "sparsity", "fingerprint", "metrics", "dense_metrics")
        summary = {key: getattr(record, key) for key in keys}
        target = self.experiment.folder / "model"
        save_model(self.engine.store, self.tokenizer, self.experiment.source.generation_config(), summary, target)
        log.info("model: %s", target)

    @parallel.on_rank_0
    def _finish(self, record: RunRecord, experiment: Experiment) -> None:
        """Write a record, and remove what only a resumed run would need."""
        runtime = self.experiment.runtime
        record.evaluation_hashes = {name: token_hash(ids) for name, ids in self.evaluation_ids.items()}
        if experiment is self.experiment:
            record.seconds = self.stopwatch.total()
        else:  # the dense model, measured in the same pass
            record.seconds = dict.fromkeys(("dense_evaluation", "total"), self.stopwatch.seconds["dense_evaluation"])
        record.peak_host_bytes = peak_host_bytes()
        record.peak_device_bytes = peak_device_bytes()
        if runtime.batch_tokens != self.experiment.config["runtime"]["batch_tokens"]:
            record.notes.append(f"out of device memory: went on with runtime.batch_tokens={runtime.batch_tokens}")
        if parallel.is_distributed():
            record.notes.append(f"computed by {parallel.world_size()} processes; peaks of memory are those of the first")
        record.finished = datetime.now(UTC).isoformat(timespec="seconds")
        record.write(experiment.folder)
        shutil.rmtree(experiment.folder / SCRATCH, ignore_errors=True)


@parallel.on_rank_0
def _read_dense(folder: Path) -> RunRecord | None:
    """The dense model's record; None, with a warning, if it is damaged."""
    try:
        return read_completed(folder)
    except RecordError as error:
        log.warning("warning: %s; the dense model is measured again", error)
        return None


def _warn_of_demo_texts(experiment: Experiment) -> None:
    """Warn of a real model on the demo's texts, which `model.path=org/name` without `model=hub` gets by default."""
    if experiment.source.path != "demo" and "demo" in experiment.evaluation.evaluators:
        log.warning(
            "warning: evaluation=demo measures a real model on the demo's text; model=hub or model=local has better defaults"
        )


def _log_computing_dtype(experiment: Experiment) -> None:
    """Log the computing dtype if it is not the checkpoint's."""
    stored, computing = name_of(experiment.source.stored_dtype), name_of(experiment.computing_dtype)
    if computing != stored:
        device = experiment.runtime.torch_device.type.replace("cpu", "CPU").replace("cuda", "CUDA device")
        log.info("computing in %s: this %s has no units for the checkpoint's %s", computing, device, stored)


def skeleton(experiment: Experiment, config: Any) -> Decoder:
    """The model without its weights. Raises ValueError if its files do not suit `runtime.layers`."""
    source = experiment.source
    model = source.skeleton(config)
    source.check(model, experiment.runtime.layers)
    return Decoder(model, source.layers_path)


def check_shapes(experiment: Experiment, decoder: Decoder) -> None:
    """Raise ValueError for sequences longer than the model's positions, and for patterns that do not fit its linears or the pruner."""
    positions = getattr(decoder.text_config, "max_position_embeddings", None)
    lengths = {"calibration": 0 if experiment.is_dense else experiment.calibration.seq_len}
    lengths["evaluation"] = max((one.seq_len for one in experiment.evaluation.evaluators.values()), default=0)
    for key, seq_len in lengths.items():
        if positions and seq_len > positions:
            raise ValueError(
                f"{key}.seq_len={seq_len}: {experiment.source.name} has {positions} positions; lower {key}.seq_len"
            )
    allocation = Uniform() if experiment.is_dense else experiment.allocation
    for pattern in sorted(allocation.check(experiment.pattern, decoder.shapes_by_layer()), key=str):
        experiment.method.pruner.validate(pattern)


def token_ids(experiment: Experiment, config: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Calibration ids (N, T), with N = 0 for a dense run, and evaluator name -> windows (N, T); int64."""
    vocab_size = config.get_text_config().vocab_size
    evaluation = experiment.evaluation.token_ids(tokenizer)
    if experiment.is_dense:
        return torch.empty(0, experiment.calibration.seq_len, dtype=torch.int64), evaluation
    return experiment.calibration.token_ids(tokenizer, vocab_size), evaluation


def _engine(experiment: Experiment, config: Any) -> LayerwiseEngine:
    """The model, loaded or with its layers offloaded to disk, as the runtime says."""
    source, runtime = experiment.source, experiment.runtime
    lazy = runtime.layers == "disk"
    model = source.skeleton(config) if lazy else source.load(config)
    use_kernel(model, runtime.torch_device)
    decoder = Decoder(model, source.layers_path)
    checkpoint = source.checkpoint(decoder.model) if lazy else None
    layer_files = LayerFiles(experiment.folder / SCRATCH, decoder.path)
    store = LayerStore(decoder, runtime.torch_device, runtime.layers, layer_files, checkpoint, experiment.computing_dtype)
    scratch = experiment.folder / SCRATCH / f"rank-{parallel.rank()}" if parallel.rank() else experiment.folder
    return LayerwiseEngine(decoder, store, runtime, scratch)
