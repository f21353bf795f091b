"""Collecting what nobody needs: what stays, what goes, also beside others at work and when it is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_in_memory import MemoryStore

from bivlm import collection
from bivlm import workspace as workspace_module
from bivlm.collection import collect, in_use, look
from bivlm.errors import InputError
from bivlm.identity import canonical_json, digest
from bivlm.retention import LEAST_SECONDS, Needed, collectable, lineage_steps
from bivlm.workspace import StepRecord, Workspace, step_name

DAY = 24 * 3600.0
KEEP = 30 * DAY
NOTHING = Needed()


def record_of(number: int, outputs, inputs: dict | None = None) -> StepRecord:
    identity = {"stage": "pack", "version": 1, "inputs": inputs or {}, "recipe": number}
    return StepRecord(identity=identity, outputs=outputs, seconds=1.0)


def gc(place: Workspace, needed: Needed = NOTHING, keep: float = KEEP):
    """All of it at once: a look, no pause, and what goes."""
    first = look(place, at_once=1)
    return collect(place, collectable(first, needed, keep), first, needed, keep, at_once=1)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only tests move, for the store and for those who ask how old something is."""

    class Clock:
        now = 1_000_000_000.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(workspace_module.time, "time", clock)
    return clock


@pytest.fixture
def place(tmp_path, clock) -> Workspace:
    return Workspace(MemoryStore(tmp_path, clock))


def test_a_step_that_is_needed_stays_with_what_it_made_and_read_however_old(place, clock):
    read = place.put_bytes(b"read")
    kept = record_of(1, {"file": place.put_bytes(b"kept")}, {"statistics": read.sha256})
    gone = record_of(2, {"file": place.put_bytes(b"gone")})
    for record in (kept, gone):
        place.finish_step(record)
    clock.now += 1000 * DAY
    went = gc(place, Needed.by([{kept.key: kept}]))
    assert (went.steps, went.objects) == (1, 1)
    assert place.step(kept.key) == kept and place.holds(read)
    assert place.step(gone.key) is None and not place.holds(gone.outputs["file"])


def test_an_object_of_two_steps_stays_as_long_as_one_of_them(place, clock):
    shared = place.put_bytes(b"shared")
    kept, gone = record_of(1, {"a": shared}), record_of(2, {"b": shared})
    for record in (kept, gone):
        place.finish_step(record)
    clock.now += 31 * DAY
    went = gc(place, Needed(frozenset([kept.key])))
    assert (went.steps, went.objects) == (1, 0)
    assert place.step(kept.key) == kept


def test_what_was_found_again_counts_as_used_then(place, clock):
    record = record_of(1, {"file": place.put_bytes(b"x")})
    place.finish_step(record)
    clock.now += 29 * DAY
    assert place.step(record.key) == record
    clock.now += 29 * DAY
    assert gc(place).steps == 0
    clock.now += 2 * DAY
    assert gc(place).steps == 1
    assert place.store.held == {}


def test_looking_at_a_record_is_no_use_of_its_step(place, clock):
    record = record_of(1, {})
    place.finish_step(record)
    clock.now += 31 * DAY
    place.record(record.key)
    assert gc(place).steps == 1


def test_what_was_used_just_now_stays_whatever_is_asked_for(place, clock):
    place.finish_step(record_of(1, {"file": place.put_bytes(b"x")}))
    clock.now += LEAST_SECONDS - 1
    assert gc(place, keep=0.0).steps == 0
    clock.now += 2
    assert gc(place, keep=0.0).steps == 1


def test_a_run_in_progress_keeps_what_it_uses_for_as_long_as_it_lives(place, clock, monkeypatch):
    record, before = record_of(1, {"file": place.put_bytes(b"x")}), record_of(2, {})
    place.finish_step(before)
    clock.now += 90 * DAY
    with in_use(place):
        (name,) = (name for name in place.store.held if name.startswith("running/"))
        place.finish_step(record)
        clock.now += 60 * DAY
        place.store.put_bytes(name.replace("began", "alive"), b"")  # as it says every five minutes
        assert gc(place).steps == 1  # `before`
        assert place.step(record.key) == record
        clock.now += 60 * DAY
        place.store.put_bytes(name.replace("began", "alive"), b"")
        assert gc(place).steps == 0
    assert not any(name.startswith("running/") for name in place.store.held)
    clock.now += 31 * DAY
    assert gc(place).steps == 1


