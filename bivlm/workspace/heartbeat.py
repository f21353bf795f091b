"""Names in a store that say that somebody is at work and alive, to machines that share nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from bivlm.workspace.stores.base import Store


@contextmanager
def heartbeat(store: Store, first: str, alive: str, every_seconds: float) -> Iterator[None]:
    """Within this block the store has an empty `first`, and `alive` is written again every `every_seconds`.

    Both are deleted at the end, whichever way it ends. Whoever is killed leaves them; their times tell.
    """
    ended = threading.Event()

    def say() -> None:
        while not ended.wait(every_seconds):
            with suppress(Exception):  # trouble with the store is told by whoever works with it; this is said again
                store.put_bytes(alive, b"")

    store.put_bytes(first, b"")
    saying = threading.Thread(target=say, name=f"heartbeat of {first}", daemon=True)
    saying.start()
    try:
        yield
    finally:
        ended.set()
        saying.join()
        with suppress(Exception):  # must not hide how the work ended; what is left is soon old
            store.delete(first)
            store.delete(alive)
