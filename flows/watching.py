"""Looks for new revisions of the listed base models and tells Prefect of each: an event, which starts a compression."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from tasks.watching.events import emit_found, runs_at_work
from tasks.watching.looking import is_due, look_at_base_models, remember_emitted, remember_found
from tasks.watching.watch_lists import load_base_models, nothing_watched


class LookFailed(RuntimeError):
    """Some of the listed models could not be looked at."""


@flow(name="watch", flow_run_name="watch-base-models", persist_result=False)
def watch_flow(
    workspace: str | None = None,
    settled_seconds: Annotated[float, Field(ge=0)] = 60,
    again_after_minutes: Annotated[float, Field(ge=6)] = 60,
) -> dict[str, Any]:
    """Emit `bivlm.base_model.found` for every revision and recipe of the list that no compression is known of.

    The list is `tasks.watching.watch_lists.base_models_file`. What was seen is kept in the workspace, so that nothing
    is missed while no watcher runs; an event is written down as emitted once the server has taken it, and is emitted
    again, with the same id, if nobody answers it. Returns ``{"seen", "emitted", "at_work", "answered", "waiting"}``.
    Raises `LookFailed` at the end if a model could not be looked at, `InputError` for a list that is not in order.

    Args:
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        settled_seconds: a folder or S3 prefix counts once it has stayed as it is for so long.
        again_after_minutes: an event that led to nothing is emitted again after this, then after twice as long. Below
            six minutes Prefect's server would take it for the one it had.
    """
    log = get_run_logger()
    store = Workspace.open(workspace or default_workspace())
    listed = load_base_models()
    if not listed:
        log.info("%s", nothing_watched())
    seen = look_at_base_models(listed, settled_seconds, store.url)
    for model, why in seen.waiting.items():
        log.info("%s: not yet: %s", model, why)
    again_after = timedelta(minutes=again_after_minutes)
    due, answered = [], []
    for revision in seen.revisions:
        found, answer = remember_found(revision, store.url)
        if is_due(found, answer, again_after):
            due.append((revision, found))
        elif answer is not None and answer.outcome is not None:
            answered.append(str(revision.event_id))
    at_work = runs_at_work() if due else {}
    emitted = []
    for revision, found in due:
        if revision in at_work:
            log.info("%s at %s by %s: flow run %s", *_words(revision), at_work[revision])
            continue
        emit_found(revision)
        remember_emitted(revision, found, store.url)
        emitted.append(str(revision.event_id))
        log.info("%s at %s by %s: event %s, time %d", *_words(revision), revision.event_id, len(found.emitted) + 1)
    if seen.troubled:
        lines = [f"  {model}: {why}" for model, why in seen.troubled.items()]
        raise LookFailed("\n".join([f"{len(lines)} of the listed models could not be looked at:", *lines]))
    return {
        "seen": [str(revision.event_id) for revision in seen.revisions],
        "emitted": emitted,
        "at_work": [str(revision.event_id) for revision, _ in due if revision in at_work],
        "answered": answered,
        "waiting": seen.waiting,
    }


def _words(revision: Any) -> tuple[str, str, str]:
    return revision.model, revision.revision[:12], revision.recipe
