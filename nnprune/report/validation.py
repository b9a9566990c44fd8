"""Which records the collector can use. `records.read_all` has checked that they are JSON with the keys of a record."""

import json
import sys
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from nnprune.records import RunRecord
from nnprune.report.escaping import shorten, visible
from nnprune.report.labels import UNKNOWN, normal_sparsity, sparsity_key

MAX_DEPTH = 50
NON_FINITE = ("nan", "inf", "-inf")  # how a record holds what JSON has no number for


def find_fault(record: dict[str, Any]) -> str | None:
    """Why this record, a dict with the fields of `RunRecord`, is in no table: one line, or None for a usable one."""
    if fault := _find_bad_value(record):  # first: nothing below could format such a value
        return fault
    if isinstance(record["status"], str) and record["status"] != "completed":
        return f"{visible(record['status'])} run: {shorten(visible(str(record['error'])), 160)}"
    for entry in fields(RunRecord):
        value = record[entry.name]
        if not _is_of_type(value, entry.type):
            kind = entry.type.__name__ if isinstance(entry.type, type) and not get_args(entry.type) else entry.type
            return f"{entry.name}={_excerpt(value)} is not of type {kind}"
    if not all(isinstance(entry.get("metrics"), dict) for entry in record["evaluations"].values()):
        return "evaluations has one without metrics"
    if not record["fingerprint"]:
        return "has an empty fingerprint"
    if sparsity_key(normal_sparsity(record["sparsity"]))[0] == UNKNOWN:
        return f"sparsity={_excerpt(record['sparsity'])} is neither dense, a fraction below 1, nor N:M with M below 10^7"
    return None


def _find_bad_value(record: dict[str, Any]) -> str | None:
    """Look for what JSON can hold and a table cannot. Not recursive, since the nesting may be deep."""
    todo = [(name, value, 1) for name, value in record.items()]
    while todo:
        name, value, depth = todo.pop()
        if isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                return f"{name} is nested more than {MAX_DEPTH} deep"
            inside = [*value, *value.values()] if isinstance(value, dict) else value
            todo += [(name, item, depth + 1) for item in inside]
        elif isinstance(value, str):
            if any("\ud800" <= char <= "\udfff" for char in value):
                return f"{name}={_excerpt(value)} is no valid Unicode"
        elif isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            return f"{name} has a number that is no finite float"
    return None


def _is_of_type(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON fits a type as in the annotations of `RunRecord`. A missing figure may be null."""
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is_of_type(value, option) for option in get_args(kind))
    origin = get_origin(kind)
    if origin is dict:
        return isinstance(value, dict) and all(_is_of_type(item, get_args(kind)[1]) for item in value.values())
    if origin is list:
        return isinstance(value, list) and all(_is_of_type(item, get_args(kind)[0]) for item in value)
    if kind is float:
        return value is None or value in NON_FINITE or (isinstance(value, int | float) and not isinstance(value, bool))
    if kind is int:  # integers of a table's column have 64 bits
        return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value is None if kind is NoneType else isinstance(value, kind)


def _excerpt(value: Any) -> str:
    return shorten(visible(json.dumps(value)), 60)
