"""Content-addressed files and the steps that made them: the only cache of the pipeline.

``objects/<aa>/<sha256>`` holds bytes under their own hash, ``steps/<key>.json`` says that a step is done and what it
made. A step counts as done only while every file it made is there with the right bytes; reads are checked against the
hash. Writes appear whole or not at all, so any number of workers may share a workspace and any of them may be killed.
``used/`` and ``doomed/`` keep the work of running compressions from a collection, see `bivlm.workspace.garbage`.
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
# A step or object that was put, or noted as used, this recently need not be noted again.
FRESH_SECONDS = 3600
# A collection notes that an object is doomed a few requests before it goes; an older note is of one that was killed.
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
    """A finished step.

    Attributes:
        identity: what makes it the step it is, from `bivlm.workspace.hashing.step_identity`.
        outputs: the files it made, by name.
        figures: what later steps or the report need to know without opening a file.
        seconds: how long it took.
        environment: what ran it, from `bivlm.workspace.environment.software`.
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
        """Return whether both are of one step that made the same; time and environment may differ."""
        return (self.identity, self.outputs, self.figures) == (other.identity, other.outputs, other.figures)

    @property
    def stage(self) -> str:
        """The name of the step's stage."""
        return str(self.identity["stage"])


class Workspace:
    """A folder or an S3 prefix that holds objects and finished steps; `store` is where the bytes are."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def open(cls, location: str | Path) -> Workspace:
        """Open a folder (made if missing) or ``s3://bucket/prefix``; raise `InputError` if it can be neither."""
        return cls(open_store(location))

    @classmethod
    def look_into(cls, location: str | Path) -> Workspace:
        """Open a workspace only to read it: nothing is made or tried there. Raises `InputError` as `open`."""
        return cls(open_store(location, look_only=True))

    @property
    def url(self) -> str:
        """The location that opens this workspace again, on any machine that can reach it."""
        return self.store.url

    @property
    def local(self) -> Path:
        """A folder on this machine that belongs to the workspace: itself, or the cache of the S3 prefix."""
        return self.store.local

    def scratch(self) -> AbstractContextManager[Path]:
        """Yield an empty folder on the workspace's disk for a step at work, removed at the end."""
        return scratch_folder(self.local / "scratch")

    def put_file(self, path: str | Path) -> Reference:
        """Store a copy of the file at `path`; storing the same bytes again changes nothing but the object's time."""
        path = Path(path)
        reference = Reference(sha256=file_digest(path), nbytes=path.stat().st_size)
        self._put(reference, lambda: self.store.put_file(object_name(reference.sha256), path))
        return reference

    def put_bytes(self, data: bytes) -> Reference:
        """Store `data`; storing the same bytes again changes nothing but the object's time."""
        reference = Reference(sha256=hashlib.sha256(data).hexdigest(), nbytes=len(data))
        self._put(reference, lambda: self.store.put_bytes(object_name(reference.sha256), data))
        return reference

    def fetch(self, reference: Reference) -> Path:
        """Return a local file with exactly these bytes, to be read only; raise `WorkspaceError` if there are none."""
        said, again = f"{self.url}: object {reference.sha256}", "run the step that makes it again"
        # A local copy may be damaged, or gone, while the stored object is sound: the second time it is not looked at.
        for anew in (False, True):
            path = self.store.path(object_name(reference.sha256), anew)
            if path is None:
                raise MissingObject(f"{said} is missing; {again}")
            if _is(path, reference):
                return path
        raise WorkspaceError(f"{said} holds other bytes; {again}")

    def read(self, reference: Reference) -> bytes:
        """Return the bytes of an object; raises `WorkspaceError` as `fetch` does."""
        return self.fetch(reference).read_bytes()

    def holds(self, reference: Reference) -> bool:
        """Return whether the object is there with the right bytes."""
        try:
            self.fetch(reference)
        except WorkspaceError:
            return False
        return True

    def has(self, reference: Reference) -> bool:
        """Return whether an object of this name and length is there; unlike `holds` it reads no byte."""
        return self.store.size(object_name(reference.sha256)) == reference.nbytes

    def fetch_folder(self, outputs: dict[str, Reference], folder: str | Path) -> Path:
        """Copy `outputs` into `folder` by their names (forward slashes make subfolders)."""
        folder = Path(folder)
        for name, reference in outputs.items():
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"output {name!r}: leaves the folder {folder}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.fetch(reference), target)
        return folder

    def put_folder(self, folder: str | Path) -> dict[str, Reference]:
        """Store every file under `folder`; return them by their paths relative to it, in order."""
        folder = Path(folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): self.put_file(path) for path in files}

    def step(self, key: str) -> StepRecord | None:
        """Return the finished step `key`; None where it must run again.

        That is where there is no record, or one that is damaged or of another step, or where an output is missing or
        differs. From now on the step counts as used.
        """
        record = self.record(key)
        # Noted first and looked at afterwards: what is collected meanwhile is then either seen to be missing, or kept.
        if record is None or not self._note_use(record):
            return None
        return record if all(self.holds(reference) for reference in record.outputs.values()) else None

    def record(self, key: str) -> StepRecord | None:
        """Return the record of step `key`, whether or not its outputs are still there; None as in `step`."""
        data = self.store.read_bytes(step_name(key)) if is_sha256(key) else None  # the key may be from outside
        return parse_record(data, key) if data is not None else None

    def finish_step(self, record: StepRecord) -> None:
        """Record that a step is done; its outputs must be stored already (`WorkspaceError` if one is not)."""
        for name, reference in record.outputs.items():
            if not self.has(reference):
                raise WorkspaceError(f"{self.url}: output {name!r} of {record.stage} is not stored; put it first")
        self.store.put_bytes(step_name(record.key), _sealed(record.model_dump(mode="json")))

    def state(self, name: str) -> dict[str, Any] | None:
        """Return what was last put as the state `name`; None if nothing was, or it cannot be read.

        Unlike steps, states change: the watcher's memory is one. `name` is made by this code, never by others.
        """
        data = self.store.read_bytes(_state_name(name))
        return None if data is None else _unsealed(data)

    def put_state(self, name: str, content: dict[str, Any]) -> None:
        """Put `content` (JSON) as the state `name`, whole or not at all, in the place of the one before."""
        self.store.put_bytes(_state_name(name), _sealed(content))

    def _note_use(self, record: StepRecord) -> bool:
        """Note under ``used/`` that the step was found, unless that is fresh; return whether it is there afterwards."""
        name, note = step_name(record.key), used_name(record.key)
        if _is_fresh(self.store.entry(name)):
            return True
        if not _is_fresh(self.store.entry(note)):
            self.store.put_bytes(note, _sealed(record.model_dump(mode="json")))
        return self.store.entry(name) is not None

    def _put(self, reference: Reference, put: Callable[[], None]) -> None:
        """Keep the object there, and fresh: an old one is put again, because it may be about to be collected."""
        name = object_name(reference.sha256)
        there = self.holds(reference) and _is_fresh(self.store.entry(name))
        while not there:
            put()
            # Put first and looked at afterwards: a collection writes its note first and looks at the time afterwards.
            self._wait_while_doomed(reference.sha256)
            there = self.store.entry(name) is not None

    def _wait_while_doomed(self, sha256: str) -> None:
        """Wait until the object, which was just put, is gone, or no living collection notes it as doomed."""
        began = time.monotonic()
        while doomed := self.store.entry(doomed_name(sha256)):
            there = self.store.entry(object_name(sha256))
            # How old the note is: by the store's clock until the object was put, by a stopwatch since then.
            if there is None or there.modified - doomed.modified + time.monotonic() - began > _DOOMED_SECONDS:
                return
            time.sleep(_PAUSE_SECONDS)


