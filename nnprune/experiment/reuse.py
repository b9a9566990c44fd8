"""What an earlier run has left for this one: its record, to which evaluations may be added, its model and its layer files."""

import logging
import shutil
from dataclasses import replace
from importlib.metadata import version

from nnprune.engine import parallel
from nnprune.experiment.build import Experiment
from nnprune.experiment.folder import locked
from nnprune.experiment.identity import own_code
from nnprune.experiment.job import Job, dense_record_of
from nnprune.experiment.measurement import check_metrics, evaluation_entry
from nnprune.experiment.preparation import DEFAULT_POSITIONS, SCRATCH
from nnprune.experiment.provenance import now
from nnprune.model.dtypes import name_of
from nnprune.model.export import SUMMARY, describe
from nnprune.model.model_files import read_json
from nnprune.records import RunRecord, read_completed, read_journal, write_journal

log = logging.getLogger(__name__)

CODE_JOURNAL = "code.json"
OVERWRITING = "overwriting"
"""Says that the layer files beside it are of a run with overwrite=true."""


@parallel.on_rank_0
def reusable_record(experiment: Experiment, keep_layers: bool = False) -> RunRecord | None:
    """The completed record of this experiment, if nothing has to be pruned for what was asked; else None.

    `overwrite=true` returns None and deletes old layer files, unless `keep_layers` says that they are new, or they are of such a run
    that was interrupted. The old record stays until the new one is written.
    """
    folder, config = experiment.folder, experiment.config
    code = own_code(experiment)
    if config["overwrite"]:
        record = None
        if not keep_layers and not (folder / SCRATCH / OVERWRITING).exists():
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    elif record := read_completed(folder):
        if not keep_layers:  # else the grid has said it
            _report_other_code(record, code)
        if problem := _unmet(experiment, record):
            if not keep_layers:
                log.info("finished already, but %s: running again", problem)
            record = None
        elif (folder / SCRATCH / OVERWRITING).exists():
            log.info("a run of it with overwrite=true was interrupted; the same command continues it")
        else:  # a run may have been killed after writing its record, before removing this
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    if record is None and not experiment.is_dense:
        _drop_layers_of_other_code(experiment, code)
        if config["overwrite"]:
            (folder / SCRATCH / OVERWRITING).touch()
    return record


def add_evaluations(experiment: Experiment, record: RunRecord) -> bool:
    """Add to the record of a finished run the evaluations that it lacks, measured on the saved model. Returns whether any was measured."""
    missing = experiment.missing_from(record)
    before = dict(record.metrics)
    if missing:
        log.info("measuring the %s model with %s", "dense" if experiment.is_dense else "saved", ", ".join(missing))
    if by_rows := _with_rows(experiment, missing):
        wanted = replace(experiment, evaluations=by_rows)
        source, scratch = experiment.saved_source(), experiment.folder / SCRATCH
        job = Job(replace(wanted.dense(), source=source, label="saved", home=scratch))
        metrics = job.measure()
        dense = dense_record_of(wanted, job.evaluation_hashes).evaluations
        record.add_evaluations(job.entries(metrics, {key: dense[key]["metrics"] for key in metrics}))
        _keep(experiment, record)
    for name, key in missing.items():
        if name not in by_rows:
            _add_whole_models(experiment, record, name, key)
            _keep(experiment, record)
    record.add_evaluations({key: record.evaluations[key] for key in experiment.evaluations.values()})  # the last ones are shown
    if missing or record.metrics != before:
        _keep(experiment, record)
        shutil.rmtree(experiment.folder / SCRATCH, ignore_errors=True)
    return bool(missing)


def _with_rows(experiment: Experiment, evaluations: dict[str, str]) -> dict[str, str]:
    """Those of some evaluations that measure rows."""
    evaluators = experiment.evaluation.evaluators
    return {name: key for name, key in evaluations.items() if not evaluators[name].loads_model}


def _add_whole_models(experiment: Experiment, record: RunRecord, name: str, key: str) -> None:
    """Add the evaluation `key` of an evaluator that loads the model itself: the dense one, or the saved one and the dense one's figures."""
    evaluator, runtime = experiment.evaluation.evaluators[name], experiment.runtime
    source = experiment.source if experiment.is_dense else experiment.saved_source()
    source.files.weights()  # those of the hub are fetched
    metrics = dense_metrics = evaluator.measure_model(
        str(source.files.folder),
        device=str(runtime.torch_device),
        dtype=name_of(experiment.computing_dtype),
        batch_size=runtime.rows_per_batch(evaluator.seq_len or DEFAULT_POSITIONS),
        trust_remote_code=source.trust_remote_code,
    )
    if not experiment.is_dense:
        dense = replace(experiment.dense(), evaluations={name: key})
        dense_record_of(replace(dense, evaluations={}), {})
        with locked(dense.folder):
            dense_record = read_completed(dense.folder)
            add_evaluations(dense, dense_record)
        dense_metrics = dense_record.evaluations[key]["metrics"]
    record.add_evaluations({key: evaluation_entry(name, evaluator, "", metrics, dense_metrics)})


@parallel.on_rank_0
def _keep(experiment: Experiment, record: RunRecord) -> None:
    """Write a record that gained evaluations, also as the description of the saved model."""
    check_metrics(record.evaluations, experiment.evaluations)
    record.config["evaluation"], record.finished = experiment.config["evaluation"], now()
    record.write(experiment.folder)
    if ((saved := experiment.folder / "model") / SUMMARY).is_file():
        describe(saved, read_json(saved / SUMMARY, f"{saved}")["base_model"], record)


def _unmet(experiment: Experiment, record: RunRecord) -> str | None:
    """Why a finished run has to start again for what was asked; None if it has not."""
    is_saved = (experiment.folder / "model").is_dir()
    if experiment.config["save"] and not is_saved:
        return "its model was not saved"
    if is_saved and experiment.config["push"] and experiment.saved_source().digest() != record.saved_hash:
        return "its saved model has changed"
    missing = experiment.missing_from(record)
    if not (_with_rows(experiment, missing) if experiment.is_dense else missing):
        return None
    reason = f"not measured with {', '.join(missing)}"
    if experiment.is_dense:
        return reason
    if not is_saved:
        return f"{reason}, and its model was not saved (save=true keeps it)"
    if experiment.saved_source().digest() != record.saved_hash:
        return f"{reason}, and its saved model has changed"
    return None


def _report_other_code(record: RunRecord, code: dict[str, str]) -> None:
    """Say in one line that a finished record was made by other code of nnprune."""
    if record.code and (changed := _changed(record.code, code)):
        log.warning("warning: other code made the record of this finished run (%s); overwrite=true runs it again", changed)


def _drop_layers_of_other_code(experiment: Experiment, code: dict[str, str]) -> None:
    """Remove the layer files of an unfinished run that other code made, nnprune's or a library's: no model is pruned by two versions."""
    scratch = experiment.folder / SCRATCH
    journal = scratch / CODE_JOURNAL
    code = code | {package: version(package).partition("+")[0] for package in ("torch", "transformers")}  # built for any device
    if scratch.is_dir() and (changed := _changed(read_journal(journal) or {}, code)):
        log.warning("warning: other code made the layer files of this unfinished run (%s): starting afresh", changed)
        shutil.rmtree(scratch)
    write_journal(journal, code)


def _changed(old: dict[str, str], new: dict[str, str]) -> str:
    """The files and packages that differ, as text; empty if none does."""
    changed = (name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name))
    return ", ".join(f"nnprune/{name}" if name.endswith(".py") else f"{name} {old.get(name)}" for name in changed)