def test_a_run_that_was_killed_keeps_nothing_after_an_hour(place, clock):
    place.store.put_bytes("running/abc.began", b"")
    place.finish_step(record_of(1, {}))
    clock.now += 31 * DAY
    went = gc(place)
    assert (went.steps, went.leftovers) == (1, 1)
    assert place.store.held == {}


def test_a_run_says_that_it_is_alive(place, monkeypatch):
    monkeypatch.setattr(collection, "ALIVE_EVERY_SECONDS", 0.01)
    with in_use(place):
        deadline = time.monotonic() + 10
        while not any(name.endswith(".alive") for name in place.store.held):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert place.store.held == {}


def test_records_that_cannot_be_read_go_and_other_files_are_left_alone(place, clock):
    place.store.put_bytes(step_name("0" * 64), b"damaged")
    for name in ("objects/ab/README", "steps/notes.txt", "seen/model.json", "mlflow.db"):
        place.store.put_bytes(name, b"mine")
    clock.now += 31 * DAY
    assert gc(place).steps == 1
    assert sorted(place.store.held) == ["mlflow.db", "objects/ab/README", "seen/model.json", "steps/notes.txt"]


def test_what_killed_writers_left_goes_after_a_day(place, clock):
    place.store.put_bytes("objects/ab/.partial-0123456789abcdef", b"half")
    assert gc(place).leftovers == 0
    clock.now += 1.1 * DAY
    went = gc(place)
    assert (went.leftovers, went.nbytes) == (1, 4)


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
        record = record_of(number, {"file": place.put_bytes(b"object %d" % made)}, inputs)
        place.finish_step(record)
        records.append((number, record))
    clock.now = end
    return [record for _, record in sorted(records, key=lambda each: each[0])]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=GRAPHS)
def test_exactly_the_needed_and_the_young_stay_and_nothing_dangles(tmp_path_factory, clock, graph):
    place = Workspace(MemoryStore(tmp_path_factory.mktemp("m"), clock))
    records = build(place, clock, graph)
    needed = Needed.by(
        [{record.key: record} for record, (_, _, wanted, _) in zip(records, graph, strict=True) if wanted]
    )
    gc(place, needed)
    for record, (_, age, wanted, _) in zip(records, graph, strict=True):
        assert (place.record(record.key) is not None) == (wanted or age <= 30)
        if wanted or age <= 30:
            assert place.step(record.key) == record
    assert all(place.holds(place_reference(place, sha256)) for sha256 in needed.objects)
    # What is left is named by a record that is left, read by one that is needed, or young itself.
    last = look(place)
    assert collectable(last, needed, KEEP).objects == frozenset()


def place_reference(place: Workspace, sha256: str):
    from bivlm.workspace import Reference, object_name

    data = place.store.held.get(object_name(sha256), (b"", 0))[0]
    return Reference(sha256=sha256, nbytes=len(data))


class Waits(Exception):
    """The other worker waits for the collection, which stands still while it does."""


@pytest.fixture
def waiting(monkeypatch):
    def sleep(_seconds):
        raise Waits

    monkeypatch.setattr(workspace_module.time, "sleep", sleep)


def disturbed(place: Workspace, wanted: StepRecord, data: bytes, moment: int, does_it_again: bool) -> bool:
    """A collection before whose request `moment` another worker looks `wanted` up, or makes it again from `data`.

    Whatever it was given, or has finished, is there afterwards. Returns whether the collection had that many requests.
    """
    held: list[StepRecord | None] = []

    def do_it_again() -> StepRecord:
        assert place.put_bytes(data) == wanted.outputs["file"]
        place.finish_step(wanted)
        return wanted

    def other_worker(request: int) -> None:
        if request >= moment and not held:
            held.append(place.step(wanted.key))
            if does_it_again:
                held[0] = None
                with suppress(Waits):
                    held[0] = do_it_again()

    place.store.requests = 0
    place.store.before = other_worker
    gc(place)
    place.store.before = lambda request: None
    if held == [None] and does_it_again:
        held[0] = do_it_again()  # it has waited
    if held and held[0] is not None:
        assert place.step(wanted.key) == wanted
    return bool(held)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    graph=st.lists(GRAPHS.flatmap(st.sampled_from), min_size=1, max_size=3),
    moment=st.integers(1, 60),
    which=st.integers(0, 2),
    does_it_again=st.booleans(),
)
def test_a_step_that_is_found_or_done_again_at_any_moment_of_it_stays_whole(
    tmp_path_factory, clock, waiting, graph, moment, which, does_it_again
):
    place = Workspace(MemoryStore(tmp_path_factory.mktemp("m"), clock))
    records = build(place, clock, graph)
    made, wanted = graph[which % len(graph)][0], records[which % len(graph)]
    disturbed(place, wanted, b"object %d" % made, moment, does_it_again)


