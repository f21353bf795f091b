"""Steps of long ago in a workspace, and the whole of a collection at once."""

from __future__ import annotations

from hypothesis import strategies as st

from bivlm.workspace.garbage import collect, collectable, look
from bivlm.workspace.steps import StepRecord, Workspace

DAY = 24 * 3600.0
KEEP = 30 * DAY
NOTHING = frozenset()


def record_of(number: int, outputs, inputs: dict | None = None) -> StepRecord:
    identity = {"stage": "pack", "version": 1, "inputs": inputs or {}, "recipe": number}
    return StepRecord(identity=identity, outputs=outputs, seconds=1.0)


def done(place: Workspace, number: int, data: bytes = b"x", inputs: dict | None = None) -> StepRecord:
    """A step that was just finished and has made `data`."""
    record = record_of(number, {"file": place.put_bytes(data)}, inputs)
    place.finish_step(record)
    return record


def gc(place: Workspace, needed: frozenset[str] = NOTHING, keep: float = KEEP):
    """All of it at once: a look, no pause, and what goes."""
    first = look(place, at_once=1)
    return collect(place, collectable(first, needed, keep), first, needed, keep, at_once=1)


# Steps 0-4 make one object each out of five, so that some share them; ages in days.
GRAPHS = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0.1, 100), st.booleans(), st.none() | st.integers(0, 4)),
    min_size=1,
    max_size=7,
)


def build(place: Workspace, clock, graph) -> list[StepRecord]:
    end, records = clock.now + 101 * DAY, []
    for number, (made, age, _, read) in sorted(enumerate(graph), key=lambda step: -step[1][1]):
        clock.now = end - age * DAY
        inputs = {} if read is None else {"file": place.put_bytes(b"object %d" % read).sha256}
        records.append((number, done(place, number, b"object %d" % made, inputs)))
    clock.now = end
    return [record for _, record in sorted(records, key=lambda each: each[0])]
