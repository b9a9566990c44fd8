"""Rewrites and checks the command line before Hydra parses it.

Users type `sparsity=0.7` or `sparsity=2:4,0.5`, and Hydra accepts no number as a group's option. And Hydra creates a sweep's folder
under `outputs` before it calls our code.
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
PLAIN_OPTIONS = {"allocation": "uniform", "target": "dense", "update": "none", "recover": "none"}
"""Groups that change a method, and the option of each that does nothing."""

FILES = {"0": "dense", "0.0": "dense", "0.5": "unstructured", "2:4": "2of4", "4:8": "4of8"}


def rewrite_sparsity(arguments: list[str]) -> list[str]:
    """The command line with each literal after `sparsity=` replaced by the name of an option.

    Literals without a file in conf/sparsity are registered as new options, valid or not: `parse_pattern` checks them later.
    """
    key = "sparsity="
    return [key + ",".join(map(_option, a.removeprefix(key).split(","))) if a.startswith(key) else a for a in arguments]


def gather_grid(arguments: list[str]) -> list[str]:
    """The command line with the pruners and sparsities of `grid=true` as the value of one setting.

    `grid=true pruner=a,b sparsity=0.5,2:4` becomes `pruner=a sparsity=0.5 grid={pruner:[a,b],sparsity:['0.5','2:4']}`. Hydra
    still sweeps over other settings; each job is then a grid.
    """
    if "grid=true" not in arguments:
        return arguments
    kept = [argument for argument in arguments if argument.partition("=")[0] not in ("grid", *GRID)]
    given = {key: value for key, equals, value in (argument.partition("=") for argument in arguments) if equals and key in GRID}
    choices = {key: [choice.strip().strip("'\"") for choice in given[key].split(",")] for key in GRID if key in given}
    lists = ",".join(f"{key}:[{','.join(repr(choice) for choice in values)}]" for key, values in choices.items())
    return [*kept, *(f"{key}={values[0]}" for key, values in choices.items()), f"grid={{{lists}}}"]


def is_grid(cfg: DictConfig) -> bool:
    """Whether a config is that of a grid. Raises ValueError for a value of `grid` that does not come from `gather_grid`."""
    if cfg.grid is None or cfg.grid is False:
        return False
    if not isinstance(cfg.grid, DictConfig):
        raise ValueError(f"grid={cfg.grid}: write grid=true, with pruner=A,B and sparsity=X,Y, or leave it out")
    return True


def label_of(cfg: DictConfig, choices: Mapping[str, str], overrides: Sequence[str]) -> str:
    """The default label of a method, such as wanda+refit: its `pruner` option, or the class of a user's own pruner, and the options
    of the groups in `PLAIN_OPTIONS` that the overrides set."""
    name = choices["pruner"]
    if name == "custom":
        name = str(OmegaConf.select(cfg, "pruner._target_", default=name)).split(".")[-1]
    overridden = {entry.partition("=")[0] for entry in overrides}
    options = (choices[key] for key, plain in PLAIN_OPTIONS.items() if key in overridden and choices[key] != plain)
    return "+".join([name, *options])


def grid_cells(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the runs that a grid consists of. Call it within a Hydra job only."""
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
    """Raise ValueError if this is a sweep whose `outputs` cannot be written."""
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


def _option(choice: str) -> str:
    """The option of `sparsity` for a literal; anything else as it is."""
    literal = choice.strip().strip("'\"")
    if not LITERAL.fullmatch(literal):
        return choice
    if literal in FILES:
        return FILES[literal]
    name = literal.replace(":", "of") if ":" in literal else f"unstructured_{literal}"
    ConfigStore.instance().store(group="sparsity", name=name, node={"pattern": literal})
    return name