@pytest.mark.parametrize("does_it_again", [False, True])
@pytest.mark.parametrize("days_since_it_was_found", [None, 50])
def test_each_moment_of_the_collection_of_one_step(
    tmp_path_factory, clock, waiting, days_since_it_was_found, does_it_again
):
    """Every moment in turn, because only one or two of them are those that the order of the requests is for."""
    moments = 0
    while True:
        place = Workspace(MemoryStore(tmp_path_factory.mktemp("m"), clock))
        wanted = record_of(1, {"file": place.put_bytes(b"x")})
        place.finish_step(wanted)
        if days_since_it_was_found is not None:
            clock.now += 50 * DAY
            place.step(wanted.key)
        clock.now += 50 * DAY
        if not disturbed(place, wanted, b"x", moments + 1, does_it_again):
            break
        moments += 1
    assert moments > 20


@pytest.mark.parametrize("does_it_again", [False, True])
@pytest.mark.parametrize("of_two_steps", [False, True])
def test_each_moment_of_another_worker_in_which_everything_is_collected(
    tmp_path_factory, clock, of_two_steps, does_it_again
):
    """The other way round: before one request of the worker a whole collection happens. The object may be that of a
    needed step too, so that only the record goes."""
    moments = 0
    while True:
        place = Workspace(MemoryStore(tmp_path_factory.mktemp("m"), clock))
        wanted = record_of(1, {"file": place.put_bytes(b"x")})
        kept = record_of(2, wanted.outputs)
        for record in (wanted, kept) if of_two_steps else (wanted,):
            place.finish_step(record)
        needed = Needed.by([{kept.key: kept}]) if of_two_steps else NOTHING
        clock.now += 50 * DAY
        collected = []

        def everything_goes(request: int, place=place, needed=needed, moment=moments + 1, collected=collected) -> None:
            if request >= moment and not collected:
                collected.append(gc(place, needed))

        place.store.requests, place.store.before = 0, everything_goes
        found = place.step(wanted.key)
        if does_it_again:
            assert place.put_bytes(b"x") == wanted.outputs["file"]
            place.finish_step(wanted)
        place.store.before = lambda request: None
        assert found in (None, wanted)
        if found or does_it_again:
            assert place.step(wanted.key) == wanted
        if not collected:
            break
        moments += 1
    assert moments > 3


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=GRAPHS, moment=st.integers(1, 120))
def test_broken_off_at_any_moment_it_leaves_no_record_without_its_objects(tmp_path_factory, clock, graph, moment):
    class Killed(BaseException):
        pass

    def kill(request: int) -> None:
        if request >= moment:
            raise Killed

    place = Workspace(MemoryStore(tmp_path_factory.mktemp("m"), clock))
    records = build(place, clock, graph)
    needed = Needed.by(
        [{record.key: record} for record, (_, _, wanted, _) in zip(records, graph, strict=True) if wanted]
    )
    place.store.requests, place.store.before = 0, kill
    with suppress(Killed):
        gc(place, needed)
    place.store.before = lambda request: None
    for record, (_, age, wanted, _) in zip(records, graph, strict=True):
        if place.record(record.key) is not None:
            assert all(place.holds(reference) for reference in record.outputs.values())
        else:
            assert not wanted and age > 30
    gc(place, needed)
    left = {key for key, step in look(place).steps.items() if step.record is not None}
    assert left == {r.key for r, (_, age, wanted, _) in zip(records, graph, strict=True) if wanted or age <= 30}


