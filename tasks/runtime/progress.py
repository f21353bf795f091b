"""Report the progress of tasks, without knowing who shows it."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Progress(Protocol):
    """Shows progress; called from several threads."""

    def advance(self, stage: str, units: float = 1.0) -> None:
        """Note that `units` more of a stage are done."""

    def expect(self, stage: str, units: int) -> None:
        """Note that a stage has `units`, which could not be known at the beginning."""


class _Silent:
    def advance(self, stage: str, units: float = 1.0) -> None:
        """Do nothing: nobody listens, for example in a worker process."""

    def expect(self, stage: str, units: int) -> None:
        """Do nothing."""


# Prefect's thread pool copies the context into its threads, so that tasks there find the flow's listener.
_listener: ContextVar[Progress] = ContextVar("progress", default=_Silent())  # noqa: B039


def advance(stage: str, units: float = 1.0) -> None:
    """Report that `units` more of `stage` are done."""
    _listener.get().advance(stage, units)


def expect(stage: str, units: int) -> None:
    """Report how many units a stage has."""
    _listener.get().expect(stage, units)


class Restartable:
    """Progress of work that may begin again, with smaller batches or a lower rate; the bar never goes back."""

    def __init__(self, stage: str) -> None:
        self._stage, self._reached = stage, 0.0

    def reach(self, units: float) -> None:
        """Report that `units` of the stage are done by now."""
        if units > self._reached:
            advance(self._stage, units - self._reached)
            self._reached = units


@contextmanager
def shown_by(progress: Progress):
    """Send progress to `progress` within the block and in the tasks it starts in this process."""
    token = _listener.set(progress)
    try:
        yield progress
    finally:
        _listener.reset(token)
