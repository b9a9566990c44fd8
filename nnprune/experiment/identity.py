"""What names a pruned model: the scientific content of an experiment, of which its fingerprint is a hash.

A local text or model counts by its content, not its path. The code of a method from outside this package counts too. Evaluations
do not: each has a fingerprint of its own.
"""

import hashlib
import inspect
import logging
import sys
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnprune.evaluation import Evaluator
from nnprune.method import Method
from nnprune.model.dtypes import name_of
from nnprune.records import NOT_SCIENCE, fingerprint

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from nnprune.experiment.build import Experiment


def science(experiment: "Experiment") -> dict[str, Any]:
    """Everything that makes it another experiment when it changes."""
    config, source, method = experiment.config, experiment.source, experiment.method
    model = {**config["model"], "path": source.digest() or source.path, "revision": source.commit, "name": None}
    model["dtype"] = {"stored": name_of(source.stored_dtype), "computing": name_of(experiment.computing_dtype)}
    if experiment.is_dense:
        return {"model": model}
    text = experiment.calibration.source
    settings = {key: value for key, value in config.items() if key not in NOT_SCIENCE}
    parts = {"allocation": experiment.allocation, "target": method.target, "update": method.update, "recover": method.recovery}
    settings["allocation"] = settings["allocation"] | experiment.allocation.identity()
    settings |= {key: settings[key] | _code_entry(type(part)) for key, part in parts.items()}
    return settings | {
        "model": model,
        "calibration": {**config["calibration"], "path": None, "dataset": text and text.identity()},
        "sparsity": str(experiment.pattern),
        "pruner_code": _code_of(type(method.pruner)),
    }


def evaluation_fingerprints(evaluators: Mapping[str, Evaluator]) -> dict[str, str]:
    """Name of an evaluator -> the hash of its settings, texts and code."""
    return {
        name: fingerprint({"name": name, **one.identity(), "code": _code_of(type(one))}) for name, one in evaluators.items()
    }


def own_code(method: Method, allocation: Any) -> dict[str, str]:
    """Each file of nnprune that a method's classes are in or use, with a hash of it.

    It is no part of a fingerprint, since nnprune's versions should agree, but a record that other code made is worth a line.
    """
    parts = (method.pruner, method.target, method.update, method.recovery, allocation)
    found: set[str] = set()
    todo = {kind.__module__ for part in parts for kind in type(part).__mro__}
    while todo := {name for name in todo if name.startswith("nnprune.")} - found:
        found |= todo
        todo = {_module_of(value) for name in todo for value in vars(sys.modules[name]).values()}
    root = Path(__file__).parent.parent
    files = sorted(Path(sys.modules[name].__file__ or "") for name in found)
    return {file.relative_to(root).as_posix(): _hash(file) for file in files}


@cache  # an edit while this process runs does not change what it runs
def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _module_of(value: Any) -> str:
    """The name of the module that a module's global is, or comes from."""
    return str(value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", ""))


def _code_entry(method: type) -> dict[str, str]:
    """The entry that the code of a user's own method adds to the settings of its group."""
    code = _code_of(method)
    return {"code": code} if code else {}


def _code_of(method: type) -> str | None:
    """A hash of the source files of a method's classes from outside this package: an edited method is another method.

    Code without a file, such as a notebook's, may have changed unseen: its hash is new each time, so nothing of it is reused.
    """
    outside = [kind for kind in method.__mro__ if kind.__module__.split(".")[0] not in ("nnprune", "builtins", "abc", "typing")]
    if not outside:
        return None
    sha = hashlib.sha256()
    for kind in outside:
        try:
            sha.update(kind.__qualname__.encode() + Path(inspect.getfile(kind)).read_bytes())
        except (OSError, TypeError):
            log.warning(
                "warning: the code of %s is in no file, so this run will not be reused; put it in a module", kind.__name__
            )
            return uuid.uuid4().hex[:16]
    return sha.hexdigest()[:16]
