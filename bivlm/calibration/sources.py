"""Sources of calibration samples: each gives samples in the order drawn, one at a time.

Two kinds of material are treated differently. A ``data.jsonl`` of your own is read strictly: every line is checked
before the first is used, and whatever is wrong is an error. Conversations as others publish them (LLaVA-Instruct's
files, data sets of the hub) always have some rows that cannot be used: an image that is missing or cannot be decoded, a
conversation without an answer. For such a row a source gives the `InputError` that says why, so that the next row can
take its place and the loss be counted.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bivlm.calibration.turns import first_turns
from bivlm.errors import InputError
from bivlm.recipe.calibration import HUB, REFERENCE, TEXT_SUFFIXES, CalibrationSettings
from bivlm.sources.json_rows import FILE_NAME, read_folder, read_lines, read_list
from bivlm.sources.rows import Row
from bivlm.sources.samples import CalibrationSample

if TYPE_CHECKING:
    from bivlm.sources.hub_datasets import StreamedRows

# Columns to look for if the recipe names none; the first one that is there is taken.
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "png")
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages", "texts")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")
PAIRS_OF_COLUMNS = (("user", "assistant"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"))


@dataclass(frozen=True)
class Source:
    """Samples in the order drawn.

    Attributes:
        name: what messages call it.
        samples: the samples, and why a row cannot be one.
        size: how many there are, where that is known before they are read.
        revision: the commit of a data set of the hub.
    """

    name: str
    samples: Iterator[CalibrationSample | InputError]
    size: int | None = None
    revision: str | None = None


def open_source(settings: CalibrationSettings, wanted: int) -> Source:
    """Return the source of samples with an image, of which `wanted` are needed.

    Raises `InputError` when it cannot be read, and for a line of a ``data.jsonl`` that is not valid; ConnectionError
    when the hub cannot be reached.
    """
    if settings.source == REFERENCE:
        from bivlm.reference.question_sets import calibration_samples  # draws images: not needed for any other source

        return Source("the reference questions", iter(calibration_samples(wanted, settings.seed)), wanted)
    if settings.source.startswith(HUB):
        return open_hub_images(settings)
    path = Path(settings.source)
    if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
        rows = _read(path)
    else:
        path, rows = path / FILE_NAME, list(read_folder(path))
    if (images := images_folder(settings)) is not None:
        rows = [dataclasses.replace(row, images=images) for row in rows]
    return _of_file(path, rows, settings.seed, with_image=True)


def open_text_source(settings: CalibrationSettings) -> Source:
    """Return the source of samples without an image, which `settings.text_source` names; raises as `open_source`."""
    name = settings.text_source or ""
    if name == REFERENCE:
        from bivlm.reference.question_sets import text_only_samples

        return Source("the reference catalogue", text_only_samples(settings.seed))
    if name.startswith(HUB):
        return open_hub_texts(settings)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"calibration.text_source: found {name!r}, expected a file; there is none")
    return _of_file(path, _read(path), settings.seed, with_image=False)


def open_hub_images(settings: CalibrationSettings) -> Source:
    """Return the data set that `settings.source` names: images with captions or with conversations.

    Raises `InputError` naming the key for a data set, revision, subset, split or column that is not there, and
    ConnectionError when the hub cannot be reached.
    """
    from bivlm.sources.hub_datasets import open_stream  # takes seconds to import, and only the hub needs it

    data = open_stream(
        settings.source, keys="calibration.", revision=settings.revision, subset=settings.subset, split=settings.split
    )
    image = _column(data, "image_column", settings.image_column, IMAGE_COLUMNS)
    is_conversation = settings.conversation_column is not None or (
        settings.text_column is None and any(name in data.columns for name in CONVERSATION_COLUMNS)
    )
    if is_conversation:
        text = _column(data, "conversation_column", settings.conversation_column, CONVERSATION_COLUMNS)
    else:
        text = _column(data, "text_column", settings.text_column, CAPTION_COLUMNS)

    def read(row: Row) -> CalibrationSample:
        user, assistant = (
            first_turns(row, text, images=1) if is_conversation else (settings.instruction, _caption(row, text))
        )
        return CalibrationSample(row.image(image), user, assistant)

    rows = data.shuffled([image, text], settings.seed, images_folder(settings))
    return Source(data.name, _attempts(rows, read), revision=data.revision)


def open_hub_texts(settings: CalibrationSettings) -> Source:
    """Return the data set that `settings.text_source` names: conversations without images.

    Raises as `open_hub_images`.
    """
    from bivlm.sources.hub_datasets import open_stream

    data = open_stream(
        settings.text_source or "",
        keys="calibration.text_",
        revision=settings.text_revision,
        subset=settings.text_subset,
        split=settings.text_split,
    )
    conversation = next((name for name in CONVERSATION_COLUMNS if name in data.columns), None)
    pair = next((pair for pair in PAIRS_OF_COLUMNS if set(pair) <= set(data.columns)), ())
    images = [name for name in IMAGE_COLUMNS if name in data.columns]
    if conversation is None and not pair:
        known = ", ".join((*CONVERSATION_COLUMNS, *(" and ".join(pair) for pair in PAIRS_OF_COLUMNS)))
        raise InputError(
            f"calibration.text_source: found {data.name} with the columns {', '.join(data.columns)}, "
            f"expected one of {known}"
        )

    def read(row: Row) -> CalibrationSample:
        for name in images:
            _refuse_image(row, name)
        turns = (row.text(name) for name in pair) if conversation is None else first_turns(row, conversation, images=0)
        return CalibrationSample(None, *turns)

    rows = data.shuffled([*images, *(pair if conversation is None else (conversation,))], settings.seed, None)
    return Source(data.name, _attempts(rows, read), revision=data.revision)


def images_folder(settings: CalibrationSettings) -> Path | None:
    """Return the folder of images that the settings name, if they do; raises `InputError` if it is none."""
    if settings.images is None:
        return None
    if not (folder := Path(settings.images)).is_dir():
        raise InputError(f"calibration.images: found {settings.images!r}, expected a folder with images")
    return folder


def _read(path: Path) -> list[Row]:
    return list(read_lines(path)) if path.suffix.lower() == ".jsonl" else read_list(path)


def _of_file(path: Path, rows: list[Row], seed: int, *, with_image: bool) -> Source:
    """Return the rows of a file in random order; those of your own are checked before."""
    published = path.suffix.lower() == ".json" or "conversations" in rows[0].values

    def read(row: Row) -> CalibrationSample:
        if not with_image:
            _refuse_image(row, "image")
        if published:
            user, assistant = first_turns(row, "conversations", images=int(with_image))
        else:
            user, assistant = row.text("user"), row.text("assistant")
        return CalibrationSample(row.image("image") if with_image else None, user, assistant)

    for row in rows if not published else ():
        row.check_keys(("image", "user", "assistant") if with_image else ("user", "assistant"))
        row.text("user"), row.text("assistant")
        if with_image:
            row.image_path("image")
    # A permutation, so that the first samples stay the same ones when more are requested.
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    drawn = (rows[index] for index in order)
    return Source(str(path), _attempts(drawn, read) if published else map(read, drawn), len(rows))


def _attempts(
    rows: Iterable[Row], read: Callable[[Row], CalibrationSample]
) -> Iterator[CalibrationSample | InputError]:
    """Yield what `read` makes of each row, or why it makes nothing."""
    attempt: CalibrationSample | InputError
    for row in rows:
        try:
            attempt = read(row)
        except InputError as error:
            attempt = error
        yield attempt


def _refuse_image(row: Row, key: str) -> None:
    if row.values.get(key):
        row.complain(key, "no image")


def _caption(row: Row, column: str) -> str:
    """Return a caption, or the first of a list of captions."""
    value = row.value(column)
    return row.check_text(column, value[0] if isinstance(value, list | tuple) and value else value)


def _column(data: StreamedRows, key: str, given: str | None, known: Sequence[str]) -> str:
    """Return the column `given`, else the first that is there of those `known`; raises `InputError` naming the key."""
    there = f"the columns of {data.name} are {', '.join(data.columns)}"
    if given is not None and given not in data.columns:
        raise InputError(f"calibration.{key}: found {given!r}, expected the name of a column; {there}")
    found = given or next((name for name in known if name in data.columns), None)
    if found is None:
        raise InputError(f"calibration.{key}: not given, and none of {', '.join(known)} is there; {there}")
    return found
