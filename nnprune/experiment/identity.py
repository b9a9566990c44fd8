"""What names a pruned model: the scientific content of an experiment, of which its fingerprint is a hash.

A local text or model counts by its content, not its path. The code of a method from outside this package counts too. Evaluations
do not: each has a fingerprint of its own.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnprune.evaluation import Evaluator
from nnprune.experiment.content_hash import is_file, is_plain
from nnprune.experiment.own_objects import code_of, state_hash
from nnprune.experiment.user_code import reachable
from nnprune.files.digests import file_digest
from nnprune.model.dtypes import name_of
from nnprune.records import NOT_SCIENCE, SINCE, fingerprint

if TYPE_CHECKING:
    from nnprune.experiment.build import Experiment
    from nnprune.method import Method


def science(experiment: "Experiment") -> dict[str, Any]:
    """Everything that makes it another experiment when it changes."""
    config, source, method = experiment.config, experiment.source, experiment.method
    model = {**config["model"], "path": source.digest() or source.path, "revision": source.commit, "name": None}
    model["dtype"] = {"stored": name_of(source.stored_dtype), "computing": name_of(experiment.computing_dtype)}
    if experiment.is_dense:
        return {"model": model}
    text = experiment.calibration.source
    calibration = {
        key: value for key, value in config["calibration"].items() if (f"calibration.{key}", value) not in SINCE.items()
    }
    settings = {key: value for key, value in config.items() if key not in NOT_SCIENCE}
    recovery = method.distillation or method.recovery
    parts = {"allocation": experiment.allocation, "target": method.target, "update": method.update, "recover": recovery}
    settings["allocation"] = settings["allocation"] | experiment.allocation.identity()
    update = {key: value for key, value in config["update"].items() if key != "bias"}  # earlier records corrected none
    corrects = method.corrects_biases and source.has_biases
    settings["update"] = {**update, "bias": True} if corrects else update
    settings |= {key: settings[key] | code_entry(type(part), settings[key]) for key, part in parts.items()}
    if method.distillation and (layers := settings["recover"].get("layers")):
        settings["recover"]["layers"] = layers | code_entry(type(method.recovery), layers)
    if files := _files_of(type(method.pruner), settings["pruner"]):
        settings["pruner_files"] = files
    return settings | {
        "model": model,
        "calibration": {
            **calibration,
            "path": None,
            "dataset": text and text.identity(),
            **experiment.calibration.identity(source.tokenizer),
            **code_entry(type(experiment.calibration), config["calibration"]),
        },
        "sparsity": str(experiment.pattern),
        "pruner_code": code_of(type(method.pruner)),
    }


def without_seeds(science: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs of an experiment have in common whose results are averaged over seeds."""
    common = {key: value for key, value in science.items() if key != "seed"}
    if "calibration" in common:
        common["calibration"] = {key: value for key, value in common["calibration"].items() if key != "seed"}
    return common


def evaluation_fingerprints(evaluators: Mapping[str, Evaluator]) -> dict[str, str]:
    """Name of an evaluator -> the hash of its settings, texts and code."""
    return {name: fingerprint({"name": name, **_evaluation(one)}) for name, one in evaluators.items()}


def _evaluation(evaluator: Evaluator) -> dict[str, Any]:
    settings, kind = evaluator.identity(), type(evaluator)
    code = code_entry(kind, settings)
    if not code:
        return settings | {"code": None}
    plain = {key: value for key, value in settings.items() if is_plain(value)}
    held = {key: value for key, value in settings.items() if key not in plain}
    return plain | code | ({"state_hash": state_hash(held, kind.__name__)} if held else {})


def own_code(experiment: "Experiment") -> dict[str, str]:
    """Each file of nnprune that the classes of an experiment's method are in or use, with a hash of it; none for the dense model.

    It is no part of a fingerprint, since nnprune's versions should agree, but a record that other code made is worth a line.
    """
    if experiment.is_dense:
        return {}
    method = experiment.method
    recoveries = (method.recovery, *([method.distillation] if method.distillation else []))
    parts = (method.pruner, method.target, method.update, *recoveries, experiment.allocation)
    root = Path(__file__).parent.parent
    files = _own_files(frozenset(kind.__module__ for part in parts for kind in type(part).__mro__))
    tuning = [root / "engine" / name for name, is_used in _tuning_files(method) if is_used]
    return {file.relative_to(root).as_posix(): _hash(file) for file in (*files, *tuning)}


def _tuning_files(method: "Method") -> Iterator[tuple[str, bool]]:
    """The files of the engine that decide what several decoder layers are tuned towards, and whether a method uses them."""
    yield "window.py", method.recovery.num_layers > 1
    yield "distillation.py", method.distillation is not None
    yield "logits.py", method.recovery.logits_epochs > 0 or method.distillation is not None


@cache  # what is imported does not change, and each record of a sweep asks
def _own_files(modules: frozenset[str]) -> list[Path]:
    """The files of nnprune that `modules` are in or use."""
    found = reachable(modules, lambda name: name.startswith("nnprune.") and name in sys.modules)
    return sorted(Path(sys.modules[name].__file__ or "") for name in found)


@cache  # an edit while this process runs does not change what it runs
def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def code_entry(method: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that the code of a user's own method, and the files that its settings name, add to the settings of its group."""
    code, files = code_of(method), _files_of(method, settings)
    return ({"code": code} if code else {}) | ({"files": files} if files else {})


def _files_of(method: type, settings: Mapping[str, Any]) -> dict[str, str]:
    """Setting -> hash of the content, for the settings of a user's own method that name a file, in lists too: it may read that."""
    if method.__module__.split(".")[0] == "nnprune":
        return {}
    named = {key: Path(value) for key, value in _texts(settings) if value}
    return {key: file_digest(path)[:16] for key, path in named.items() if is_file(path)}


def _texts(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and value of each text in lists and dictionaries, however deep; `a.b` is that of b in a."""
    if isinstance(settings, str):
        yield key, settings
    elif isinstance(settings, Mapping | list | tuple):
        for name, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
            yield from _texts(value, f"{key}.{name}" if key else f"{name}")
