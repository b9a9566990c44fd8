"""What the command line says before and after Hydra parses it: the place of `-m`, the cells of `grid=true`, the default label.

Two things are rewritten: `-m` between settings, which argparse refuses, and `grid=true pruner=A,B`, whose lists are one run, where
Hydra would see a sweep.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from nnprune.checks import quoted

PACKAGE = Path(__file__).parent.parent
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
SWEEP = ("-m", "--multirun")
GRID = ("pruner", "sparsity")
PLAIN_OPTIONS = {"allocation": "uniform", "target": "dense", "update": "none", "recover": "none"}
"""Groups that change a method, and the option of each that does nothing."""

failures: list[str] | None = None
"""The errors of this process's runs, for its exit status; None where a launcher's process runs them, which has to raise."""


def rewrite(arguments: list[str]) -> list[str]:
    """The command line as Hydra takes it. Raises HydraException for a list where one option belongs, of which Hydra makes a mixture."""
    for argument in arguments:
        if match := re.match(r"(pruner|allocation|target|update|recover|calibration|runtime|model)=\[(.*)\]", argument):
            raise HydraException(f"{quoted(argument)}: takes one option; to run each write -m {match[1]}={quoted(match[2])}")
    rest = gather_grid([argument for argument in arguments if argument not in SWEEP])
    return [SWEEP[0]] * any(argument in SWEEP for argument in arguments) + rest


def choices_of(setting: str) -> list[str]:
    """The values of a setting `key=a,b`, `key=choice(a,b)`, `key=range(start,stop,step)`, or its only one."""
    value = setting.partition("=")[2]
    try:
        parsed = OverridesParser.create().parse_override(setting)
        if parsed.is_sweep_override():
            return [str(getattr(one, "text", one)) for one in parsed.sweep_iterator(Transformer.identity)]
    except (HydraException, ValueError):  # Hydra or `parse_pattern` refuses it later
        pass
    return [value.strip().strip("'\"")]


def gather_grid(arguments: list[str]) -> list[str]:
    """The command line with the pruners and sparsities of `grid=true` as the value of one setting.

    `grid=true pruner=a,b sparsity=0.5,2:4` becomes `pruner=a sparsity=0.5 grid={pruner:[a,b],sparsity:['0.5','2:4']}`. Hydra
    still sweeps over other settings; each job is then a grid.
    """
    if "grid=true" not in arguments:
        return arguments
    kept = [argument for argument in arguments if argument.partition("=")[0] not in ("grid", *GRID)]
    given = {key: argument for argument in arguments if (key := argument.partition("=")[0]) in GRID}
    choices = {key: choices_of(given[key]) for key in GRID if key in given}
    lists = ",".join(f"{key}:[{','.join(repr(choice) for choice in values)}]" for key, values in choices.items())
    return [*kept, *(f"{key}={values[0]}" for key, values in choices.items()), f"grid={{{lists}}}"]


def is_grid(cfg: DictConfig) -> bool:
    """Whether a config is that of a grid. Raises ValueError for a value of `grid` that does not come from `gather_grid`."""
    if cfg.grid is None or cfg.grid is False:
        return False
    if not isinstance(cfg.grid, DictConfig):
        raise ValueError(f"grid={cfg.grid}: write grid=true, with pruner=A,B and sparsity=X,Y, or leave it out")
    return True


def composed(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    """The config that overrides make, and the chosen option of each group. Call it where Hydra is initialized only."""
    if HydraConfig.initialized():  # more folders of options
        overrides = [*(one for one in HydraConfig.get().overrides.hydra if one.startswith("hydra.searchpath=")), *overrides]
    cfg = compose("config", list(overrides), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def label_of(cfg: DictConfig, choices: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """The default label of a method, such as wanda+refit: its `pruner` option, or the class of a user's own pruner, and the
    options of the groups in `PLAIN_OPTIONS` that are not the pruner's own or that the overrides set; where they switch off what a
    preset has, best+recover=none. Call it where Hydra is initialized only."""
    name = choices["pruner"]
    if name == "custom":
        name = str(OmegaConf.select(cfg, "pruner._target_", default=name)).split(".")[-1]
    if name == "sparsegpt_int4":
        name = f"sparsegpt_int{cfg.pruner.bits}" if cfg.pruner.bits else "sparsegpt"
    overridden = {entry.partition("=")[0] for entry in overrides}
    if all(choices[key] == plain and key not in overridden for key, plain in PLAIN_OPTIONS.items()):
        return name  # composing takes a moment
    own = composed([f"pruner={choices['pruner']}"])[1]
    for key, plain in PLAIN_OPTIONS.items():
        if choices[key] != plain and (choices[key] != own[key] or key in overridden):
            name += f"+{choices[key]}"
        elif choices[key] != own[key]:
            name += f"+{key}={choices[key]}"
    return name


def grid_cells(cfg: DictConfig) -> list[DictConfig]:
    """The configs of the runs that a grid consists of, each with its pruner and sparsity as `grid`. Call it within a Hydra
    job only."""
    hydra_config = HydraConfig.get()
    overrides = [entry for entry in hydra_config.overrides.task if entry.partition("=")[0] not in ("grid", *GRID)]
    pruners = cfg.grid.get("pruner") or [hydra_config.runtime.choices["pruner"]]
    patterns = cfg.grid.get("sparsity") or [cfg.sparsity]
    cells = []
    for pruner, pattern in product(pruners, patterns):
        cell, choices = composed([*overrides, f"pruner={pruner}", f"sparsity={pattern}"])
        cell.label = cell.label or label_of(cell, choices, overrides)
        cell.grid = {"pruner": pruner, "sparsity": str(pattern)}
        cells.append(cell)
    return cells
