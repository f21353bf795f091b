"""The trigger of a flow run in a few words, for the lineage of what it makes."""

from __future__ import annotations

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.runtime import flow_run as runtime

from tasks.tracking.champions import LONGEST, one_line

BY_HAND = "by hand"


def trigger_of_run(said: str | None) -> str:
    """Return what the caller `said`, else what Prefect knows: a schedule, an automation, a deployment; else by hand.

    A run within another flow's run has the trigger of the outermost, with its name. Raises `InputError` if `said` is
    not one line.
    """
    if said is not None:
        return one_line("trigger", said)
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return BY_HAND
    with get_client(sync_client=True) as client:
        own = context.flow_run
        outermost = own if own.parent_task_run_id is None else client.read_flow_run(runtime.root_flow_run_id)
        words = in_words(outermost, client)
    within = "" if outermost.id == own.id else f", in {outermost.name}"
    # Names are anybody's.
    return "".join(letter for letter in words + within if letter.isprintable())[:LONGEST]


def in_words(run: FlowRun, client: SyncPrefectClient) -> str:
    """Return what started a run: the schedule or the automation of a deployment, a deployment, or somebody."""
    if run.deployment_id is None:
        return BY_HAND
    deployment = f"deployment {client.read_deployment(run.deployment_id).name}"
    creator = run.created_by
    if creator is None or creator.type not in ("SCHEDULE", "AUTOMATION"):
        return deployment
    return f"{creator.type.lower()} {creator.display_value}, {deployment}"
