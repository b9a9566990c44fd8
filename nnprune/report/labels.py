"""How methods, sparsities and models are called in tables and plots, and the order they stand in."""

from __future__ import annotations

import re
from typing import Any

DENSE = "dense"
PRETTY = {
    DENSE: "Dense",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
    "ria": "RIA",
    "dsnot": "DSnoT",
    "swaps": "Swaps",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "alps": "ALPS",
    "sparsegpt_nnpruning": "SparseGPT (nn-pruning)",
}
FIRST_PRUNERS = [
    *(DENSE, "magnitude", "wanda", "ria", "dsnot", "swaps", "sparsegpt", "admm", "alps"),
    *("best_fast", "best_medium", "best"),  # by cost
]
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def normal_sparsity(label: Any) -> str:
    """Text of a sparsity, so that "0.50" and 0.5 name the same cell; 2:4 and dense stay as they are."""
    try:
        return f"{float(label):g}"
    except ValueError:
        return str(label).strip()


def sparsity_key(label: str) -> tuple[int, float, int]:
    """(kind, fraction of zeros, M): unstructured first, ascending, then N:M, then whatever else a record may say."""
    pair = re.fullmatch(r"(\d+):([1-9]\d*)", label)
    if pair:
        return 1, 1 - int(pair[1]) / int(pair[2]), int(pair[2])
    try:
        return 0, 0.0 if label == DENSE else float(label), 0
    except ValueError:
        return 2, 0.0, 0


def pretty_sparsity(label: str) -> str:
    kind, fraction, _ = sparsity_key(label)
    return f"{100 * fraction:.4g}%" if kind == 0 else label


def pretty_pruner(label: str) -> str:
    """`Wanda + refit` for wanda+refit and wanda_refit."""
    pruner, *beside = _parts(label)
    return " + ".join([PRETTY.get(pruner, pruner), *beside])


def pruner_key(label: str) -> tuple[int, list[str], str]:
    """The known ones first, each before what it is with, refit foremost; then others."""
    pruner, *beside = _parts(label)
    place = FIRST_PRUNERS.index(pruner) if pruner in FIRST_PRUNERS else len(FIRST_PRUNERS)
    return place, [pruner.lower(), *("" if name == "refit" else name.lower() for name in beside)], label


def _parts(label: str) -> list[str]:
    """A label's pruner, then what was put beside it: update, target, recovery, allocation."""
    pruner, *beside = label.split("+")
    plain = pruner.removesuffix("_refit")
    return [plain, "refit", *beside] if plain != pruner and plain in FIRST_PRUNERS else [pruner, *beside]


def model_key(name: str) -> tuple[bool, list[str | float]]:
    """The demo first, then natural order with size units: opt-125m < opt-350m < opt-1.3b < opt-13b."""
    parts: list[str | float] = re.split(r"(\d+(?:\.\d+)?(?:[kmbt](?![a-z]))?)", name.lower())
    for i in range(1, len(parts), 2):  # re.split puts the captured numbers at the odd places
        unit = UNITS.get(parts[i][-1])
        parts[i] = float(parts[i][:-1]) * unit if unit else float(parts[i])
    return name != "demo", parts
