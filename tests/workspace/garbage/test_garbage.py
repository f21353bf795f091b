"""Collecting what nobody needs: what stays, what goes, also when it is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from old_steps import DAY, GRAPHS, KEEP, NOTHING, build, done, gc, record_of

from bivlm.errors import InputError
from bivlm.workspace import garbage as collection
from bivlm.workspace.garbage import (
    LEAST_SECONDS,
    _discard_step,
    collect,
    collectable,
    in_use,
    lineage_steps,
    look,
    needed_by,
)
from bivlm.workspace.hashing import canonical_json, digest
from bivlm.workspace.steps import Workspace, WorkspaceError, object_name, step_name, used_name


def test_a_step_that_is_needed_stays_with_what_it_made_and_read_however_old(place, clock):
    read = place.put_bytes(b"read")
    kept, gone = done(place, 1, b"kept", {"statistics": read.sha256}), done(place, 2, b"gone")
    clock.now += 1000 * DAY
    went = gc(place, needed_by([{kept.key: kept}]))
    assert (went.steps, went.objects) == (1, 1)
    assert place.step(kept.key) == kept and place.holds(read)
    assert place.step(gone.key) is None and not place.holds(gone.outputs["file"])


def test_what_two_records_of_one_step_made_stays(place, clock):
    """As a step that is not exact may have, in the lineage of two versions."""
    first, second = done(place, 1, b"first"), done(place, 1, b"second")
    clock.now += 1000 * DAY
    assert gc(place, needed_by([{first.key: first}, {second.key: second}])).objects == 0


def test_an_object_of_two_steps_stays_as_long_as_one_of_them(place, clock):
    kept, _gone = done(place, 1), done(place, 2)
    clock.now += 31 * DAY
    went = gc(place, frozenset({step_name(kept.key)}))
    assert (went.steps, went.objects) == (1, 0)
    assert place.step(kept.key) == kept


def test_what_was_found_again_counts_as_used_then(place, clock):
    record = done(place, 1)
    clock.now += 29 * DAY
    assert place.step(record.key) == record
    clock.now += 29 * DAY
    assert gc(place).steps == 0
    clock.now += 2 * DAY
    assert gc(place).steps == 1
    assert place.store.held == {}


def test_looking_at_a_record_is_no_use_of_its_step(place, clock):
    record = done(place, 1)
    clock.now += 31 * DAY
    place.record(record.key)
    assert gc(place).steps == 1


def test_what_was_used_just_now_stays_whatever_is_asked_for(place, clock):
    done(place, 1)
    clock.now += LEAST_SECONDS - 1
    assert gc(place, keep=0.0).steps == 0
    clock.now += 2
    assert gc(place, keep=0.0).steps == 1


def test_a_run_in_progress_keeps_what_it_uses_for_as_long_as_it_lives(place, clock):
    done(place, 2, b"before")
    clock.now += 90 * DAY
    with in_use(place):
        (name,) = (name for name in place.store.held if name.startswith("running/"))
        record = done(place, 1)
        for going in (1, 0):  # the one before
            clock.now += 60 * DAY
            place.store.put_bytes(name.replace("began", "alive"), b"")  # as it says every five minutes
            assert gc(place).steps == going
            assert place.record(record.key) == record and place.holds(record.outputs["file"])
    assert not any(name.startswith("running/") for name in place.store.held)
    clock.now += 31 * DAY
    assert gc(place).steps == 1


def test_a_run_that_was_killed_keeps_nothing_after_an_hour(place, clock):
    done(place, 1)
    clock.now += 31 * DAY
    place.store.put_bytes("running/abc.began", b"")
    clock.now += 3599
    assert len(look(place).began) == 1
    clock.now += 2
    assert look(place).began == ()
    clock.now += DAY
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


def test_a_turn_stays_for_as_long_as_its_machine_says_that_it_is_alive(place, clock):
    """The name that was put down a day ago is needed as well as the one that is written again and again."""
    turn = f"turns/{'ab' * 32}/{'1' * 12}-{'2' * 16}"
    place.store.put_bytes(f"{turn}.asked", b"")
    clock.now += 25 * 3600
    place.store.put_bytes(f"{turn}.alive", b"")
    assert gc(place).leftovers == 0
    assert sorted(place.store.held) == [f"{turn}.alive", f"{turn}.asked"]
    clock.now += 25 * 3600
    assert gc(place).leftovers == 2
    assert place.store.held == {}


def test_a_store_that_does_not_show_what_was_put_is_not_collected(place, monkeypatch):
    """Its clock is not known, and that of this machine may be any time ahead."""
    monkeypatch.setattr(place.store, "entry", lambda name: None)
    with pytest.raises(WorkspaceError, match="is not there"):
        look(place)


def test_a_run_that_is_seen_to_live_by_the_second_look_keeps_what_it_uses(place, clock):
    """It was silent for more than a day, as on a machine that was suspended."""
    place.store.put_bytes("running/abc.began", b"")
    clock.now += DAY
    used = done(place, 1)
    clock.now += 40 * DAY
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert marked == names_of(used) | {"running/abc.began"}
    place.store.put_bytes("running/abc.alive", b"")
    went = collect(place, marked, first, NOTHING, KEEP, at_once=1)
    assert (went.steps, went.objects, went.leftovers) == (0, 0, 0)
    assert place.step(used.key) == used and "running/abc.began" in place.store.held


def test_a_step_that_grows_too_old_between_the_looks_stays(place, clock):
    record = done(place, 1)
    clock.now += KEEP
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert marked == frozenset()
    clock.now += 1
    assert collect(place, marked, first, NOTHING, KEEP, at_once=1).steps == 0
    assert place.record(record.key) == record


def test_an_object_whose_steps_go_otherwise_meanwhile_stays_until_the_next_time(place, clock):
    """It was not marked, though nothing names it by the time that steps have gone."""
    gone, needed = done(place, 1), done(place, 2)
    clock.now += 31 * DAY
    first = look(place)
    keeps = frozenset({step_name(needed.key)})
    marked = collectable(first, keeps, KEEP)
    assert marked == {step_name(gone.key)}
    place.store.delete(step_name(needed.key))
    went = collect(place, marked, first, keeps, KEEP, at_once=1)
    assert (went.steps, went.objects) == (1, 0)
    assert gc(place).objects == 1


def test_what_mlflow_has_come_to_need_by_the_second_asking_stays(place, clock):
    record = done(place, 1)
    clock.now += 31 * DAY
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert marked == names_of(record)
    went = collect(place, marked, first, needed_by([{record.key: record}]), KEEP, at_once=1)
    assert (went.steps, went.objects) == (0, 0)
    assert place.step(record.key) == record


@pytest.mark.parametrize("name", [step_name, used_name])
def test_a_step_that_was_done_or_found_after_the_second_look_is_not_taken_away_for_a_moment(place, clock, name):
    record = done(place, 1)
    clock.now += 31 * DAY
    place.store.put_bytes(name(record.key), place.store.held[step_name(record.key)][0])
    before = dict(place.store.held)
    assert not _discard_step(place.store, step_name(record.key), clock.now - KEEP)
    assert place.store.held == before  # with their times


def test_records_that_cannot_be_read_go_and_other_files_are_left_alone(place, clock):
    place.store.put_bytes(step_name("0" * 64), b"damaged")
    others = ("mlflow.db", "objects/ab/README", "running/README.md", "seen/model.json", "steps/notes.txt")
    for name in others:
        place.store.put_bytes(name, b"mine")
    clock.now += 31 * DAY
    assert gc(place).steps == 1
    assert tuple(sorted(place.store.held)) == others


def test_what_killed_writers_left_goes_after_a_day(place, clock):
    for name in ("objects/ab/.partial-0123456789abcdef", f"doomed/{'a' * 64}", "running/ab.clock"):
        place.store.put_bytes(name, b"half")
    assert gc(place).leftovers == 0
    clock.now += 1.1 * DAY
    went = gc(place)
    assert (went.leftovers, went.nbytes) == (3, 12)


def names_of(record) -> set[str]:
    return {step_name(record.key), *(object_name(each.sha256) for each in record.outputs.values())}


def staying(records, graph) -> tuple[frozenset[str], list]:
    """The names that the wanted steps of `graph` need, and the records that are wanted or young."""
    wanted = [record for record, (_, _, wanted, _) in zip(records, graph, strict=True) if wanted]
    young = [record for record, (_, age, _, _) in zip(records, graph, strict=True) if age <= 30]
    return needed_by([{record.key: record} for record in wanted]), wanted + young


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=GRAPHS)
def test_exactly_the_needed_and_the_young_stay_and_nothing_dangles(new_place, clock, graph):
    place = new_place()
    records = build(place, clock, graph)
    needed, stay = staying(records, graph)
    gc(place, needed)
    for record in records:
        assert (place.record(record.key) is not None) == (record in stay)
        if record in stay:
            assert place.step(record.key) == record
    assert needed <= place.store.held.keys()
    # What is left is named by a record that is left, read by one that is needed, or young itself.
    last = look(place)
    assert last.objects & collectable(last, needed, KEEP) == frozenset()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=GRAPHS, moment=st.integers(1, 120))
def test_broken_off_at_any_moment_it_leaves_no_record_without_its_objects(new_place, clock, graph, moment):
    class Killed(BaseException):
        pass

    def kill(request: int) -> None:
        if request >= moment:
            raise Killed

    place = new_place()
    records = build(place, clock, graph)
    needed, stay = staying(records, graph)
    place.store.requests, place.store.before = 0, kill
    with suppress(Killed):
        gc(place, needed)
    place.store.before = lambda request: None
    for record in records:
        if place.record(record.key) is not None:
            assert all(place.holds(reference) for reference in record.outputs.values())
        else:
            assert record not in stay
    gc(place, needed)
    left = {name for name, record in look(place).steps.items() if record is not None}
    assert left == {step_name(record.key) for record in stay}


# Given a workspace, after how many removals to stop, and what is needed.
COLLECTION = """
import itertools, os, signal, sys
from bivlm.workspace.garbage import collect, collectable, look
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.folder import FolderStore