# Imported once, then forked for every attempt. Prints how many steps were left after each.
KILLED = textwrap.dedent("""
    import os, random, signal, sys, time
    from bivlm.collection import collect, look
    from bivlm.retention import Needed, collectable
    from bivlm.workspace import Workspace

    place, needed, kills = Workspace.open(sys.argv[1]), Needed(frozenset(sys.argv[2].split(","))), int(sys.argv[3])
    for kill in [True] * kills + [False]:
        pid = os.fork()
        if not pid:
            first = look(place)
            collect(place, collectable(first, needed, 0.0), first, needed, 0.0)
            os._exit(0)
        if kill:
            time.sleep(random.uniform(0.0, 0.12))
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        steps = look(place).steps
        for key, step in steps.items():
            assert step.record is not None, key
            assert all(place.has(reference) for reference in step.record.outputs.values()), key
        print(len(steps), flush=True)
""")


def test_killed_by_the_system_again_and_again_it_keeps_what_is_needed_whole(tmp_path):
    """A real folder and SIGKILL: no record ever misses an object, and in the end only what is needed is left."""
    place = Workspace.open(tmp_path / "workspace")
    outputs = (
        {"file": place.put_bytes(b"file %d" % i), "of two": place.put_bytes(b"%d" % (i // 2))} for i in range(200)
    )
    records = [record_of(number, made) for number, made in enumerate(outputs)]
    for record in records:
        place.finish_step(record)
    long_ago = time.time() - 10 * DAY
    for path in (tmp_path / "workspace").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    needed = records[::5]
    arguments = [str(tmp_path / "workspace"), ",".join(record.key for record in needed), "12"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"steps left after each kill: {done.stdout.split()}")
    last = look(place)
    assert set(last.steps) == {record.key for record in needed}
    assert set(last.objects) == {reference.sha256 for record in needed for reference in record.outputs.values()}
    assert all(place.step(record.key) == record for record in needed)


def test_a_folder_and_s3_are_collected_alike(location, monkeypatch):
    place = Workspace.open(location)
    kept, gone = (record_of(i, {"file": place.put_bytes(b"%d" % i)}) for i in range(2))
    for record in (kept, gone):
        place.finish_step(record)
    place.fetch(gone.outputs["file"])
    first = look(place)
    assert collectable(first, NOTHING, 0.0).steps == frozenset()
    monkeypatch.setattr(collection, "_now", lambda store: time.time() + 3 * 3600)
    first, needed = look(place), Needed.by([{kept.key: kept}])
    went = collect(place, collectable(first, needed, 0.0), first, needed, 0.0)
    assert (went.steps, went.objects, went.put_back) == (1, 1, 0)
    assert place.step(kept.key) == kept
    assert place.step(gone.key) is None and not place.has(gone.outputs["file"])
    if location.startswith("s3://"):
        assert not (place.local / "objects" / gone.outputs["file"].sha256[:2] / gone.outputs["file"].sha256).exists()


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    place = Workspace.open(tmp_path)
    place.finish_step(record_of(1, {"file": place.put_bytes(b"x")}))

    def denied(*_arguments):
        raise PermissionError(13, "Permission denied", "steps")

    monkeypatch.setattr("bivlm.stores.folder.os.scandir", denied)
    with pytest.raises(PermissionError):
        look(place)


def test_the_steps_of_a_lineage_record_are_read_whatever_else_it_says():
    record = record_of(1, {})
    content = {"format": 99, "from a later version": True, "steps": {record.key: record.model_dump(mode="json")}}
    assert lineage_steps(canonical_json(content), "x") == {record.key: record}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"steps": {}}', b'{"steps": {"a": 1}}', b"\xff"],
)
def test_a_lineage_record_that_cannot_be_read_is_refused(content):
    with pytest.raises(InputError, match="version small/3: not a lineage record"):
        lineage_steps(content, "version small/3")


def test_a_lineage_record_whose_steps_have_other_keys_is_refused():
    record = record_of(1, {})
    content = canonical_json({"steps": {digest({}): record.model_dump(mode="json")}})
    with pytest.raises(InputError, match="another key"):
        lineage_steps(content, "x")
