"""What happens to a command line before Hydra sees it.

Users type `sparsity=0.7` or `sparsity=2:4,0.5`, and Hydra refuses a number as a group's option. And a sweep makes a folder
of its own under `outputs` before any of our code runs.
"""

import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

LITERAL = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?|-?\d+:-?\d+")
GRID = ("pruner", "sparsity")
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
