"""Remove what is no longer needed from a workspace, while compressions are running in it.

A step is needed if the lineage record of a version that is to stay names it; an object if a needed step made or read
it. Whatever else was not used for a while goes: neither made, nor found again, nor used since the oldest run in
progress began. A record goes before the objects it names, so a kill leaves objects that no record names, and never a
record without its objects. What is lost otherwise is a step that is redone.

Each note in the store has one reason; nothing holds a lock, because machines that share an S3 workspace share none:

- ``running/``: a long run needs the steps that it began with until it ends, however short the age limit is.
- ``used/<key>.json``: a step that is found is not put again, because that could bring back the record of one whose
  objects are about to go. The finder writes this note first and then looks at the record once more; a collection
  removes the record first and then looks for the note. Either the finder sees that the record has gone and redoes the
  step, or the note is seen and the record put back.
- ``doomed/<sha256>``: an object that is put again must not go between its put and its step's record. Whoever puts an
  old one writes it again and looks for this note afterwards; a collection writes this note first and looks at the
  object's time afterwards. Either the object is young and stays, or its writer waits until it has gone, and puts it
  again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bivlm.errors import InputError
from bivlm.names import is_sha256
from bivlm.untrusted import parse_object
from bivlm.workspace.locks import TURNS, heartbeat
from bivlm.workspace.steps import (
    DOOMED,
    FRESH_SECONDS,
    OBJECTS,
    STEPS,
    USED,
    StepRecord,
    Workspace,
    WorkspaceError,
    doomed_name,
    object_name,
    parse_record,
    step_name,
)
from bivlm.workspace.stores.base import Entry, Store

RUNNING = "running"
ALIVE_EVERY_SECONDS = 300
DEAD_AFTER_SECONDS = 3600
# What was used this recently stays whatever the age limit: a step that is found again notes it once in `FRESH_SECONDS`,
# and the clocks of machines differ.
LEAST_SECONDS = 2 * FRESH_SECONDS
_LEFT_AFTER_SECONDS = 24 * 3600
_AT_ONCE = 16  # requests to the store
_STEP = re.compile(rf"(?:{STEPS}|{USED})/([0-9a-f]{{64}})\.json")
_OBJECT = re.compile(rf"{OBJECTS}/([0-9a-f]{{2}})/\1[0-9a-f]{{62}}")
# What its writer removes again, by who that is: a run and a turn have two names, of which one is written again.
_PASSING = re.compile(
    rf"((?:.*/)?\.partial-[0-9a-f]+|{DOOMED}/[0-9a-f]{{64}})|({RUNNING}/[0-9a-f]+|{TURNS}/.+)\.(?:began|asked|alive|clock)"
)

Names = frozenset[str]  # of steps, objects and leftovers, as the store has them


@dataclass(frozen=True)
class Inventory:
    """The contents of a workspace. All times are on its own clock, in seconds since 1970.

    Attributes:
        now: when it was looked at.
        entries: what the store has, by name.
        steps: record of every step, by name; None if it cannot be read.
        objects: names of all objects.
        leftovers: names of what killed writers left a day ago or earlier.
        began: when each run in progress began.
    """

    now: float
    entries: Mapping[str, Entry]
    steps: Mapping[str, StepRecord | None]
    objects: Names
    leftovers: Names
    began: tuple[float, ...]

    def horizon(self, keep_seconds: float) -> float:
        """Return the time since when whatever was used stays.

        `keep_seconds` ago, at least `LEAST_SECONDS` ago, and well before the oldest run in progress began.
        """
        latest = self.now - max(keep_seconds, LEAST_SECONDS)
        return min([latest, *(began - LEAST_SECONDS for began in self.began)])

    def nbytes(self, names: Iterable[str]) -> int:
        """Return the bytes of steps, objects and leftovers."""
        both = {each for name in names for each in (name, _note_of(name))}
        return sum(self.entries[name].nbytes for name in both if name in self.entries)


@dataclass(frozen=True)
class Collected:
    """Numbers of steps, objects and leftovers that went, their bytes, and the steps that were found again meanwhile."""

    steps: int
    objects: int
    leftovers: int
    nbytes: int
    put_back: int


@contextmanager
def in_use(workspace: Workspace) -> Iterator[None]:
    """Keep whatever was used since this block began; what a killed run used stays for another hour.

    ``running/<id>.began`` says since when, ``running/<id>.alive`` is written again every few minutes.
    """
    name = f"{RUNNING}/{secrets.token_hex(8)}"
    with heartbeat(workspace.store, f"{name}.began", f"{name}.alive", ALIVE_EVERY_SECONDS):
        yield


def needed_by(lineages: Iterable[Mapping[str, StepRecord]]) -> Names:
    """Return the steps that these lineage records name, and the objects that those made or read."""
    names: set[str] = set()
    for lineage in lineages:
        names |= {step_name(key) for key in lineage}
        for record in lineage.values():
            names |= _made(record) | {object_name(sha256) for sha256 in _hashes(record.identity.get("inputs"))}
    return frozenset(names)


def look(workspace: Workspace, known: Inventory | None = None, at_once: int = _AT_ONCE) -> Inventory:
    """Return what the workspace holds. Records that are as old as in `known` are not read again."""
    store = workspace.store
    now = _now(store)
    folders = (OBJECTS, STEPS, USED, DOOMED, RUNNING, TURNS)
    found = {entry.name: entry for folder in folders for entry in store.entries(folder)}
    passing = {name: match[1] or match[2] for name in found if (match := _PASSING.fullmatch(name))}
    last: dict[str, float] = {}  # when each writer was alive last
    for name, writer in passing.items():
        last[writer] = max(found[name].modified, last.get(writer, 0.0))
    runs = [name for name in passing if name.endswith(".began")]

    def read(name: str) -> dict[str, StepRecord | None]:
        entries = _of_step(found, name)
        if known is not None and name in known.steps and _of_step(known.entries, name) == entries:
            return {name: known.steps[name]}
        # A copy without a record stands for the one that it was found with.
        data = next((data for entry in entries if (data := store.read_bytes(entry.name)) is not None), None)
        return {name: parse_record(data, Path(name).stem)} if data is not None else {}

    names = {step_name(match[1]) for name in found if (match := _STEP.fullmatch(name))}
    with ThreadPoolExecutor(at_once) as threads:
        steps = {name: record for step in threads.map(read, sorted(names)) for name, record in step.items()}
    return Inventory(
        now,
        found,
        steps,
        objects=frozenset(name for name in found if _OBJECT.fullmatch(name)),
        leftovers=frozenset(name for name, writer in passing.items() if now - last[writer] > _LEFT_AFTER_SECONDS),
        began=tuple(found[name].modified for name in runs if now - last[passing[name]] < DEAD_AFTER_SECONDS),
    )


def collectable(held: Inventory, needed: Names, keep_seconds: float) -> Names:
    """Return what may go: neither needed nor used since the horizon.

    An object stays as long as any step that stays made it, whether that is needed or young.
    """
    horizon = held.horizon(keep_seconds)
    last = {name: max(entry.modified for entry in _of_step(held.entries, name)) for name in held.steps}
    steps = {name for name, used in last.items() if used < horizon} - needed
    made = {made for name, record in held.steps.items() if name not in steps for made in _made(record)}
    old = {name for name in held.objects if held.entries[name].modified < horizon}
    return frozenset(steps | (old - needed - made) | held.leftovers)


def collect(
    workspace: Workspace,
    marked: Names,
    known: Inventory,
    needed: Names,
    keep_seconds: float,
    at_once: int = _AT_ONCE,
) -> Collected:
    """Remove what was `marked` in an earlier look and may still go; steps first, then objects.

    `known` is the earlier look, `needed` was determined again after it.
    """
    store = workspace.store
    again = look(workspace, known, at_once)
    horizon = again.horizon(keep_seconds)

    def discard(discard_one: Callable[[Store, str, float], bool], names: Iterable[str]) -> Names:
        names = sorted(names)
        with ThreadPoolExecutor(at_once) as threads:
            went = threads.map(lambda name: discard_one(store, name, horizon), names)
            return frozenset(name for name, gone in zip(names, went, strict=True) if gone)

    going = marked & collectable(again, needed, keep_seconds)
    old, leftovers = going & again.steps.keys(), going & again.leftovers
    steps = discard(_discard_step, old)
    # Once more, because of the steps that were put back, and of those that were finished meanwhile.
    last = look(workspace, again, at_once)
    objects = discard(_discard_object, going & last.objects & collectable(last, needed, keep_seconds))
    for name in leftovers:
        store.delete(name)
    nbytes = again.nbytes(steps | objects | leftovers)
    return Collected(len(steps), len(objects), len(leftovers), nbytes, put_back=len(old) - len(steps))


def lineage_steps(data: bytes, source: str) -> dict[str, StepRecord]:
    """Return the steps of a lineage record by key, of whatever version of bivlm wrote it.

    Nothing else of the record is looked at, so that an older or a newer one is read as well. Raises `InputError` naming
    `source` for one whose steps cannot be read: what it needs is then not known.
    """
    unreadable = f"{source}: not a lineage record whose steps can be read"
    content = parse_object(data, unreadable)
    try:
        steps = {key: StepRecord.model_validate(record) for key, record in content["steps"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # pydantic's is a ValueError
        raise InputError(f"{unreadable} ({type(error).__name__})") from None
    wrong = next((key for key, record in steps.items() if record.key != key), None)
    if not steps or wrong is not None:
        found = "no step" if wrong is None else f"step {wrong}, which has another key"
        raise InputError(f"{source}: not a lineage record that can be relied on: it holds {found}")
    return steps


def _now(store: Store) -> float:
    """Return the time on the store's clock, by which its entries are dated."""
    name = f"{RUNNING}/{secrets.token_hex(8)}.clock"
    store.put_bytes(name, b"")
    try:
        entry = store.entry(name)
    finally:
        store.delete(name)
    if entry is None:  # this machine's own clock may be any time ahead, which would make everything old
        raise WorkspaceError(f"{store.url}: {name} was put and is not there; nothing can be collected by such a store")
    return entry.modified


