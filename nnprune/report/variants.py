"""Tells apart runs of one pruner, model and sparsity by the settings in which their configs differ.

A *method* is a pruner's label with the values of those settings, its *variant*: `wanda` alone, or `wanda` with `alpha=0.7`.
"""

import json
from collections import Counter
from typing import Any

import pandas as pd

from nnprune import records
from nnprune.report.escaping import shorten
from nnprune.report.labels import DENSE, natural_key, pretty_pruner, pruner_key

NO_VARIANT = (*records.NOT_SCIENCE, "seed", "calibration.seed", "sparsity", "model.name")
"""Settings that make no method another one. Seeds are averaged over, and sparsity and model have a place of their own."""

SELECTION = ("prune.include", "prune.exclude")
"""Settings that are named wherever they are set, whether or not runs without them are there."""

LONGEST_VALUE = 40  # characters


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """A record's config as `{"pruner.alpha": 0.7}`, without what makes no method another one.

    What an earlier record lacks has the value of what was done then. `update.bias` is whether biases were corrected: "auto" leaves that
    to the method, and some models have none.
    """
    flat: dict[str, Any] = {}
    todo = list(record["config"].items())
    while todo:
        key, value = todo.pop()
        if key in NO_VARIANT or key.endswith(".state_hash"):  # a hash may be new each time
            continue
        if isinstance(value, dict):
            todo += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            flat[key] = value
    if any(key.startswith("calibration.") for key in flat):
        flat = records.SINCE | flat
    if "update._target_" in flat:
        flat["update.bias"] = any("bias_change" in linear for linear in record.get("per_linear", ()))
    return dict(sorted(flat.items()))


def setting_text(value: Any) -> str:
    """A value as on the command line."""
    is_plain = isinstance(value, str) and ", " not in value  # which stands between settings
    return value if is_plain else json.dumps(value, sort_keys=True)


def short_texts(key: str, settings: list[dict[str, Any]]) -> dict[str, str]:
    """`setting_key` of each value of a setting -> its text, as short as leaves those of different values different."""
    values = {setting_key(one, key): one[key] for one in settings if key in one}
    for form in (_class_name if key.endswith("._target_") else _start, _end, setting_text):
        texts = {name: form(value) for name, value in values.items()}
        if len(set(texts.values())) == len(values):
            return texts
    return {name: name for name in values}


def _class_name(value: Any) -> str:
    return shorten(setting_text(value).rpartition(".")[2], LONGEST_VALUE)


def _start(value: Any) -> str:
    return shorten(setting_text(value), LONGEST_VALUE)


def _end(value: Any) -> str:
    """Where paths differ that begin alike."""
    text = setting_text(value)
    return text if len(text) <= LONGEST_VALUE else f"...{text[3 - LONGEST_VALUE :]}"


def with_methods(rows: pd.DataFrame, ignored: str | None = None) -> pd.DataFrame:
    """The frame's rows with two more columns, `variant` (text, "" for none) and `method` (see `pretty_method`).

    Settings count that differ between runs of one pruner, model and sparsity, except for `ignored`, and whatever kept linears from being
    pruned.
    """
    settings = {index: settings_of(record) for index, record in rows["record"].items()}
    variants = pd.Series("", index=rows.index, dtype=object)
    is_pruned = (rows["sparsity"] != DENSE) | (rows["pruner"] != DENSE)
    for _, of_pruner in rows[is_pruned].groupby("pruner"):
        keys = set()
        for _, cell in of_pruner.groupby(["model", "sparsity"]):
            if len(cell) > 1:
                keys |= _differing([settings[index] for index in cell.index])
        keys |= {key for index in of_pruner.index for key in SELECTION if settings[index].get(key) is not None}
        keys = _without_implied(keys - {ignored}, [settings[index] for index in of_pruner.index])
        names = _short_names(keys)
        texts = {key: short_texts(key, [settings[index] for index in of_pruner.index]) for key in keys}
        for index in of_pruner.index:
            one = {key: value for key, value in settings[index].items() if key not in SELECTION or value is not None}
            given = [f"{names[key]}={texts[key][setting_key(one, key)]}" for key in sorted(keys) if key in one]
            variants[index] = ", ".join(given)
    methods = [_method(pruner, variant) for pruner, variant in zip(rows["pruner"], variants, strict=True)]
    return rows.assign(variant=variants, method=pd.Series(methods, index=rows.index, dtype=object))


def differing_settings(rows: pd.DataFrame) -> list[str]:
    """The settings that differ between any two rows of the frame."""
    return sorted(_differing([settings_of(record) for record in rows["record"]]))


def _differing(settings: list[dict[str, Any]]) -> set[str]:
    keys = {key for one in settings for key in one}
    return {key for key in keys if len({setting_key(one, key) for one in settings}) > 1}


def setting_key(settings: dict[str, Any], key: str) -> str:
    """A setting's value as text that can be compared, "" where it has none."""
    return json.dumps(settings[key], sort_keys=True) if key in settings else ""


def _without_implied(keys: set[str], settings: list[dict[str, Any]]) -> set[str]:
    """`keys` without those that the class of their group, `_target_`, determines: the options that another class has."""
    kept = set(keys)
    for target in (key for key in keys if key.endswith("._target_")):
        group = target.removesuffix("_target_")
        for key in (key for key in keys if key.startswith(group) and key != target):
            pairs = {(setting_key(one, target), setting_key(one, key)) for one in settings}
            if len(pairs) == len({pair[0] for pair in pairs}):
                kept.discard(key)
    return kept


def _short_names(keys: set[str]) -> dict[str, str]:
    """Each key without its group, where that leaves it alone of its name; a class by its group."""
    short = {key: key.removesuffix("._target_").rpartition(".")[2] for key in keys}
    uses = Counter(short.values())
    return {key: name if uses[name] == 1 else key for key, name in short.items()}


def _method(pruner: str, variant: str) -> str:
    """A text that no other pair has, whatever is in a label."""
    return f"{len(pruner)}:{pruner}{variant}"


def parts_of(method: str) -> tuple[str, str]:
    """The pruner's label and the variant of a method."""
    length, _, rest = method.partition(":")
    return rest[: int(length)], rest[int(length) :]


def pretty_method(method: str) -> str:
    """`Wanda (alpha=0.7)`."""
    pruner, variant = parts_of(method)
    return f"{pretty_pruner(pruner)} ({variant})" if variant else pretty_pruner(pruner)


def plain_method(method: str) -> str:
    """`wanda (alpha=0.7)`, for messages."""
    pruner, variant = parts_of(method)
    return f"{pruner} ({variant})" if variant else pruner


def method_key(method: str) -> tuple:
    """Sort key: that of the pruner, then the variant with numbers in their order."""
    pruner, variant = parts_of(method)
    return *pruner_key(pruner), natural_key(variant), variant
