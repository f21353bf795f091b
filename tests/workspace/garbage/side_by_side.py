"""Functions that use one `MemoryStore` at a time, request by request, in an order that is chosen: so every order can be
tried. They are greenlets of one thread, so that between two requests of one of them only what was chosen happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from greenlet import getcurrent, greenlet
from stored_in_memory import MemoryStore

Choose = Callable[[list[str]], str]


def side_by_side(
    store: MemoryStore,
    works: Mapping[str, Callable[[], Any]],
    choose: Choose,
    pass_time: Callable[[float], None],
    killed_after: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Run `works` until all have ended; returns their results by name.

    ``choose(names)`` says which of those that could go on does so up to its next request. One that sleeps goes on once
    another one has; ``pass_time(seconds)`` is called when all who are left sleep. After so many requests as
    `killed_after` says, one goes no further, and its ``finally`` is not done either.
    """
    each = {name: greenlet(work) for name, work in works.items()}
    left = {name: (killed_after or {}).get(name, -1) for name in works}
    asleep: dict[str, float] = {}
    results: dict[str, Any] = {}
    store.before = lambda request: getcurrent().parent.switch(None) if getcurrent() in each.values() else None
    try:
        while going := [name for name in each if not each[name].dead and left[name] != 0]:
            awake = [name for name in going if name not in asleep]
            if not awake:
                pass_time(min(asleep.values()))
                asleep.clear()
                continue
            name = choose(awake) if len(awake) > 1 else awake[0]
            value = each[name].switch()
            asleep.clear()  # what one does may be what the others sleep for
            if each[name].dead:
                results[name] = value
            elif value is not None:
                asleep[name] = value
            else:
                left[name] -= 1
        return results
    finally:
        store.before = lambda request: None
        _never_ended.extend(each.values())


_never_ended: list[greenlet] = []  # one that is let go of would do its ``finally`` after all


def sleep(seconds: float) -> None:
    """Instead of `time.sleep`, for functions that are run side by side."""
    getcurrent().parent.switch(seconds)


class InTurn:
    """Instead of `ThreadPoolExecutor`, for functions that are run side by side: all in the thread that asks."""

    def __init__(self, at_once: int) -> None:
        pass

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    map = staticmethod(map)


def one_before(first: str, moment: int, then: str) -> Choose:
    """`first` for `moment` requests, then `then` as far as it gets."""
    done = 0

    def choose(names: list[str]) -> str:
        nonlocal done
        done += 1
        return first if done <= moment else then

    return choose


def every_order(attempt: Callable[[Choose], None]) -> Iterator[str]:
    """Call `attempt` with a `choose` for every order in turn; yields each, as the first letters of the names."""
    path: list[int] = []
    while True:
        widths: list[int] = []
        order: list[str] = []

        def choose(names: list[str], widths: list[int] = widths, order: list[str] = order) -> str:
            if len(widths) == len(path):
                path.append(0)
            chosen = names[path[len(widths)]]
            widths.append(len(names))
            order.append(chosen[0])
            return chosen

        attempt(choose)
        yield "".join(order)
        while path and path[-1] == widths[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1
