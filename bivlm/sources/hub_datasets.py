"""Data sets of the Hugging Face hub: the commit of a name, which answers of the hub are final, and rows as a stream."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import httpx2  # the hub's
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from bivlm.errors import InputError, describe
from bivlm.names import check_commit, check_revision
from bivlm.recipe.calibration import HUB
from bivlm.sources.rows import Row

_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}  # no room for a file, or no right to it
_REFUSALS = {400, 401, 403, 404}  # no such name, no access, no such data set or file, no such revision
_BUFFER_ROWS = 512
_BUFFER_SHARDS = 10


def commit_of(name: str, revision: str | None, *, key: str, prefix: str) -> str:
    """Return the commit that a revision (None: the newest) of the data set OWNER/NAME stands for.

    Messages begin with `key`, and `prefix` stands before a name or folder where the user writes them. Raises
    `InputError` for what the hub does not have or does not give, and ConnectionError when it cannot be reached.
    """
    check_revision(revision, f"{key}: {name}")
    wanted = f"{name} at revision {revision}" if revision else name
    try:
        with hub_asked(key, wanted, f": no folder {name}"):
            return check_commit(HfApi().dataset_info(name, revision=revision).sha, f"{key}: {name}")
    except HFValidationError:
        raise InputError(f"{key}: found {prefix + name!r}, expected {prefix}OWNER/NAME or {prefix}FOLDER") from None
    except OfflineModeIsEnabled:
        raise InputError(
            f"{key}: no folder {name}, and the hub may not be asked for {wanted}, because HF_HUB_OFFLINE is set; "
            f"download its parquet files and give their folder as {prefix}FOLDER"
        ) from None


@contextmanager
def hub_asked(key: str, wanted: str, otherwise: str = "") -> Iterator[None]:
    """Raise a final answer of the hub within the block as `InputError`, and other trouble as ConnectionError.

    Messages begin with `key`; `otherwise` says what else was tried.
    """
    try:
        yield
    except (HFValidationError, OfflineModeIsEnabled, DatasetsError):
        raise
    except (httpx2.HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in _REFUSALS:
            raise InputError(f"{key}{otherwise}, and the hub gives no data set {wanted}: {describe(error)}") from error
        if isinstance(error, OSError) and error.errno in _OF_THIS_MACHINE:
            raise
        raise ConnectionError(
            f"{key}: the hub cannot be reached for the data set {wanted}: {describe(error)}"
        ) from error


@dataclass(frozen=True)
class StreamedRows:
    """One split of a data set, of which no more is downloaded than is read.

    Attributes:
        name: what messages call it.
        stream: the rows, images as their stored bytes.
        columns: names of all columns.
        revision: its commit on the hub, or None for a folder.
    """

    name: str
    stream: datasets.IterableDataset
    columns: tuple[str, ...]
    revision: str | None

    def shuffled(self, columns: Sequence[str], seed: int, images: Path | None) -> Iterator[Row]:
        """Yield the rows in random order with these columns alone; paths are looked up in the folder `images`.

        Shards are shuffled first and then rows within a buffer, so a row near the beginning of its shard has the better
        chance. Raises `InputError` on damaged files.
        """
        # Sets that are mixed from several are ordered by where a row came from: rows of many shards go into the buffer.
        # Reading one shard needs no threads, whose end the library waits for with a pause of seconds.
        shards = min(_BUFFER_SHARDS, self.stream.num_shards)
        rows = self.stream.select_columns(list(columns))
        rows = rows.shuffle(seed=seed, buffer_size=_BUFFER_ROWS, max_buffer_input_shards=shards)
        with _readable(self.name):
            for number, values in enumerate(rows, start=1):
                yield Row(self.name, number, values, images, "drawn row")


def open_stream(source: str, *, keys: str, revision: str | None, subset: str | None, split: str | None) -> StreamedRows:
    """Open the data set ``hf:OWNER/NAME`` or ``hf:FOLDER``, of which the split ``train`` is the default among several.

    Messages put `keys` before the names of the settings. Raises `InputError` for a data set, revision, subset or split
    that is not there, and ConnectionError when the hub cannot be reached.
    """
    path, commit = source.removeprefix(HUB), None
    if Path(path).is_dir():
        if revision is not None:
            raise InputError(f"{keys}revision: found {revision!r}, but {path} is a folder and has none")
    elif "/" not in path or path.startswith((".", "/", "~")):
        raise InputError(f"{keys}source: found {source!r}, no such folder, and not of the form {HUB}OWNER/NAME")
    else:
        commit = commit_of(path, revision, key=f"{keys}source", prefix=HUB)
    try:
        splits = datasets.load_dataset(path, subset, revision=commit, streaming=True)
    except (DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise InputError(f"{keys}source: cannot open {source!r} as a data set: {describe(error)}") from error
    if split is None:
        split = "train" if len(splits) > 1 else next(iter(splits))
    if split not in splits:
        there = ", ".join(splits)
        raise InputError(f"{keys}split: found {split!r}, expected one of {there}, the splits of {source}")
    name, stream = f"{source}, split {split}", splits[split]
    if stream.features is not None:
        return StreamedRows(name, stream.decode(False), tuple(stream.features), commit)
    with _readable(name):
        return StreamedRows(name, stream, tuple(next(iter(stream), {})), commit)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (DatasetsError, ValueError) as error:  # damaged files among them
        raise InputError(f"{name}: cannot be read: {describe(error)}") from error
