"""A deployment started through Prefect's API, and followed to its end from somewhere else: what CI does.

Only the API is asked, at ``PREFECT_API_URL`` with ``PREFECT_API_KEY`` (or ``PREFECT_API_AUTH_STRING``): whoever follows
needs no way to the worker, to MLflow or to S3.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    LogFilter,
    LogFilterFlowRunId,
    LogFilterTimestamp,
    TaskRunFilter,
    TaskRunFilterId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

from bivlm.addresses import without_credentials
from bivlm.errors import GateNotPassed, InputError, describe
from bivlm.names import check_address, check_proxies
from bivlm.workspace.hashing import digest
from flows.progress import PAGE_KEY

_LOGS = 200  # of one answer
_LATE = timedelta(seconds=30)  # by which a line of the log may come after a later one
_LINK = re.compile(r"\((https?://[^\s()]+)\)")
_REFUSED = re.compile(rf"\b{GateNotPassed.__name__}\b")
_TRACEBACK = "Traceback (most recent call last):\n"
_LOGS_COME = 3.0  # seconds within which a process that has ended its run hands the server what it logged
_PASSING = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Ended:
    """How a flow run ended.

    Attributes:
        state: the name of its last state, such as ``Completed``.
        completed: whether that is well.
        refused: whether it ended so because a gate was not passed.
        message: what the state says.
        pages: addresses in MLflow that it published, newest last.
    """

    state: str
    completed: bool
    refused: bool
    message: str
    pages: list[str] = field(default_factory=list)


def start(deployment: str, wanted: Mapping[str, Any], *, once: bool) -> tuple[FlowRun, str]:
    """(the flow run, its page in Prefect's UI) of ``FLOW/DEPLOYMENT`` with `wanted` as parameters.

    Values of None are left to the deployment. With `once` the same deployment and parameters give the run that was
    started before, whatever became of it; who asks (``trigger``) does not make it another. Raises `InputError` for a
    deployment that is not there, parameters that it does not take, a key that is not accepted.
    """
    given = {key: value for key, value in wanted.items() if value is not None}
    with _asking() as client:
        found = _deployment(client, deployment)
        properties = (found.parameter_openapi_schema or {}).get("properties", {})
        if "model" in given and "model" not in properties and "model_id" in properties:
            given["model_id"] = given.pop("model")
        if "trigger" not in properties:
            given.pop("trigger", None)
        unknown = sorted(given.keys() - properties.keys())
        if unknown:
            expected = ", ".join(properties) or "nothing"
            raise InputError(f"deployment {deployment}: takes no {unknown[0]!r}; expected some of {expected}")
        asked = {key: value for key, value in given.items() if key != "trigger"}
        key = f"bivlm trigger {digest([deployment, asked])}" if once else None
        run = client.create_flow_run_from_deployment(
            found.id, parameters=given, idempotency_key=key, tags=["bivlm", "bivlm-trigger"]
        )
    return run, url_for("flow-run", obj_id=run.id) or str(run.id)


def follow(
    run_id: UUID,
    tell: Callable[[str], None],
    *,
    poll_seconds: float = 3.0,
    patience_seconds: float = 900.0,
    timeout_seconds: float | None = None,
) -> Ended:
    """Tell the run's states and log lines as they come, those of runs within it included, until it has ended.

    A server that does not answer is asked again for `patience_seconds`. Raises ConnectionError after that, TimeoutError
    if the run takes longer than `timeout_seconds`: it goes on all the same.
    """
    begun = answered = time.monotonic()
    log = _Log(tell)
    shown = None
    for _ in itertools.count():
        try:
            with get_client(sync_client=True) as client:
                run = client.read_flow_run(run_id)
                within = _within(client, run_id)
                state = run.state
                if state is not None and (state.name, state.type) != shown:
                    shown = (state.name, state.type)
                    tell(f"{run.name}: {state.name}")
                runs = [run_id, *(each.id for each in within)]
                log.show(client, runs)
                if state is not None and state.is_final():
                    time.sleep(_LOGS_COME)
                    log.show(client, runs)
                    return Ended(
                        state=state.name,
                        completed=state.is_completed(),
                        refused=not state.is_completed() and _REFUSED.search(state.message or "") is not None,
                        message=state.message or "",
                        pages=_pages(client, runs),
                    )
            answered = time.monotonic()
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if isinstance(error, PrefectHTTPStatusError) and error.response.status_code not in _PASSING:
                raise
            if time.monotonic() - answered > patience_seconds:
                raise ConnectionError(
                    f"Prefect's server has not answered for {patience_seconds:.0f} s ({describe(error)}); "
                    "the run may go on"
                ) from error
        if timeout_seconds is not None and time.monotonic() - begun > timeout_seconds:
            raise TimeoutError(f"flow run {run_id} has not ended within {timeout_seconds:.0f} s; it goes on")
        time.sleep(poll_seconds)
    raise AssertionError("unreachable")


class _Log:
    """Log lines in their order, each once, though some come late."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._seen: set[UUID] = set()
        self._tasks: dict[UUID, str] = {}
        self._newest: datetime | None = None

    def show(self, client: SyncPrefectClient, runs: list[UUID]) -> None:
        since = LogFilterTimestamp(after_=self._newest - _LATE) if self._newest else None
        wanted = LogFilter(flow_run_id=LogFilterFlowRunId(any_=runs), timestamp=since)
        for page in itertools.count():
            lines = client.read_logs(wanted, limit=_LOGS, offset=page * _LOGS, sort=LogSort.TIMESTAMP_ASC)
            new = [line for line in lines if line.id not in self._seen]
            self._name(client, {line.task_run_id for line in new if line.task_run_id})
            for line in new:
                self._seen.add(line.id)
                self._newest = max(self._newest or line.timestamp, line.timestamp)
                task = f"{self._tasks[line.task_run_id]}: " if line.task_run_id in self._tasks else ""
                self._tell(f"{line.timestamp:%H:%M:%S} {task}{_without_frames(line.message)}")
            if len(lines) < _LOGS:
                return

    def _name(self, client: SyncPrefectClient, tasks: set[UUID]) -> None:
        """Ask for the names of tasks; one that the server does not know yet stays without."""
        if unknown := tasks - self._tasks.keys():
            asked = TaskRunFilter(id=TaskRunFilterId(any_=list(unknown)))
            self._tasks |= {each.id: each.name for each in client.read_task_runs(task_run_filter=asked, limit=_LOGS)}


def _without_frames(message: str) -> str:
    """A log line's message without its traceback's frames, which Prefect's page of the run has; the error stays."""
    head, traceback, _ = message.partition(_TRACEBACK)
    if not traceback:
        return message
    # Of a chain the last one says how it ended; its frames are all indented, what follows them is the error.
    return head + re.sub(r"\A(?:  .*\n)*", "", message.rpartition(_TRACEBACK)[2])


@contextmanager
def _asking() -> Iterator[SyncPrefectClient]:
    """A client, whose refusals are told as what the caller can mend."""
    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set; expected the address of Prefect's API, as https://HOST/api")
    check_address(PREFECT_API_URL.value(), "PREFECT_API_URL")
    check_proxies()
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{_server()} refuses (HTTP {status}): expected PREFECT_API_KEY or, with a server of "
                "one's own, PREFECT_API_AUTH_STRING"
            ) from None
        if status in (409, 422):
            raise InputError(f"the parameters are refused: {_detail(error.response)}") from None
        raise
    except httpx.TransportError as error:
        raise ConnectionError(f"no Prefect server answers at {_server()}: {describe(error)}") from error


def _server() -> str:
    return without_credentials(PREFECT_API_URL.value())


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    if name.count("/") != 1 or not all(name.split("/")):
        raise InputError(f"deployment {name!r}: expected FLOW/DEPLOYMENT, as on-base-model/on-request")
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        raise InputError(
            f"deployment {name}: not on the server at {_server()}; `prefect deploy --all` puts it there"
        ) from None


def _within(client: SyncPrefectClient, run_id: UUID) -> list[FlowRun]:
    """The runs that were started within a run, and within those."""
    found: list[FlowRun] = []
    level = [run_id]
    while level:
        parents = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=level))
        children = client.read_flow_runs(flow_run_filter=parents, limit=_LOGS)
        found += children
        level = [child.id for child in children]
    return found


def _pages(client: SyncPrefectClient, runs: list[UUID]) -> list[str]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=runs), key=ArtifactFilterKey(any_=[PAGE_KEY]))
    artifacts = client.read_artifacts(artifact_filter=wanted)
    oldest_first = sorted(artifacts, key=lambda each: each.created)
    return list(dict.fromkeys(link for each in oldest_first for link in _LINK.findall(str(each.data))))


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json().get("detail", response.text))
    except ValueError:
        return response.text
