"""Work that only one process may do at a time: locks on one machine or shared disk, turns among machines on S3.

Turns are needed because machines that share an S3 workspace see no common lock: without them two would register one
request twice, and two collections would take back each other's notes. S3 servers do not all know conditional puts, so
nothing here is written on a condition. A machine that wants a turn writes its name, waits until the store's clock has
moved on, and lists all names: any name that it did not see then was written later. The earliest living name has the
turn.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.base import Store

TURNS = "turns"
ALIVE_EVERY_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0  # how long the others wait for one that was killed
LOOK_EVERY_SECONDS = 2.0
SETTLED_SECONDS = 2.1  # S3 dates its objects in whole seconds
_NAME = re.compile(r"([0-9a-f]{12}-[0-9a-f]{16})\.(asked|alive)")


@contextmanager
def one_at_a_time(file: Path, wait: Callable[[], object] = lambda: None, left: bool = True) -> Iterator[None]:
    """Hold the lock `file` within this block; call `wait()` once if another process holds it.

    The operating system frees the lock the moment its holder dies, so a killed run blocks no other. Any thread may end
    the block. Unless it is to be `left` there, the file is removed at the end.
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
        if not left:  # while it is held; a process that waits for it then makes another, see `filelock`
            file.unlink(missing_ok=True)
        lock.release()


@contextmanager
def one_machine_at_a_time(workspace: Workspace, what: str, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Hold `what` (letters and digits) alone among all who use the workspace; call `wait()` if another has it.

    In a folder a lock does this, which all who share the folder see. In S3 the lock is that of this machine, and the
    machines take turns. A machine that shows no sign of life for a minute loses its turn without noticing.
    """
    with one_at_a_time(workspace.local / "locks" / f"{what}.lock", wait):
        if not workspace.url.startswith("s3://"):
            yield
            return
        with turn(workspace.store, what, _machine(workspace.local), wait):
            yield


@contextmanager
def turn(store: Store, what: str, machine: str, wait: Callable[[], object]) -> Iterator[None]:
    """Take the turn for `what` as `machine` (12 hex digits), whose lock is held: its other names are dead."""
    place, mine = f"{TURNS}/{what}", f"{machine}-{secrets.token_hex(8)}"
    with heartbeat(store, f"{place}/{mine}.asked", f"{place}/{mine}.alive", ALIVE_EVERY_SECONDS):
        time.sleep(SETTLED_SECONDS)
        if _first(store, place, mine) != mine:
            wait()
            while _first(store, place, mine) != mine:
                time.sleep(LOOK_EVERY_SECONDS)
        yield


@contextmanager
def heartbeat(store: Store, first: str, alive: str, every_seconds: float) -> Iterator[None]:
    """Keep an empty `first` in the store within this block, and write `alive` again every `every_seconds`.

    Both are deleted at the end, however it ends. A killed process leaves them; their times tell.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(every_seconds):
            with suppress(Exception):  # errors of the store are reported where it is used; this is written again
                store.put_bytes(alive, b"")

    store.put_bytes(first, b"")
    beating = threading.Thread(target=beat, name=f"heartbeat of {first}", daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(Exception):  # must not hide how the work ended; what is left is soon old
            store.delete(first)
            store.delete(alive)


def _first(store: Store, place: str, mine: str) -> str:
    """Return the earliest living name; the names of the dead are deleted."""
    store.put_bytes(f"{place}/{mine}.alive", b"")
    asked: dict[str, float] = {}
    alive: dict[str, float] = {}
    for entry in store.entries(place):
        if match := _NAME.fullmatch(entry.name.rpartition("/")[2]):
            name, kind = match.groups()
            alive[name] = max(entry.modified, alive.get(name, 0.0))
            if kind == "asked":
                asked[name] = entry.modified
    now, machine = alive.pop(mine), mine.partition("-")[0]
    for name, seen in alive.items():
        if name.startswith(f"{machine}-") or now - seen > DEAD_AFTER_SECONDS:
            asked.pop(name, None)
            store.delete(f"{place}/{name}.asked")
            store.delete(f"{place}/{name}.alive")
    if mine not in asked:  # after a long pause another machine took this one for dead: to the end of the queue
        store.put_bytes(f"{place}/{mine}.asked", b"")
        return ""
    return min(asked, key=lambda name: (asked[name], name))


def _machine(folder: Path) -> str:
    """Return the same 12 hex digits for all who see the same locks: the same folder of the same host."""
    return hashlib.sha256(f"{socket.gethostname()}|{folder}|{folder.stat().st_ino}".encode()).hexdigest()[:12]