def _discard_step(store: Store, name: str, horizon: float) -> bool:
    """Remove the record of a step; return False if it was found again, and is there as before."""
    note = _note_of(name)
    if _used_since(store, name, horizon) or _used_since(store, note, horizon):
        return False
    data = store.read_bytes(name)
    store.delete(name)
    if data is not None and _used_since(store, note, horizon):
        store.put_bytes(name, data)
        return False
    store.delete(note)
    return True


def _discard_object(store: Store, name: str, horizon: float) -> bool:
    """Remove an object; return False if it was put again, and stays."""
    note = doomed_name(name.rpartition("/")[2])
    store.put_bytes(note, b"")
    try:
        if _used_since(store, name, horizon):
            return False
        store.delete(name)
        return True
    finally:
        store.delete(note)


def _used_since(store: Store, name: str, horizon: float) -> bool:
    entry = store.entry(name)
    return entry is not None and entry.modified >= horizon


def _note_of(name: str) -> str:
    """Return the name of the note, a copy of its record, that a step was found again."""
    return name.replace(f"{STEPS}/", f"{USED}/", 1)


def _of_step(entries: Mapping[str, Entry], name: str) -> list[Entry]:
    return [entries[each] for each in (name, _note_of(name)) if each in entries]


def _made(record: StepRecord | None) -> set[str]:
    """Return the names of the objects that a step made; none if its record cannot be read, which makes it no step."""
    return {object_name(reference.sha256) for reference in record.outputs.values()} if record else set()


def _hashes(value: Any) -> Iterator[str]:
    """Return every sha256 in a JSON value."""
    if isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _hashes(part)
    elif is_sha256(value):
        yield value
