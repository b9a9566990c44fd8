"""Builds the objects of an experiment from a resolved config, checked, before any weights are loaded."""

from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nnprune.allocations.base import Allocation
from nnprune.allocations.selection import Selection
from nnprune.allocations.uniform import Uniform
from nnprune.calibration import Calibration
from nnprune.checks import check_count, nearest, one_of, quoted
from nnprune.engine import parallel
from nnprune.engine.propagation import PROPAGATE
from nnprune.evaluation import Evaluation, Perplexity
from nnprune.experiment.create import create, make, recovery_of
from nnprune.experiment.folder import run_folder
from nnprune.experiment.identity import evaluation_fingerprints, science, without_seeds
from nnprune.method import Method
from nnprune.model.loading import ModelSource
from nnprune.model.push import check_destination
from nnprune.patterns import SparsityPattern, Unstructured, parse_pattern
from nnprune.pruners.base import Pruner
from nnprune.records import RunRecord, fingerprint
from nnprune.recovery import Distillation
from nnprune.runtime import Runtime
from nnprune.targets import Target
from nnprune.tracking.base import Tracker
from nnprune.updates import Update

GROUPS = ("pruner", "allocation", "target", "update", "recover", "calibration", "evaluation", "runtime", "model", "tracking")
NAMES = (
    ("label",),
    ("push",),
    ("outputs",),
    ("model", "name"),
    ("model", "path"),
    ("model", "revision"),
    ("model", "layers_path"),
)
MAX_NAME = 200
"""Characters of a part of a name: file systems take 255 bytes, and a fingerprint is added."""

SETTINGS = (
    *(
        "prune",
        "sparsity",
        "seed",
        "propagate",
        "label",
        "outputs",
        "overwrite",
        "save",
        "push",
        "push_private",
        "plan",
        "grid",
    ),
    "objective",
)


@dataclass
class Experiment:
    """Everything one run needs, built and validated, without weights.

    `evaluations` maps the name of each evaluator that is to be measured to its fingerprint; `home` is the folder where it is not
    the usual one; `cell` has the pruner and sparsity of a grid's cell, as they were written.
    """

    config: dict[str, Any]
    pattern: SparsityPattern
    method: Method
    selection: Selection
    allocation: Allocation
    calibration: Calibration
    evaluation: Evaluation
    source: ModelSource
    runtime: Runtime
    label: str
    evaluations: dict[str, str]
    tracker: Tracker
    home: Path | None = None
    cell: dict[str, str] | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned, so that only model and evaluation matter."""
        return self.allocation.is_dense(self.pattern)

    @property
    def computing_dtype(self) -> torch.dtype:
        """The dtype that layers compute in on the device."""
        return self.source.computing_dtype(self.runtime.torch_device)

    @cached_property  # it may read gigabytes
    def _science(self) -> dict[str, Any]:
        return science(self)

    @cached_property
    def fingerprint(self) -> str:
        """The hash of its scientific content that names this experiment (see `identity`)."""
        return fingerprint(self._science)

    @property
    def seedless_fingerprint(self) -> str:
        """The same for every seed."""
        return fingerprint(without_seeds(self._science))

    @property
    def folder(self) -> Path:
        """outputs/<model>/<pattern>/<pruner>-<fingerprint>."""
        return self.home or run_folder(
            self.config["outputs"], self.source.name, str(self.pattern), self.label, self.fingerprint
        )

    def missing_from(self, record: RunRecord) -> dict[str, str]:
        """Of the `evaluations`, those that a record lacks."""
        return {name: key for name, key in self.evaluations.items() if key not in record.evaluations}

    def saved_source(self) -> ModelSource:
        """The pruned model that `save=true` has left."""
        return replace(self.source, path=str(self.folder / "model"), revision=None)

    def dense(self) -> "Experiment":
        """The same model and evaluations with nothing pruned."""
        config = {**self.config, "save": False, "overwrite": False}
        return replace(self, config=config, pattern=Unstructured(0.0), allocation=Uniform(), label="dense")


def build(cfg: DictConfig, pruner: Pruner | None = None) -> Experiment:
    """The experiment of a config, with `pruner` in place of the config's if given.

    Raises ValueError naming the key, the value and the remedy for everything that can be checked without weights.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]}=???: has no value; add {missing[0]}=... to the command line")
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    _check_settings(config)
    if config["propagate"] not in PROPAGATE:
        raise ValueError(f"propagate={quoted(config['propagate'])}: must be {one_of(PROPAGATE)}")
    pattern = parse_pattern(config["sparsity"])
    config["sparsity"] = {"pattern": str(config["sparsity"])}  # as in every record
    cell, config["grid"] = config["grid"] or None, None  # the record of a cell is that of a run alone
    runtime = make("runtime", Runtime, config)
    selection = make("prune", Selection, {"prune": config.pop("prune")})
    config |= {"prune": selection.settings} if selection.settings else {}  # the default is no part of a fingerprint
    pruner = pruner or create("pruner", config, Pruner)
    pruner.validate(pattern)
    target, update, recovery = create("target", config, Target), create("update", config, Update), recovery_of(config)
    distillation = recovery if isinstance(recovery, Distillation) else None
    method = Method(pruner, target, update, distillation.layers if distillation else recovery, distillation)
    if config["propagate"] == "dense" and (method.pairs_inputs or method.recovery.epochs_before):
        key = "target" if method.pairs_inputs else "recover.epochs_before"
        raise ValueError(
            f"propagate=dense: leaves nothing for {key}, which makes up for the errors of layers before, and the dense model has none; set "
            f"propagate=pruned or sequential, or leave {key} out"
        )
    method.check()
    source = make("model", ModelSource, config)
    evaluation = create("evaluation", config, Evaluation)
    calibration = create("calibration", config, Calibration)
    _check_objective(config["objective"], evaluation)
    tracker = create("tracking", config, Tracker)
    if parallel.is_distributed() and any(one.loads_model for one in evaluation.evaluators.values()):
        raise ValueError("evaluation.backend=hf: measures in one process; add it to the saved model's record without torchrun")
    for part in (*evaluation.evaluators.values(), calibration.source, tracker):
        if part:
            part.check()
    allocation = create("allocation", config, Allocation)
    experiment = Experiment(
        config=config,
        pattern=pattern,
        method=method,
        selection=selection,
        allocation=allocation,
        calibration=calibration,
        evaluation=evaluation,
        source=source,
        runtime=runtime,
        label="dense" if allocation.is_dense(pattern) else str(config["label"] or type(pruner).__name__),
        evaluations=evaluation_fingerprints(evaluation.evaluators),
        tracker=tracker,
        cell=cell,
    )
    if not experiment.is_dense:
        calibration.check(runtime)
    _ = experiment.fingerprint  # computed, or refused, before anything is written under that name
    if config["push"]:
        config["push"], config["save"] = str(config["push"]).replace(":", "of"), True  # ${sparsity} may be part of it
        if not config["plan"]:
            check_destination(config["push"], config["push_private"], experiment.fingerprint, config["overwrite"])
    return experiment


