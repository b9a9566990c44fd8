"""The record of a run: one `result.json`, written last and by rename, so that its presence means "finished".

Does not import torch, because the collector reads thousands of records.
"""

import hashlib
import json
import logging
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NOT_SCIENCE = (
    *("evaluation", "runtime", "label", "outputs", "overwrite", "save", "push", "push_private", "plan", "grid", "objective"),
    "tracking",
)
"""Settings that are no part of what names a pruned model."""

SINCE = {"calibration.min_tokens_per_expert": 256, "calibration.route": "own"}
"""Settings that earlier records lack, with what was done before there were any: with these values they are no part of a name either."""

SCHEMA_VERSION = 1
RESULT_FILE = "result.json"


class RecordError(ValueError):
    """A `result.json` that is not a record: truncated, foreign, or of another schema."""


@dataclass
class RunRecord:
    """The settings, results and provenance of one run.

    Keys of `metrics` (of the pruned model) and `dense_metrics` are `<evaluation>_perplexity`, `<task>_acc` and the like, and
    `<metric>_stderr` for a metric's standard error; sparsities are fractions of zeros; times are seconds; sizes are bytes; `dtype` is
    the computing dtype. `linear_sparsity` is that of all linears that were to be pruned; `selection` tells which, if not all: `linears`
    of `all_linears`, and how many fit each pattern of `include` and `exclude`. `per_linear` holds a dict per linear: name, pattern,
    sparsity, relative_error, seconds; the norm of its bias_change where that was corrected; of an expert also its tokens and the tensor
    that it is a part of. `left_alone` maps what the decoder layers hold beside these linears, of more than one dimension, to why it was
    not pruned; `*` in a name stands for all layers that have it. `recovered` holds a dict per tuned decoder layer: the reports of
    `Recovery.tune`, `before` and `after` pruning, with losses relative to the dense outputs, or in nats where they are of logits; where
    the whole model was tuned (`whole_model`), which tables keep apart, another with that report, `model`.
    `seconds` maps each stage to its time, and "total" to that of the run, of all processes if it was interrupted, without the work that
    was lost; a cell of a grid has no total and no peaks of memory, since cells share their pass, nor has a dense model's record peaks if it
    was measured in the pass of another run.
    `evaluations` maps the fingerprint of each evaluation to its name, settings, hash of token ids (tokens), figures (metrics,
    dense_metrics) and time (finished); the last one of each metric is in `metrics`. `seedless_fingerprint` is the
    same for the seeds of one experiment, and of no other; earlier records have none. Commits are those on the hub, hashes those of files;
    `code` maps each of nnprune's files that the method uses to a hash; `command` is None if the run was called from Python.
    `machine` is what `provenance.machine` found: cpu, cores, threads, host_bytes, gpu, device_bytes. `quantization` tells of the grid that
    kept weights are on, if they are: bits, group_size, and bits_per_weight of the pruned linears if they were packed.
    """

    status: str
    fingerprint: str
    model: str
    pruner: str
    sparsity: str
    metrics: dict[str, float] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    linear_sparsity: float | None = None
    model_sparsity: float | None = None
    selection: dict[str, Any] = field(default_factory=dict)
    per_linear: list[dict[str, Any]] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    recovered: list[dict[str, Any]] = field(default_factory=list)
    whole_model: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    calibration_hash: str | None = None
    evaluation_hashes: dict[str, str] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    seedless_fingerprint: str | None = None
    model_hash: str | None = None
    saved_hash: str | None = None
    commits: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool | None = None
    finished: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def add_evaluations(self, added: dict[str, dict[str, Any]]) -> None:
        """Add evaluations by fingerprint, and show their figures in place of earlier ones of the same metrics."""
        self.evaluations = {key: entry for key, entry in self.evaluations.items() if key not in added} | added
        for entry in self.evaluations.values():
            self.metrics.update(entry["metrics"])
            self.dense_metrics.update(entry["dense_metrics"])
            self.evaluation_hashes[entry["name"]] = entry["tokens"]

    def prunes_as(self, other: "RunRecord") -> bool:
        """Whether another run of the same fingerprint has pruned with the same code, packages and calibration ids, so that the figures
        of one are those of the other's model."""
        one, another = ((record.code, record.versions, record.calibration_hash) for record in (self, other))
        return one == another

    def write(self, folder: Path) -> Path:
        """Write `folder`/result.json atomically and return its path."""
        return write_atomically(folder / RESULT_FILE, self.as_json())

    def as_json(self) -> str:
        """The text of a `result.json`."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False) + "\n"


def with_stderr(metrics: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Metric -> its value and standard error, None without one, from a record's `metrics`."""
    stderrs = {f"{metric}_stderr" for metric in metrics}
    return {metric: (value, metrics.get(f"{metric}_stderr")) for metric, value in metrics.items() if metric not in stderrs}


