"""Locks: one process at a time, on one machine or on a disk that machines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def one_at_a_time(file: Path, wait: Callable[[], object] = lambda: None, left: bool = True) -> Iterator[None]:
    """Hold the lock `file` within this block; `wait()` is called once if somebody else holds it.

    The operating system releases the lock the moment its holder dies, so no run has to be cleaned up after. Any thread
    may end the block. The file is removed at the end, unless it is to be `left` there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        wait()
        lock.acquire()
    try:
        yield
    finally:
        if not left:  # while it is held; whoever waits for it then makes another, see `filelock`
            file.unlink(missing_ok=True)
        lock.release()