def _check_settings(config: dict[str, Any]) -> None:
    """Raise ValueError for a missing group, an unknown key, or an invalid setting outside the groups."""
    for key in GROUPS:
        if not config.get(key):
            raise ValueError(f"{key}: has no settings; choose one of conf/{key}/")
    if unknown := sorted(set(config) - {*GROUPS, *SETTINGS}):
        raise ValueError(
            f"{unknown[0]}={quoted(config[unknown[0]])}: no such setting; {nearest(unknown[0], (*GROUPS, *SETTINGS))}"
        )
    if not isinstance(config["prune"], dict):
        raise ValueError(f"prune={quoted(config['prune'])}: must be prune.include=... or prune.exclude=..., patterns of names")
    check_count("seed", config["seed"], 0)
    for key in ("overwrite", "save", "push_private", "plan"):
        if not isinstance(config[key], bool):
            raise ValueError(f"{key}={quoted(config[key])}: must be true or false")
    for keys in NAMES:
        value = reduce(lambda group, key: group.get(key), keys, config)
        if isinstance(value, list | dict | bool) or max(map(len, str(value).split("/"))) > MAX_NAME:
            reason = f"must be one name, no part of it longer than {MAX_NAME} characters"
            raise ValueError(f"{'.'.join(keys)}={quoted(value)}: {reason}")
    if config["outputs"] in (None, ""):
        raise ValueError(f"outputs={config['outputs']}: must be a folder, such as outputs")


def _check_objective(objective: Any, evaluation: Evaluation) -> None:
    """Raise ValueError for an `objective` that will not be measured, where all that will be is known."""
    evaluators = evaluation.evaluators.values()
    known = [f"{one.name}_perplexity" for one in evaluators if isinstance(one, Perplexity)]
    if objective is not None and len(known) == len(evaluators) and objective not in known:
        raise ValueError(f"objective={quoted(objective)}: is not measured by evaluation; {nearest(str(objective), known)}")
