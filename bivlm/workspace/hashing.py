"""Canonical hashes: two things have the same digest only if they are the same thing.

Whatever has no single stable form (NaN, sets, keys that are not strings, objects of unknown classes) is refused with
its place in the value: a guess here would return another step's cached result.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bivlm.errors import InputError


def canonical_json(value: Any) -> bytes:
    """Return UTF-8 JSON of `value` with sorted keys and no spaces; tuples are written as lists.

    Values are None, bool, int, finite float, str, list, tuple and dict with str keys, of exactly these classes. 1 and
    1.0 are different values. Raises `InputError` with the path of the first value that is something else.
    """
    _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of `canonical_json(value)` in hex; raises `InputError` as it does."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hex, read a part at a time."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_identity(
    stage: str, version: int, inputs: Mapping[str, Any], recipe_part: Any, *, exact: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Return the identity of a step, whose digest is its key: everything that may change what the step makes.

    `inputs` holds the hashes of what the step reads, `recipe_part` what the recipe says about it, `version` is raised
    when the step's code makes something else. A step that is not `exact` across devices also has the device class and
    the torch version.
    """
    identity: dict[str, Any] = {"stage": stage, "version": version, "inputs": dict(inputs), "recipe": recipe_part}
    if not exact:
        identity |= {"device": device, "torch": metadata.version("torch")}
    return identity


def _check(value: Any, path: str) -> None:
    kind = type(value)
    if value is None or kind in (bool, int):
        return
    if kind is float:
        if not math.isfinite(value):
            raise InputError(f"{path}: {value} has no stable JSON form; expected a finite number")
    elif kind is str:
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{path}: {value!r} is not valid Unicode text") from None
    elif kind in (list, tuple):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]")
    elif kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise InputError(f"{path}: key {key!r} is of class {type(key).__name__}; expected str")
            _check(key, path)
            _check(item, f"{path}.{key}")
    else:
        raise InputError(
            f"{path}: a value of class {kind.__name__} has no stable form; "
            "expected None, bool, int, float, str, list, tuple or dict"
        )
