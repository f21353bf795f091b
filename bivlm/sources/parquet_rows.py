"""Read rows of a published data set, from the hub or from a copy on this machine; images stay as their stored bytes.

From the hub only the parquet files of the wanted split are downloaded, one after the other and into the hub's own
cache, until there are enough rows. Everything is then read from local files, some rows at a time and only the wanted
columns, as often as needed.
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
from typing import Any

import pyarrow.parquet as pq

from bivlm.errors import InputError, describe
from bivlm.sources.rows import Row

HUB = "hub"
ARGUMENT = "hub|OWNER/NAME|FOLDER"
_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes for a split, and for several
_PART = re.compile(r"(?P<name>.*)-\d{5}-of-(?P<of>\d{5}).*")
_ROWS = 32  # held at once; images may have megabytes
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Layout:
    """Where the questions of a set are: on the hub by default, and within it or a copy of it.

    Attributes:
        name: OWNER/NAME on the hub.
        subset: the configuration with the questions; None where there is but one.
        splits: the names that the split goes by, the hub's first.
    """

    name: str
    subset: str | None
    splits: tuple[str, ...]


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
        """Yield the first `limit` rows with these columns; raises `InputError` on files that cannot be read."""
        rows = self._of_parquet(columns) if self.folder is None else self._of_arrow(columns)
        try:
            for number, values in enumerate(islice(rows, limit)):
                yield Row(self.place, number, values)
        except (ValueError, OSError) as error:
            raise InputError(f"{self.place}: cannot be read: {describe(error)}") from error

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
        """Raise `InputError` when one is missing."""
        for column in columns:
            if column not in self.columns:
                there = ", ".join(self.columns)
                raise InputError(f"{self.place}: column {column!r} is missing, found the columns {there}")

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Return what changes when the files do: path, size and time of change of each."""
        stats = ((file, file.stat()) for file in self.files)
        return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats)


def open_rows(kind: str, argument: str, layout: Layout, limit: int | None) -> Rows:
    """Open the rows that `argument` names: ``hub``, ``OWNER/NAME``, either with ``@REVISION``, or a folder.

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
    return Rows(place, known, tuple(_opened(place, paths[0]).schema_arrow.names), paths)


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
        rows += _opened(place, files[-1]).metadata.num_rows
        if limit is not None and rows >= limit:
            break
    known: dict[str, str | None] = {"data_set": name, "revision": commit, "subset": subset, "split": split}
    return Rows(place, known, tuple(_opened(place, files[0]).schema_arrow.names), tuple(files))


@lru_cache(maxsize=64)
def _commit(name: str, revision: str | None, kind: str) -> str:
    """Return one commit per process, so that all models of a run answer the same questions."""
    from bivlm.sources.hub_datasets import commit_of

    return commit_of(name, revision, key=kind, prefix=f"{kind}:")


def _parquet_files(task: str, path: str, commit: str | None, layout: Layout) -> tuple[str, str, list[str]]:
    """Return subset, split and parquet files (paths, or addresses on the hub) of a folder or data set.

    They are found as `datasets` finds them. A copy without subsets is taken for the wanted one.
    """
    import datasets

    from bivlm.sources.hub_datasets import hub_asked

    try:
        with hub_asked(task, f"{path} at revision {commit}") if commit else nullcontext():
            subsets = datasets.get_dataset_config_names(path, revision=commit)
            chosen = next((each for each in (layout.subset, "default") if each in subsets), None)
            if chosen is None and len(subsets) > 1:
                there = ", ".join(subsets)
                raise InputError(f"{task}: found the subsets {there}, expected {layout.subset or 'one set alone'}")
            chosen = chosen or str(subsets[0])
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
    """Raise `InputError` where parts are missing, as an interrupted download leaves a folder."""
    parts = (_PART.fullmatch(file) for file in files)
    found = Counter((part["name"], int(part["of"])) for part in parts if part)
    for (name, of), count in found.items():
        if count < of:
            raise InputError(f"{task}: found {count} of the {of} files of {Path(name).name}, expected all of them")


def _downloaded(task: str, name: str, commit: str, address: str) -> Path:
    """Return the file at ``hf://datasets/OWNER/NAME@COMMIT/PATH``, from the hub's cache if it is there."""
    from huggingface_hub import hf_hub_download

    from bivlm.sources.hub_datasets import hub_asked

    path = address.partition(f"@{commit}/")[2]
    with hub_asked(task, f"{name} with {path} at revision {commit}"):
        return Path(hf_hub_download(name, path, repo_type="dataset", revision=commit))


def _opened(place: str, file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (ValueError, OSError) as error:
        raise InputError(f"{place}: cannot read {file.name} as a parquet file: {describe(error)}") from error
