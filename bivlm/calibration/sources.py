"""Where calibration samples come from: a source gives conversations in the order drawn, one at a time.

Two kinds of material are treated differently. A ``data.jsonl`` of your own is read strictly: every line is checked
before the first is used, and whatever is wrong is an error. Conversations as others publish them (LLaVA-Instruct's
files, data sets of the hub) always have some entries that cannot be used: a picture that is missing or cannot be
decoded, a conversation without an answer. Such an entry is given as the `UnusableError` that says why, so that the
next one can take its place and the loss be counted.

Data sets of the hub, and folders of parquet files that are read the same way, are streamed: of a large set only the
first parts of a few shards are downloaded. So rows are shuffled as streams are, shards first and then rows within a
buffer of some hundred, and a row near the beginning of its shard has the better chance.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bivlm.calibration.exchanges import UnusableError, caption_exchange, first_exchange, pair_exchange
from bivlm.errors import InputError, describe
from bivlm.recipe.calibration import HUB, REFERENCE, TEXT_SUFFIXES, CalibrationSettings
from bivlm.sources.hub_datasets import commit_of
from bivlm.sources.image_folders import FILE_NAME, Line, find_picture, read_lines
from bivlm.sources.images import decode_picture, open_picture
from bivlm.sources.samples import Conversation
from bivlm.untrusted import SAMPLES, read_json, short

if TYPE_CHECKING:
    import datasets

Entry = Conversation | UnusableError

# By these names columns are found that the recipe does not name, the first one that is there.
IMAGE_COLUMNS = ("image", "images", "img", "jpg", "png")
CONVERSATION_COLUMNS = ("conversations", "conversation", "messages", "texts")
CAPTION_COLUMNS = ("caption", "captions", "text", "sentences")
PAIRS_OF_COLUMNS = (("user", "assistant"), ("prompt", "response"), ("prompt", "completion"), ("question", "answer"))

_BUFFER_ROWS = 512
_BUFFER_SHARDS = 10


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
        return open_hub_pictures(settings)
    path = Path(settings.source)
    if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
        lines = _read(path)
    else:
        path = path / FILE_NAME
        lines = list(read_lines(path.parent))
    if (images := images_folder(settings)) is not None:
        lines = [dataclasses.replace(line, folder=images) for line in lines]
    if _published(lines):
        return _drawn(path, lines, settings.seed, lambda line: _attempt(_place(line), lambda: _about_picture(line)))
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
        return open_hub_texts(settings)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"calibration.text_source: found {name!r}, expected a file; there is none")
    lines = _read(path)
    if _published(lines):
        return _drawn(path, lines, settings.seed, lambda line: _attempt(_place(line), lambda: _text_alone(line)))
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


def _attempt(place: str, make: Callable[[], Conversation]) -> Entry:
    """What `make` gives, or why it gives nothing, with the place it happened at."""
    try:
        return make()
    except (UnusableError, InputError) as error:
        return UnusableError(f"{place}: {error}")


def _picture_in(folder: Path, name: Any) -> Path:
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
    return Conversation(open_picture(_picture_in(line.folder, line.values.get("image"))), user, assistant)


def _text_alone(line: Line) -> Conversation:
    if line.values.get("image"):
        raise UnusableError(f"found image {short(line.values['image'])}, expected a conversation without a picture")
    return Conversation(None, *first_exchange(_turns(line), pictures=0))


def _turns(line: Line) -> Any:
    if "conversations" not in line.values:
        raise UnusableError(f"key 'conversations' is missing, found {short(list(line.values))}")
    return line.values["conversations"]


def open_hub_pictures(settings: CalibrationSettings) -> Source:
    """The data set that `settings.source` names: pictures, with captions or with conversations.

    Raises `InputError` naming the key for a data set, revision, subset, split or column that is not there, and
    ConnectionError when the hub cannot be reached.
    """
    data = _open(settings.source, "", settings.revision, settings.subset, settings.split)
    image = data.column("image_column", settings.image_column, IMAGE_COLUMNS)
    conversation, caption = None, None
    if settings.conversation_column is not None or (
        settings.text_column is None and any(name in data.columns for name in CONVERSATION_COLUMNS)
    ):
        conversation = data.column("conversation_column", settings.conversation_column, CONVERSATION_COLUMNS)
    else:
        caption = data.column("text_column", settings.text_column, CAPTION_COLUMNS)
    images = images_folder(settings)

    def read(row: dict[str, Any]) -> Conversation:
        if conversation is not None:
            user, assistant = first_exchange(row[conversation], pictures=1)
        else:
            user, assistant = caption_exchange(settings.instruction, row[caption])
        return Conversation(_picture(row[image], images), user, assistant)

    return data.source([image, conversation or caption], settings.seed, read)


def open_hub_texts(settings: CalibrationSettings) -> Source:
    """The data set that `settings.text_source` names: conversations without pictures.

    Raises as `open_hub_pictures`.
    """
    data = _open(settings.text_source, "text_", settings.text_revision, settings.text_subset, settings.text_split)
    conversation = next((name for name in CONVERSATION_COLUMNS if name in data.columns), None)
    pair = next((pair for pair in PAIRS_OF_COLUMNS if set(pair) <= set(data.columns)), None)
    pictures = [name for name in IMAGE_COLUMNS if name in data.columns]
    if conversation is None and pair is None:
        known = ", ".join((*CONVERSATION_COLUMNS, *(" and ".join(pair) for pair in PAIRS_OF_COLUMNS)))
        raise InputError(
            f"calibration.text_source: found {data.name} with the columns {', '.join(data.columns)}, "
            f"expected one of {known}"
        )

    def read(row: dict[str, Any]) -> Conversation:
        if any(row[name] for name in pictures):
            raise UnusableError("found a picture, expected a conversation without one")
        if conversation is not None:
            return Conversation(None, *first_exchange(row[conversation], pictures=0))
        return Conversation(None, *pair_exchange(row[pair[0]], row[pair[1]]))

    return data.source([*pictures, *([conversation] if conversation is not None else pair)], settings.seed, read)


@dataclass(frozen=True)
class _DataSet:
    """One split of a data set: what messages call it, its rows, its columns, and its commit on the hub."""

    name: str
    rows: datasets.IterableDataset
    columns: tuple[str, ...]
    revision: str | None

    def column(self, key: str, given: str | None, known: Sequence[str]) -> str:
        """The column `given`, else the first that is there of those `known`; raises `InputError` naming the key."""
        there = f"the columns of {self.name} are {', '.join(self.columns)}"
        if given is not None and given not in self.columns:
            raise InputError(f"calibration.{key}: found {given!r}, expected the name of a column; {there}")
        found = given or next((name for name in known if name in self.columns), None)
        if found is None:
            raise InputError(f"calibration.{key}: not given, and none of {', '.join(known)} is there; {there}")
        return found

    def source(self, columns: Sequence[str], seed: int, read: Callable[[dict[str, Any]], Conversation]) -> Source:
        """The rows, in random order and with these columns only, as entries made by `read`."""
        # Sets that are mixed from several are ordered by where a row came from: rows of many shards go into the buffer.
        # Reading one shard needs no threads, whose end the library waits for with a pause of seconds.
        shards = min(_BUFFER_SHARDS, self.rows.num_shards)
        rows = self.rows.select_columns(list(columns))
        rows = rows.shuffle(seed=seed, buffer_size=_BUFFER_ROWS, max_buffer_input_shards=shards)
        return Source(self.name, self._entries(rows, read), revision=self.revision)

    def _entries(
        self, rows: datasets.IterableDataset, read: Callable[[dict[str, Any]], Conversation]
    ) -> Iterator[Entry]:
        from datasets.exceptions import DatasetsError  # takes seconds to import, and only the hub needs it

        stream, number = iter(rows), 0
        while True:
            try:
                row = next(stream)
            except StopIteration:
                return
            except (DatasetsError, ValueError) as error:  # damaged files among them
                raise InputError(f"{self.name}: cannot be read: {describe(error)}") from error
            number += 1
            yield _attempt(f"{self.name}, row {number} as drawn", lambda row=row: read(row))


def _open(source: str, prefix: str, revision: str | None, subset: str | None, split: str | None) -> _DataSet:
    """A data set by ``hf:NAME``; the keys of its settings begin with `prefix`."""
    import datasets
    from datasets.exceptions import DatasetsError

    path, key = source.removeprefix(HUB), f"calibration.{prefix}source"
    commit = None
    if Path(path).is_dir():
        if revision is not None:
            raise InputError(f"calibration.{prefix}revision: found {revision!r}, but {path} is a folder and has none")
    elif "/" not in path or path.startswith((".", "/", "~")):
        raise InputError(f"{key}: found {source!r}, no such folder, and not of the form {HUB}OWNER/NAME")
    else:
        commit = commit_of(path, revision, key=key, prefix=HUB)
    try:
        splits = datasets.load_dataset(path, subset, revision=commit, streaming=True)
    except (DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise InputError(f"{key}: cannot open {source!r} as a data set: {describe(error)}") from error
    if split is None:
        split = "train" if len(splits) > 1 else next(iter(splits))
    if split not in splits:
        raise InputError(
            f"calibration.{prefix}split: found {split!r}, expected one of {', '.join(splits)}, the splits of {source}"
        )
    return _with_columns(f"{source}, split {split}", splits[split], commit)


def _with_columns(name: str, rows: datasets.IterableDataset, commit: str | None) -> _DataSet:
    from datasets.exceptions import DatasetsError

    if rows.features is not None:
        return _DataSet(name, rows.decode(False), tuple(rows.features), commit)
    try:
        first = next(iter(rows), {})
    except (DatasetsError, ValueError) as error:
        raise InputError(f"{name}: cannot be read: {describe(error)}") from error
    return _DataSet(name, rows, tuple(first), commit)


def _picture(value: Any, images: Path | None) -> Image.Image:
    """The picture in a cell: bytes, a structure with `bytes`, a path in `images`, or a list of one of these."""
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    path = value
    if isinstance(value, dict):
        value, path = value.get("bytes"), value.get("path")
    if isinstance(value, bytes):
        return decode_picture(value, "the picture")
    if images is not None and isinstance(path, str):
        return open_picture(_picture_in(images, path))
    where = "; a path needs calibration.images" if isinstance(path, str) else ""
    raise UnusableError(f"image is {short(path)}, expected one picture{where}")
