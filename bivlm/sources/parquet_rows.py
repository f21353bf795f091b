"""Rows of a published data set, from the hub or from a copy on this machine; pictures stay as their stored bytes.

From the hub only the parquet files of the wanted split are downloaded, into the hub's own cache and one after the other
until there are as many rows as are asked for. Everything is then read from local files, some rows at a time and only
the wanted columns, as often as it is needed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import pyarrow.parquet as pq
from PIL import Image

from bivlm.errors import InputError, describe
from bivlm.sources.image_folders import check_text
from bivlm.sources.images import clipped_rgb, decode_picture
from bivlm.untrusted import short

HUB = "hub"
ARGUMENT = "hub|OWNER/NAME|FOLDER"
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes for a split, and for several
_PART = re.compile(r"(?P<name>.*)-\d{5}-of-(?P<of>\d{5}).*")
_ROWS = 32  # held at once; pictures may have megabytes
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Layout:
    """Where a set is by default, and in what it is looked for there and in copies of it.

    Attributes:
        name: OWNER/NAME on the hub.
        subset: the configuration with the questions; None where there is but one.
        splits: the names that the split goes by, the hub's first.
    """

    name: str
    subset: str | None
    splits: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """Some columns of a row, and where it stands."""

    place: str
    number: int  # counted from 0, as data sets are
    values: dict[str, Any]

    def complain(self, column: str, found: Any, valid: str) -> NoReturn:
        """Raises `InputError` about the value of a column."""
        raise InputError(f"{self.place}, row {self.number}, column {column!r}: found {short(found)}, expected {valid}")

    def text(self, column: str, *, may_be_empty: bool = False) -> str:
        """A string as it is stored, white space included; raises `InputError` when it is empty and must not be."""
        value = self.values[column]
        if may_be_empty and value in ("", None):
            return ""
        try:
            return check_text(value)
        except ValueError as error:
            self.complain(column, value, str(error))

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of strings, at least one; raises `InputError`."""
        value = self.values[column]
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            self.complain(column, value, "a list of strings, at least one")
        return tuple(value)

    def picture_bytes(self, column: str) -> bytes:
        """The file of a picture; raises `InputError` when there is none in the cell."""
        value = self.values[column]
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            self.complain(column, value, "the bytes of a picture")
        return content

    def picture(self, column: str) -> Image.Image:
        """Return the picture, decoded, upright and in RGB as lmms-eval makes it, bit for bit; raises `InputError`.

        Unlike everywhere else, wide values are clipped at 255 and alpha is dropped.
        """
        name = f"{self.place}, row {self.number}, column {column!r}"
        return decode_picture(self.picture_bytes(column), name, clipped_rgb)


