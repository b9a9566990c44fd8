"""What happens to a command line before Hydra sees it.

Users type `sparsity=0.7` or `sparsity=2:4,0.5`, and Hydra refuses a number as a group's option. And a sweep makes a folder
of its own under `outputs` before any of our code runs.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from hydra import compose
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

LITERAL = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?|-?\d+:-?\d+")
GRID = ("pruner", "sparsity")
BESIDE = {"allocation": "uniform", "target": "dense", "update": "none", "recover": "none"}
"""Groups that change a method, and the option that leaves it as it is."""

FILES = {"0": "dense", "0.0": "dense", "0.5": "unstructured", "2:4": "2of4", "4:8": "4of8"}


def rewrite_sparsity(arguments: list[str]) -> list[str]:
    """The command line with each literal after `sparsity=` replaced by the name of an option.

    Literals without a file under conf/sparsity are registered as options of their own, valid or not: what a pattern may
    be is for `parse_pattern` to say. Everything else is left to Hydra.
    """
    return [_rewrite(argument) if argument.startswith("sparsity=") else argument for argument in arguments]


def gather_grid(arguments: list[str]) -> list[str]:
    """The command line with what `grid=true` sweeps over, pruners and sparsities, as data of one job.

    `grid=true pruner=a,b sparsity=0.5,2:4` becomes `pruner=a sparsity=0.5 grid={pruner:[a,b],sparsity:['0.5','2:4']}`. Other
    sweeps are left to Hydra: each of their jobs is a grid.
    """
    if "grid=true" not in arguments:
        return arguments
    kept = [argument for argument in arguments if argument.partition("=")[0] not in ("grid", *GRID)]
    given = {key: [a.partition("=")[2] for a in arguments if a.startswith(f"{key}=")] for key in GRID}
    choices = {
        key: [choice.strip().strip("'\"") for choice in values[-1].split(",")] for key, values in given.items() if values
    }
    lists = ",".join(f"{key}:[{','.join(repr(choice) for choice in values)}]" for key, values in choices.items())
    return [*kept, *(f"{key}={values[0]}" for key, values in choices.items()), f"grid={{{lists}}}"]


def is_grid(cfg: DictConfig) -> bool:
    """Whether a config is that of a grid. Raises ValueError for a value that `gather_grid` did not make."""
    if cfg.grid is None or cfg.grid is False:
        return False
    if not isinstance(cfg.grid, DictConfig):
        raise ValueError(f"grid={cfg.grid}: write grid=true, with pruner=A,B and sparsity=X,Y, or leave it away")
    return True


def label_of(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """What to call the method: its option of `pruner`, or its class where that is the user's own, and what was asked for beside it:
    wanda+refit."""
    name = choices["pruner"]
    if name == "custom":
        name = str(OmegaConf.select(cfg, "pruner._target_", default=name)).split(".")[-1]
    asked = {entry.partition("=")[0] for entry in overrides}
    return "+".join([name, *(choices[key] for key, plain in BESIDE.items() if key in asked and choices[key] != plain)])


def grid_cells(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the ordinary runs that a grid stands for. Within a Hydra job only."""
    hydra_config = HydraConfig.get()
    choices = hydra_config.runtime.choices
    overrides = [entry for entry in hydra_config.overrides.task if entry.partition("=")[0] not in ("grid", *GRID)]
    pruners = cfg.grid.get("pruner") or [choices["pruner"]]
    patterns = cfg.grid.get("sparsity") or [cfg.sparsity.pattern]
    cells = []
    for pruner, pattern in product(pruners, patterns):
        cell = compose("config", rewrite_sparsity([*overrides, f"pruner={pruner}", f"sparsity={pattern}"]))
        cell.label = cell.label or label_of(cell, {**choices, "pruner": pruner}, overrides)
        cells.append(cell)
    return cells


def check_outputs_of_sweep(arguments: list[str]) -> None:
    """Raise ValueError when a sweep is asked for and its `outputs` cannot be written."""
    if not {"-m", "--multirun"} & set(arguments):
        return
    given = [argument.removeprefix("outputs=") for argument in arguments if argument.startswith("outputs=")]
    outputs = given[-1] if given else "outputs"
    try:
        Path(outputs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"outputs={outputs}: cannot be written ({error.strerror}); set outputs=DIR to a writable folder"
        ) from None


def _rewrite(argument: str) -> str:
    key, _, value = argument.partition("=")
    return f"{key}={','.join(_option(choice) for choice in value.split(','))}"


def _option(choice: str) -> str:
    literal = choice.strip().strip("'\"")
    if not LITERAL.fullmatch(literal):
        return choice
    if literal in FILES:
        return FILES[literal]
    name = literal.replace(":", "of") if ":" in literal else f"unstructured_{literal}"
    ConfigStore.instance().store(group="sparsity", name=name, node={"pattern": literal})
    return name
