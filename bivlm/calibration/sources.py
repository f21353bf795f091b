"""Where calibration samples come from: a source gives conversations in the order drawn, one at a time.

Two kinds of material are treated differently. A ``data.jsonl`` of your own is read strictly: every line is checked
before the first is used, and whatever is wrong is an error. Conversations as others publish them (LLaVA-Instruct's
files, data sets of the hub) always have some entries that cannot be used: a picture that is missing or cannot be
decoded, a conversation without an answer. Such an entry is given as the `UnusableError` that says why, so that the
next one can take its place and the loss be counted.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivlm.calibration.exchanges import UnusableError, first_exchange
from bivlm.errors import InputError
from bivlm.recipe.calibration import HUB, REFERENCE, TEXT_SUFFIXES, CalibrationSettings
from bivlm.sources.image_folders import FILE_NAME, Line, find_picture, read_lines
from bivlm.sources.images import open_picture
from bivlm.sources.samples import Conversation
from bivlm.untrusted import SAMPLES, read_json, short

Entry = Conversation | UnusableError


@dataclass(frozen=True)
class Source:
    """Entries in the order drawn.

    Attributes:
        name: what messages call it.
        entries: conversations, and what could not be made one.
        size: how many entries there are, where that is known before they are read.
        revision: the commit of a data set of the hub.
    """

    name: str
    entries: Iterator[Entry]
    size: int | None = None
    revision: str | None = None


def open_source(settings: CalibrationSettings, wanted: int) -> Source:
    """The source of conversations with a picture, of which `wanted` are needed.

    Raises `InputError` when it cannot be read, and for a line of a ``data.jsonl`` that is not valid.
    """
    if settings.source == REFERENCE:
        from bivlm.reference.question_sets import calibration_samples  # draws pictures: not needed for any other source

        return Source("the reference questions", iter(calibration_samples(wanted, settings.seed)), wanted)
    if settings.source.startswith(HUB):
        from bivlm.calibration.hub import open_pictures  # takes seconds to import

        return open_pictures(settings)
    path = Path(settings.source)
    if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
        lines = _read(path)
    else:
        path = path / FILE_NAME
        lines = list(read_lines(path.parent))
    if (images := images_folder(settings)) is not None:
        lines = [dataclasses.replace(line, folder=images) for line in lines]
    if _published(lines):
        return _drawn(path, lines, settings.seed, lambda line: attempt(_place(line), lambda: _about_picture(line)))
    for line in lines:
        line.check_keys(("image", "user", "assistant"))
        line.text("user"), line.text("assistant"), line.picture()
    return _drawn(path, lines, settings.seed, _own)


def open_text_source(settings: CalibrationSettings) -> Source:
    """The source of conversations without a picture, which `settings.text_source` names; raises as `open_source`."""
    name = settings.text_source or ""
    if name == REFERENCE:
        from bivlm.reference.question_sets import text_only_samples

        return Source("the reference catalogue", text_only_samples(settings.seed))
    if name.startswith(HUB):
        from bivlm.calibration.hub import open_texts

        return open_texts(settings)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"calibration.text_source: found {name!r}, expected a file; there is none")
    lines = _read(path)
    if _published(lines):
        return _drawn(path, lines, settings.seed, lambda line: attempt(_place(line), lambda: _text_alone(line)))
    for line in lines:
        line.check_keys(("user", "assistant"))
        line.text("user"), line.text("assistant")
    return _drawn(
        path, lines, settings.seed, lambda line: Conversation(None, line.text("user"), line.text("assistant"))
    )


def images_folder(settings: CalibrationSettings) -> Path | None:
    """The folder of pictures that the settings name, if they do; raises `InputError` when it is none."""
    if settings.images is None:
        return None
    if not (folder := Path(settings.images)).is_dir():
        raise InputError(f"calibration.images: found {settings.images!r}, expected a folder with pictures")
    return folder


def attempt(place: str, make: Callable[[], Conversation]) -> Entry:
    """What `make` gives, or why it gives nothing, with the place it happened at."""
    try:
        return make()
    except (UnusableError, InputError) as error:
        return UnusableError(f"{place}: {error}")


def picture_in(folder: Path, name: Any) -> Path:
    """The picture of this name in `folder`; raises `UnusableError` if there is none."""
    if isinstance(name, list | tuple) and len(name) == 1:
        name = name[0]
    if not isinstance(name, str) or not name:
        raise UnusableError(f"image is {short(name)}, expected the path of one picture")
    try:
        return find_picture(folder, name)
    except ValueError as error:
        raise UnusableError(f"image is {short(name)}, expected {error}") from None


def _drawn(path: Path, lines: list[Line], seed: int, read: Callable[[Line], Entry]) -> Source:
    # A permutation, so that the first samples stay the same ones when more are asked for.
    order = random.Random(seed).sample(range(len(lines)), len(lines))
    return Source(str(path), (read(lines[index]) for index in order), len(lines))


def _read(path: Path) -> list[Line]:
    """The objects of a ``.jsonl`` file, or of the list in a ``.json`` file; a line's number is then its place there."""
    if path.suffix.lower() == ".jsonl":
        return list(read_lines(path.parent, path.name))
    values = read_json(path, SAMPLES)
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: found {short(values)}, expected a list of conversations")
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path}, entry {number}: found {short(value)}, expected a JSON object")
    return [Line(path.parent, path, number, value) for number, value in enumerate(values, start=1)]


def _published(lines: list[Line]) -> bool:
    return lines[0].file.suffix.lower() == ".json" or "conversations" in lines[0].values


def _place(line: Line) -> str:
    return f"{line.file}, {'entry' if line.file.suffix.lower() == '.json' else 'line'} {line.number}"


def _own(line: Line) -> Conversation:
    return Conversation(open_picture(line.picture()), line.text("user"), line.text("assistant"))


def _about_picture(line: Line) -> Conversation:
    user, assistant = first_exchange(_turns(line), pictures=1)
    return Conversation(open_picture(picture_in(line.folder, line.values.get("image"))), user, assistant)


def _text_alone(line: Line) -> Conversation:
    if line.values.get("image"):
        raise UnusableError(f"found image {short(line.values['image'])}, expected a conversation without a picture")
    return Conversation(None, *first_exchange(_turns(line), pictures=0))


def _turns(line: Line) -> Any:
    if "conversations" not in line.values:
        raise UnusableError(f"key 'conversations' is missing, found {short(list(line.values))}")
    return line.values["conversations"]
