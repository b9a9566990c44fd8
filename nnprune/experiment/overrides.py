"""Which settings are no overrides of `nnprune.prune`."""

import re
from collections.abc import Sequence

from nnprune.checks import quoted

REMEDIES = {
    "pruner": "give the pruner object its options, such as MyPruner(alpha=0.7)",
    "sparsity": 'write prune(..., sparsity="2:4")',
    "grid": "call prune once for each pruner and sparsity",
    "plan": "only the command nnprune estimates the cost of a run",
    "experiment": "give its settings one by one, or start it with the command nnprune",
}
"""Settings that are no overrides of `nnprune.prune`, with what to do instead."""


def check_overrides(overrides: Sequence[str], has_model: bool) -> None:
    """Raise ValueError for an override that would not count beside the arguments of `nnprune.prune`; `has_model` says whether
    they name a model."""
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].strip()
        remedy = REMEDIES.get(re.split("[.@]", key)[0])
        if has_model and key in ("model", "model.path"):
            remedy = "leave out this override or model_name, which both name a model"
        if remedy:
            raise ValueError(f"{quoted(override)}: is no override of nnprune.prune; {remedy}")
