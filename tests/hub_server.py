"""A Hugging Face hub on this machine: what huggingface_hub asks of one, over real HTTP, with its refusals and faults.

Repositories hold commits, branches and files; large ones are kept by sha256 and served from another host name, as the
hub's are, with range requests. What the hub answers in which case was read in the client and its documentation.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub_state import Account, Commit, Fault, Repository, Request, git_id, is_large, local_id, pointer, sha256_of
from huggingface_hub import constants
from huggingface_hub.utils import close_session

_PIECE = 1 << 16
_SLOW_SECONDS = 0.01  # after each piece


class Hub:
    """The hub's state; tests put repositories, accounts and faults here and look at what was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.accounts: dict[str, Account] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.large: dict[str, bytes] = {}
        self.xet = False  # whether it tells of xet storage, which this server does not have
        self.part_size: int | None = None  # of uploads in parts
        self.page = 1000  # files of a listing
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.elsewhere = f"http://localhost:{self.port}"  # where large files are: another host to a client
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, model: str, files: Path | Mapping[str, bytes | str], **settings: Any) -> Repository:
        """A repository with one commit of these files, or of a folder's."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()
            }
        given = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        self.repositories[model] = repository = Repository(**settings)
        repository.commit(given, "initial commit")
        self.large.update({sha256_of(data): data for name, data in given.items() if is_large(name)})
        return repository

    def fail(self, path: str, *answers: int | tuple[str, int]) -> None:
        self.faults.append(Fault(path, list(answers)))

    def asked(self, method: str, part: str) -> list[Request]:
        """The requests by this method whose path contains `part`."""
        return [each for each in self.requests if each.method == method and part in each.path]

    def close(self) -> None:
        if self.closing.is_set():
            return
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, body = unquote(parts.path), self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_log = Request(self.command, path, parse_qs(parts.query), headers)
        self.hub.requests.append(self.request_log)
        self.fault = self._fault(path)
        if isinstance(self.fault, int):
            return self._refuse(self.fault, None, "out of order")
        token = headers.get("authorization", "").removeprefix("Bearer ").strip()
        if token and token not in self.hub.accounts:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        self.account = self.hub.accounts.get(token)
        for pattern, method, answer in _ROUTES:
            found = pattern.fullmatch(path)
            if found and self.command in method.split("|"):
                return answer(self, body, **found.groupdict())
        return self._refuse(404, None, f"no such address: {self.command} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _fault(self, path: str) -> int | tuple[str, int] | None:
        for fault in self.hub.faults:
            if fault.path in path and fault.answers:
                return fault.answers.pop(0)
        return None

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        what, after = self.fault if isinstance(self.fault, tuple) else ("", len(body))
        after = len(body) if what == "slow" else after
        for begin in range(0, min(after, len(body)), _PIECE):
            piece = body[begin : min(begin + _PIECE, after)]
            self.wfile.write(piece)
            self.request_log.sent += len(piece)
            if what == "slow":
                time.sleep(_SLOW_SECONDS)
        if what == "stall":
            self.wfile.flush()
            self.hub.closing.wait()
        if what == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if what:
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _refuse(self, status: int, code: str | None, message: str, **headers: str) -> None:
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
        self._json({"error": message}, status, told)

    def _repository(self, model: str) -> Repository | None:
        """The repository, if whoever asks may know of it; else the answer is given, that of one that is not there."""
        repository = self.hub.repositories.get(model)
        if repository is not None and (not repository.private or self.account):
            return repository
        status = 404 if self.account else 401
        message = "Repository not found" if self.account else "Invalid username or password."
        self._refuse(status, "RepoNotFound", message)
        return None

    def _commit_at(self, model: str, revision: str) -> Commit | None:
        repository = self._repository(model)
        if repository is None:
            return None
        commit = repository.at(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _writes(self, model: str) -> Repository | None:
        if self.account is None or not self.account.writes:
            status = 403 if self.account else 401
            self._refuse(status, None, "You don't have the rights to write here" if self.account else "No token")
            return None
        return self._repository(model)

    # Reading

    def info(self, _: bytes, model: str, revision: str = "main") -> None:
        commit = self._commit_at(model, revision)
        if commit is None:
            return
        repository = self.hub.repositories[model]
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        about = {"id": model, "modelId": model, "sha": commit.oid, "private": repository.private, "siblings": siblings}
        self._json(about | {"gated": "manual" if repository.gated else False, "tags": [], "downloads": 0, "likes": 0})

    def tree(self, _: bytes, model: str, revision: str, folder: str | None = None) -> None:
        commit = self._commit_at(model, revision)
        if commit is None:
            return
        begin = int(self.request_log.query.get("cursor", ["0"])[0])
        below = f"{folder}/" if folder else ""
        entries = [self._entry(commit, name) for name in sorted(self._places(commit)) if name.startswith(below)]
        more = f"{self.hub.endpoint}/api/models/{model}/tree/{revision}?recursive=true&cursor={begin + self.hub.page}"
        links = {"Link": f'<{more}>; rel="next"'} if begin + self.hub.page < len(entries) else {}
        self._json(entries[begin : begin + self.hub.page], headers=links)

    def paths_info(self, body: bytes, model: str, revision: str) -> None:
        commit = self._commit_at(model, revision)
        if commit is not None:
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            self._json([self._entry(commit, path) for path in asked if path in self._places(commit)])

    def _places(self, commit: Commit) -> set[str]:
        folders = {parent.as_posix() for name in commit.files for parent in Path(name).parents} - {"."}
        return folders | commit.files.keys()

    def _entry(self, commit: Commit, name: str) -> dict[str, Any]:
        if name not in commit.files:
            return {"type": "directory", "path": name, "size": 0, "oid": git_id(name, b"")}
        data = commit.files[name]
        entry = {"type": "file", "path": name, "size": len(data), "oid": git_id(name, data)}
        if is_large(name):
            entry["lfs"] = {"oid": sha256_of(data), "size": len(data), "pointerSize": len(pointer(data))}
            entry |= {"xetHash": sha256_of(b"xet" + data)} if self.hub.xet else {}
        return entry

    def resolve(self, _: bytes, model: str, revision: str, name: str) -> None:
        commit = self._commit_at(model, revision)
        if commit is None:
            return
        known = {"X-Repo-Commit": commit.oid}
        if self.hub.repositories[model].gated and (self.account is None or model not in self.account.accepted):
            message = f"Access to model {model} is restricted. You must have access to it and be authenticated."
            return self._refuse(403 if self.account else 401, "GatedRepo", message)
        if name not in commit.files:
            return self._refuse(404, "EntryNotFound", "Entry not found", **known)
        data = commit.files[name]
        if not is_large(name):
            return self._ranged(data, known | {"ETag": f'"{git_id(name, data)}"'})
        known |= {"X-Linked-Etag": f'"{sha256_of(data)}"', "X-Linked-Size": str(len(data))}
        if self.hub.xet:
            route = f"{self.hub.endpoint}/api/models/{model}/xet-read-token/{commit.oid}"
            known |= {"X-Xet-Hash": sha256_of(b"xet" + data), "Link": f'<{route}>; rel="xet-auth"'}
        return self._send(302, b"", known | {"Location": f"{self.hub.elsewhere}/large/{sha256_of(data)}?signed=1"})

    def large(self, _: bytes, sha256: str) -> None:
        data = self.hub.large[sha256]
        self._ranged(data, {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    def _ranged(self, data: bytes, headers: Mapping[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self._send(200, data, {"Accept-Ranges": "bytes", **headers})
        begin, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        if begin >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self._send(206, data[begin : end + 1], {"Content-Range": f"bytes {begin}-{end}/{len(data)}", **headers})

    def refs(self, _: bytes, model: str) -> None:
        repository = self._repository(model)
        if repository is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in repository.refs.items()
            ]
            self._json({"branches": branches, "tags": [], "converts": []})

    def whoami(self, _: bytes) -> None:
        if self.account is None:
            return self._refuse(401, None, "Invalid username or password.")
        return self._json({"type": "user", "name": self.account.name, "auth": {"accessToken": {"role": "write"}}})

    # Writing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        model = f"{asked.get('organization') or (self.account and self.account.name)}/{asked['name']}"
        if self.account is None or not self.account.writes:
            return self._refuse(403 if self.account else 401, None, "You don't have the rights to create a model")
        if model in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": self._url(model)}, 409)
        self.hub.repositories[model] = repository = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        return self._json({"url": self._url(model), "name": model})

    def _url(self, model: str) -> str:
        return f"{self.hub.endpoint}/{model}"

    def branch(self, body: bytes, model: str, name: str) -> None:
        repository = self._writes(model)
        if repository is None:
            return None
        if name in repository.refs:
            return self._refuse(409, None, "Reference already exists")
        repository.refs[name] = repository.refs[json.loads(body or b"{}").get("startingPoint", "main")]
        return self._json({})

    def validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        errors = [] if good else [{"message": "metadata block missing"}]
        self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def preupload(self, body: bytes, model: str, revision: str) -> None:
        repository = self._writes(model)
        if repository is None:
            return
        there = repository.at(revision).files
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if is_large(each["path"]) else "regular",
                "shouldIgnore": False,
                "oid": local_id(each["path"], there[each["path"]]) if each["path"] in there else None,
            }
            for each in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def batch(self, body: bytes, model: str) -> None:
        if self._writes(model) is None:
            return
        self._json({"transfer": "basic", "objects": [self._upload(each) for each in json.loads(body)["objects"]]})

    def _upload(self, asked: dict[str, Any]) -> dict[str, Any]:
        oid, size = asked["oid"], asked["size"]
        known = {"oid": oid, "size": size}
        if oid in self.hub.large:
            return known
        upload: dict[str, Any] = {"href": f"{self.hub.elsewhere}/upload/{oid}"}
        part = self.hub.part_size
        if part and size > part:
            count = -(-size // part)
            numbers = {f"{number:05d}": f"{self.hub.elsewhere}/part/{oid}/{number}" for number in range(1, count + 1)}
            upload = {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(part), **numbers}}
        return known | {"actions": {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/verify/{oid}"}}}

    def upload(self, body: bytes, oid: str) -> None:
        if sha256_of(body) != oid:
            return self._refuse(400, None, "the bytes are not those that were announced")
        self.hub.large[oid] = body
        return self._send(200)

    def part(self, body: bytes, oid: str, number: str) -> None:
        self.hub.large[f"{oid}/{number}"] = body
        self._send(200, headers={"ETag": f'"{number}"'})

    def complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self.upload(b"".join(self.hub.large.pop(f"{oid}/{number}") for number in numbers), oid)

    def verify(self, body: bytes, oid: str) -> None:
        asked = json.loads(body)
        there = self.hub.large.get(oid)
        if there is None or len(there) != asked["size"]:
            return self._refuse(404, None, "not uploaded")
        return self._json({})

    def commit(self, body: bytes, model: str, revision: str) -> None:
        repository = self._writes(model)
        if repository is None:
            return None
        lines = [json.loads(line) for line in body.splitlines()]
        header, files = lines[0]["value"], dict(repository.at(revision).files)
        if header.get("parentCommit") not in (None, repository.refs[revision]):
            return self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self._refuse(400, None, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                del files[value["path"]]
        done = repository.commit(files, header["summary"], revision)
        return self._json({"commitUrl": f"{self._url(model)}/commit/{done.oid}", "commitOid": done.oid})


_KIND = "(?:models|datasets)"  # in one space of names here
_MODEL = r"(?P<model>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_OID = r"(?P<oid>[0-9a-f]{64})"
_ROUTES = [
    (re.compile(pattern), method, answer)
    for pattern, method, answer in (
        (rf"/api/{_KIND}/{_MODEL}", "GET", _Handler.info),
        (rf"/api/{_KIND}/{_MODEL}/revision/{_REVISION}", "GET", _Handler.info),
        (rf"/api/{_KIND}/{_MODEL}/tree/{_REVISION}(?:/(?P<folder>.+))?", "GET", _Handler.tree),
        (rf"/api/{_KIND}/{_MODEL}/paths-info/{_REVISION}", "POST", _Handler.paths_info),
        (rf"/api/models/{_MODEL}/refs", "GET", _Handler.refs),
        (rf"/(?:datasets/)?{_MODEL}/resolve/{_REVISION}/(?P<name>.+)", "GET|HEAD", _Handler.resolve),
        (r"/large/(?P<sha256>[0-9a-f]{64})", "GET|HEAD", _Handler.large),
        (r"/api/whoami-v2", "GET", _Handler.whoami),
        (r"/api/repos/create", "POST", _Handler.create),
        (rf"/api/models/{_MODEL}/branch/(?P<name>.+)", "POST", _Handler.branch),
        (r"/api/validate-yaml", "POST", _Handler.validate),
        (rf"/api/models/{_MODEL}/preupload/{_REVISION}", "POST", _Handler.preupload),
        (rf"/{_MODEL}\.git/info/lfs/objects/batch", "POST", _Handler.batch),
        (rf"/upload/{_OID}", "PUT", _Handler.upload),
        (rf"/part/{_OID}/(?P<number>\d+)", "PUT", _Handler.part),
        (rf"/complete/{_OID}", "POST", _Handler.complete),
        (rf"/verify/{_OID}", "POST", _Handler.verify),
        (rf"/api/models/{_MODEL}/commit/{_REVISION}", "POST", _Handler.commit),
    )
]


def environment(hub: Hub, place: Path, token: str | None = None) -> dict[str, str]:
    """What leads a process of its own to `hub`, with its cache in `place`."""
    return {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "hf"), "HF_TOKEN": token or "", "HF_HUB_OFFLINE": ""}


@contextmanager
def leading_to(hub: Hub, place: Path) -> Iterator[None]:
    """In this process: huggingface_hub reads its settings once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(place / "hf" / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(place / "hf" / "token"))
        patch.setenv("HF_TOKEN", "")
        try:
            yield
        finally:
            close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A running hub, which this process asks."""
    running = Hub()
    with leading_to(running, tmp_path):
        yield running
    running.close()