@dataclass(frozen=True)
class Rows:
    """One split of a data set on this machine.

    Attributes:
        place: what messages call it.
        source: `data_set` (OWNER/NAME or a folder), `revision` (its commit on the hub, or None), `subset`, `split`.
        columns: names of its columns.
        files: parquet files, or the arrow files of `folder`.
        folder: what `datasets.save_to_disk` wrote, or None for parquet files.
    """

    place: str
    source: dict[str, str | None]
    columns: tuple[str, ...]
    files: tuple[Path, ...]
    folder: Path | None = None

    def read(self, columns: Sequence[str], limit: int | None = None) -> Iterator[Row]:
        """The first `limit` rows with these columns; raises `InputError` on files that cannot be read."""
        rows = islice(self._of_parquet(columns) if self.folder is None else self._of_arrow(columns), limit)
        number = 0
        while True:
            try:
                values = next(rows)
            except StopIteration:
                return
            except (ValueError, OSError) as error:
                raise InputError(f"{self.place}: cannot be read: {describe(error)}") from error
            yield Row(self.place, number, values)
            number += 1

    def _of_parquet(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        # Not by `datasets`: with the scanner that it reads parquet by, a stream that is left before its end can abort
        # the process when that ends (github.com/apache/arrow/issues/45214); and it holds a whole row group.
        for path in self.files:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(_ROWS, columns=list(columns)):
                    yield from batch.to_pylist()

    def _of_arrow(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        import datasets

        data = datasets.load_from_disk(str(self.folder)).select_columns(list(columns))
        for table in data.with_format("arrow").iter(_ROWS):
            yield from table.to_pylist()

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raises `InputError` when one is missing."""
        for column in columns:
            if column not in self.columns:
                there = ", ".join(self.columns)
                raise InputError(f"{self.place}: column {column!r} is missing, found the columns {there}")

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Changes when the files do: path, size and time of change of each."""
        stats = ((file, file.stat()) for file in self.files)
        return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def open_rows(kind: str, argument: str, layout: Layout, limit: int | None) -> Rows:
    """The rows that `argument` names: ``hub``, ``OWNER/NAME``, either with ``@REVISION``, or a folder.

    A folder is looked for first, but for one called ``hub``, which is ``./hub``. It holds parquet files as on the hub,
    or what `datasets.save_to_disk` wrote. From the hub, files are downloaded until there are `limit` rows. Raises
    `InputError` for a data set, revision, subset or split that is not there, and ConnectionError when the hub cannot be
    reached.
    """
    task = f"{kind}:{argument}"
    folder = Path(argument).expanduser()
    name, at, revision = argument.partition("@")
    if name != HUB and folder.is_dir():
        return _of_folder(task, folder, layout)
    name = layout.name if name == HUB else name
    if not _NAME.fullmatch(name) or (at and not revision):
        raise InputError(f"{task}: no such folder, and not of the form hub, OWNER/NAME or OWNER/NAME@REVISION")
    return _of_hub(kind, task, name, revision or None, layout, limit)


def _of_folder(task: str, folder: Path, layout: Layout) -> Rows:
    source = {"data_set": str(folder.resolve()), "revision": None}
    if any((folder / file).is_file() for file in _SAVED):
        return _saved(task, folder, layout, source)
    if layout.subset is not None and (folder / layout.subset).is_dir() and not (folder / "README.md").is_file():
        folder = folder / layout.subset
    subset, split, files = _parquet_files(task, str(folder), None, layout)
    place, known = f"{task}, split {split}", {**source, "subset": subset, "split": split}
    paths = tuple(Path(file) for file in files)
    return Rows(place, known, _columns(place, paths[0]), paths)


def _saved(task: str, folder: Path, layout: Layout, source: dict[str, str | None]) -> Rows:
    import datasets

    if not (folder / "state.json").is_file():
        found = [split for split in layout.splits if (folder / split / "state.json").is_file()]
        if not found:
            there = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json"))) or "none"
            raise InputError(f"{task}: no split {layout.splits[0]}, found {there}")
        folder = folder / found[0]
    try:
        data = datasets.load_from_disk(str(folder))
    except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError) as error:
        raise InputError(f"{task}: cannot open {folder} as a saved data set: {describe(error)}") from error
    split = str(data.split) if data.split is not None else None
    if split is not None and split not in layout.splits:
        raise InputError(f"{task}: found split {split}, expected {layout.splits[0]}")
    known = {**source, "subset": data.info.config_name, "split": split or layout.splits[0]}
    files = tuple(Path(file["filename"]) for file in data.cache_files)
    return Rows(f"{task}, split {known['split']}", known, tuple(data.column_names), files, folder)


def _of_hub(kind: str, task: str, name: str, revision: str | None, layout: Layout, limit: int | None) -> Rows:
    commit = _commit(name, revision, kind)
    subset, split, addresses = _parquet_files(task, name, commit, layout)
    place = f"{task}, split {split}"
    files: list[Path] = []
    rows = 0
    for address in addresses:
        files.append(_downloaded(task, name, commit, address))
        rows += _row_count(place, files[-1])
        if limit is not None and rows >= limit:
            break
    known = {"data_set": name, "revision": commit, "subset": subset, "split": split}
    return Rows(place, known, _columns(place, files[0]), tuple(files))


@lru_cache(maxsize=64)
def _commit(name: str, revision: str | None, kind: str) -> str:
    """One commit a process, so that all models of a run are asked the same questions."""
    from bivlm.sources.hub_datasets import commit_of

    return commit_of(name, revision, key=kind, prefix=f"{kind}:")


def _parquet_files(task: str, path: str, commit: str | None, layout: Layout) -> tuple[str, str, list[str]]:
    """Subset, split and parquet files (paths, or addresses on the hub) of a folder or data set, as `datasets` sees it.

    A copy without subsets is taken for the wanted one.
    """
    import datasets

    from bivlm.sources.hub_datasets import hub_asked

    wanted = f"{path} at revision {commit}"
    try:
        with hub_asked(task, wanted, f"{task}: the hub cannot be reached for") if commit else nullcontext():
            subsets = datasets.get_dataset_config_names(path, revision=commit)
            chosen = layout.subset if layout.subset in subsets else "default"
            if chosen not in subsets and len(subsets) > 1:
                there = ", ".join(subsets)
                raise InputError(f"{task}: found the subsets {there}, expected {layout.subset or 'one set alone'}")
            chosen = chosen if chosen in subsets else subsets[0]
            found = datasets.load_dataset_builder(path, chosen, revision=commit).config.data_files or {}
    except InputError:
        raise
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError, RuntimeError) as error:
        raise InputError(f"{task}: cannot open {path} as a data set: {describe(error)}") from error
    split = next((split for split in layout.splits if split in found), None)
    if split is None:
        raise InputError(f"{task}: no split {layout.splits[0]}, found {', '.join(map(str, found)) or 'none'}")
    files = [str(file) for file in found[split]]
    if other := next((file for file in files if not file.endswith(".parquet")), None):
        raise InputError(f"{task}: found {Path(other).name}, expected parquet files")
    _check_complete(task, files)
    return chosen, split, files


def _check_complete(task: str, files: Sequence[str]) -> None:
    """Raises `InputError` where parts are missing, as a download that was broken off leaves a folder."""
    parts = (_PART.fullmatch(file) for file in files)
    found = Counter((part["name"], int(part["of"])) for part in parts if part)
    for (name, of), count in found.items():
        if count < of:
            raise InputError(f"{task}: found {count} of the {of} files of {Path(name).name}, expected all of them")


def _downloaded(task: str, name: str, commit: str, address: str) -> Path:
    """The file at ``hf://datasets/OWNER/NAME@COMMIT/PATH``, from the hub's cache if it is there."""
    from huggingface_hub import hf_hub_download

    from bivlm.sources.hub_datasets import hub_asked

    path = address.partition(f"@{commit}/")[2]
    with hub_asked(task, f"{name} with {path} at revision {commit}", f"{task}: the hub cannot be reached for"):
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=commit))


def _row_count(place: str, file: Path) -> int:
    return _opened(place, file).metadata.num_rows


def _columns(place: str, file: Path) -> tuple[str, ...]:
    return tuple(_opened(place, file).schema_arrow.names)


def _opened(place: str, file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise InputError(f"{place}: cannot read {file.name} as a parquet file: {describe(error)}") from error
