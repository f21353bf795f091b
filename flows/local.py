"""A flow that a command runs here, in its own process, with a temporary Prefect server if no other is configured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from bivlm.names import without_credentials

OWNER_VARIABLE = "BIVLM_OWNER"  # in the environment of a temporary server: the process that it belongs to
_TEMPORARY_SERVER = "PREFECT__SERVER_EPHEMERAL"  # Prefect's own mark


@contextmanager
def temporary_server() -> Iterator[None]:
    """Within this block flow runs are tracked by a temporary server of this process, unless another is configured.

    Such a server ends with its process; one whose process was killed lives on, and is ended here. Its flow runs send no
    heartbeats: these tell a server that outlives the run when it has crashed, and ending them holds up the end of every
    flow run by up to a second. (The environment cannot turn them off: it accepts numbers only.) Raises ConnectionError
    if the configured server does not answer.
    """
    if server := PREFECT_API_URL.value():
        _check_that_it_answers(server)
        yield
        return
    end_orphaned_servers()
    os.environ[OWNER_VARIABLE] = _owner(psutil.Process())
    try:
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        del os.environ[OWNER_VARIABLE]


def _check_that_it_answers(server: str) -> None:
    try:
        httpx.get(f"{server}/health", timeout=10)
    except httpx.TransportError as error:
        raise ConnectionError(
            f"PREFECT_API_URL is {without_credentials(server)}, where no Prefect server answers ({error}); "
            "start it, or unset the variable to use a temporary one"
        ) from error


def end_orphaned_servers() -> list[int]:
    """End temporary servers whose process is gone; returns their process ids. Those of others are left alone."""
    ended = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()  # readable for processes of the same user only
            owner = environment.get(OWNER_VARIABLE)
            # The mark is inherited by the server alone: it is set while one is started, and not by its owner itself.
            if owner is not None and environment.get(_TEMPORARY_SERVER) and not _lives(owner):
                process.terminate()
                ended.append(process.pid)
    return ended


def _owner(process: psutil.Process) -> str:
    # Process ids are used again; together with the time of its start one is unique.
    return f"{process.pid}:{process.create_time()}"


def _lives(owner: str) -> bool:
    pid, _, started = owner.partition(":")
    try:
        # A set clock shifts the times by as much as it was wrong.
        return abs(psutil.Process(int(pid)).create_time() - float(started)) < 60
    except psutil.NoSuchProcess:
        return False
