"""nnprune: the bench for LLM-pruning research.

Names are imported on first use, so that reading records never waits for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "prune": "nnprune.run",
    "Pruner": "nnprune.pruners.base",
    "ScorePruner": "nnprune.pruners.base",
    "BaseActAwareUnstructuredPruner": "nnprune.pruners.base",
    "SquaredNorm": "nnprune.statistics",
    "Moments": "nnprune.statistics",
    "Hessian": "nnprune.statistics",
    "RunRecord": "nnprune.records",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'nnprune' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
