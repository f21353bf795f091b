"""What runs by the clock over the list of base models: their compression every night, leaderboards every week."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from bivlm.errors import GateNotPassed, describe
from bivlm.workspace.steps import Workspace
from bivlm.workspace.stores.location import default_workspace
from flows.base_model import on_base_model_flow
from flows.leaderboard import leaderboard_flow
from tasks.watching.looking import Seen, look_at_base_models
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


class SomeFailed(RuntimeError):
    """Some models went wrong; the others were seen to."""


@flow(name="nightly", flow_run_name="nightly", persist_result=False)
def nightly_flow(
    evaluate: bool = True,
    questions: Annotated[int, Field(ge=1)] | None = None,
    workspace: str | None = None,
    runner: str = "threads",
    settled_seconds: Annotated[float, Field(ge=0)] = 60,
) -> dict[str, Any]:
    """Compress every listed model, at the revision it is at, by each of its recipes, as far as that was not done.

    It sees to what no event did: a recipe that was changed, an event that was lost, a run that failed. One model's
    failure keeps no other from its turn. Returns ``{"versions", "waiting"}``. Raises `SomeFailed` at the end, with
    every reason.

    Args:
        evaluate: whether accuracy and divergence are measured.
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        runner: threads, processes, dask or ray.
        settled_seconds: a folder or S3 prefix counts once it has stayed as it is for so long.
    """
    store = Workspace.open(workspace or default_workspace())
    seen = _look(_listed(), settled_seconds, store.url)
    versions, failed = {}, dict(seen.troubled)
    for revision in seen.revisions:
        try:
            result = on_base_model_flow(
                model_id=revision.model,
                revision=revision.revision,
                recipe=revision.recipe,
                evaluate=evaluate,
                questions=questions,
                workspace=store.url,
                runner=runner,
            )
        except GateNotPassed as error:
            if error.result is None:  # it was told on the night when it was made
                get_run_logger().warning("%s", error)
            else:
                failed[_words(revision)] = describe(error)
        except Exception as error:  # told below, all together; the run of its own has the trace
            failed[_words(revision)] = describe(error)
        else:
            versions[_words(revision)] = result["version"]
    _raise_if(failed)
    return {"versions": versions, "waiting": seen.waiting}


@flow(name="weekly-leaderboards", flow_run_name="weekly-leaderboards", persist_result=False)
def weekly_flow(
    questions: Annotated[int, Field(ge=1)] | None = None,
    workspace: str | None = None,
    finish: bool = False,
    settled_seconds: Annotated[float, Field(ge=0)] = 60,
) -> dict[str, Any]:
    """A leaderboard of every listed model that has one, by model and revision in ``leaderboards`` of the outputs.

    Where two entries are about one revision of a model, its board has the recipes of both. Returns
    ``{"boards", "waiting"}``, folders by model and revision. Raises `SomeFailed` at the end, with every reason.

    Args:
        questions: only the first of every benchmark.
        workspace: a folder or s3://bucket/prefix; without it that of the worker.
        finish: whether all scales are tuned together at the end of every recipe.
        settled_seconds: a folder or S3 prefix counts once it has stayed as it is for so long.
    """
    store = Workspace.open(workspace or default_workspace())
    # A recipe of the board stands where one to compress by does, so that a look says what belongs together.
    listed = [entry.model_copy(update={"recipes": entry.leaderboard}) for entry in _listed()]
    seen = _look([entry for entry in listed if entry.recipes], settled_seconds, store.url)
    recipes: dict[tuple[str, str], list[str]] = {}
    for each in seen.revisions:
        recipes.setdefault((each.model, each.revision), []).append(each.recipe)
    boards, failed = {}, dict(seen.troubled)
    for (model, revision), names in recipes.items():
        output = outputs_folder() / LEADERBOARDS / model_slug(model) / revision[:16]
        try:
            result = leaderboard_flow(
                model=model,
                recipes=[recipe_source(name) for name in names],
                output=str(output),
                revision=revision,
                workspace=store.url,
                questions=questions,
                finish=finish,
            )
        except Exception as error:  # as above
            failed[model] = describe(error)
        else:
            boards[f"{model} at {revision[:12]}"] = result["output"]
    _raise_if(failed)
    return {"boards": boards, "waiting": seen.waiting}


def _listed() -> tuple[Watched, ...]:
    """The list of base models; that it is empty goes into the run's log."""
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


def _raise_if(failed: dict[str, str]) -> None:
    if failed:
        raise SomeFailed("\n".join([f"{len(failed)} failed:", *(f"  {what}: {why}" for what, why in failed.items())]))
