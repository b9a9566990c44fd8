"""How pruners, sparsities and models are named in tables and plots, and in which order they stand."""

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
    **{f"sparsegpt_int{bits}": f"SparseGPT, {bits} bits" for bits in range(8, 1, -1)},
    "sparsegpt_nnpruning": "SparseGPT (nn-pruning)",
}
ADDITIONS = {"model": "distillation", "layer_model": "layer + distillation"}
"""What is added to a pruner, where a name says more than the option."""

FIRST_PRUNERS = [
    *(DENSE, "magnitude", "wanda", "ria", "dsnot", "swaps", "sparsegpt"),
    *(name for name in PRETTY if name.startswith("sparsegpt_int")),
    *("admm", "alps"),
    *("best_fast", "best_medium", "best"),  # by cost
]
UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

UNSTRUCTURED, N_OF_M, UNKNOWN = range(3)
"""Kinds of sparsity, in the order of their blocks. No completed run has an unknown one."""


def normal_sparsity(label: str) -> str:
    """One text for each sparsity: "0.5" for "0.50", "dense" for 0. N:M and anything else stay as they are."""
    try:
        fraction = float(label)
    except ValueError:
        return label.strip()
    return repr(fraction) if fraction else DENSE


def sparsity_key(label: str) -> tuple[int, float, int]:
    """Sort key (kind, fraction of zeros, M): unstructured first, ascending, then N:M, then what is neither."""
    pair = re.fullmatch(r"([1-9][0-9]{0,6}):([1-9][0-9]{0,6})", label)
    if pair and int(pair[1]) < int(pair[2]):
        return N_OF_M, 1 - int(pair[1]) / int(pair[2]), int(pair[2])
    try:
        fraction = 0.0 if label == DENSE else float(label)
    except ValueError:
        return UNKNOWN, 0.0, 0
    return (UNSTRUCTURED, fraction, 0) if 0 <= fraction < 1 else (UNKNOWN, 0.0, 0)


def pretty_sparsity(label: str) -> str:
    """`62.5%` for 0.625. Fractions that differ behind the fourth digit share a name: see `escaping.distinct_names`."""
    kind, fraction, _ = sparsity_key(label)
    return f"{100 * fraction:.4g}%" if kind == UNSTRUCTURED else label


def pretty_pruner(label: str) -> str:
    """`Wanda + refit` for wanda+refit and wanda_refit. Several labels may share a name: see `escaping.distinct_names`."""
    pruner, *additions = _parts(label)
    return " + ".join([PRETTY.get(pruner, pruner), *(ADDITIONS.get(one, one) for one in additions)])


def pruner_key(label: str) -> tuple[int, list[str], str]:
    """Sort key: known pruners first, each followed by its combinations, refit foremost; then others by name."""
    pruner, *additions = _parts(label)
    rank = FIRST_PRUNERS.index(pruner) if pruner in FIRST_PRUNERS else len(FIRST_PRUNERS)
    return rank, [pruner.lower(), *("" if name == "refit" else name.lower() for name in additions)], label


def _parts(label: str) -> list[str]:
    """A label's pruner, then what it is combined with: update, target, recovery, allocation."""
    pruner, *additions = label.split("+")
    plain = pruner.removesuffix("_refit")
    return [plain, "refit", *additions] if plain != pruner and plain in FIRST_PRUNERS else [pruner, *additions]


def model_key(name: str) -> tuple[bool, list[str | float], str]:
    """Sort key: the demo first, then natural order."""
    return name != "demo", natural_key(name), name


def natural_key(text: str) -> list[str | float]:
    """Sort key: numbers as numbers, with size units: opt-125m < opt-350m < opt-1.3b < opt-13b."""
    parts: list[Any] = re.split(r"(\d+(?:\.\d+)?(?:e-?\d+)?(?:[kmbt](?![a-z]))?)", text.lower())
    for i in range(1, len(parts), 2):  # re.split puts the captured numbers at odd indices
        unit = UNITS.get(parts[i][-1])
        parts[i] = float(parts[i][:-1]) * unit if unit else float(parts[i])
    return parts
