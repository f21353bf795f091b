"""Folders of tables (a leaderboard, a sweep, a reproduction); they list their files as a packed checkpoint does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import methodcaller
from pathlib import Path

from bivlm.checkpoint.outputs import is_plain, list_files, listing, some_of
from bivlm.checkpoint.reading import CONFIG
from bivlm.errors import InputError
from bivlm.workspace.stores.folder import writable_folder, write_atomically


def check_tables(folder: Path, is_ours: Callable[[str], bool], always: Iterable[str]) -> None:
    """Raise `InputError` unless the tables whose names `is_ours` accepts may be written into `folder`.

    Refused are files of such names that bivlm did not write, a checkpoint, whose digest tables would change, and a
    folder where nothing can be written. `always` are the names that every finished set of tables has: where there are
    all of them and no listing, an earlier version wrote them.
    """
    if os.path.lexists(folder / CONFIG):
        raise InputError(f"output {folder}: a checkpoint lies there, which tables would change; choose another folder")
    if listing(folder) is None and all(is_plain(folder, name) for name in always):
        list_files(folder, _named(folder, is_ours))
    listed = listing(folder) or ()
    if strangers := [name for name in _named(folder, is_ours) if name not in listed or not is_plain(folder, name)]:
        raise InputError(
            f"output {folder}: {some_of(strangers)}: not made by bivlm, and would be overwritten; move it elsewhere, "
            "or choose a new folder"
        )
    writable_folder(folder, "output")
    if is_ours("tables/any.csv") and os.path.lexists(folder / "tables"):
        writable_folder(folder / "tables", "output")


def write_tables(folder: Path, texts: Mapping[str, str], is_ours: Callable[[str], bool]) -> None:
    """Write the `texts` by name into `folder`, in the place of all listed files whose names `is_ours` accepts.

    The listing is written first, so that after a kill the next run knows every file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    list_files(folder, texts)
    listed = listing(folder) or set()
    stale = {name for name in listed - texts.keys() if is_ours(name) and is_plain(folder, name)}
    for name in stale:
        (folder / name).unlink()
    for name, text in texts.items():
        write_atomically(folder / name, methodcaller("write", text.encode()))
    list_files(folder, (), gone=stale)


def _named(folder: Path, is_ours: Callable[[str], bool]) -> Iterator[str]:
    """Return the names in `folder`, and in the folders in it, that `is_ours` accepts."""
    paths = sorted([*folder.glob("*"), *folder.glob("*/*")])
    return filter(is_ours, (path.relative_to(folder).as_posix() for path in paths))
