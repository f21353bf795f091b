"""Events of base models to Prefect's server, and what the server knows of the runs that answer them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, Operator
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.runtime import flow_run as runtime

from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.states import COMPLETED, GATE_STATE, INPUT_STATE
from tasks.watching.looking import LONGEST_PAUSE
from tasks.watching.watch_lists import DEFAULT_RECIPE, Revision

FLOW = "on-base-model"
# States that end the matter: the same event again would end in the same way.
OUTCOMES = (COMPLETED, GATE_STATE, INPUT_STATE)
_UNFINISHED = sorted(set(StateType) - TERMINAL_STATES)
_PAGE = 200


@dataclass(frozen=True)
class Answer:
    """What Prefect knows of a revision's runs.

    Attributes:
        at_work: the id of one that waits or works. A run that began, or was given to a worker, more than a day ago
            does not count: one that was lost with its machine seems to work for ever.
        outcome: the state of one that ended the matter.
        last: when the last one ended, or began if it has not ended.
    """

    at_work: str | None = None
    outcome: str | None = None
    last: datetime | None = None


@task(name="emit-event", **OVER_NETWORK)
def emit_found(revision: Revision) -> None:
    """Send the event of `revision` to the server, and return once the server has taken it.

    Prefect's `emit_event` leaves the sending to a thread, which does not say how it went.
    """
    sent = {"id": str(revision.event_id), "occurred": datetime.now(UTC).isoformat(), "related": []}
    with get_client(sync_client=True) as client:
        client.request("POST", "/events", json=[revision.event() | sent]).raise_for_status()


def tag_run(revision: Revision) -> None:
    """Tag the flow run that calls with the id of the revision's event: by this tag `read_answers` finds it."""
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(runtime.id), tags=sorted({*runtime.tags, str(revision.event_id)}))


@task(name="read-answers", **OVER_NETWORK)
def read_answers(revisions: Sequence[Revision]) -> dict[Revision, Answer]:
    """Return what became of each revision so far: by the tag of its runs, or by the parameters of those to come."""
    by_event = {str(each.event_id): each for each in revisions}
    runs: dict[Revision, list[FlowRun]] = {each: [] for each in revisions}
    if runs:
        with get_client(sync_client=True) as client:
            for run in _runs(client, list(by_event)):
                given = {"recipe": DEFAULT_RECIPE} | run.parameters
                asked = Revision(*(str(given.get(key)) for key in ("model_id", "revision", "recipe")))
                for revision in {by_event[tag] for tag in run.tags if tag in by_event} or {asked} & runs.keys():
                    runs[revision].append(run)
    return {revision: _answer(those) for revision, those in runs.items()}


def _runs(client: SyncPrefectClient, tags: list[str]) -> Iterator[FlowRun]:
    """Yield the runs of `FLOW` that have one of the tags, or have not ended."""
    wanted = {"operator": Operator.or_, "tags": {"any_": tags}, "state": {"type": {"any_": _UNFINISHED}}}
    for page in itertools.count():
        runs = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": [FLOW]}}),
            flow_run_filter=FlowRunFilter.model_validate(wanted),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=_PAGE,
            offset=page * _PAGE,
        )
        yield from runs
        if len(runs) < _PAGE:
            return


def _answer(runs: Sequence[FlowRun]) -> Answer:
    at_work, outcome, moments = None, None, []
    for run in runs:
        moment = run.end_time or run.start_time
        if moment is None and run.state is not None and run.state.is_pending():
            moment = run.state.timestamp
        if run.state_type in _UNFINISHED and (moment is None or datetime.now(UTC) - moment < LONGEST_PAUSE):
            at_work = str(run.id)
        if run.state_name in OUTCOMES:
            outcome = run.state_name
        moments += [moment] if moment else []
    return Answer(at_work, outcome, max(moments, default=None))
