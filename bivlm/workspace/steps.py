"""Content-addressed files and the steps that made them: the only cache of the pipeline.

``objects/<aa>/<sha256>`` holds bytes under their own hash, ``steps/<key>.json`` says that a step is done and what it
made. A step counts as done only while every file it made is there with the right bytes; reads are checked against the
hash. Writes appear whole or not at all, so any number of workers may share a workspace and any of them may be killed.

``used/<key>.json`` is a copy of a step's record, written when the step is found again: its time says when that was.
``doomed/<sha256>`` is there while an object is being collected. They make `bivlm.workspace.garbage` safe beside running
compressions.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from bivlm.errors import InputError
from bivlm.names import is_sha256
from bivlm.untrusted import parse_object
from bivlm.workspace.hashing import canonical_json, digest, file_digest
from bivlm.workspace.scratch import scratch_folder
from bivlm.workspace.stores.base import Entry, Store
from bivlm.workspace.stores.opening import open_store

_SHA256 = r"^[0-9a-f]{64}$"
OBJECTS, STEPS, USED, DOOMED = "objects", "steps", "used", "doomed"
# A step or object that was put, or said to be in use, this recently need not be said to be in use again.
FRESH_SECONDS = 3600
# Whoever collects an object says so a few requests before it goes; a saying older than this is of one that was killed.
_DOOMED_SECONDS = 300
_PAUSE_SECONDS = 0.2


class WorkspaceError(RuntimeError):
    """An object of the workspace is missing or its bytes are not what its name says."""


class MissingObject(WorkspaceError):
    """An object of the workspace is not there."""


class Reference(BaseModel):
    """The name of an object: SHA-256 and length of its bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str = Field(pattern=_SHA256)
    nbytes: int = Field(ge=0)


class StepRecord(BaseModel):
    """What a finished step was and made: files by name, figures small enough to travel, how long it took, and where.

    `identity` is from `bivlm.workspace.hashing.step_identity`; `figures` is what later steps or the report need to know
    without opening a file; `environment` says what ran it (`bivlm.workspace.environment.software`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    identity: dict[str, JsonValue]
    outputs: dict[str, Reference] = {}
    figures: dict[str, JsonValue] = {}
    seconds: float = Field(ge=0)
    environment: dict[str, str] = {}

    @field_validator("identity")
    @classmethod
    def _names_its_stage(cls, identity: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if not isinstance(identity.get("stage"), str):
            raise ValueError("expected the name of a stage under 'stage'")
        return identity

    @property
    def key(self) -> str:
        """The digest of the identity."""
        return digest(self.identity)

    def says_the_same_as(self, other: StepRecord) -> bool:
        """Whether both are of one step that made one thing; how long that took, and where, may differ."""
        return (self.identity, self.outputs, self.figures) == (other.identity, other.outputs, other.figures)

    @property
    def stage(self) -> str:
        """The name of the step's stage."""
        return self.identity["stage"]


