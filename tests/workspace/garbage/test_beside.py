"""A collection and a worker at one workspace, request by request, in every order that matters: nothing that the worker
was given, or has finished, goes."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from old_steps import DAY, GRAPHS, KEEP, NOTHING, build, done, gc, record_of
from side_by_side import InTurn, every_order, one_before, side_by_side

from bivlm.workspace import garbage as collection
from bivlm.workspace.garbage import LEAST_SECONDS, _discard_object, _discard_step, needed_by
from bivlm.workspace.steps import StepRecord, Workspace, doomed_name, object_name, step_name

WITH_FIXTURES = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(autouse=True)
def in_turn(monkeypatch):
    monkeypatch.setattr(collection, "ThreadPoolExecutor", InTurn)


def an_old_step(place: Workspace, clock) -> StepRecord:
    record = done(place, 1)
    clock.now += 50 * DAY
    return record


def found_or_done_again(place: Workspace, record: StepRecord, data: bytes = b"x") -> StepRecord:
    """What a worker does with a step."""
    found = place.step(record.key)
    if found is None:
        assert place.put_bytes(data) == record.outputs["file"]
        place.finish_step(record)
    return found or record


# Seconds that the machine's clock is ahead of the store's.
@pytest.mark.parametrize(("ahead", "stored"), [*((ahead, b"x") for ahead in (0, 360, 3660, 2 * DAY, -3540)), (0, b"y")])
def test_no_order_loses_an_object_that_is_put_while_it_is_collected(new_place, clock, ahead, stored):
    clock.ahead = ahead

    def attempt(choose) -> None:
        place = new_place()
        reference = place.put_bytes(b"x")
        name = object_name(reference.sha256)
        place.store.put_bytes(name, stored)
        clock.now += 50 * DAY
        works = {
            "collection": lambda: _discard_object(place.store, name, clock.now - KEEP),
            "worker": lambda: place.put_bytes(b"x"),
        }
        side_by_side(place.store, works, choose, clock.pass_time)
        assert place.holds(reference)

    assert len(list(every_order(attempt))) > 100


def test_no_order_loses_the_record_of_a_step_that_was_found(new_place, clock):
    found = []

    def attempt(choose) -> None:
        place = new_place()
        record = an_old_step(place, clock)
        works = {
            "collection": lambda: _discard_step(place.store, step_name(record.key), clock.now - KEEP),
            "worker": lambda: place.step(record.key),
        }
        found.append(side_by_side(place.store, works, choose, clock.pass_time)["worker"])
        assert found[-1] is None or place.record(record.key) == found[-1]

    assert len(list(every_order(attempt))) > 100
    assert {each is None for each in found} == {True, False}


@settings(max_examples=300, **WITH_FIXTURES)
@given(seed=st.integers(0, 2**32), begins=st.integers(0, 40), days_since_it_was_found=st.sampled_from([None, 50]))
def test_a_step_that_is_found_or_done_again_beside_a_collection_stays_whole(
    new_place, clock, seed, begins, days_since_it_was_found
):
    """All of both, in orders by chance: the worker begins after so many requests of the collection."""
    place, chance, done = new_place(), random.Random(seed), 0
    record = an_old_step(place, clock)
    if days_since_it_was_found is not None:
        place.step(record.key)
        clock.now += days_since_it_was_found * DAY

    def choose(names: list[str]) -> str:
        nonlocal done
        done += 1
        return "collection" if done <= begins else chance.choice(names)

    works = {"collection": lambda: gc(place), "worker": lambda: found_or_done_again(place, record)}
    side_by_side(place.store, works, choose, clock.pass_time)
    assert place.step(record.key) == record


@settings(max_examples=300, **WITH_FIXTURES)
@given(
    graph=st.lists(GRAPHS.flatmap(st.sampled_from), min_size=1, max_size=3),
    moment=st.integers(0, 60),
    which=st.integers(0, 2),
)
def test_one_of_several_steps_that_is_found_or_done_again_at_any_moment_stays_whole(
    new_place, clock, graph, moment, which
):
    place = new_place()
    records = build(place, clock, graph)
    made, wanted = graph[which % len(graph)][0], records[which % len(graph)]
    works = {
        "collection": lambda: gc(place),
        "worker": lambda: found_or_done_again(place, wanted, b"object %d" % made),
    }
    side_by_side(place.store, works, one_before("collection", moment, "worker"), clock.pass_time)
    assert place.step(wanted.key) == wanted


@pytest.mark.parametrize("first", ["collection", "worker"])
@pytest.mark.parametrize("days_since_it_was_found", [None, 50])
@pytest.mark.parametrize("of_two_steps", [False, True])
def test_each_moment_of_one_in_which_the_other_does_all(new_place, clock, first, days_since_it_was_found, of_two_steps):
    """The object may be that of a needed step too, so that only the record goes."""
    then = {"collection": "worker", "worker": "collection"}[first]
    for moment in range(80):
        place = new_place()
        record = an_old_step(place, clock)
        kept = record_of(2, record.outputs)
        if of_two_steps:
            place.finish_step(kept)
        needed = needed_by([{kept.key: kept}]) if of_two_steps else NOTHING
        if days_since_it_was_found is not None:
            place.step(record.key)
            clock.now += days_since_it_was_found * DAY
        works = {
            "collection": lambda place=place, needed=needed: gc(place, needed),
            "worker": lambda place=place, record=record: found_or_done_again(place, record),
        }
        side_by_side(place.store, works, one_before(first, moment, then), clock.pass_time)
        assert place.step(record.key) == record, moment
        assert not of_two_steps or place.step(kept.key) == kept


def test_what_was_found_keeps_its_bytes_though_the_collection_is_killed_before_its_record_is_put_back(new_place, clock):
    """At any moment of a collection a worker finds the step, at any later one the collection is killed; the next one
    leaves what the worker works with."""
    without_record = 0
    for moment in range(30):
        for killed in range(moment, moment + 12):
            place = new_place()
            record = an_old_step(place, clock)
            works = {
                "collection": lambda place=place: gc(place),
                "worker": lambda place=place, record=record: place.step(record.key),
            }
            choose = one_before("collection", moment, "worker")
            results = side_by_side(place.store, works, choose, clock.pass_time, {"collection": killed})
            if results["worker"] is not None:
                without_record += place.record(record.key) is None
                gc(place)
                assert place.holds(record.outputs["file"])
    assert without_record > 0


def test_what_is_found_has_its_bytes_though_the_step_is_collected_and_has_other_ones_when_it_is_done_again(
    new_place, clock
):
    """As a step that is not exact may; at any moment of the worker that looks it up."""
    for moment in range(12):
        place = new_place()
        record = an_old_step(place, clock)

        def collected_and_done_again(place=place) -> None:
            gc(place)
            if place.step(record_of(1, {}).key) is None:
                place.finish_step(record_of(1, {"file": place.put_bytes(b"y")}))

        works = {"worker": lambda place=place, key=record.key: place.step(key), "other": collected_and_done_again}
        found = side_by_side(place.store, works, one_before("worker", moment, "other"), clock.pass_time)["worker"]
        assert found is None or all(place.holds(reference) for reference in found.outputs.values())


@pytest.mark.parametrize(
    ("age", "ahead", "waits"), [(0, 0, 300), (LEAST_SECONDS, 0, 0), (LEAST_SECONDS, DAY, 0), (LEAST_SECONDS, -DAY, 0)]
)
def test_what_a_killed_collection_says_of_an_object_is_waited_for_until_it_is_five_minutes_old(
    place, clock, age, ahead, waits
):
    reference = place.put_bytes(b"x")
    clock.now += 50 * DAY
    place.store.put_bytes(doomed_name(reference.sha256), b"")
    clock.now += age
    began, clock.ahead = clock.now, ahead

    def pass_time(seconds: float) -> None:
        clock.pass_time(seconds)
        assert clock.now - began < waits + 2

    side_by_side(place.store, {"worker": lambda: place.put_bytes(b"x")}, one_before("", 0, ""), pass_time)
    assert max(0, waits - 1) <= clock.now - began <= (waits + 2 if waits else 0)
    assert place.holds(reference)
