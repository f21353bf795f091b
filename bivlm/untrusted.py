"""Read files, JSON and YAML that somebody else wrote.

Every config, index, header, record, recipe and list of samples is read here. Whatever can be wrong with one of them is
an `InputError` that names its source. What is returned has bounds that all further code may rely on: plain values,
at most `MAX_DEPTH` levels, integers that a float can hold, and text that is valid Unicode.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import regex
import yaml
from pydantic import BaseModel, ValidationError

from bivlm.errors import InputError, describe

MAX_DEPTH = 64
MAX_YAML_BYTES = 256 << 10
MAX_YAML_NODES = 50_000  # with every alias written out
MATCH_SECONDS = 2  # of a core: a busy machine does not count
_MAX_REPEATS = 10_000
_MERGE = "tag:yaml.org,2002:merge"
_SHOWN = 120  # characters of a value in a message

# Errors that the path itself causes. Other errors of the system (a disk, a network) are not the input's fault.
_OF_THE_PATH = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
}
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class Kind:
    """The bounds of a kind of JSON document.

    Attributes:
        max_bytes: its largest size.
        any_number: NaN and Infinity are numbers.
        any_text: lone surrogates pass; the caller checks each text that it uses.
        repeats: a key may be repeated with an equal value.
    """

    max_bytes: int
    any_number: bool = False
    any_text: bool = False
    repeats: bool = False


RECORD = Kind(512 << 20)  # written by this code
MODEL_CONFIG = Kind(64 << 20, any_number=True, repeats=True)  # written by transformers, or by hand
SAMPLES = Kind(8 << 30, any_number=True, any_text=True)  # one entry that cannot be used does not spoil the others

Model = TypeVar("Model", bound=BaseModel)


def open_file(file: Path) -> BinaryIO:
    """Open a regular file for reading, without buffer; anything else is refused before a byte is read.

    Raises `InputError` naming the file if it is missing, cannot be opened, or is no regular file.
    """
    try:
        # Looked at first: opening a device can have an effect of its own. A pipe that takes its place does not block.
        _check_regular(file, file.stat().st_mode)
        stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)
    except FileNotFoundError:
        raise InputError(f"{file}: the file is missing") from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{str(file)!r}: not the name of a file ({error})") from None  # a NUL
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise InputError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        _check_regular(file, os.fstat(stream.fileno()).st_mode)
    except InputError:
        stream.close()
        raise
    return stream


def read_bytes(file: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; raises `InputError` naming it as `open_file`, and if it is larger."""
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > max_bytes:
            raise InputError(f"{file}: {size:,} bytes, expected at most {max_bytes:,}")
        return stream.read()


def read_json(file: Path, kind: Kind = RECORD) -> Any:
    """Return what a JSON file holds; raises `InputError` naming it as `read_bytes` and `parse_json`."""
    return parse_json(read_bytes(file, kind.max_bytes), file, kind)


def read_object(file: Path, kind: Kind = RECORD) -> dict[str, Any]:
    """Read a file that must hold an object, as `read_json` does."""
    return parse_object(read_bytes(file, kind.max_bytes), file, kind)


def parse_json(data: bytes | str, source: object, kind: Kind = RECORD) -> Any:
    """Return what `data` says.

    Raises `InputError` naming `source` for what is not UTF-8 or not JSON, for a key that is given twice, and for a
    value out of the bounds above. NaN and Infinity are no JSON either, except where `kind` allows them.
    """
    text = _text(data, source, kind.max_bytes)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found and not (kind.repeats and found[key] == value):
                raise InputError(f"{source}: the key {short(key)} is given twice, expected once")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except RecursionError:
        _too_deep(source)
    except ValueError as error:  # of the syntax, and of integers with thousands of digits
        raise InputError(f"{source}: not valid JSON ({error})") from None
    _check(value, source, kind)
    return value


def parse_object(data: bytes | str, source: object, kind: Kind = RECORD) -> dict[str, Any]:
    """Parse what must be an object, as `parse_json` does."""
    value = parse_json(data, source, kind)
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected a JSON object, found {short(value)}")
    return value


