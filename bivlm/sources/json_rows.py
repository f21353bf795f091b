"""Samples in JSON files: one object per line, as in the ``data.jsonl`` of a folder, or a list of objects.

Paths of images are relative to the file's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bivlm.errors import InputError
from bivlm.sources.rows import Row
from bivlm.untrusted import SAMPLES, parse_json, read_json, short

FILE_NAME = "data.jsonl"


def read_folder(folder: Path) -> Iterator[Row]:
    """Return the lines of the ``data.jsonl`` in a folder of images.

    Raises `InputError` as `read_lines`, and when the folder is missing or the file is a link that leaves it.
    """
    file = folder / FILE_NAME
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder with images and {FILE_NAME}")
    if file.is_file() and not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{file}: a link to {file.resolve()}, outside the folder; copy the file into it")
    return read_lines(file)


def read_lines(file: Path) -> Iterator[Row]:
    """Yield the objects of a file with one JSON object per line; blank lines are skipped.

    Raises `InputError` when there is no such file or no line in it, and on a line that is no JSON object, is not UTF-8
    or has a key twice.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected one JSON object a line")
    rows = 0
    with file.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            text = _decode(file, number, content)
            if text.strip():
                rows += 1
                yield _row(file, number, parse_json(text, f"{file}, line {number}", SAMPLES), "line")
    if not rows:
        raise InputError(f"{file}: found no line, expected one JSON object a line")


def read_list(file: Path) -> list[Row]:
    """Return the objects of a JSON file that holds a list of them; raises `InputError` if it holds something else."""
    values = read_json(file, SAMPLES)
    if not isinstance(values, list) or not values:
        raise InputError(f"{file}: found {short(values)}, expected a list of samples")
    return [_row(file, number, value, "sample") for number, value in enumerate(values, start=1)]


def _row(file: Path, number: int, value: Any, unit: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{file}, {unit} {number}: found {short(value)}, expected a JSON object")
    return Row(str(file), number, value, file.parent, unit, "key")


def _decode(file: Path, number: int, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
