"""What the registry holds of a base model's revision, and a registered version's place in MLflow, to add to."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from prefect import task

from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import digest
from bivlm.workspace.steps import Workspace
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.facts import ASKED_TAG, GATE_TAG, NOTHING, REASONS_TAG, REFUSED, UNDECIDED, as_many
from tasks.tracking.lookup import find_version, registry_client
from tasks.tracking.registry import MODEL_TAG, RECORDED_TAG, versions_where
from tasks.tracking.run import (
    BASE_ID_TAG,
    BASE_TAG,
    NOT_RECORDED,
    REQUEST_TAG,
    TRIGGER_TAG,
    Tracking,
    page_address,
)


@dataclass(frozen=True)
class Finished:
    """A version about which everything is recorded, its gate's decision included; `refused` says why it said no."""

    name: str
    version: int
    page: str
    refused: str | None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@task(name="find-finished-version", **OVER_NETWORK)
def finished_version(model: str, revision: str, recipe: Recipe, questions: str, workspace: str) -> Finished | None:
    """The newest finished version of `model` at the pinned `revision` by `recipe`; None if there is none.

    One that was asked fewer questions than `questions` (`tasks.tracking.facts.questions_asked`) is not finished. A
    folder's revision is the sha256 of its checkpoint, which may have been compressed under another path.
    """
    client = registry_client(open_workspace(workspace))
    of_folder = model.startswith("/")
    tag = BASE_TAG if of_folder else "bivlm.base.revision"
    condition = f"tags.`bivlm.recipe.sha256` = '{digest(recipe.canonical())}' and tags.`{tag}` = '{revision}'"
    found = [
        version
        for version in versions_where(client, condition)
        if (of_folder or version.tags.get(BASE_ID_TAG) == model)
        and RECORDED_TAG in version.tags
        and version.tags.get(GATE_TAG) != UNDECIDED
        and as_many(version.tags.get(ASKED_TAG, NOTHING), questions)
    ]
    newest = max(found, key=lambda version: int(version.version), default=None)
    if newest is None:
        return None
    refused = newest.tags.get(REASONS_TAG, "") if newest.tags.get(GATE_TAG) == REFUSED else None
    return Finished(newest.name, int(newest.version), version_page(client, newest), refused)


def version_page(client: MlflowClient, version: ModelVersion) -> str:
    """Where the UI shows a version."""
    return f"{page_address(client.tracking_uri)}/#/models/{quote(version.name)}/versions/{version.version}"


def place_of_version(text: str, workspace: Workspace) -> tuple[ModelVersion, Tracking]:
    """A registered version, by name or alias, and the run that made it, to be added to; raises `InputError`."""
    client = registry_client(workspace)
    version = find_version(text, client)
    run = client.get_run(version.run_id)
    label = f"{version.tags.get(BASE_ID_TAG, version.name)} · {version.tags.get('bivlm.recipe', version.name)}"
    place = Tracking(
        uri=client.tracking_uri,
        experiment_id=run.info.experiment_id,
        run_id=version.run_id,
        request=version.tags.get(REQUEST_TAG, NOT_RECORDED),
        label=label,
        trigger=version.tags.get(TRIGGER_TAG, NOT_RECORDED),
    )
    return version, place


def logged_model_of(version: ModelVersion) -> str:
    """The id of the logged model that a version is."""
    return version.tags.get(MODEL_TAG) or version.model_id
