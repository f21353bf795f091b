"""Events of base models to Prefect's server, and whether somebody is at work on one."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

from prefect import task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort

from tasks.runtime.policy import OVER_NETWORK
from tasks.watching.looking import LONGEST_PAUSE
from tasks.watching.watch_lists import DEFAULT_RECIPE, Revision

FLOW = "on-base-model"
_UNFINISHED = [
    StateType.SCHEDULED,
    StateType.PENDING,
    StateType.RUNNING,
    StateType.PAUSED,
    StateType.CANCELLING,
]
_PAGE = 200


@task(name="emit-event", **OVER_NETWORK)
def emit_found(revision: Revision) -> None:
    """Hand the server the event of `revision`; returns once it has taken it.

    By a request of its own: Prefect's `emit_event` leaves the sending to a thread, which does not say how it went.
    """
    event = {
        **revision.event(),
        "id": str(revision.event_id),
        "occurred": datetime.now(UTC).isoformat(),
        "related": [],
    }
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[event]).raise_for_status()


@task(name="find-runs-at-work", **OVER_NETWORK)
def runs_at_work() -> dict[Revision, str]:
    """The ids of flow runs that are to compress a base model, or are at it, by what they were asked for.

    A run that began, or was handed to a worker, more than a day ago does not count: a worker that was lost with its
    machine leaves one that seems to be at it for ever.
    """
    found: dict[Revision, str] = {}
    with get_client(sync_client=True) as client:
        for page in itertools.count():
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
                flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNFINISHED))),
                sort=FlowRunSort.EXPECTED_START_TIME_ASC,
                limit=_PAGE,
                offset=page * _PAGE,
            )
            for run in runs:
                begun = run.start_time
                if begun is None and run.state is not None and run.state.is_pending():
                    begun = run.state.timestamp
                if begun is not None and datetime.now(UTC) - begun >= LONGEST_PAUSE:
                    continue
                given = {"recipe": DEFAULT_RECIPE} | run.parameters
                found[Revision(*(str(given.get(key)) for key in ("model_id", "revision", "recipe")))] = str(run.id)
            if len(runs) < _PAGE:
                break
    return found
