"""A store in memory with a clock of its own, and with a moment before every request at which others may act."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bivlm.workspace.stores.base import Entry, Store


class MemoryStore(Store):
    """`clock` is a function that says the time; `before(request)` is called with the number of each request."""

    url = "memory"

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder, self._clock = folder, clock
        self.held: dict[str, tuple[bytes, float]] = {}
        self.requests = 0
        self.before: Callable[[int], None] = lambda request: None

    @property
    def local(self) -> Path:
        return self._folder

    def put_file(self, name: str, path: Path) -> None:
        self.put_bytes(name, path.read_bytes())

    def put_bytes(self, name: str, data: bytes) -> None:
        self._request()
        self.held[name] = (data, self._clock())

    def read_bytes(self, name: str) -> bytes | None:
        self._request()
        return self.held[name][0] if name in self.held else None

    def entry(self, name: str) -> Entry | None:
        self._request()
        return Entry(name, len(self.held[name][0]), self.held[name][1]) if name in self.held else None

    def entries(self, folder: str) -> Iterator[Entry]:
        self._request()
        listed = [name for name in list(self.held) if name.startswith(f"{folder}/")]
        yield from [Entry(name, len(self.held[name][0]), self.held[name][1]) for name in listed]

    def delete(self, name: str) -> None:
        self._request()
        if name in self.held:
            self._file(name).unlink(missing_ok=True)
            del self.held[name]

    def path(self, name: str, anew: bool = False) -> Path | None:
        self._request()
        if name not in self.held:
            return None
        path = self._file(name)
        if not path.exists():
            path.write_bytes(self.held[name][0])
        self._request()  # the file may go before it is opened
        return path

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '-')}-{hash(self.held[name][0])}"

    def _request(self) -> None:
        self.requests += 1
        self.before(self.requests)
