"""Collecting what nobody needs: what stays, what goes, also when it is killed."""

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
from old_steps import DAY, GRAPHS, KEEP, NOTHING, build, gc, record_of

from bivlm.errors import InputError
from bivlm.workspace import garbage as collection
from bivlm.workspace.garbage import (
    LEAST_SECONDS,
    Needed,
    _discard_step,
    collect,
    collectable,
    in_use,
    lineage_steps,
    look,
)
from bivlm.workspace.hashing import canonical_json, digest
from bivlm.workspace.steps import Reference, Workspace, WorkspaceError, object_name, step_name, used_name


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
    """It was silent for more than an hour, as on a machine that was suspended."""
    place.store.put_bytes("running/abc.began", b"")
    clock.now += DAY
    used = record_of(1, {"file": place.put_bytes(b"x")})
    place.finish_step(used)
    clock.now += 40 * DAY
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert (marked.steps, marked.leftovers) == ({used.key}, {"running/abc.began"})
    place.store.put_bytes("running/abc.alive", b"")
    went = collect(place, marked, first, NOTHING, KEEP, at_once=1)
    assert (went.steps, went.objects, went.leftovers) == (0, 0, 0)
    assert place.step(used.key) == used and "running/abc.began" in place.store.held


def test_a_step_that_grows_too_old_between_the_looks_stays(place, clock):
    record = record_of(1, {})
    place.finish_step(record)
    clock.now += KEEP
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert marked.steps == frozenset()
    clock.now += 1
    assert collect(place, marked, first, NOTHING, KEEP, at_once=1).steps == 0
    assert place.record(record.key) == record


def test_an_object_whose_steps_go_otherwise_meanwhile_stays_until_the_next_time(place, clock):
    """It was not marked, though nothing names it by the time that steps have gone."""
    shared = {"file": place.put_bytes(b"x")}
    gone, needed = record_of(1, shared), record_of(2, shared)
    for record in (gone, needed):
        place.finish_step(record)
    clock.now += 31 * DAY
    first = look(place)
    keeps = Needed(frozenset([needed.key]))
    marked = collectable(first, keeps, KEEP)
    assert (marked.steps, marked.objects) == ({gone.key}, frozenset())
    place.store.delete(step_name(needed.key))
    went = collect(place, marked, first, keeps, KEEP, at_once=1)
    assert (went.steps, went.objects) == (1, 0)
    assert gc(place).objects == 1


def test_what_mlflow_has_come_to_need_by_the_second_asking_stays(place, clock):
    record = record_of(1, {"file": place.put_bytes(b"x")})
    place.finish_step(record)
    clock.now += 31 * DAY
    first = look(place)
    marked = collectable(first, NOTHING, KEEP)
    assert marked.steps == {record.key}
    went = collect(place, marked, first, Needed.by([{record.key: record}]), KEEP, at_once=1)
    assert (went.steps, went.objects) == (0, 0)
    assert place.step(record.key) == record


@pytest.mark.parametrize("name", [step_name, used_name])
def test_a_step_that_was_done_or_found_after_the_second_look_is_not_taken_away_for_a_moment(place, clock, name):
    record = record_of(1, {})
    place.finish_step(record)
    clock.now += 31 * DAY
    place.store.put_bytes(name(record.key), place.store.held[step_name(record.key)][0])
    before = dict(place.store.held)
    assert not _discard_step(place.store, record.key, clock.now - KEEP)
    assert place.store.held == before  # with their times


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=GRAPHS)
def test_exactly_the_needed_and_the_young_stay_and_nothing_dangles(new_place, clock, graph):
    place = new_place()
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
    data = place.store.held.get(object_name(sha256), (b"", 0))[0]
    return Reference(sha256=sha256, nbytes=len(data))


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


# Imported once, then forked for every attempt, which stops itself after so many removals, whatever its threads are at,
# and is killed. Prints how many steps were left after each.
KILLED = textwrap.dedent("""
    import itertools, os, random, signal, sys
    from bivlm.workspace.garbage import collect, look
    from bivlm.workspace.garbage import Needed, collectable
    from bivlm.workspace.stores.folder import FolderStore
    from bivlm.workspace.steps import Workspace

    place, needed, kills = Workspace.open(sys.argv[1]), Needed(frozenset(sys.argv[2].split(","))), int(sys.argv[3])
    delete = FolderStore.delete

    def gc(stops_after):
        first = look(place)
        removals = itertools.count(1)

        def counted(store, name):
            if next(removals) == stops_after:
                os.kill(os.getpid(), signal.SIGSTOP)
            delete(store, name)

        FolderStore.delete = counted
        collect(place, collectable(first, needed, 0.0), first, needed, 0.0)

    for kill in [True] * kills + [False]:
        pid = os.fork()
        if not pid:
            gc(random.randint(1, 40) if kill else None)
            os._exit(0)
        status = os.waitpid(pid, os.WUNTRACED)[1]
        assert os.WIFSTOPPED(status) == kill, status
        if kill:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        steps = look(place).steps
        for key, step in steps.items():
            assert step.record is not None, key
            assert all(place.has(reference) for reference in step.record.outputs.values()), key
        print(len(steps), flush=True)
""")


def test_killed_by_the_system_again_and_again_it_keeps_what_is_needed_whole(tmp_path):
    """A real folder and SIGKILL: no record ever misses an object, and in the end only what is needed is left. Every
    kill falls into the midst of a collection."""
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
