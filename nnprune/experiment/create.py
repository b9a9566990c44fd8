"""The objects that groups of settings stand for, with errors that name the setting."""

from dataclasses import fields
from inspect import signature
from pydoc import locate
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from nnprune.checks import nearest, quoted
from nnprune.recovery import Recovery


def recovery_of(config: dict[str, Any]) -> Recovery:
    """That of group `recover`. The errors of one in `recover.layers`, which can't know where it is, name that key."""
    layers = config["recover"].get("layers")
    if not isinstance(layers, dict) or "_target_" not in layers:
        return create("recover", config, Recovery)
    try:
        built = create("recover", {"recover": layers}, object)
    except ValueError as error:
        raise ValueError(str(error).replace("recover.", "recover.layers.")) from None
    return create("recover", config, Recovery, layers=built)


def make(key: str, kind: type, config: dict[str, Any]) -> Any:
    """An instance of the dataclass `kind` from the settings of group `key`."""
    known = [setting.name for setting in fields(kind) if setting.init]
    for name, value in config[key].items():
        if name not in known:
            raise ValueError(f"{key}.{name}={quoted(value)}: no such setting; {nearest(name, known)}")
    try:
        return kind(**config[key])
    except TypeError as error:
        raise ValueError(f"{key}: a setting is of the wrong kind ({error}); see conf/{key}/") from error


def _check_known(key: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for a setting that the class or function `_target_` of group `key` does not have: for example one that a preset
    sets and another option lacks."""
    try:
        target: Any = locate(settings["_target_"])
        known = signature(target).parameters
    except Exception:  # no such thing, or none that tells
        return
    foreign = [name for name in settings if name not in known and not name.startswith("_")]
    if foreign and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        name = foreign[0]
        wrong = f"{key}.{name}={quoted(settings[name])}: no such setting (~{key}.{name} leaves out a preset's)"
        raise ValueError(f"{wrong}; {nearest(name, list(known)) if known else 'there are none'}")


def create(key: str, config: dict[str, Any], expected: type, **parts: Any) -> Any:
    """The object that group `key` names by `_target_`, with `parts` in place of these settings. Raises ValueError if it cannot be created
    or is not of type `expected`."""
    target = quoted(config[key].get("_target_"))
    try:
        built = instantiate(config[key], _convert_="all", **parts)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise cause from None
        _check_known(key, config[key])
        reason = quoted(str(cause or error))
        remedy = "check its spelling, its folder and its options"
        raise ValueError(f"{key}._target_={target}: cannot be created ({reason}); {remedy}") from error
    if not isinstance(built, expected):
        raise ValueError(f"{key}._target_={target}: is no {expected.__name__}; derive it from nnprune's {expected.__name__}")
    return built
