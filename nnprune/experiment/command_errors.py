"""What Hydra and a user's own code refuse, each in one line: what was typed, what is wrong, and the remedy."""

import re
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nnprune.checks import nearest, quoted
from nnprune.experiment.command_line import PACKAGE, PLAIN_OPTIONS, choices_of, rewrite

EXTRAS = {
    "hydra/launcher": {"joblib": "parallel", "submitit_local": "slurm", "submitit_slurm": "slurm"},
    "hydra/sweeper": {"optuna": "optuna"},
}
"""What brings each launcher and sweeper."""


def explain(error: Exception, arguments: Sequence[str], conf: Path) -> str:
    """One line for an error that Hydra raises before it calls our code.

    Args:
        error: what was raised.
        arguments: the command line as it was typed.
        conf: the folder of the options.
    """
    text, typed = " ".join(str(error).split()), {a.partition("=")[0].lstrip("+~"): a for a in arguments if "=" in a}
    group, _, option = str(getattr(error, "missing_cfg_file", "")).rpartition("/")
    if extra := EXTRAS.get(group, {}).get(option):
        return f"{group}={option}: is not installed; pip install 'nnprune[{extra}]'"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{group}={quoted(option)}: no such option; {nearest(option, error.options)}"
    if isinstance(error, OverrideParseException) and re.search(r"[{,]\s*[\"'][^\"']*[\"']\s*:", error.override):
        return (
            f"{quoted(error.override)}: keys within braces stand without quotes, such as allocation.patterns={{*.mlp.*: 0.5}}"
        )
    if isinstance(error, OverrideParseException):
        return (
            f"{quoted(error.override)}: is no setting; write key=value, and a value with special characters as key='\"a(b)\"'"
        )
    if match := re.match(r"Could not override '([^']+)'", text):
        key, written = match[1], quoted(typed.get(match[1], match[1]))
        parent, _, name = key.rpartition(".")
        known = _keys(arguments, conf)
        if key in known:  # Hydra looks for it among the defaults first, without what is swept over
            return f"{written}: not all options of this sweep have it; write ++{written}"
        siblings = sorted(one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == parent)
        if not siblings and parent in PLAIN_OPTIONS:
            return f"{written}: no such setting; this option of {parent} has none"
        meant = nearest(name, siblings) if siblings else nearest(key, known)
        own = f"; an option of your own class is added as +{key}=" if "pruner=custom" in arguments else ""
        return f"{written}: no such setting; {meant}{own}"
    if match := re.match(r"Ambiguous value for argument '([^=]+)", text):
        key, _, value = typed.get(match[1], f"{match[1]}=A,B").partition("=")
        a_list = f", or write {key}=[{quoted(value)}] for a list" if key == "evaluation" or "." in key else ""
        return f"{quoted(f'{key}={value}')}: has several values; add -m to run each{a_list}"
    if match := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"{quoted(typed.get(match[1], match[1]))}: exists already; leave out the +"
    if re.search("Unsupported item value in defaults : (float|int)", text):  # to YAML 2:4 is 124
        return 'a defaults list has a number; quote it, as in override /sparsity: "0.5" or "2:4"'
    if isinstance(error, OmegaConfBaseException) and (setting := next((a for a in arguments if "${" in a), None)):
        return f"{quoted(setting)}: cannot be resolved ({quoted(str(error.msg or error))}); write the value itself"
    if isinstance(error, OSError) and not str(error.filename).endswith(".yaml"):  # else a long option
        return f"outputs: {error.filename} cannot be written ({error.strerror}); set outputs=DIR to a writable folder"
    return quoted(text)


def where_raised(error: Exception) -> tuple[str, bool]:
    """The file and line of a user's own code that raised an error, and True; of ours, and False, where there is none."""
    libraries = tuple(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib"))
    frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame.startswith(str(PACKAGE))]
    users = [frame for frame in frames if frame not in ours and not frame.startswith((*libraries, "<"))]
    return (users or ours or frames)[-1], bool(users)


def _keys(arguments: Sequence[str], conf: Path) -> list[str]:
    """The keys, with dots, that the options of a command line have; of a sweep, any of its options."""
    groups = {a.partition("=")[0]: choices_of(a) for a in arguments if "=" in a and (conf / a.partition("=")[0]).is_dir()}
    found: dict[str, None] = {}
    with initialize_config_dir(str(conf), version_base="1.3"):
        for place in range(max(map(len, groups.values()), default=1)):
            try:
                cfg = compose("config", rewrite([f"{key}={some[min(place, len(some) - 1)]}" for key, some in groups.items()]))
            except HydraException:  # another mistake
                cfg = compose("config")
            found |= dict.fromkeys(_flat(OmegaConf.to_container(cfg)))
    return list(found)


def _flat(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys += [f"{prefix}{key}"] * (key != "_target_")
        keys += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return keys
