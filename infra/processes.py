"""The process of a server: noted in a file, by which other programs find it, and ended with all that it has started."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

from infra.surroundings import write_privately


class Note:
    """A file that says which process a server is. One that names a process that has ended says the same as none."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def write(self, pid: int) -> None:
        """Note the process `pid`."""
        write_privately(self._file, _text(psutil.Process(pid)))

    def living(self) -> psutil.Process | None:
        """Return the process that is noted, if it is alive."""
        try:
            pid, started = self._file.read_text().split()
            process = psutil.Process(int(pid))
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None
        # Process ids are used again; together with the time of its start one is unique.
        same = abs(process.create_time() - float(started)) < 1
        return process if same and is_alive(process) else None

    def forget(self, process: psutil.Process) -> None:
        """Remove the note, unless it names another process than this one by now."""
        if self._file.exists() and self._file.read_text() == _text(process):
            self._file.unlink()


def is_alive(process: psutil.Process) -> bool:
    """Return whether the process has not ended; one that waits for its parent to notice has."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ask_to_end(process: psutil.Process, by: int, seconds: float) -> None:
    """Send the signal `by`; returns when the process has ended, or after `seconds`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(by)
    _wait_for_end([process], seconds)


def family(process: psutil.Process) -> list[psutil.Process]:
    """Return a process and all that it has started."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: list[psutil.Process]) -> None:
    """End them at once, and wait until they have."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for_end(processes, 10)
    # PostgreSQL takes one that its parent has not noticed for alive; `run` looks twice a second.
    psutil.wait_procs(processes, timeout=1)


def _wait_for_end(processes: list[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _text(process: psutil.Process) -> str:
    return f"{process.pid} {process.create_time()}"
