"""What nnprune is to reach on one NVIDIA H100 or H200 with Llama-3-8B's shape, against what `device.py` measured."""

from collections.abc import Callable
from typing import Any

Parts = dict[str, dict[str, dict[str, Any]]]


def _seconds(section: str, row: str, stage: str = "total") -> Callable[[Parts], float]:
    return lambda parts: parts[section][row]["seconds"][stage]


def _ratio(first: Callable[[Parts], float], second: Callable[[Parts], float]) -> Callable[[Parts], float]:
    return lambda parts: first(parts) / second(parts)


def _slower(than: str, row: str) -> Callable[[Parts], float]:
    """Pruning time of a row of the settings relative to another."""
    return _ratio(_seconds("settings", row, "prune"), _seconds("settings", than, "prune"))


def _limited(gibibytes: int, row: str) -> Callable[[Parts], float]:
    """Time with so much memory of the device relative to all of it."""
    return _ratio(_seconds("memory", f"{gibibytes} GiB, {row}"), _seconds("settings", row))


def _saving(parts: Parts) -> float:
    """Seconds that saving takes beyond those of the disk."""
    saved = parts["whole"]["sparsegpt 2:4, saved"]
    return saved["seconds"]["total"] - parts["whole"]["sparsegpt 2:4"]["seconds"]["total"] - saved["disk_seconds"]


_OURS = _seconds("compare", "nnprune", "prune")

GOALS: tuple[tuple[str, str, float, Callable[[Parts], float]], ...] = (  # what, "at most" or "at least", how much, measured
    ("wanda 2:4, all layers, s", "at most", 15, _seconds("whole", "wanda 2:4")),
    ("sparsegpt 2:4, all layers, s", "at most", 30, _seconds("whole", "sparsegpt 2:4")),
    ("alps 2:4, all layers, s", "at most", 60, _seconds("whole", "alps 2:4")),
    ("sparsegpt 2:4 saved, s beyond the disk's", "at most", 10, _saving),
    ("official / nnprune, few layers", "at least", 10, _ratio(_seconds("compare", "official", "prune"), _OURS)),
    ("llmcompressor / nnprune, few layers", "at least", 15, _ratio(_seconds("compare", "llmcompressor", "prune"), _OURS)),
    ("sparsegpt 0.5 / 2:4, pruning", "at most", 1.3, _slower("sparsegpt 2:4", "sparsegpt 0.5")),
    ("alps / sparsegpt, pruning", "at most", 2, _slower("sparsegpt 2:4", "alps 2:4")),
    ("sparsegpt_refit / sparsegpt, pruning", "at most", 1.5, _slower("sparsegpt 2:4", "sparsegpt_refit 2:4")),
    ("sparsegpt in 12 GiB / without a limit", "at most", 1.4, _limited(12, "sparsegpt 2:4")),
    ("alps in 12 GiB / without a limit", "at most", 1.4, _limited(12, "alps 2:4")),
    ("best_medium in 16 GiB / without a limit", "at most", 1.4, _limited(16, "best_medium 2:4")),
)


def goal_rows(parts: Parts, is_rehearsal: bool = False) -> list[list[str]]:
    """A row for each goal: what, asked, measured, met. A part that failed or was left out has no measure, a rehearsal meets nothing."""
    rows = []
    for what, kind, asked, measure in GOALS:
        row = [what, f"{kind} {asked:g}"]
        try:
            found = measure(parts)
        except KeyError:
            rows.append([*row, "--", "not measured"])
            continue
        is_met = found <= asked if kind == "at most" else found >= asked
        rows.append([*row, f"{found:.2f}", "rehearsal" if is_rehearsal else "yes" if is_met else "no"])
    return rows
