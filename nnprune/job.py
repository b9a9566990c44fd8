"""The steps of one run behind its checks: ids, model, dense perplexity, pruning, perplexity, record."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.utils import logging as transformers_logging

from nnprune.calibration import token_hash
from nnprune.decoder import Decoder
from nnprune.evaluation import perplexity
from nnprune.experiment import Experiment
from nnprune.layerstore import LayerStore
from nnprune.layerwise import LayerwiseEngine
from nnprune.patterns import SparsityPattern
from nnprune.provenance import commit, versions
from nnprune.pruning import LayerwisePruning, count_zeros
from nnprune.records import RunRecord, read, write_atomically
from nnprune.runtime import peak_device_bytes, peak_host_bytes
from nnprune.saving import save_model

log = logging.getLogger(__name__)

SCRATCH = "unfinished"
"""Folder, in a run's own, of what an interrupted run has finished; removed once the record is written."""


@contextmanager
def prepare_folder(folder: Path) -> Iterator[None]:
    """Make the run's folder, keep other processes out of it meanwhile, and log into it.

    Raises OSError naming the folder when it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
        handler = logging.FileHandler(folder / "run.log")
    except OSError as error:
        reason = f"outputs={folder}: cannot be written ({error.strerror})"
        raise OSError(error.errno, f"{reason}; set outputs=DIR to a writable folder") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("nnprune")
    if logger.level == logging.NOTSET:  # called from Python, where nobody configured logging
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        lock.release()


def _acquire(folder: Path) -> FileLock:
    """The lock of a folder, which the system gives back when a process dies."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that works in %s", folder)
        lock.acquire()
    except NotImplementedError:
        log.warning("warning: %s lies on a file system without locks: do not start the same run twice at once", folder)
    return lock


class Stopwatch:
    """Seconds by stage, added up over repeated visits."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens within."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        """All stages, and the time since this object was made."""
        return {**self.seconds, "total": time.perf_counter() - self._start}


def execute(experiment: Experiment) -> RunRecord:
    """Do the work of an experiment in its folder, from the last finished layer on, and write its record."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    watch = Stopwatch()
    experiment.runtime.start(experiment.config["seed"])
    _warn_of_demo_texts(experiment)
    with watch.stage("data"):
        config, tokenizer = experiment.source.config(), experiment.source.tokenizer()
        plan = _plan(experiment, config)
        calibration_ids, evaluation_ids = _token_ids(experiment, config, tokenizer)
    with watch.stage("load"):
        engine = _engine(experiment, config)
        engine.check_model()
    record = _new_record(experiment)
    record.evaluation_hashes = {name: token_hash(ids) for name, ids in evaluation_ids.items()}
    with watch.stage("dense_evaluation"):
        record.dense_metrics = dense_metrics(experiment, engine, record.evaluation_hashes, evaluation_ids)
    if experiment.is_dense:
        record.metrics = record.dense_metrics
    else:
        record.calibration_hash = token_hash(calibration_ids)
        with watch.stage("prune"):
            pruning = LayerwisePruning(engine, experiment.pruner, plan, experiment.config["propagate"])
            reports = pruning.run(calibration_ids)
            record.per_linear = [linear for report in reports for linear in report["linears"]]
        with watch.stage("evaluation"):
            record.metrics = _metrics(experiment, engine, evaluation_ids)
    record.linear_sparsity, record.model_sparsity = _sparsities(engine, pruned=not experiment.is_dense)
    if experiment.config["save"]:
        with watch.stage("save"):
            told = ("model", "pruner", "sparsity", "fingerprint", "metrics", "dense_metrics")
            summary = {key: getattr(record, key) for key in told}
            target = experiment.folder / "model"
            save_model(engine.store, tokenizer, experiment.source.generation_config(), summary, target)
            log.info("model: %s", target)
    _finish(record, watch)
    record.write(experiment.folder)
    shutil.rmtree(experiment.folder / SCRATCH, ignore_errors=True)
    return record


def dense_metrics(
    experiment: Experiment, engine: LayerwiseEngine, hashes: dict[str, str], ids: dict[str, Tensor]
) -> dict[str, float]:
    """Perplexities of the dense model: from their record if there is one, else measured and recorded."""
    dense = experiment.dense()
    if experiment.is_dense:
        return _metrics(dense, engine, ids)
    with prepare_folder(dense.folder):
        record = read(dense.folder)
        if record is None or record.status != "completed":
            watch = Stopwatch()
            record = _new_record(dense)
            record.evaluation_hashes = hashes
            with watch.stage("evaluation"):
                record.metrics = record.dense_metrics = _metrics(dense, engine, ids)
            record.linear_sparsity, record.model_sparsity = _sparsities(engine, pruned=False)
            _finish(record, watch)
            record.write(dense.folder)
            shutil.rmtree(dense.folder / SCRATCH, ignore_errors=True)
    return record.metrics


