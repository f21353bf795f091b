"""Start a deployment through Prefect's API and follow its run from another machine, as CI does.

Only the API is used, at ``PREFECT_API_URL`` with ``PREFECT_API_KEY`` (or ``PREFECT_API_AUTH_STRING``): the follower
needs no access to the worker, to MLflow or to S3.
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
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.utilities.urls import url_for

from bivlm.addresses import without_credentials
from bivlm.errors import InputError, describe
from bivlm.names import check_address, check_proxies
from bivlm.workspace.hashing import digest
from flows.progress import PAGE_KEY
from tasks.runtime.policy import is_passing

_LOGS = 200  # of one answer
_LATE = timedelta(seconds=30)  # by which a line of the log may come after a later one
_LINK = re.compile(r"\((https?://[^\s()]+)\)")
_TRACEBACK = "Traceback (most recent call last):\n"
_LOGS_COME = 3.0  # seconds within which a process that has ended its run hands the server what it logged


@dataclass(frozen=True)
class Ended:
    """The last state of a flow run, and the addresses in MLflow that it published, newest last."""

    state: State
    pages: list[str]


def start(deployment: str, wanted: Mapping[str, Any], *, once: bool) -> tuple[FlowRun, str]:
    """Start ``FLOW/DEPLOYMENT`` with `wanted` as parameters; return the flow run and its page in Prefect's UI.

    Values of None are left to the deployment. With `once` the same deployment and parameters return the earlier run,
    whatever became of it; who asks (``trigger``) makes no difference. Raises `InputError` for an unknown deployment,
    parameters that it does not take, or a key that is not accepted.
    """
    given = {key: value for key, value in wanted.items() if value is not None}
    if deployment.count("/") != 1 or not all(deployment.split("/")):
        raise InputError(f"deployment {deployment!r}: expected FLOW/DEPLOYMENT, as on-base-model/on-request")
    with _client(deployment) as client:
        found = client.read_deployment_by_name(deployment)
        properties = (found.parameter_openapi_schema or {}).get("properties", {})
        if "model" in given and "model" not in properties and "model_id" in properties:
            given["model_id"] = given.pop("model")
        if "trigger" not in properties:
            given.pop("trigger", None)
        if unknown := sorted(given.keys() - properties.keys()):
            expected = ", ".join(properties) or "nothing"
            raise InputError(f"deployment {deployment}: takes no {unknown[0]!r}; expected some of {expected}")
        asked = {key: value for key, value in given.items() if key != "trigger"}
        key = f"bivlm trigger {digest([deployment, asked])}" if once else None
        run = client.create_flow_run_from_deployment(
            found.id, parameters=given, idempotency_key=key, tags=["bivlm", "bivlm-trigger"]
        )
    return run, url_for("flow-run", obj_id=run.id) or str(run.id)


@contextmanager
def _client(deployment: str) -> Iterator[SyncPrefectClient]:
    """Yield a client whose refusals are `InputError`; raises ConnectionError if no server answers."""
    if not PREFECT_API_URL.value():
        raise InputError("PREFECT_API_URL is not set; expected the address of Prefect's API, as https://HOST/api")
    check_address(PREFECT_API_URL.value(), "PREFECT_API_URL")
    check_proxies()
    server = without_credentials(PREFECT_API_URL.value())
    try:
        with get_client(sync_client=True) as client:
            yield client
    except ObjectNotFound:
        raise InputError(
            f"deployment {deployment}: not on the server at {server}; `prefect deploy --all` puts it there"
        ) from None
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{server} refuses (HTTP {status}): expected PREFECT_API_KEY or, with a server of "
                "one's own, PREFECT_API_AUTH_STRING"
            ) from None
        if status in (409, 422):
            raise InputError(f"the parameters are refused: {_detail(error.response)}") from None
        raise
    except httpx.TransportError as error:
        raise ConnectionError(f"no Prefect server answers at {server}: {describe(error)}") from error


def follow(
    run_id: UUID,
    tell: Callable[[str], None],
    *,
    poll_seconds: float = 3.0,
    patience_seconds: float = 900.0,
    timeout_seconds: float | None = None,
) -> Ended:
    """Report a run's states and log lines, and those of runs within it, until it has ended.

    A server that does not answer is asked again for `patience_seconds`. Raises ConnectionError after that, and
    TimeoutError if the run takes longer than `timeout_seconds`; the run itself continues.
    """
    begun = answered = time.monotonic()
    view = _View(run_id, tell)
    while True:
        try:
            with get_client(sync_client=True) as client:
                if ended := view.refresh(client):
                    return ended
            answered = time.monotonic()
        except httpx.HTTPError as error:
            if not is_passing(error):
                raise
            if time.monotonic() - answered > patience_seconds:
                raise ConnectionError(
                    f"Prefect's server has not answered for {patience_seconds:.0f} s ({describe(error)}); "
                    "the run may go on"
                ) from error
        if timeout_seconds is not None and time.monotonic() - begun > timeout_seconds:
            raise TimeoutError(f"flow run {run_id} has not ended within {timeout_seconds:.0f} s; it goes on")
        time.sleep(poll_seconds)


@dataclass
class _View:
    """What was reported of a run so far: its last state and its log lines, each once, though some come late."""

    run_id: UUID
    tell: Callable[[str], None]
    state: str | None = None
    lines: set[UUID] = field(default_factory=set)
    tasks: dict[UUID, str] = field(default_factory=dict)
    newest: datetime | None = None

    def refresh(self, client: SyncPrefectClient) -> Ended | None:
        """Report what is new; return how the run ended, or None."""
        run = client.read_flow_run(self.run_id)
        runs = [self.run_id, *_within(client, self.run_id)]
        if run.state is None:
            return None
        if run.state.name != self.state:
            self.state = run.state.name
            self.tell(f"{run.name}: {self.state}")
        self._show_log(client, runs)
        if not run.state.is_final():
            return None
        time.sleep(_LOGS_COME)
        self._show_log(client, runs)
        return Ended(run.state, _pages(client, runs))

    def _show_log(self, client: SyncPrefectClient, runs: list[UUID]) -> None:
        since = {"after_": self.newest - _LATE} if self.newest else None
        wanted = LogFilter.model_validate({"flow_run_id": {"any_": runs}, "timestamp": since})
        for page in itertools.count():
            lines = client.read_logs(wanted, limit=_LOGS, offset=page * _LOGS, sort=LogSort.TIMESTAMP_ASC)
            new = [line for line in lines if line.id not in self.lines]
            # A task that the server does not know yet stays without a name.
            if unknown := {line.task_run_id for line in new if line.task_run_id} - self.tasks.keys():
                asked = TaskRunFilter.model_validate({"id": {"any_": list(unknown)}})
                self.tasks |= {each.id: each.name for each in client.read_task_runs(task_run_filter=asked, limit=_LOGS)}
            for line in new:
                self.lines.add(line.id)
                self.newest = max(self.newest or line.timestamp, line.timestamp)
                task = f"{self.tasks[line.task_run_id]}: " if line.task_run_id in self.tasks else ""
                self.tell(f"{line.timestamp:%H:%M:%S} {task}{_without_frames(line.message)}")
            if len(lines) < _LOGS:
                return


def _within(client: SyncPrefectClient, run_id: UUID) -> Iterator[UUID]:
    """Yield the runs that were started within a run, and within those."""
    level = [run_id]
    while level:
        parents = FlowRunFilter.model_validate({"parent_flow_run_id": {"any_": level}})
        level = [each.id for each in client.read_flow_runs(flow_run_filter=parents, limit=_LOGS)]
        yield from level


def _pages(client: SyncPrefectClient, runs: list[UUID]) -> list[str]:
    wanted = ArtifactFilter.model_validate({"flow_run_id": {"any_": runs}, "key": {"any_": [PAGE_KEY]}})
    oldest_first = sorted(client.read_artifacts(artifact_filter=wanted), key=lambda each: each.created)
    return list(dict.fromkeys(link for each in oldest_first for link in _LINK.findall(str(each.data))))


def _without_frames(message: str) -> str:
    """Return a log line without its traceback's frames, which Prefect's page of the run shows; the error stays."""
    head, traceback, _ = message.partition(_TRACEBACK)
    if not traceback:
        return message
    # Of a chain the last one says how it ended; its frames are all indented, what follows them is the error.
    return head + re.sub(r"\A(?:  .*\n)*", "", message.rpartition(_TRACEBACK)[2])


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json().get("detail", response.text))
    except ValueError:
        return response.text
