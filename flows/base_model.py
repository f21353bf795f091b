"""The compression of one revision of a base model, into a folder of its own: what events, schedules and CI start."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run as runtime
from pydantic import Field

from bivlm.errors import GateNotPassed, InputError, describe
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.cli.console import in_short
from flows.compress import compress_flow
from flows.progress import publish_page
from tasks.tracking import questions_asked
from tasks.tracking.registry import finished_version
from tasks.watching.base_model import pin_revision
from tasks.watching.events import FLOW
from tasks.watching.looking import ended_now, remember_answer, taken_now
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
) -> dict[str, Any]:
    """Compress `model_id` at `revision` by `recipe` into `tasks.watching.watch_lists.Revision.output`, unless that was
    done.

    The revision is pinned before anything else: a branch to its commit, a folder by its content, an S3 prefix by its
    listing. Where the registry has a finished version of that revision by that recipe, which was asked as many
    questions, nothing is done (and a gate that did not pass it is told again). What becomes of it is written down for
    the watcher. Returns ``{"outcome", "version", "page", "output", "gate"}``. Raises `InputError` for names that are
    not in order or not permitted (`tasks.watching.watch_lists.check_permitted`), and for a folder or prefix that is no
    longer at `revision`; what `compress_flow` raises.

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
    log = get_run_logger()
    kind = kind_of(model_id)
    check_permitted(model_id, listed_if_any())
    chosen = named_recipe(recipe)
    if revision is not None:
        check_asked(kind, revision, pinned=event_id is not None)
    if event_id is not None and event_id != str(Revision(model_id, revision or "", recipe).event_id):
        raise InputError(f"event {event_id!r}: not that of {model_id} at {revision} by {recipe}")
    store = Workspace.open(workspace or default_workspace())
    # Until it is pinned there is nothing that an answer could be of, but for a revision that says which bytes.
    answer = (
        taken_now(Revision(model_id, revision, recipe), runtime.id) if revision and is_pinned(kind, revision) else None
    )
    try:
        pinned = Revision(model_id, pin_revision(model_id, revision), recipe)
        answer = taken_now(pinned, runtime.id)
        log.info("%s at %s by %s: event %s", model_id, pinned.revision, recipe, pinned.event_id)
        wanted = questions_asked(chosen, evaluate, questions)
        finished = finished_version(model_id, pinned.revision, chosen, wanted, store.url)
        if finished is not None:
            publish_page(finished.page)
            if finished.refused is not None:
                raise GateNotPassed(f"{finished} was made before, and not passed by its gate: {finished.refused}")
            remember_answer(ended_now(answer, "compressed", "registered before", str(finished)), store.url)
            log.info("%s is already registered as %s: nothing to do", model_id, finished)
            return {
                "outcome": "registered before",
                "version": str(finished),
                "page": finished.page,
                "output": None,
                "gate": None,
            }
        remember_answer(answer, store.url)
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
    except GateNotPassed as error:
        if error.result is not None:
            log.info("%s", in_short(error.result))
        remember_answer(ended_now(answer, "gate not passed", describe(error)), store.url)
        raise
    except InputError as error:
        if answer is not None:
            remember_answer(ended_now(answer, "bad input", describe(error)), store.url)
        raise
    except Exception as error:
        if answer is not None:
            remember_answer(ended_now(answer, None, describe(error)), store.url)
        raise
    tracked = result["mlflow"]
    version = f"{tracked['registered_model']}/{tracked['version']}"
    publish_page(tracked["page"])
    log.info("%s", in_short(result))
    remember_answer(ended_now(answer, "compressed", "", version), store.url)
    return {
        "outcome": "compressed",
        "version": version,
        "page": tracked["page"],
        "output": result["output"],
        "gate": result["gate"],
    }