def parse_model(model: type[Model], data: bytes | str, source: object, what: str) -> Model:
    """Return `data` as a record of the class `model`.

    Raises `InputError` "`source`: not `what`" with what is wrong, as `parse_json`, or the key that is.
    """
    parse_json(data, f"{source}: not {what}")
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InputError(f"{source}: not {what}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first of pydantic's complaints in a line: the key, what is wrong and what was found."""
    first = error.errors(include_url=False)[0]
    found = "" if first["type"] == "missing" else f", found {short(first['input'])}"
    return f"{place_of(first)}: {first['msg']}{found}"


def place_of(problem: Mapping[str, Any]) -> str:
    """Return the path of the key that one of pydantic's complaints is about."""
    return ".".join(str(part)[:_SHOWN] for part in problem["loc"]) or "(top)"


def read_yaml(file: Path) -> Any:
    """Return what a YAML file holds; raises `InputError` naming it as `read_bytes` and `parse_yaml`."""
    return parse_yaml(read_bytes(file, MAX_YAML_BYTES), file)


def parse_yaml(data: bytes | str, source: object) -> Any:
    """Return what `data` says: plain values with text as keys.

    Raises `InputError` naming `source` for what is not UTF-8 or not YAML, for a key that is given twice, for aliases
    that refer to themselves or stand for more than `MAX_YAML_NODES` values, for tags of other classes, and for a value
    out of the bounds above.
    """
    text = _text(data, source, MAX_YAML_BYTES)
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        _too_deep(source)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    # A tag on a value of another form (``!!int x``) fails inside of PyYAML's constructors, each in its own way.
    except (ValueError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        said = in_a_line(error)
        raise InputError(f"{source}: not valid YAML: a value is not what its tag or form says ({said})") from None
    _check(value, source, RECORD)
    return value


def matching(pattern: str, names: Iterable[str], source: object) -> set[str]:
    """Return those of `names` that the regular expression `pattern` matches as a whole.

    Raises `InputError` naming `source` for what is no regular expression of Python's, and for one that takes longer
    than `MATCH_SECONDS` over all names, as ``(a|aa)+b`` can.
    """
    try:
        re.compile(pattern)
        # `re` cannot be interrupted. `regex` reads the same patterns, but unrolls counted repeats while compiling.
        if prod(int(count) for count in re.findall(r"\{(?:[0-9]*,)?([0-9]+)\}", pattern)) > _MAX_REPEATS:
            raise InputError(f"{source}: expected counted repeats of at most {_MAX_REPEATS:,} all together")
        matcher = regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise InputError(f"{source} is not a regular expression: {error}") from None
    began, found = time.thread_time(), set()
    for name in names:
        try:
            left = began + MATCH_SECONDS - time.thread_time()
            if left > 0 and not matcher.fullmatch(name, timeout=left):
                continue
        except TimeoutError:
            left = 0.0
        if left <= 0:
            raise InputError(f"{source}: takes more than {MATCH_SECONDS} seconds to match; expected a simpler pattern")
        found.add(name)
    return found


def short(value: Any) -> str:
    """Return `repr` of a value, cut so that a message stays readable; no more of it is built than is shown."""
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _SHOWN:
            return text[: _SHOWN - 3] + "..."
    return text


def in_a_line(error: Exception) -> str:
    """Return what another library says of an input, see `describe`, as a line of at most 500 characters."""
    return " ".join(describe(error).split())[:500]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with a bound on aliases; it refuses a key that is given twice, and a date is text."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Before what is merged (``<<``) is put among them: a key of its own goes before a merged one.
        own = [key for key, _ in node.value if key.tag != _MERGE]
        mapping = super().construct_mapping(node, deep=True)
        seen: set[Hashable] = set()
        for key in (self.construct_object(key, deep=True) for key in own):
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {short(key)} is given twice", node.start_mark
                )
            seen.add(key)
        return mapping


def _size(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return (values, levels) of a node, with every alias written out; `known` has the nodes already counted."""
    if id(node) not in known:
        known[id(node)] = (MAX_YAML_NODES + 1, 0)  # for an alias to a node that it is inside of
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        sizes = [_size(part, known) for part in parts]
        total, depth = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if total > MAX_YAML_NODES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_YAML_NODES:,} values, aliases written out", node.start_mark
            )
        if depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels", node.start_mark)
        known[id(node)] = (total, depth)
    return known[id(node)]


def _check(value: Any, source: object, kind: Kind) -> None:
    """Raise `InputError` for a value out of bounds. Level by level, because recursion is what deep values break."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                for key in each:
                    if not isinstance(key, str):
                        raise InputError(f"{source}: the key {short(key)}: expected text")
                    _check_leaf(key, source, kind)
                below.extend(each.values())
            elif isinstance(each, list):
                below.extend(each)
            else:
                _check_leaf(each, source, kind)
        if not below:
            return
        level = below
    _too_deep(source)


def _check_leaf(value: Any, source: object, kind: Kind) -> None:
    if isinstance(value, str):
        if not value.isascii() and not kind.any_text and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InputError(f"{source}: {short(value)}: expected text without lone surrogates")
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        if value.bit_length() > 1023:
            raise InputError(f"{source}: {short(value)}: expected a number below 1e308")
    elif isinstance(value, float):
        if not math.isfinite(value) and not kind.any_number:
            raise InputError(f"{source}: found {value}, expected a finite number")
    else:
        raise InputError(
            f"{source}: found {short(value)} of class {type(value).__name__}, expected text, a number, a list or a "
            "mapping"
        )


def _check_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{file}: expected a file, found {_KINDS.get(stat.S_IFMT(mode), 'something else')}")


def _text(data: bytes | str, source: object, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise InputError(f"{source}: {len(data):,} bytes, expected at most {max_bytes:,}")
    if isinstance(data, str):
        return data
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: not a UTF-8 text file ({error.reason} at byte {error.start})") from None


def _too_deep(source: object) -> NoReturn:
    raise InputError(f"{source}: nested too deep, expected at most {MAX_DEPTH} levels") from None


def _pieces(value: Any) -> Iterator[str]:
    """Yield the text of `repr`, piece by piece."""
    if type(value) is dict:
        yield "{"
        for number, (key, part) in enumerate(value.items()):
            yield ", " if number else ""
            yield from _pieces(key)
            yield ": "
            yield from _pieces(part)
        yield "}"
    elif type(value) in (list, tuple):
        yield "[" if type(value) is list else "("
        for number, part in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(part)
        yield "]" if type(value) is list else (",)" if len(value) == 1 else ")")
    elif isinstance(value, str | bytes):
        yield repr(value[: _SHOWN + 1])
    elif isinstance(value, int) and value.bit_length() > 1023:
        yield f"an integer of {value.bit_length():,} bits"
    else:
        yield repr(value)
