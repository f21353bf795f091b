"""A small server that speaks as much of the hub's API as reading a data set takes; its repository is a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class DataHub:
    """What the server holds, and what it was asked for."""

    name: str
    folder: Path
    revisions: tuple[str, ...] = ("main", COMMIT)
    failing: set[str] = field(default_factory=set)  # paths that are answered with 503
    downloads: list[str] = field(default_factory=list)
    address: str = ""


@contextmanager
def served(hub: DataHub) -> Iterator[DataHub]:
    """The server, for as long as the block lasts."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    hub: DataHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/datasets/{self.hub.name}/resolve/"):
            revision, _, file = path.removeprefix(f"/datasets/{self.hub.name}/resolve/").partition("/")
            self._file(revision, file)
        elif path.startswith(f"/api/datasets/{self.hub.name}"):
            kind, _, rest = path.removeprefix(f"/api/datasets/{self.hub.name}").strip("/").partition("/")
            self._about(kind, rest)
        else:
            self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        asked = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content).get("paths", [])
        self._say(200, [self._entry(path) for path in asked if (self.hub.folder / path).exists()])

    def _about(self, kind: str, rest: str) -> None:
        revision, _, place = rest.partition("/")
        if kind and revision not in self.hub.revisions:
            self._say(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "tree":
            below = sorted(path for path in (self.hub.folder / place).rglob("*"))
            self._say(200, [self._entry(path.relative_to(self.hub.folder).as_posix()) for path in below])
        else:
            files = [path for path in self.hub.folder.rglob("*") if path.is_file()]
            names = [{"rfilename": path.relative_to(self.hub.folder).as_posix()} for path in files]
            self._say(200, {"id": self.hub.name, "sha": COMMIT, "siblings": names, "private": False})

    def _entry(self, path: str) -> dict:
        full = self.hub.folder / path
        kind = "directory" if full.is_dir() else "file"
        return {"type": kind, "path": path, "oid": _etag(path), "size": 0 if full.is_dir() else full.stat().st_size}

    def _file(self, revision: str, file: str) -> None:
        if file in self.hub.failing:
            self._say(503, {"error": "busy"})
        elif revision not in self.hub.revisions:
            self._say(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif not (self.hub.folder / file).is_file():
            self._say(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            if self.command == "GET":
                self.hub.downloads.append(file)
            content = (self.hub.folder / file).read_bytes()
            self._answer(200, content, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _say(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(value).encode(), headers or {})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _etag(path: str) -> str:
    return hashlib.sha1(path.encode()).hexdigest()
