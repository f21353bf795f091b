"""Machines that share a store and no locks take turns, also when one of them is killed."""

from __future__ import annotations

import random
import threading
import time

import pytest
from stored_in_memory import MemoryStore

from bivlm.workspace import locks as turns
from bivlm.workspace.locks import one_machine_at_a_time, turn
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.opening import open_store

WHAT = "ab" * 32


@pytest.fixture
def fast(monkeypatch):
    """A store whose clock counts tenths of a second, and patience to match."""
    times = {
        "ALIVE_EVERY_SECONDS": 0.05,
        "DEAD_AFTER_SECONDS": 1.0,
        "LOOK_EVERY_SECONDS": 0.02,
        "SETTLED_SECONDS": 0.25,
    }
    for name, value in times.items():
        monkeypatch.setattr(turns, name, value)


@pytest.fixture
def store(tmp_path, fast):
    return MemoryStore(tmp_path, lambda: int(time.time() * 10) / 10)


def machine(number: int) -> str:
    return f"{number:012x}"


def test_of_eight_machines_one_works_at_a_time_and_each_does(store):
    at_work, most, done, waited = [], [], [], []

    def work(number: int) -> None:
        time.sleep(random.uniform(0, 0.3))
        with turn(store, WHAT, machine(number), lambda: waited.append(number)):
            at_work.append(number)
            most.append(len(at_work))
            time.sleep(0.05)
            at_work.remove(number)
            done.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == list(range(8))
    assert set(most) == {1}
    assert 0 < len(waited) == len(set(waited)) < 8
    assert store.held == {}


def test_a_machine_that_was_killed_is_not_waited_for_for_long(store):
    store.put_bytes(f"turns/{WHAT}/{machine(1)}-{'0' * 16}.asked", b"")
    began = time.monotonic()
    with turn(store, WHAT, machine(2), lambda: None):
        waited = time.monotonic() - began
        assert not any("-0000" in name for name in store.held)
    assert 0.8 < waited < 10


def test_what_the_same_machine_left_when_it_was_killed_is_not_waited_for_at_all(store):
    store.put_bytes(f"turns/{WHAT}/{machine(1)}-{'0' * 16}.asked", b"")
    with turn(store, WHAT, machine(1), lambda: pytest.fail("it waited")):
        pass
    assert store.held == {}


def test_one_that_works_for_long_keeps_its_turn(store):
    ended = []

    def work() -> None:
        with turn(store, WHAT, machine(1), lambda: None):
            time.sleep(2.0)
            ended.append(time.monotonic())

    first = threading.Thread(target=work)
    first.start()
    time.sleep(0.5)
    with turn(store, WHAT, machine(2), lambda: None):
        assert ended and time.monotonic() >= ended[0]
    first.join()


def test_one_that_was_taken_for_dead_asks_again(store):
    """Its name is struck off while it waits, as after a long pause."""
    waits = threading.Event()

    def strike_off() -> None:
        waits.wait(10)
        for name in [name for name in store.held if f"/{machine(2)}-" in name]:
            store.delete(name)

    other = threading.Thread(target=strike_off)
    other.start()
    store.put_bytes(f"turns/{WHAT}/{machine(1)}-{'0' * 16}.asked", b"")
    with turn(store, WHAT, machine(2), waits.set):
        other.join()
    assert store.held == {}


def test_other_work_is_not_waited_for(store):
    with turn(store, WHAT, machine(1), lambda: None), turn(store, "cd" * 32, machine(2), lambda: pytest.fail("waited")):
        pass


def test_two_machines_with_a_workspace_in_s3(s3_location, fast, monkeypatch, tmp_path):
    monkeypatch.setattr(turns, "SETTLED_SECONDS", 1.1)
    first = Workspace(open_store(s3_location))
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
    second = Workspace(open_store(s3_location))
    monkeypatch.setattr(turns, "DEAD_AFTER_SECONDS", 20.0)
    order, waits = [], threading.Event()

    def work() -> None:
        with one_machine_at_a_time(second, WHAT, waits.set):
            order.append("second")

    with one_machine_at_a_time(first, WHAT):
        other = threading.Thread(target=work)
        other.start()
        assert waits.wait(30)
        time.sleep(0.5)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]


def test_a_folder_needs_no_turns_because_its_locks_are_seen(tmp_path):
    place = Workspace.open(tmp_path)
    with one_machine_at_a_time(place, WHAT, lambda: pytest.fail("waited")):
        assert not (tmp_path / "turns").exists()
