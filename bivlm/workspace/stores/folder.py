"""A store that is a folder on a local or shared disk."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bivlm.errors import InputError
from bivlm.workspace.stores.base import Entry, Store


class FolderStore(Store):
    """Files written beside their place, flushed to disk and renamed into it, so that a killed writer leaves nothing."""

    def __init__(self, folder: Path, look_only: bool = False) -> None:
        self._folder = folder.expanduser().absolute()
        if not look_only:
            writable_folder(self._folder, "workspace")
        elif not self._folder.is_dir():
            raise InputError(f"workspace {self._folder}: no such folder")
        self.url = str(self._folder)

    @property
    def local(self) -> Path:
        return self._folder

    def put_file(self, name: str, path: Path) -> None:
        with path.open("rb") as source:
            write_atomically(self._folder / name, lambda target: shutil.copyfileobj(source, target, 1 << 20))

    def put_bytes(self, name: str, data: bytes) -> None:
        write_atomically(self._folder / name, lambda target: target.write(data))

    def read_bytes(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a pipe would never end
                raise InputError(f"workspace {self._folder}: {name}: expected a file, found something else")
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def entry(self, name: str) -> Entry | None:
        try:
            found = (self._folder / name).stat()
        except FileNotFoundError:
            return None
        return Entry(name, found.st_size, found.st_mtime)

    def entries(self, folder: str) -> Iterator[Entry]:
        for place, _folders, files in os.walk(self._folder / folder, onerror=_raise_unless_absent):
            for file in files:
                # Others may take it away, or finish what they were writing, while we look.
                if (entry := self.entry((Path(place) / file).relative_to(self._folder).as_posix())) is not None:
                    yield entry

    def delete(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def path(self, name: str, anew: bool = False) -> Path | None:
        path = self._folder / name
        return path if path.is_file() else None


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def writable_folder(folder: Path, what: str) -> Path:
    """Return `folder`, made if missing; raise `InputError` naming `what` it is for if nothing can be written there."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{what} {folder}: not a folder; expected one, or a path where one can be made")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder / "any"):
            return folder
    except OSError as error:
        raise InputError(f"{what} {folder}: cannot be written to: {error.strerror}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make `path` with what `write` writes: it appears whole, flushed to disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    flush_folder(path.parent)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a new empty file in the folder of `path`, removed at the end unless it was renamed.

    It has the permissions of any new file: those of `tempfile` would keep it from others who share the folder.
    """
    temporary = path.parent / f".partial-{secrets.token_hex(8)}"
    temporary.touch(exist_ok=False)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Put the renames in `folder` on disk; without it a power cut can undo what was finished."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