def _warn_of_demo_texts(experiment: Experiment) -> None:
    """The demo's texts are the defaults of `model.path=org/name` alone, and say little about a real model."""
    if experiment.source.path != "demo" and "demo" in experiment.evaluation.sources:
        log.warning(
            "warning: evaluation=demo measures a real model on the demo's text; model=hub or model=local has better defaults"
        )


def _plan(experiment: Experiment, config: Any) -> dict[str, SparsityPattern]:
    """Pattern by linear, from shapes alone. Raises ValueError for sequences or groups that the model can't have."""
    decoder = Decoder(experiment.source.skeleton(config), experiment.source.layers_path)
    positions = getattr(decoder.text_config, "max_position_embeddings", None)
    used = {"calibration": not experiment.is_dense, "evaluation": bool(experiment.evaluation.sources)}
    for key in [key for key, is_used in used.items() if is_used]:
        seq_len = getattr(experiment, key).seq_len
        if positions and seq_len > positions:
            raise ValueError(
                f"{key}.seq_len={seq_len}: {experiment.source.name} has {positions} positions; lower {key}.seq_len"
            )
    return experiment.allocation.plan(experiment.pattern, decoder.shapes())


def _token_ids(experiment: Experiment, config: Any, tokenizer: Any) -> tuple[Tensor, dict[str, Tensor]]:
    vocab_size = config.get_text_config().vocab_size
    evaluation = experiment.evaluation.token_ids(tokenizer)
    if experiment.is_dense:
        return torch.empty(0, experiment.calibration.seq_len, dtype=torch.int64), evaluation
    return experiment.calibration.token_ids(tokenizer, vocab_size), evaluation


def _engine(experiment: Experiment, config: Any) -> LayerwiseEngine:
    """The model, its layers where the runtime wants them, and the loop over them."""
    source, runtime = experiment.source, experiment.runtime
    lazy = runtime.layers == "disk"
    decoder = Decoder(source.skeleton(config) if lazy else source.load(config), source.layers_path)
    checkpoint = source.checkpoint(decoder.model) if lazy else None
    store = LayerStore(decoder, runtime.torch_device, runtime.layers, experiment.folder / SCRATCH, checkpoint)
    return LayerwiseEngine(decoder, store, runtime, experiment.folder)


def _metrics(experiment: Experiment, engine: LayerwiseEngine, ids: dict[str, Tensor]) -> dict[str, float]:
    """Perplexity by text. Those that an interrupted run has measured are in a file beside its finished layers."""
    journal = experiment.folder / SCRATCH / "metrics.json"
    metrics = json.loads(journal.read_text(encoding="utf-8")) if journal.exists() else {}
    kind = "dense" if experiment.is_dense else "pruned"
    for name, rows in ids.items():
        key = f"{name}_perplexity"
        if key not in metrics:
            metrics[key] = perplexity(engine, rows, not experiment.is_dense, f"{kind} {name} perplexity")
            write_atomically(journal, json.dumps(metrics))
    return metrics


def _sparsities(engine: LayerwiseEngine, pruned: bool) -> tuple[float, float]:
    """Fraction of zeros among the weights of linears, and among all parameters, tied ones counted once."""
    store, decoder = engine.store, engine.decoder
    totals = dict.fromkeys(("zeros", "size", "linear_zeros", "linear_size"), 0)
    inside = set(decoder.layers.parameters())
    shell = [parameter for parameter in decoder.model.parameters() if parameter not in inside]
    for index in range(len(decoder.layers)):
        if pruned:
            counts = store.reports[index]
        else:
            counts = count_zeros(store.fetch(index, pruned=False), decoder.linears(index))
            store.release(index)
        totals = {key: total + counts[key] for key, total in totals.items()}
    zeros = totals["zeros"] + sum(parameter.numel() - int(parameter.count_nonzero()) for parameter in shell)
    size = totals["size"] + sum(parameter.numel() for parameter in shell)
    return totals["linear_zeros"] / totals["linear_size"], zeros / size


def _new_record(experiment: Experiment) -> RunRecord:
    head, dirty = commit()
    return RunRecord(
        status="completed",
        fingerprint=experiment.fingerprint,
        model=experiment.source.name,
        pruner=experiment.label,
        sparsity=str(experiment.pattern),
        config=experiment.config,
        versions=versions(),
        commit=head,
        dirty=dirty,
    )


def _finish(record: RunRecord, watch: Stopwatch) -> None:
    record.seconds = watch.total()
    record.peak_host_bytes = peak_host_bytes()
    record.peak_device_bytes = peak_device_bytes()
    record.finished = datetime.now(UTC).isoformat(timespec="seconds")
