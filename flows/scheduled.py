"""Scheduled flows over the list of base models: a look every five minutes, a night's work, weekly leaderboards.

The flows of a night and a week are imported when they run: a look starts often, and needs little memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import flow, get_run_logger
from pydantic import Field

from bivlm.errors import GateNotPassed, describe
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from tasks.watching.events import emit_found, read_answers
from tasks.watching.looking import Seen, is_due, look_at_base_models, recall_found, remember_found
from tasks.watching.watch_lists import (
    Revision,
    Watched,
    load_base_models,
    model_slug,
    nothing_watched,
    outputs_folder,
    recipe_source,
)

LEADERBOARDS = "leaderboards"  # in the folder of outputs

Seconds = Annotated[float, Field(ge=0)]
Questions = Annotated[int, Field(ge=1)]


class SomeFailed(RuntimeError):
    """Some models failed; the others were handled."""


@dataclass(frozen=True)
class WatchResult:
    """The result of a look: ids of events, and by model why it has no revision yet."""

    seen: list[str]
    emitted: list[str]
    at_work: list[str]
    answered: list[str]
    waiting: dict[str, str]


@dataclass(frozen=True)
class MadeResult:
    """Versions or leaderboards by what they are of, and by model why it has no revision yet."""

    made: dict[str, str]
    waiting: dict[str, str]


@flow(name="watch", flow_run_name="watch-base-models", persist_result=False)
def watch_flow(
    workspace: str | None = None,
    settled_seconds: Seconds = 60,
    again_after_minutes: Annotated[float, Field(ge=6)] = 60,
) -> WatchResult:
    """Emit `bivlm.base_model.found` for every listed revision and recipe without a known outcome.

    What was seen is kept in the workspace, so nothing is missed while no watcher runs. An event counts as emitted once
    the server has taken it; without an outcome it is emitted again, with the same id. Raises `SomeFailed` at the end if
    a model could not be looked at, and `InputError` for a list that is not valid.

    Args:
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        settled_seconds: a folder or S3 prefix counts once it has not changed for this long.
        again_after_minutes: the pause before an event without an outcome is emitted again; it doubles every time. Below
            six minutes Prefect's server would drop it as a duplicate.
    """
    log, store = get_run_logger(), Workspace.open(workspace or default_workspace())
    seen = _look(_listed(), settled_seconds, store.url)
    known = recall_found(seen.revisions, store.url)
    answers = read_answers([each for each, found in known.items() if found.outcome is None])
    emitted, at_work = [], []
    for revision, answer in answers.items():
        found, event, now = known[revision], str(revision.event_id), _now()
        if answer.outcome is not None:
            known[revision] = found.model_copy(update={"outcome": answer.outcome})
        elif answer.at_work is not None:
            at_work.append(event)
            log.info("%s: flow run %s", _words(revision), answer.at_work)
        elif is_due(found, answer.last, timedelta(minutes=again_after_minutes), now):
            emit_found(revision)
            emitted.append(event)
            known[revision] = found.model_copy(update={"emitted": (*found.emitted, now)})
            log.info("%s: event %s, time %d", _words(revision), event, len(found.emitted) + 1)
        if known[revision] != found:
            remember_found(known[revision], store.url)
    _raise_if(seen.troubled, "of the listed models could not be looked at")
    return WatchResult(
        seen=[str(each.event_id) for each in seen.revisions],
        emitted=emitted,
        at_work=at_work,
        answered=[str(each.event_id) for each, found in known.items() if found.outcome is not None],
        waiting=seen.waiting,
    )


@flow(name="nightly", flow_run_name="nightly", persist_result=False)
def nightly_flow(
    evaluate: bool = True,
    questions: Questions | None = None,
    workspace: str | None = None,
    runner: str = "threads",
    settled_seconds: Seconds = 60,
) -> MadeResult:
    """Compress every listed model, at its current revision, by each of its recipes, unless that was done.

    It catches up on what no event did: a changed recipe, a lost event, a failed run. Raises `SomeFailed` at the end,
    with every reason: one model's failure does not stop the others.

    Args:
        evaluate: whether accuracy and divergence are measured.
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        runner: threads, processes, dask or ray.
        settled_seconds: a folder or S3 prefix counts once it has not changed for this long.
    """
    from flows.base_model import on_base_model_flow

    store = Workspace.open(workspace or default_workspace())
    seen = _look(_listed(), settled_seconds, store.url)
    versions, failed = {}, dict(seen.troubled)
    for each in seen.revisions:
        asked = {"model_id": each.model, "revision": each.revision, "recipe": each.recipe, "questions": questions}
        try:
            result = on_base_model_flow(**asked, evaluate=evaluate, workspace=store.url, runner=runner)
            versions[_words(each)] = result.version
        except Exception as error:  # reported below, all together; the model's own run has the trace
            if isinstance(error, GateNotPassed) and error.result is None:  # reported on the night when it was made
                get_run_logger().warning("%s", error)
            else:
                failed[_words(each)] = describe(error)
    _raise_if(failed)
    return MadeResult(versions, seen.waiting)


@flow(name="weekly-leaderboards", flow_run_name="weekly-leaderboards", persist_result=False)
def weekly_flow(
    questions: Questions | None = None,
    workspace: str | None = None,
    finish: bool = False,
    settled_seconds: Seconds = 60,
) -> MadeResult:
    """Make the leaderboard of every listed model that has one, in ``leaderboards`` of the outputs.

    Two entries about one revision share a board with the recipes of both. Raises `SomeFailed` at the end, with every
    reason.

    Args:
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        finish: whether all scales are tuned together at the end of every recipe.
        settled_seconds: a folder or S3 prefix counts once it has not changed for this long.
    """
    from flows.leaderboard import leaderboard_flow

    store = Workspace.open(workspace or default_workspace())
    # With the recipes of its board in place of its own, a look returns the revisions that belong on boards.
    listed = [each.model_copy(update={"recipes": each.leaderboard}) for each in _listed() if each.leaderboard]
    seen = _look(listed, settled_seconds, store.url)
    recipes: dict[tuple[str, str], list[str]] = {}
    for each in seen.revisions:
        recipes.setdefault((each.model, each.revision), []).append(each.recipe)
    boards, failed = {}, dict(seen.troubled)
    for (model, revision), names in recipes.items():
        output = str(outputs_folder() / LEADERBOARDS / model_slug(model) / revision[:16])
        asked = {"model": model, "revision": revision, "output": output, "questions": questions, "finish": finish}
        try:
            result = leaderboard_flow(recipes=[recipe_source(name) for name in names], workspace=store.url, **asked)
            boards[f"{model} at {revision[:12]}"] = result["output"]
        except Exception as error:  # as above
            failed[model] = describe(error)
    _raise_if(failed)
    return MadeResult(boards, seen.waiting)


def _now() -> datetime:
    return datetime.now(UTC)


def _listed() -> list[Watched]:
    """Return the list of base models; log if it is empty."""
    listed = load_base_models()
    if not listed:
        get_run_logger().info("%s", nothing_watched())
    return listed


def _look(entries: Sequence[Watched], settled_seconds: float, workspace: str) -> Seen:
    seen = look_at_base_models(entries, settled_seconds, workspace)
    for model, why in seen.waiting.items():
        get_run_logger().info("%s: not yet: %s", model, why)
    return seen


def _words(revision: Revision) -> str:
    return f"{revision.model} at {revision.revision[:12]} by {revision.recipe}"


def _raise_if(failed: dict[str, str], what: str = "failed") -> None:
    if failed:
        raise SomeFailed("\n".join([f"{len(failed)} {what}:", *(f"  {each}: {why}" for each, why in failed.items())]))
