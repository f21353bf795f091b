"""The interface of a store, which keeps the bytes of a workspace: a folder, or an S3 bucket.

A store knows names and bytes, not what they mean. Whatever is put under a name becomes visible whole or not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A name in a store: its bytes, and when it was last put, in seconds since 1970 on the store's clock."""

    name: str
    nbytes: int
    modified: float


class Store(ABC):
    """Files under names such as ``objects/ab/abcd...`` (always forward slashes)."""

    url: str  # what opens this store again

    @property
    @abstractmethod
    def local(self) -> Path:
        """A folder on this machine for files that need one: the store itself, or its cache."""

    @abstractmethod
    def put_file(self, name: str, path: Path) -> None:
        """Store the bytes of `path` under `name`, replacing what was there."""

    @abstractmethod
    def put_bytes(self, name: str, data: bytes) -> None:
        """Store `data` under `name`, replacing what was there."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes | None:
        """Return the bytes under `name`, or None if there are none."""

    @abstractmethod
    def entry(self, name: str) -> Entry | None:
        """Return the entry of `name`, or None if there is none; no byte is read."""

    @abstractmethod
    def entries(self, folder: str) -> Iterator[Entry]:
        """Return all names that begin with `folder` and a slash, in no order.

        Whatever lies there is listed or an error is raised: what was overlooked could be taken for unused.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete `name` and its bytes; do nothing if there is none."""

    def size(self, name: str) -> int | None:
        """Return the number of bytes under `name`, or None if there is none."""
        found = self.entry(name)
        return None if found is None else found.nbytes

    @abstractmethod
    def path(self, name: str, anew: bool = False) -> Path | None:
        """Return a local file with the bytes under `name`, to be read only; None if there is no such name.

        It may be a copy from earlier that is known by its length alone, so this is for names whose bytes never change;
        with `anew` it is none from earlier. Whoever deletes `name` takes the file away.
        """