class Workspace:
    """A folder or an S3 prefix that holds objects and finished steps."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def open(cls, location: str | Path) -> Workspace:
        """The workspace at a folder (made if missing) or ``s3://bucket/prefix``; raises `InputError` naming it."""
        return cls(open_store(location))

    @classmethod
    def look_into(cls, location: str | Path) -> Workspace:
        """The workspace at `location`, to be read only: nothing is made or tried there; raises `InputError`."""
        return cls(open_store(location, look_only=True))

    @property
    def url(self) -> str:
        """What opens this workspace again, on any machine that can reach it."""
        return self._store.url

    @property
    def local(self) -> Path:
        """A folder on this machine that belongs to the workspace: itself, or the cache of the S3 prefix."""
        return self._store.local

    @property
    def store(self) -> Store:
        """Where the bytes are, for what looks after the workspace as a whole."""
        return self._store

    def scratch(self) -> AbstractContextManager[Path]:
        """An empty folder on the workspace's disk for a step at work, removed at the end."""
        return scratch_folder(self.local / "scratch")

    def put_file(self, path: str | Path) -> Reference:
        """Store a copy of the file at `path`; storing the same bytes again changes nothing but the object's time."""
        path = Path(path)
        reference = Reference(sha256=file_digest(path), nbytes=path.stat().st_size)
        self._put(reference, lambda: self._store.put_file(_object_name(reference), path))
        return reference

    def put_bytes(self, data: bytes) -> Reference:
        """Store `data`; storing the same bytes again changes nothing but the object's time."""
        reference = Reference(sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))
        self._put(reference, lambda: self._store.put_bytes(_object_name(reference), data))
        return reference

    def fetch(self, reference: Reference) -> Path:
        """A local file with exactly these bytes, to be read only; raises `WorkspaceError` if there are none."""
        # A local copy may be damaged, or gone, while the stored object is sound: the second time it is not looked at.
        for anew in (False, True):
            path = self._store.path(_object_name(reference), anew)
            if path is None:
                raise MissingObject(
                    f"{self.url}: object {reference.sha256} is missing; run the step that makes it again"
                )
            if _is(path, reference):
                return path
        raise WorkspaceError(
            f"{self.url}: object {reference.sha256} holds other bytes; run the step that makes it again"
        )

    def read(self, reference: Reference) -> bytes:
        """The bytes of an object; raises `WorkspaceError` as `fetch` does."""
        return self.fetch(reference).read_bytes()

    def holds(self, reference: Reference) -> bool:
        """Whether the object is there with the right bytes."""
        try:
            self.fetch(reference)
        except WorkspaceError:
            return False
        return True

    def has(self, reference: Reference) -> bool:
        """Whether an object of this name and length is there; unlike `holds` it reads no byte."""
        return self._store.size(_object_name(reference)) == reference.nbytes

    def fetch_folder(self, outputs: dict[str, Reference], folder: str | Path) -> Path:
        """Lay copies of `outputs` under `folder` by their names (forward slashes make subfolders)."""
        folder = Path(folder)
        for name, reference in outputs.items():
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"output {name!r}: leaves the folder {folder}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.fetch(reference), target)
        return folder

    def put_folder(self, folder: str | Path) -> dict[str, Reference]:
        """Store every file under `folder`; the names are paths relative to it, in order."""
        folder = Path(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): self.put_file(path) for path in files}

    def step(self, key: str) -> StepRecord | None:
        """The finished step `key`; None if there is none, if its record cannot be read or is that of another step, or
        if any of its outputs is missing or differs: all of which mean that the step must run again.

        One that is found is in use from now on, see `bivlm.workspace.garbage`.
        """
        data = self._store.read_bytes(step_name(key)) if is_sha256(key) else None
        record = parse_record(data, key) if data is not None else None
        # Said first and looked at afterwards: what is collected meanwhile is then either seen to be missing, or kept.
        if record is None or not self._say_that_it_is_used(key, data):
            return None
        return record if all(self.holds(reference) for reference in record.outputs.values()) else None

    def record(self, key: str) -> StepRecord | None:
        """What is written down of step `key`, whether or not its outputs are still there; None as in `step`."""
        data = self._store.read_bytes(step_name(key)) if is_sha256(key) else None  # the key may be from outside
        return parse_record(data, key) if data is not None else None

    def finish_step(self, record: StepRecord) -> None:
        """Write down that a step is done; its outputs must be stored already (`WorkspaceError` if one is not)."""
        for name, reference in record.outputs.items():
            if not self.has(reference):
                raise WorkspaceError(f"{self.url}: output {name!r} of {record.stage} is not stored; put it first")
        content: dict[str, Any] = record.model_dump(mode="json")
        content["checksum"] = digest(content)  # a damaged figure would otherwise pass for a true one
        self._store.put_bytes(step_name(record.key), canonical_json(content) + b"\n")

    def state(self, name: str) -> dict[str, Any] | None:
        """What was last put as the state `name`; None if nothing was, or it cannot be read.

        Unlike steps, states change: the watcher's memory is kept so. `name` is made by this code, never by others.
        """
        data = self._store.read_bytes(_state_name(name))
        if data is None:
            return None
        try:
            content = parse_object(data, self.url)
            checksum = content.pop("checksum")
            return content if digest(content) == checksum else None
        except (InputError, KeyError):
            return None

    def put_state(self, name: str, content: dict[str, Any]) -> None:
        """Put `content` (JSON) as the state `name`, whole or not at all; what was there before is replaced."""
        self._store.put_bytes(_state_name(name), canonical_json({**content, "checksum": digest(content)}) + b"\n")

    def _say_that_it_is_used(self, key: str, data: bytes) -> bool:
        """Put the step's record under ``used/`` unless it, or the record itself, is fresh; whether the step is there
        afterwards."""
        if _is_fresh(self._store.entry(step_name(key))):
            return True
        if not _is_fresh(self._store.entry(used_name(key))):
            self._store.put_bytes(used_name(key), data)
        return self._store.entry(step_name(key)) is not None

    def _put(self, reference: Reference, put: Callable[[], None]) -> None:
        """Have the object there, and fresh: an old one is put again, because it may be about to be collected."""
        name = _object_name(reference)
        if self.holds(reference) and _is_fresh(self._store.entry(name)):
            return
        there = False
        while not there:
            put()
            # Put first and looked at afterwards: whoever collects says it first, and looks at the time afterwards.
            self._wait_while_doomed(reference)
            there = self._store.entry(name) is not None

    def _wait_while_doomed(self, reference: Reference) -> None:
        """Wait until the object, which was just put, is gone or nobody alive says that it is being collected."""
        began = time.monotonic()
        while doomed := self._store.entry(doomed_name(reference.sha256)):
            there = self._store.entry(_object_name(reference))
            # How old the saying is: by the store's clock until the object was put, by a stopwatch since then.
            if there is None or there.modified - doomed.modified + time.monotonic() - began > _DOOMED_SECONDS:
                return
            time.sleep(_PAUSE_SECONDS)


def parse_record(data: bytes, key: str) -> StepRecord | None:
    """The record that `data` holds of step `key`; None if it is damaged or that of another step."""
    try:
        content = parse_object(data, step_name(key))
        checksum = content.pop("checksum")
        if digest(content) != checksum:
            return None
        record = StepRecord.model_validate(content)
    except (InputError, KeyError, ValidationError):
        return None
    return record if record.key == key else None


def _is_fresh(entry: Entry | None) -> bool:
    """By this machine's clock, which only saves requests: ahead it asks for more of them, and an hour behind is safe,
    because nothing goes that is younger than two."""
    return entry is not None and time.time() - entry.modified < FRESH_SECONDS


def _is(path: Path, reference: Reference) -> bool:
    try:
        return path.stat().st_size == reference.nbytes and file_digest(path) == reference.sha256
    except FileNotFoundError:  # it was collected since it was looked at
        return False


def _object_name(reference: Reference) -> str:
    return object_name(reference.sha256)


def _state_name(name: str) -> str:
    return f"state/{name}.json"


def object_name(sha256: str) -> str:
    """Where an object is in the store."""
    return f"{OBJECTS}/{sha256[:2]}/{sha256}"


def step_name(key: str) -> str:
    """Where a step's record is in the store."""
    return f"{STEPS}/{key}.json"


def doomed_name(sha256: str) -> str:
    """Where it is said that an object is being collected."""
    return f"{DOOMED}/{sha256}"


def used_name(key: str) -> str:
    """Where it is said that a step was found again."""
    return f"{USED}/{key}.json"
