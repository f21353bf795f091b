"""What of a workspace is needed, and what may go: decided from listings alone, nothing is read or removed here.

A step is needed if the lineage record of a version that is to stay names it; an object if a needed step made it or read
it. What is not needed may go once it was not used for a while: neither made, nor found again, nor young beside a run
that is still in progress.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from bivlm.errors import InputError
from bivlm.untrusted import parse_object
from bivlm.workspace.steps import FRESH_SECONDS, StepRecord

# What was used this recently stays, whatever anybody asks for: a step that is found again says so once in
# `FRESH_SECONDS`, and the clocks of machines differ.
LEAST_SECONDS = 2 * FRESH_SECONDS
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HeldStep:
    """A step's record in a workspace: None if it cannot be read, its bytes, and when it was made or found last."""

    record: StepRecord | None
    nbytes: int
    used: float


@dataclass(frozen=True)
class HeldObject:
    """An object in a workspace: its bytes, and when it was put last."""

    nbytes: int
    used: float


@dataclass(frozen=True)
class Inventory:
    """What a workspace holds.

    Attributes:
        now: the time on the workspace's own clock, as all times here: seconds since 1970.
        steps: by key.
        objects: by sha256.
        began: when each run in progress began.
        leftovers: bytes of what killed writers left behind a day ago or earlier, by name.
    """

    now: float
    steps: Mapping[str, HeldStep]
    objects: Mapping[str, HeldObject]
    began: tuple[float, ...] = ()
    leftovers: Mapping[str, int] | None = None

    def horizon(self, keep_seconds: float) -> float:
        """The time before which something must have been used last to go.

        `keep_seconds` ago, no later than `LEAST_SECONDS` ago, and well before the oldest run in progress began.
        """
        latest = self.now - max(keep_seconds, LEAST_SECONDS)
        return min([latest, *(began - LEAST_SECONDS for began in self.began)])


@dataclass(frozen=True)
class Needed:
    """Keys of steps and sha256 of objects that have to stay, however old."""

    steps: frozenset[str] = frozenset()
    objects: frozenset[str] = frozenset()

    @classmethod
    def by(cls, lineages: Iterable[Mapping[str, StepRecord]]) -> Needed:
        """What these lineage records name: their steps, what the steps made, and what they read."""
        steps: set[str] = set()
        objects: set[str] = set()
        for lineage in lineages:
            steps |= lineage.keys()
            for record in lineage.values():
                objects |= _named(record)
        return cls(frozenset(steps), frozenset(objects))

    def __or__(self, other: Needed) -> Needed:
        return Needed(self.steps | other.steps, self.objects | other.objects)


@dataclass(frozen=True)
class Collectable:
    """Keys of steps, sha256 of objects and names of leftovers that may go."""

    steps: frozenset[str]
    objects: frozenset[str]
    leftovers: frozenset[str]

    def __and__(self, other: Collectable) -> Collectable:
        return Collectable(self.steps & other.steps, self.objects & other.objects, self.leftovers & other.leftovers)

    def nbytes(self, inventory: Inventory) -> int:
        """Their bytes."""
        held = [inventory.steps[key].nbytes for key in self.steps]
        held += [inventory.objects[sha256].nbytes for sha256 in self.objects]
        return sum(held) + sum((inventory.leftovers or {})[name] for name in self.leftovers)


def collectable(inventory: Inventory, needed: Needed, keep_seconds: float) -> Collectable:
    """What may go: neither needed nor used since the horizon.

    An object stays as long as any step that stays made it, whether that is needed or young.
    """
    horizon = inventory.horizon(keep_seconds)
    steps = {key for key, step in inventory.steps.items() if step.used < horizon} - needed.steps
    made = {sha256 for key, step in inventory.steps.items() if key not in steps for sha256 in outputs_of(step.record)}
    old = {sha256 for sha256, held in inventory.objects.items() if held.used < horizon}
    return Collectable(frozenset(steps), frozenset(old - needed.objects - made), frozenset(inventory.leftovers or ()))


def outputs_of(record: StepRecord | None) -> frozenset[str]:
    """The sha256 of what a step made; nothing if its record cannot be read, which makes it no step."""
    return frozenset(reference.sha256 for reference in record.outputs.values()) if record else frozenset()


def lineage_steps(data: bytes, source: str) -> dict[str, StepRecord]:
    """The steps of a lineage record by key, of whatever version of bivlm wrote it.

    Nothing else of the record is looked at, so that an older or a newer one is read as well. Raises `InputError` naming
    `source` for one whose steps cannot be read: what it needs is then not known.
    """
    unreadable = f"{source}: not a lineage record whose steps can be read"
    content = parse_object(data, unreadable)
    try:
        steps = {key: StepRecord.model_validate(record) for key, record in content["steps"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        raise InputError(f"{unreadable} ({type(error).__name__})") from None
    wrong = next((key for key, record in steps.items() if record.key != key), None)
    if not steps or wrong is not None:
        found = "no step" if wrong is None else f"step {wrong}, which has another key"
        raise InputError(f"{source}: not a lineage record that can be relied on: it holds {found}")
    return steps


def _named(record: StepRecord) -> set[str]:
    return {*outputs_of(record), *_hashes(record.identity.get("inputs"))}


def _hashes(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _SHA256.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _hashes(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _hashes(part)
