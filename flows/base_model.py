"""The compression of one revision of a base model, into a folder of its own: what events, schedules and CI start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from bivlm.errors import GateNotPassed, InputError
from bivlm.recipe.loading import Recipe
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.cli.console import in_short
from flows.compress import compress_flow
from flows.progress import publish_page
from tasks.runtime.states import failed_by
from tasks.tracking import questions_asked
from tasks.tracking.registry import Finished, finished_version
from tasks.watching.events import FLOW, tag_run
from tasks.watching.revisions import pin_revision
from tasks.watching.watch_lists import (
    DEFAULT_RECIPE,
    Revision,
    check_asked,
    check_permitted,
    is_pinned,
    kind_of,
    listed_if_any,
    named_recipe,
)

RecipeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


@dataclass(frozen=True)
class BaseModelResult:
    """The result for a revision: "compressed" now or "registered before", its version, the version's page in MLflow.

    `output` and `gate` are those of `flows.compress.compress_flow`, if it was compressed now.
    """

    outcome: str
    version: str
    page: str
    output: str | None = None
    gate: dict[str, Any] | None = None


@flow(name=FLOW, flow_run_name="{model_id} by {recipe}", persist_result=False)
def on_base_model_flow(
    model_id: Annotated[str, Field(min_length=1, max_length=1000)],
    revision: Annotated[str, Field(max_length=200)] | None = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    event_id: Annotated[str, Field(max_length=36)] | None = None,
    trigger: Annotated[str, Field(max_length=200)] | None = None,
    evaluate: bool = True,
    questions: Annotated[int, Field(ge=1)] | None = None,
    workspace: str | None = None,
    runner: str = "threads",
) -> BaseModelResult:
    """Compress `model_id` at `revision` by `recipe`, unless the registry has it, asked as many questions.

    The output is `tasks.watching.watch_lists.Revision.output`. Raises what `compress_flow` raises, and `InputError` for
    names that are not valid or not permitted, and for a folder or prefix that is no longer at `revision`. The state of
    the run then has the name of the error (`tasks.runtime.states`).

    Args:
        model_id: owner/name on the hub, an absolute folder, or s3://bucket/prefix.
        revision: on the hub a branch, tag or commit; else what the watcher found.
        recipe: a shipped recipe, or NAME of NAME.yaml in the worker's BIVLM_RECIPES.
        event_id: of the event that started this.
        trigger: who asks, for the lineage record; without it what Prefect knows.
        evaluate: whether accuracy and divergence are measured.
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        runner: threads, processes, dask or ray.
    """
    try:
        chosen = _check_request(model_id, revision, recipe, event_id)
        store = Workspace.open(workspace or default_workspace())
        pinned = _pin(model_id, revision, recipe)
        wanted = questions_asked(chosen, evaluate, questions)
        if finished := finished_version(model_id, pinned.revision, chosen, wanted, store.url):
            return _registered_before(finished)
        result = compress_flow(
            model=model_id,
            recipe=chosen.canonical(),
            output=str(pinned.output()),
            revision=pinned.revision,
            workspace=store.url,
            evaluate=evaluate,
            questions=questions,
            quiet=True,
            runner=runner,
            trigger=trigger or (f"event {event_id}" if event_id else None),
        )
    except (GateNotPassed, InputError) as error:
        if isinstance(error, GateNotPassed) and error.result is not None:
            get_run_logger().info("%s", in_short(error.result))
        return failed_by(error)
    return _registered_now(result)


def _check_request(model_id: str, revision: str | None, recipe: str, event_id: str | None) -> Recipe:
    """Return the recipe, after every name was judged; raises `InputError`."""
    kind = kind_of(model_id)
    check_permitted(model_id, listed_if_any())
    chosen = named_recipe(recipe)
    if revision is not None:
        check_asked(kind, revision, pinned=event_id is not None)
    if event_id is not None and event_id != str(Revision(model_id, revision or "", recipe).event_id):
        raise InputError(f"event {event_id!r}: not that of {model_id} at {revision} by {recipe}")
    return chosen


def _pin(model_id: str, revision: str | None, recipe: str) -> Revision:
    """Return what to compress: a branch at its commit, a folder by its content, an S3 prefix by its listing.

    The run is tagged for the watcher as soon as the revision is known, so that it also finds one that is gone.
    """
    if revision and is_pinned(kind_of(model_id), revision):
        tag_run(Revision(model_id, revision, recipe))
    pinned = Revision(model_id, pin_revision(model_id, revision), recipe)
    tag_run(pinned)
    get_run_logger().info("%s at %s by %s: event %s", model_id, pinned.revision, recipe, pinned.event_id)
    return pinned


def _registered_before(finished: Finished) -> BaseModelResult:
    """Return the version that there is; raises `GateNotPassed` again if its gate refused it."""
    publish_page(finished.page)
    if finished.refused is not None:
        raise GateNotPassed(f"{finished} was made before, and not passed by its gate: {finished.refused}")
    get_run_logger().info("already registered as %s: nothing to do", finished)
    return BaseModelResult("registered before", str(finished), finished.page)


def _registered_now(result: dict[str, Any]) -> BaseModelResult:
    """Return the version that a compression has registered."""
    tracked = result["mlflow"]
    publish_page(tracked["page"])
    get_run_logger().info("%s", in_short(result))
    version = f"{tracked['registered_model']}/{tracked['version']}"
    return BaseModelResult("compressed", version, tracked["page"], result["output"], result["gate"])
