"""Run a flow in the command's own process, with a temporary Prefect server if no other is configured."""

from __future__ import annotations

import atexit
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import psutil
from prefect.settings import (
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    temporary_settings,
)

from bivlm.addresses import sqlite_address, without_credentials
from bivlm.errors import describe
from bivlm.names import check_address, check_proxies

OWNER_VARIABLE = "BIVLM_OWNER"  # in the environment of a temporary server: the process that it belongs to
_TEMPORARY_SERVER = "PREFECT__SERVER_EPHEMERAL"  # Prefect's own mark
_REQUEST_SECONDS = 300.0  # for one answer of a temporary server: it waits for the same cores as the run
_ENDS = 5  # how many servers that end before they listen are replaced: another process may have taken the port


@contextmanager
def temporary_server() -> Iterator[None]:
    """Track flow runs with a temporary server of this process within the block, unless another is configured.

    Such a server ends with its process; one whose process was killed lives on, and is ended here. Its flow runs send no
    heartbeats: these report a crash to a server that outlives the run, and ending them delays the end of every flow run
    by up to a second. (The environment cannot turn them off: it accepts numbers only.) Raises ConnectionError if the
    configured server does not answer, or a temporary one does not within
    ``PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS``.
    """
    check_proxies()
    if server := PREFECT_API_URL.value():
        _check_that_it_answers(server)
        yield
        return
    end_orphaned_servers()
    os.environ[OWNER_VARIABLE] = _owner(psutil.Process())
    try:
        with temporary_settings(_settings_of_a_temporary_server()):
            if PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value():
                _start_server(PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value())
            yield
    finally:
        del os.environ[OWNER_VARIABLE]


def _settings_of_a_temporary_server() -> dict[Any, Any]:
    settings: dict[Any, Any] = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    if PREFECT_API_REQUEST_TIMEOUT.value() == 60:  # the default
        settings[PREFECT_API_REQUEST_TIMEOUT] = _REQUEST_SECONDS
    # Prefect makes the address of its database of its home's path, as text, which loses what follows a ?.
    if "?" in str(PREFECT_HOME.value()) and "PREFECT_SERVER_DATABASE_CONNECTION_URL" not in os.environ:
        database = sqlite_address(PREFECT_HOME.value() / "prefect.db", "aiosqlite")
        settings[PREFECT_SERVER_DATABASE_CONNECTION_URL] = database
    return settings


def _start_server(seconds: float) -> None:
    """Start the server that Prefect's clients in this process find when no other is configured, unless it runs.

    Prefect would start it at the first request, and on a busy machine fail in several ways: it gives a server that has
    taken a connection 5 s to answer; it waits to the end for one that is dead; it draws ports from 1,000, and takes
    another process's server at the same port for its own; a second thread takes the server for ready while the first
    still waits for it.
    """
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    if server.running:
        return
    begun = time.monotonic()
    try:
        for left in reversed(range(_ENDS)):
            server.port = _free_port()
            server.server_process = server._run_uvicorn_command()
            if _is_up(server, begun + seconds):
                break
            if not left:
                raise ConnectionError(
                    f"the temporary Prefect server ended with code {server.server_process.returncode} before it "
                    "answered; PREFECT_SERVER_LOGGING_LEVEL=INFO shows why"
                )
    except BaseException as error:
        server.stop()
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            raise ConnectionError(
                f"the temporary Prefect server timed out: it did not answer within {seconds:.0f} s (load "
                f"{os.getloadavg()[0]:.1f}); run it again on a less busy machine, set a higher "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS, or PREFECT_API_URL to a server that runs"
            ) from error
        raise
    server.running = True
    atexit.register(server.stop)


def _is_up(server: Any, deadline: float) -> bool:
    """Wait until the server answers; whether it does, or has ended. Raises TimeoutError at the deadline.

    Asked only once this very process listens: another process's server may be at the port.
    """
    process = psutil.Process(server.server_process.pid)
    while server.server_process.poll() is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        with suppress(psutil.Error, httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            listening = any(
                each.status == psutil.CONN_LISTEN and each.laddr.port == server.port
                for each in process.net_connections("tcp")
            )
            if listening and _answers(server.api_url, left):
                return True
        time.sleep(0.1)
    return False


def _answers(api_url: str, seconds: float) -> bool:
    # On this machine: never through a proxy, whatever the environment says.
    return httpx.get(f"{api_url}/health", timeout=seconds, trust_env=False).status_code == httpx.codes.OK


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _check_that_it_answers(server: str) -> None:
    check_address(server, "PREFECT_API_URL")
    try:
        httpx.get(f"{server}/health", timeout=10)
    except httpx.TransportError as error:
        raise ConnectionError(
            f"PREFECT_API_URL is {without_credentials(server)}, where no Prefect server answers ({describe(error)}); "
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
