"""Taking away what nobody needs of a workspace, beside compressions that are running in it.

A record goes before the objects it names, so that whoever is killed here leaves objects that no record names and never
a record without its objects. Nothing holds a lock, because machines that share an S3 workspace share none:

- A run says that it is in progress (`in_use`); what was used since it began stays.
- A step that is found again is said to be used before it is looked at once more (`Workspace.step`). Here its record is
  removed before that saying is looked for. Whichever comes first, either the finder sees that the record has gone and
  does the step again, or it is seen here that the step was found, and the record is put back.
- An object that is put again is written again if it is old, and looked for under ``doomed/`` afterwards. Here it is
  said to be doomed before its time is looked at. Whichever comes first, either it is young and stays, or who puts it
  waits until it has gone, and puts it once more.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from bivlm.workspace.heartbeat import heartbeat
from bivlm.workspace.locks import TURNS
from bivlm.workspace.roots import Collectable, HeldObject, HeldStep, Inventory, Needed, collectable
from bivlm.workspace.steps import (
    DOOMED,
    OBJECTS,
    STEPS,
    USED,
    Workspace,
    WorkspaceError,
    doomed_name,
    object_name,
    parse_record,
    step_name,
    used_name,
)
from bivlm.workspace.stores.base import Entry, Store

RUNNING = "running"
ALIVE_EVERY_SECONDS = 300
DEAD_AFTER_SECONDS = 3600
_LEFT_AFTER_SECONDS = 24 * 3600
_AT_ONCE = 16  # requests to the store
_STEP = re.compile(rf"(?:{STEPS}|{USED})/([0-9a-f]{{64}})\.json")
_OBJECT = re.compile(rf"{OBJECTS}/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})")
_LEFT = re.compile(rf"(?:.*/)?\.partial-[0-9a-f]+|{DOOMED}/[0-9a-f]{{64}}|{RUNNING}/[0-9a-f]+\.clock")
_BEAT = re.compile(rf"({RUNNING}/[0-9a-f]+|{TURNS}/.+)\.(began|asked|alive)")


@dataclass(frozen=True)
class Collected:
    """What went: numbers of steps, objects and leftovers, their bytes, and how many steps were found again meanwhile
    and put back."""

    steps: int
    objects: int
    leftovers: int
    nbytes: int
    put_back: int


@contextmanager
def in_use(workspace: Workspace) -> Iterator[None]:
    """Within this block a run is in progress: nothing is collected that was used since it began.

    ``running/<id>.began`` says since when, ``running/<id>.alive`` is written again every few minutes. A run that was
    killed counts for another hour.
    """
    name = f"{RUNNING}/{secrets.token_hex(8)}"
    with heartbeat(workspace.store, f"{name}.began", f"{name}.alive", ALIVE_EVERY_SECONDS):
        yield


def look(workspace: Workspace, known: Inventory | None = None, at_once: int = _AT_ONCE) -> Inventory:
    """What the workspace holds. Records that are as old as in `known` are not read again."""
    store = workspace.store
    now = _now(store)
    found = {
        entry.name: entry
        for folder in (OBJECTS, STEPS, USED, DOOMED, RUNNING, TURNS)
        for entry in store.entries(folder)
    }
    keys = {match[1] for name in found if (match := _STEP.fullmatch(name))}
    with ThreadPoolExecutor(at_once) as threads:
        held = threads.map(lambda key: _held_step(store, key, found, known), sorted(keys))
        steps = {key: step for key, step in zip(sorted(keys), held, strict=True) if step is not None}
    objects = {
        match[2]: HeldObject(entry.nbytes, entry.modified)
        for name, entry in found.items()
        if (match := _OBJECT.fullmatch(name))
    }
    left = {
        name: entry.nbytes
        for name, entry in found.items()
        if _LEFT.fullmatch(name) and now - entry.modified > _LEFT_AFTER_SECONDS
    }
    living, dead = [], {}
    for who, beats in _beats(found).items():
        after = DEAD_AFTER_SECONDS if who.startswith(f"{RUNNING}/") else _LEFT_AFTER_SECONDS
        if now - max(entry.modified for entry in beats) < after:
            living += beats
        else:
            dead |= {entry.name: entry.nbytes for entry in beats}
    began = tuple(entry.modified for entry in living if entry.name.endswith(".began"))
    return Inventory(now, steps, objects, began, left | dead)


def collect(
    workspace: Workspace,
    marked: Collectable,
    known: Inventory,
    needed: Needed,
    keep_seconds: float,
    at_once: int = _AT_ONCE,
) -> Collected:
    """Remove what was `marked` in an earlier look and may go still; steps first, then objects.

    `known` is the earlier look, `needed` was asked for again after it.
    """
    store = workspace.store
    again = look(workspace, known, at_once)
    horizon = again.horizon(keep_seconds)
    doomed = marked & collectable(again, needed, keep_seconds)
    with ThreadPoolExecutor(at_once) as threads:
        went = list(threads.map(lambda key: _discard_step(store, key, horizon), sorted(doomed.steps)))
    # Anew, because of the steps that were put back, and of those that were finished meanwhile.
    last = look(workspace, again, at_once)
    unused = doomed & collectable(last, needed, keep_seconds)
    with ThreadPoolExecutor(at_once) as threads:
        gone = list(threads.map(lambda sha: _discard_object(store, sha, horizon), sorted(unused.objects)))
    for name in doomed.leftovers:
        store.delete(name)
    nbytes = sum(again.steps[key].nbytes for key, done in zip(sorted(doomed.steps), went, strict=True) if done)
    nbytes += sum(again.objects[sha].nbytes for sha, done in zip(sorted(unused.objects), gone, strict=True) if done)
    nbytes += sum((again.leftovers or {})[name] for name in doomed.leftovers)
    return Collected(sum(went), sum(gone), len(doomed.leftovers), nbytes, len(went) - sum(went))


def _now(store: Store) -> float:
    """The time on the store's clock, by which its entries are dated."""
    name = f"{RUNNING}/{secrets.token_hex(8)}.clock"
    store.put_bytes(name, b"")
    try:
        entry = store.entry(name)
    finally:
        store.delete(name)
    if entry is None:  # this machine's own clock may be any time ahead, which would make everything old
        raise WorkspaceError(f"{store.url}: {name} was put and is not there; nothing can be collected by such a store")
    return entry.modified


