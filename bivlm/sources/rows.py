"""One row of any data set, checked value by value.

Lines of a JSON file, rows of a parquet file and rows of a stream from the hub are all a `Row`. Every complaint is an
`InputError` that names the row, the key or column, the value found and the valid form. A reader of a published data set
can catch it and take the next row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from bivlm.errors import InputError
from bivlm.sources.images import check_image, decode_image, open_image
from bivlm.untrusted import short

_TEXT = "a string that is not empty"
_TEXTS = "a list of strings, at least one"
_FOUND = object()


@dataclass(frozen=True)
class Row:
    """Values by key or column, and where they stand.

    Attributes:
        source: the file or data set, as messages name it.
        number: of the row; lines count from 1, rows of a table from 0.
        values: by key.
        images: the folder that paths of images are relative to; None where there is none.
        unit: what `source` consists of, as messages name it.
        column: what messages call a key.
    """

    source: str
    number: int
    values: dict[str, Any]
    images: Path | None = None
    unit: str = "row"
    column: str = "column"

    def place(self, key: str) -> str:
        """Return where the value of a key stands, for messages."""
        return f"{self.source}, {self.unit} {self.number}, {self.column} {key!r}"

    def complain(self, key: str, valid: str, found: Any = _FOUND) -> NoReturn:
        """Raise `InputError` about the value of a key, or about the part `found` of it."""
        found = self.values.get(key) if found is _FOUND else found
        raise InputError(f"{self.place(key)}: found {short(found)}, expected {valid}")

    def check_keys(self, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        """Raise `InputError` on a key that is missing or not known."""
        for key in required:
            self.value(key)
        for key in self.values:
            if key not in required + optional:
                self.complain(key, f"one of the keys {', '.join(required + optional)}")

    def value(self, key: str) -> Any:
        """Return the value of a key, whatever it is; raises `InputError` if there is no such key."""
        if key not in self.values:
            found = short(list(self.values))
            raise InputError(f"{self.source}, {self.unit} {self.number}: key {key!r} is missing, found {found}")
        return self.values[key]

    def text(self, key: str, *, may_be_empty: bool = False) -> str:
        """Return a string as it is stored, white space included.

        With `may_be_empty`, no such key and None are the empty string. Raises `InputError`.
        """
        value = self.values.get(key) if may_be_empty else self.value(key)
        return "" if may_be_empty and value is None else self.check_text(key, value, may_be_empty=may_be_empty)

    def texts(self, key: str, *, may_be_empty: bool = False) -> tuple[str, ...]:
        """Return a list of strings, at least one, and none of them empty unless they may be; raises `InputError`."""
        value, valid = self.value(key), _TEXTS + ("" if may_be_empty else " and none empty")
        if not isinstance(value, list) or not value:
            self.complain(key, valid)
        return tuple(self.check_text(key, item, valid, may_be_empty=may_be_empty) for item in value)

    def check_text(self, key: str, text: Any, valid: str = _TEXT, *, may_be_empty: bool = False) -> str:
        """Return `text`, the value of a key or a part of it; raises `InputError` unless it is a `valid` string."""
        if not isinstance(text, str) or not (may_be_empty or text.strip()):
            self.complain(key, valid, text)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.complain(key, f"{valid} and without lone surrogates", text)
        return text

    def image_path(self, key: str) -> Path:
        """Return the path of the image that a key names, as `find_image` checks it; raises `InputError`."""
        return self._found(key, self.text(key))

    def image_bytes(self, key: str) -> bytes:
        """Return the file of an image, stored as bytes or as a structure with `bytes`; raises `InputError`."""
        value = self.value(key)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            self.complain(key, "the bytes of an image")
        return content

    def image(self, key: str) -> Image.Image:
        """Return the decoded image of a key: its bytes, a structure with `bytes` or `path`, or a path in `images`.

        A list of one of these is taken, too. Raises `InputError`.
        """
        value = self.values.get(key)
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
        if isinstance(content, bytes):
            return decode_image(content, self.place(key))
        if not isinstance(path, str) or self.images is None:
            without = "; a path needs calibration.images" if isinstance(path, str) else ""
            self.complain(key, f"one image{without}")
        found = self._found(key, path)
        try:
            return open_image(found)
        except InputError as error:
            raise InputError(f"{self.place(key)}: {error}") from error

    def _found(self, key: str, name: str) -> Path:
        try:
            return find_image(self.images or Path(), name)
        except ValueError as error:
            self.complain(key, str(error), name)


def find_image(folder: Path, name: str) -> Path:
    """Return the resolved path of the image `name` in `folder`, checked to lie inside and to begin as an image does.

    A path must not leave the folder, neither by ``..`` nor through a link. Raises ValueError that says what is valid.
    """
    valid = f"the path of an image in {folder}, relative to it"
    try:
        path = (folder / name).resolve()
        inside, there = path.is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, a loop of links
        raise ValueError(valid) from None
    if Path(name).is_absolute() or not inside:
        raise ValueError(f"{valid} and not outside")
    if not there:
        raise ValueError(f"{valid}; there is no such file")
    check_image(path)
    return path
