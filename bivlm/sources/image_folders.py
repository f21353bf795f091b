"""Folders of pictures with a ``data.jsonl``: one JSON object a line, read strictly.

Every complaint is an `InputError` that names the file, the line, the key, the value found and the valid form. Picture
paths are relative to the folder and must not leave it, neither by ``..`` nor through a link.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from bivlm.errors import InputError
from bivlm.sources.images import check_picture
from bivlm.untrusted import SAMPLES, parse_json, short

FILE_NAME = "data.jsonl"
TEXT = "a string that is not empty"


@dataclass(frozen=True)
class Line:
    """One object of a JSON-lines file, and where it stands."""

    folder: Path
    file: Path
    number: int  # counted from 1, as editors do
    values: dict[str, Any]

    def complain(self, key: str, found: Any, valid: str) -> NoReturn:
        """Raises `InputError` about the value of a key."""
        raise InputError(f"{self.file}, line {self.number}, key {key!r}: found {short(found)}, expected {valid}")

    def check_keys(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        """Raises `InputError` on a key that is missing or not known."""
        for key in required:
            if key not in self.values:
                found = short(list(self.values))
                raise InputError(f"{self.file}, line {self.number}: key {key!r} is missing, found {found}")
        for key in self.values:
            if key not in required + optional:
                self.complain(key, self.values[key], f"one of the keys {', '.join(required + optional)}")

    def text(self, key: str) -> str:
        """The value of a key that must be a string with something in it; raises `InputError`."""
        return self._checked(key, self.values[key], TEXT)

    def texts(self, key: str) -> tuple[str, ...]:
        """The value of a key that must be a list of strings, at least one, none empty; raises `InputError`."""
        value, valid = self.values[key], "a list of strings, at least one and none empty"
        if not isinstance(value, list) or not value:
            self.complain(key, value, valid)
        return tuple(self._checked(key, item, valid) for item in value)

    def picture(self, key: str = "image") -> Path:
        """The picture that a key names, checked to lie in the folder and to look like one; raises `InputError`."""
        value = self.text(key)
        try:
            return find_picture(self.folder, value)
        except ValueError as error:
            self.complain(key, value, str(error))

    def _checked(self, key: str, value: Any, valid: str) -> str:
        try:
            return check_text(value, valid)
        except ValueError as error:
            self.complain(key, value, str(error))


def check_text(value: Any, valid: str = TEXT) -> str:
    """`value`, which must be a string with something in it; raises ValueError that says what is `valid`."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(valid)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{valid} and without lone surrogates") from None
    return value


def find_picture(folder: Path, name: str) -> Path:
    """The picture of this name, checked to lie in `folder` and to look like one; raises ValueError: what is valid."""
    valid = f"the path of a picture in {folder}, relative to it"
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, a loop of links
        raise ValueError(valid) from None
    if Path(name).is_absolute() or not inside:
        raise ValueError(f"{valid} and not outside")
    if not there:
        raise ValueError(f"{valid}; there is no such file")
    check_picture(path)
    return path


def read_lines(folder: Path, file_name: str = FILE_NAME) -> Iterator[Line]:
    """The objects of ``data.jsonl``; blank lines are skipped.

    Raises `InputError` when the folder or the file is missing, on a line that is no JSON object, is not UTF-8 or has a
    key twice, and when there is no line at all.
    """
    file = folder / file_name
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a folder with pictures and {file_name}")
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected one JSON object a line")
    # A file that the user named may be a link; one that was found by its name in a folder is the folder's.
    if file_name == FILE_NAME and not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{file}: a link to {file.resolve()}, outside the folder; copy the file into it")
    lines = 0
    with file.open("rb") as stream:
        for number, content in enumerate(stream, start=1):
            text = _decode(file, number, content)
            if text.strip():
                lines += 1
                yield Line(folder, file, number, _parse(file, number, text))
    if not lines:
        raise InputError(f"{file}: found no line, expected one JSON object a line")


def _decode(file: Path, number: int, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _parse(file: Path, number: int, text: str) -> dict[str, Any]:
    value = parse_json(text, f"{file}, line {number}", SAMPLES)
    if not isinstance(value, dict):
        raise InputError(f"{file}, line {number}: found {short(value)}, expected a JSON object")
    return value
