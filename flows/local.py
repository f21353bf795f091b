"""Settings for a flow that a command runs here, in its own process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings


@contextmanager
def no_idle_heartbeats() -> Iterator[None]:
    """Within this block flow runs send no heartbeats, unless a server is configured.

    Heartbeats tell a server that outlives the run when it has crashed. A temporary server ends with the command and
    nobody asks it, but ending the heartbeats holds up the end of every flow run by up to a second. The environment
    cannot turn them off: it accepts numbers only.
    """
    if PREFECT_API_URL.value():
        yield
        return
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield
