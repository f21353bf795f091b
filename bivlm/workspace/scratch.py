"""Folders for steps at work, removed at the end of the step, or a day after a kill."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LEFT_AFTER_SECONDS = 24 * 3600
_LOCK, _WORK = "lock", "work"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty folder in `parent` (made if missing).

    What killed steps left there is removed once it is a day old. A folder's time does not tell whether a process works
    in it; the lock beside it does, which the operating system frees the moment its holder dies.
    """
    parent.mkdir(exist_ok=True)
    for left in parent.iterdir():
        # Another worker may be removing the same folder, hence the tolerance.
        with suppress(FileNotFoundError):
            # One that was just made has no lock yet, hence the day.
            if time.time() - left.lstat().st_mtime > _LEFT_AFTER_SECONDS:
                _remove_if_left(left)
    with tempfile.TemporaryDirectory(dir=parent) as place, FileLock(Path(place) / _LOCK, thread_local=False):
        folder = Path(place) / _WORK
        folder.mkdir()
        yield folder


def _remove_if_left(place: Path) -> None:
    if place.is_symlink() or not (place / _LOCK).is_file():
        with suppress(OSError):  # one that was killed before its lock is empty; anything else is not ours
            place.rmdir()
        return
    with suppress(Timeout), FileLock(place / _LOCK, timeout=0, thread_local=False):
        shutil.rmtree(place, ignore_errors=True)
