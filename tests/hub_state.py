"""What the hub of `hub_server` holds: repositories with their commits, accounts, and what goes wrong."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

LARGE = re.compile(r".*\.(safetensors|bin|pth|parquet|png)|tokenizer\.json")  # kept outside git, whatever their size


@dataclass
class Commit:
    oid: str
    files: dict[str, bytes]
    title: str
    parent: str | None


@dataclass
class Repository:
    """One model: its commits by hash, and branches and tags that lead to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], title: str, branch: str = "main") -> Commit:
        parent = self.refs.get(branch)
        content = "".join(f"{name}{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}{title}{content}{len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, dict(files), title, parent)
        self.refs[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    @property
    def head(self) -> Commit:
        return self.commits[self.refs["main"]]


@dataclass
class Account:
    """Who a token is of: whether it may write, and the gated models whose licence was accepted."""

    name: str
    writes: bool = False
    accepted: set[str] = field(default_factory=set)


@dataclass
class Fault:
    """What goes wrong for requests whose path contains `path`: each entry of `answers` is used up by one of them.

    A number is a status; ``("cut", n)`` ends the connection in order after n bytes of the body, ``("reset", n)`` resets
    it there, ``("stall", n)`` sends no more until the hub is closed; ``("slow", 0)`` takes its time.
    """

    path: str
    answers: list[int | tuple[str, int]]


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    sent: int = 0  # bytes of the body
    status: int = 0


def is_large(name: str) -> bool:
    return LARGE.fullmatch(name) is not None


@cache
def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pointer(data: bytes) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256_of(data)}\nsize {len(data)}\n".encode()


def git_id(name: str, data: bytes) -> str:
    content = pointer(data) if is_large(name) else data
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def local_id(name: str, data: bytes) -> str:
    """What the client compares with its own file: sha256 of a large one, git's hash of another."""
    return sha256_of(data) if is_large(name) else git_id(name, data)