def parse_record(data: bytes, key: str) -> StepRecord | None:
    """Return the record of step `key` that `data` holds; None if it is damaged or of another step."""
    try:
        record = StepRecord.model_validate(_unsealed(data))
    except ValidationError:
        return None
    return record if record.key == key else None


def _sealed(content: dict[str, Any]) -> bytes:
    """Return `content` as JSON with its checksum: a damaged figure would otherwise pass for a true one."""
    return canonical_json({**content, "checksum": digest(content)}) + b"\n"


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """Return the content of what `_sealed` made; None if it is damaged."""
    try:
        content = parse_object(data, "checked JSON")
        checksum = content.pop("checksum")
        return content if digest(content) == checksum else None
    except (InputError, KeyError):
        return None


def _is_fresh(entry: Entry | None) -> bool:
    """Return whether the entry is young, by this machine's clock.

    A clock that is ahead only costs requests, and one that is an hour behind is safe: nothing goes that is younger than
    two hours.
    """
    return entry is not None and time.time() - entry.modified < FRESH_SECONDS


def _is(path: Path, reference: Reference) -> bool:
    try:
        return path.stat().st_size == reference.nbytes and file_digest(path) == reference.sha256
    except FileNotFoundError:  # it was collected since it was looked at
        return False


def _state_name(name: str) -> str:
    return f"state/{name}.json"


def object_name(sha256: str) -> str:
    """Return where an object is in the store."""
    return f"{OBJECTS}/{sha256[:2]}/{sha256}"


def step_name(key: str) -> str:
    """Return where a step's record is in the store."""
    return f"{STEPS}/{key}.json"


def used_name(key: str) -> str:
    """Return where it is noted that a step was found again."""
    return f"{USED}/{key}.json"


def doomed_name(sha256: str) -> str:
    """Return where it is noted that an object is being collected."""
    return f"{DOOMED}/{sha256}"
