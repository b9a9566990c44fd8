"""Lets users type `sparsity=0.7` or `sparsity=2:4,0.5`: Hydra refuses a number as a group's option."""

import re

from hydra.core.config_store import ConfigStore

LITERAL = re.compile(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?|-?\d+:-?\d+")
FILES = {"0": "dense", "0.0": "dense", "0.5": "unstructured", "2:4": "2of4", "4:8": "4of8"}


def rewrite_sparsity(arguments: list[str]) -> list[str]:
    """The command line with each literal after `sparsity=` replaced by the name of an option.

    Literals without a file under conf/sparsity are registered as options of their own, valid or not: what a pattern may
    be is for `parse_pattern` to say. Everything else is left to Hydra.
    """
    return [_rewrite(argument) if argument.startswith("sparsity=") else argument for argument in arguments]


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