def _held_step(store: Store, key: str, found: Mapping[str, Entry], known: Inventory | None) -> HeldStep | None:
    """What is known of a step; a copy under ``used/`` without a record stands for the one it was found with."""
    stored, used = found.get(step_name(key)), found.get(used_name(key))
    entries = [entry for entry in (stored, used) if entry is not None]
    nbytes, last = sum(entry.nbytes for entry in entries), max(entry.modified for entry in entries)
    earlier = known.steps.get(key) if known is not None else None
    if earlier is not None and (earlier.nbytes, earlier.used) == (nbytes, last):
        return earlier
    data = next((data for entry in entries if (data := store.read_bytes(entry.name)) is not None), None)
    return HeldStep(parse_record(data, key), nbytes, last) if data is not None else None


def _discard_step(store: Store, key: str, horizon: float) -> bool:
    """Remove the record of a step; False if it was found again, and is there as before."""
    if _used_since(store, step_name(key), horizon) or _used_since(store, used_name(key), horizon):
        return False
    data = store.read_bytes(step_name(key))
    store.delete(step_name(key))
    if data is not None and _used_since(store, used_name(key), horizon):
        store.put_bytes(step_name(key), data)
        return False
    store.delete(used_name(key))
    return True


def _discard_object(store: Store, sha256: str, horizon: float) -> bool:
    """Remove an object; False if it was put again, and stays."""
    store.put_bytes(doomed_name(sha256), b"")
    try:
        if _used_since(store, object_name(sha256), horizon):
            return False
        store.delete(object_name(sha256))
        return True
    finally:
        store.delete(doomed_name(sha256))


def _used_since(store: Store, name: str, horizon: float) -> bool:
    entry = store.entry(name)
    return entry is not None and entry.modified >= horizon


def _beats(found: Mapping[str, Entry]) -> dict[str, list[Entry]]:
    """The names that say that somebody is at work, by who it is: one is written once, the other again and again."""
    beats: dict[str, list[Entry]] = {}
    for name, entry in found.items():
        if match := _BEAT.fullmatch(name):
            beats.setdefault(match[1], []).append(entry)
    return beats
