"""The scientific content of an experiment, of which its fingerprint is a hash.

A local text or model counts by its content, not its path. The code of a method from outside this package counts too.
"""

import hashlib
import inspect
import logging
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnprune.model.dtypes import name_of
from nnprune.records import NOT_SCIENCE

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from nnprune.experiment.build import Experiment


def science(experiment: "Experiment") -> dict[str, Any]:
    """Everything that makes it another experiment when it changes."""
    config, source, method = experiment.config, experiment.source, experiment.method
    model = {**config["model"], "path": source.digest() or source.path, "revision": source.commit, "name": None}
    model["dtype"] = {"stored": name_of(source.stored_dtype), "computing": name_of(experiment.computing_dtype)}
    evaluation = {**config["evaluation"], "path": None}
    evaluation["datasets"] = {
        name: one.identity() | _code_entry(type(one)) for name, one in experiment.evaluation.evaluators.items()
    }
    if experiment.is_dense:
        return {"model": model, "evaluation": evaluation}
    text = experiment.calibration.source
    settings = {key: value for key, value in config.items() if key not in NOT_SCIENCE}
    parts = {"allocation": experiment.allocation, "target": method.target, "update": method.update, "recover": method.recovery}
    settings["allocation"] = settings["allocation"] | experiment.allocation.identity()
    settings |= {key: settings[key] | _code_entry(type(part)) for key, part in parts.items()}
    return settings | {
        "model": model,
        "evaluation": evaluation,
        "calibration": {**config["calibration"], "path": None, "dataset": text and text.identity()},
        "sparsity": str(experiment.pattern),
        "pruner_code": _code_of(type(method.pruner)),
    }


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
