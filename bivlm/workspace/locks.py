"""What only one machine may do at a time, of those that share a workspace in S3 and no locks.

S3 servers do not all know conditional puts, so nothing here is written on a condition. Who wants a turn puts its name
down, waits until the store's clock has moved on, and lists all names: whoever was not yet listed then has put its name
down later. The earliest of those that are alive has the turn.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bivlm.workspace.heartbeat import heartbeat
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.base import Store

TURNS = "turns"
ALIVE_EVERY_SECONDS = 10.0
DEAD_AFTER_SECONDS = 60.0  # whoever was killed keeps the others waiting for so long
LOOK_EVERY_SECONDS = 2.0
SETTLED_SECONDS = 2.1  # S3 dates its objects in whole seconds
_NAME = re.compile(r"([0-9a-f]{12})-([0-9a-f]{16})\.(asked|alive)")


@contextmanager
def one_machine_at_a_time(workspace: Workspace, what: str, wait: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Have the turn for `what`, a hash, within this block; `wait()` is called once if another machine has it.

    In a folder nothing is done: the locks that lie in it are seen by all. To be called with the lock of this machine
    held, so that what it left behind when it was killed is known to be dead. A machine that does not say for a minute
    that it is alive loses its turn, and does not notice.
    """
    if not workspace.url.startswith("s3://"):
        yield
        return
    with turn(workspace.store, what, _machine(workspace.local), wait):
        yield


@contextmanager
def turn(store: Store, what: str, machine: str, wait: Callable[[], object]) -> Iterator[None]:
    """As `one_machine_at_a_time`, for the machine called `machine` (12 hex digits)."""
    place, mine = f"{TURNS}/{what}", f"{machine}-{secrets.token_hex(8)}"
    with heartbeat(store, f"{place}/{mine}.asked", f"{place}/{mine}.alive", ALIVE_EVERY_SECONDS):
        time.sleep(SETTLED_SECONDS)
        if _first(store, place, mine, machine) != mine:
            wait()
            while _first(store, place, mine, machine) != mine:
                time.sleep(LOOK_EVERY_SECONDS)
        yield


def _first(store: Store, place: str, mine: str, machine: str) -> str:
    """The earliest of those that are alive, ourselves among them; the dead are struck off."""
    store.put_bytes(f"{place}/{mine}.alive", b"")
    asked: dict[str, float] = {}
    alive: dict[str, float] = {}
    for entry in store.entries(place):
        if match := _NAME.fullmatch(entry.name.rpartition("/")[2]):
            name = f"{match[1]}-{match[2]}"
            alive[name] = max(entry.modified, alive.get(name, 0.0))
            if match[3] == "asked":
                asked[name] = entry.modified
    now = alive[mine]
    for name in [name for name in alive if name != mine]:
        if name.startswith(f"{machine}-") or now - alive[name] > DEAD_AFTER_SECONDS:
            asked.pop(name, None)
            store.delete(f"{place}/{name}.asked")
            store.delete(f"{place}/{name}.alive")
    if mine not in asked:  # taken for dead by another machine, after a long pause of this one: at the end of the queue
        store.put_bytes(f"{place}/{mine}.asked", b"")
        return ""
    return min(asked, key=lambda name: (asked[name], name))


def _machine(folder: Path) -> str:
    """Who sees the same locks: the same folder of the same host."""
    return hashlib.sha256(f"{socket.gethostname()}|{folder}|{folder.stat().st_ino}".encode()).hexdigest()[:12]