def fingerprint(science: dict[str, Any]) -> str:
    """12 hexadecimal digits of a hash of the scientific content of a resolved config, whatever the order of its keys."""
    canonical = json.dumps(_with_text_keys(science), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def _with_text_keys(value: Any) -> Any:
    """The same with every key as text: keys of several kinds cannot be sorted."""
    if isinstance(value, dict):
        return {str(key): _with_text_keys(one) for key, one in value.items()}
    return [_with_text_keys(one) for one in value] if isinstance(value, list | tuple) else value


def write_atomically(path: Path, text: str) -> Path:
    """Write `text` to `path` and return it. Readers see the old file or the complete new one, after a power cut too.

    Raises OSError naming the file and the remedy when it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = f"outputs: {path} cannot be written ({error.strerror or error})"
        raise OSError(error.errno, f"{reason}; make room or set outputs=DIR to another disk, then run again") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return path


def write_journal(path: Path, content: Any) -> None:
    """Write `content`, plain data, to a JSON file with a checksum. Raises what `write_atomically` raises."""
    write_atomically(path, json.dumps({"sha256": _checksum(content), "content": content}))


def read_journal(path: Path) -> Any:
    """The content of a file from `write_journal`; None if it is missing or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["sha256"] == _checksum(found["content"]):
            return found["content"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    log.warning("warning: %s is damaged: its content is computed again", path)
    return None


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> RunRecord | None:
    """The record in `folder`, None without one. Raises RecordError, with the remedy, if it is unreadable."""
    path = Path(folder) / RESULT_FILE
    if not path.exists():
        return None
    try:
        return RunRecord(**_read_dict(path))
    except RecordError as error:
        raise RecordError(f"{path}: {error}; delete it, or run again with overwrite=true") from None


def read_completed(folder: Path) -> RunRecord | None:
    """As `read`, but None also for the record of a failed run."""
    record = read(folder)
    return record if record is not None and record.status == "completed" else None


def read_all(root: Path) -> tuple[list[dict[str, Any]], list[tuple[Path, str]]]:
    """All records under `root`, each a dict with its `path` added, and (path, reason) for each that cannot be read.

    Links are followed; a folder or file with several paths is read once, and its other paths are among the reasons.
    """
    paths, records, problems = [], [], []
    seen: dict[str, object] = {}
    walk = os.walk(
        root,
        onerror=lambda error: problems.append((Path(error.filename), f"cannot be read ({error.strerror})")),
        followlinks=True,
    )
    for folder, subfolders, files in walk:
        if (first := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            problems.append((Path(folder), f"is the same folder as {first}"))
            subfolders.clear()  # a link to a parent folder would recurse for ever
            continue
        subfolders.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        paths += [Path(folder, RESULT_FILE)] * (RESULT_FILE in files or RESULT_FILE in subfolders)
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):
        try:
            if (first := seen.setdefault(os.path.realpath(path), path)) != path and not path.is_dir():
                raise RecordError(f"is the same file as {first}")
            readable = str(path).encode(errors="backslashreplace").decode()  # a name may hold bytes that are not text
            records.append(_read_dict(path) | {"path": readable})
        except RecordError as error:
            problems.append((path, str(error)))
    return sorted(records, key=lambda record: Path(record["path"])), sorted(problems)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities, which JSON cannot represent, as text."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read_dict(path: Path) -> dict[str, Any]:
    """The fields of `RunRecord` from a file, types unchecked. Raises RecordError if it is not a record."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would block, and a device never ends
            raise RecordError("is no file")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "schema_version" not in content:
            raise RecordError("is no nnprune record")
        if content["schema_version"] != SCHEMA_VERSION:
            raise RecordError(f"has schema_version {content['schema_version']}, this is nnprune with {SCHEMA_VERSION}")
        known = {entry.name for entry in fields(RunRecord)}
        if unknown := content.keys() - known:
            raise RecordError(f"has {min(unknown)}, which no record has")
        return asdict(RunRecord(**content))  # fields newer than the record get their defaults
    except OSError as error:
        raise RecordError(f"cannot be read ({error.strerror})") from None
    except RecursionError:
        raise RecordError("is nested too deeply") from None
    except TypeError:
        raise RecordError("lacks keys of a record") from None
    except RecordError:
        raise
    except ValueError:
        raise RecordError("is no complete JSON file") from None