delete, removals, stops_after = FolderStore.delete, itertools.count(1), int(sys.argv[2])

def counted(store, name):
    if next(removals) == stops_after:
        os.kill(os.getpid(), signal.SIGSTOP)
    delete(store, name)

FolderStore.delete = counted
place, needed = Workspace.open(sys.argv[1]), frozenset(sys.argv[3:])
first = look(place)
collect(place, collectable(first, needed, 0.0), first, needed, 0.0)
"""


def test_killed_by_the_system_again_and_again_it_keeps_what_is_needed_whole(tmp_path):
    """A real folder and SIGKILL: no record ever misses an object, and in the end only what is needed is left. Every
    kill falls into the midst of a collection."""
    folder = tmp_path / "workspace"
    place, records = Workspace.open(folder), []
    for number in range(200):
        outputs = {"file": place.put_bytes(b"file %d" % number), "of two": place.put_bytes(b"%d" % (number // 2))}
        records.append(record_of(number, outputs))
        place.finish_step(records[-1])
    long_ago = time.time() - 10 * DAY
    for path in folder.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    stay, left = records[::5], []
    needed = frozenset(step_name(record.key) for record in stay)
    for kill in [True] * 12 + [False]:
        stops_after = str(random.randint(1, 40) if kill else 0)
        process = subprocess.Popen([sys.executable, "-c", COLLECTION, folder, stops_after, *needed])
        if kill:  # once it has stopped itself, whatever its threads are at
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            process.kill()
        assert process.wait() == (-signal.SIGKILL if kill else 0)
        steps = look(place).steps
        for name, record in steps.items():
            assert record is not None, name
            assert all(place.has(reference) for reference in record.outputs.values()), name
        left.append(len(steps))
    print(f"steps left after each kill: {left}")
    last = look(place)
    assert last.steps.keys() == needed
    assert last.objects == {name for record in stay for name in names_of(record)} - needed
    assert all(place.step(record.key) == record for record in stay)


def test_a_folder_and_s3_are_collected_alike(location, monkeypatch):
    place = Workspace.open(location)
    kept, gone = done(place, 0, b"0"), done(place, 1, b"1")
    place.fetch(gone.outputs["file"])
    first = look(place)
    assert collectable(first, NOTHING, 0.0) == frozenset()
    monkeypatch.setattr(collection, "_now", lambda store: time.time() + 3 * 3600)
    first, needed = look(place), needed_by([{kept.key: kept}])
    went = collect(place, collectable(first, needed, 0.0), first, needed, 0.0)
    assert (went.steps, went.objects, went.put_back) == (1, 1, 0)
    assert place.step(kept.key) == kept
    assert place.step(gone.key) is None and not place.has(gone.outputs["file"])
    if location.startswith("s3://"):
        assert not (place.local / "objects" / gone.outputs["file"].sha256[:2] / gone.outputs["file"].sha256).exists()


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    place = Workspace.open(tmp_path)
    done(place, 1)

    def denied(*_arguments):
        raise PermissionError(13, "Permission denied", "steps")

    monkeypatch.setattr("bivlm.workspace.stores.folder.os.scandir", denied)
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
