"""BibTeX entries of the methods in records, from methods.bib."""

import re
from importlib.resources import files
from typing import Any

from nnprune.report.escaping import visible

GROUPS = ("pruner", "update", "target", "recover", "allocation")
NO_REFERENCE = ("Update", "Round", "Target", "Recovery", "Uniform", "FromFile", "ByName")
"""Classes that change nothing, or do what their user says."""


def entries() -> dict[str, str]:
    """Class name, or class name and a setting's bound -> the BibTeX entry of the method."""
    text = files("nnprune.report").joinpath("methods.bib").read_text(encoding="utf-8")
    found = {}
    for entry in re.findall(r"^@.*?^}", text, re.MULTILINE | re.DOTALL):
        for name in re.search(r"^  keywords = {(.*)},$", entry, re.MULTILINE)[1].split(", "):
            found[name] = entry
    return found


def _names(settings: dict[str, Any]) -> set[str]:
    """The keys of `entries` that an object of these settings may have."""
    target = f"{settings.get('_target_', '')}"
    if not target.startswith("nnprune."):
        return set()
    name = target.rpartition(".")[2]
    numbers = ((key, value) for key, value in settings.items() if type(value) is int)
    return {name, *(f"{name} {key}>{bound}" for key, value in numbers for bound in (0, 1) if value > bound)}


def bibliography(found: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The entries of all methods in some records, each once and in the order of methods.bib, and a line for each class without one."""
    known = entries()
    chosen = [r["config"][group] for r in found for group in GROUPS if isinstance(r["config"].get(group), dict)]
    chosen += [settings["layers"] for settings in chosen if isinstance(settings.get("layers"), dict)]  # before distillation
    targets = {f"{settings.get('_target_', '')}" for settings in chosen}
    names = set().union(*map(_names, chosen))
    lines = [
        f"--bibtex: {visible(target)} has no reference here; cite its own"
        for target in sorted(targets)
        if target and not (target.startswith("nnprune.") and target.rpartition(".")[2] in {*known, *NO_REFERENCE})
    ]
    wanted = dict.fromkeys(entry for name, entry in known.items() if name in names)
    return "\n\n".join([*wanted, ""]), lines
