"""Find, download and tag registered versions in MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.errors import InputError
from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import digest
from bivlm.workspace.steps import Workspace
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.run import Tracking, fluent, page_address, public_uri, tracking_place
from tasks.tracking.tags import NOT_RECORDED, REFUSED, UNDECIDED, Tag, as_many, having, tags_of

CANDIDATE, CHAMPION = "candidate", "champion"
VERSION_FORMS = "NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION"
_VERSION = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:/(?P<version>[0-9]{1,9})|@(?P<alias>[^/@]+))")
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_PAGE = 1000


@dataclass(frozen=True)
class Finished:
    """A version about which everything is recorded; `refused` holds the reasons if its gate refused it."""

    name: str
    version: int
    page: str
    refused: str | None

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


def is_absent(error: MlflowException) -> bool:
    """Return whether MLflow says that there is no such thing, or that nothing can have such a name."""
    return error.error_code in _ABSENT


@contextmanager
def told_if_absent(message: str) -> Iterator[None]:
    """Raise `InputError` with `message` if MLflow does not have what is looked up within this block."""
    try:
        yield
    except MlflowException as error:
        if not is_absent(error):
            raise
        raise InputError(message) from None


def is_version(text: str) -> bool:
    """Return whether `text` has one of the forms `VERSION_FORMS`."""
    return _VERSION.fullmatch(text) is not None


def registry_client(workspace: Workspace) -> MlflowClient:
    """Return a client of the registry at ``MLFLOW_TRACKING_URI``, else of the database in the workspace."""
    return MlflowClient(tracking_uri=tracking_place(workspace)[0])


def version_at(model: RegisteredModel, alias: str) -> int | None:
    """Return the version that an alias points to."""
    version = model.aliases.get(alias)
    return None if version is None else int(version)


def versions_where(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """Return all versions that meet an MLflow filter, by model, newest first."""
    found, token = [], ""
    while token is not None:
        page = client.search_model_versions(condition, max_results=_PAGE, page_token=token or None)
        found, token = found + page, page.token or None
    return sorted(found, key=lambda version: (version.name, -int(version.version)))


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """Return all versions of a registered model, newest first."""
    return versions_where(client, f"name = '{name}'")


def tag_version(client: MlflowClient, version: ModelVersion, tags: Mapping[str, str]) -> None:
    """Write those of `tags` that the version does not have yet."""
    for key, value in tags.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(version.name, str(version.version), key, value)


def find_version(text: str, client: MlflowClient) -> ModelVersion:
    """Return the registered version that `text` names; raise `InputError` if there is none."""
    match = _VERSION.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r}: not a model version; expected {VERSION_FORMS}")
    with told_if_absent(f"model version {text}: not in the registry at {public_uri(client.tracking_uri)}"):
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])


def download_version(text: str, workspace: Workspace, folder: Path) -> Path:
    """Download a version's packed checkpoint into `folder`, return where it lies; raise `InputError` if absent."""
    client = registry_client(workspace)
    version = find_version(text, client)
    with fluent(client.tracking_uri):
        found = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder)))
    checkpoints = sorted(path.parent for path in (found / "artifacts").glob("*/config.json"))
    if len(checkpoints) != 1:
        raise InputError(f"model version {text}: holds no packed checkpoint; expected one that `bivlm compress` logged")
    return checkpoints[0]


@task(name="find-finished-version", **OVER_NETWORK)
def finished_version(model: str, revision: str, recipe: Recipe, questions: str, workspace: str) -> Finished | None:
    """Return the newest finished version of `model` at the pinned `revision` by `recipe`, or None.

    One that was asked fewer than `questions` (`questions_asked`) is not finished. A folder's revision is the sha256 of
    its checkpoint, which may have been compressed under another path.
    """
    client, of_folder = registry_client(open_workspace(workspace)), model.startswith("/")
    same = {
        Tag.RECIPE_SHA256: digest(recipe.canonical()),
        (Tag.BASE_SHA256 if of_folder else Tag.BASE_REVISION): revision,
    }
    for version in sorted(versions_where(client, having(same)), key=lambda version: -int(version.version)):
        tags = tags_of(version)
        if (
            (of_folder or tags.base_id == model)
            and tags.recorded is not None
            and tags.gate != UNDECIDED
            and as_many(tags.questions, questions)
        ):
            page = f"{page_address(client.tracking_uri)}/#/models/{quote(version.name)}/versions/{version.version}"
            refused = (tags.gate_reasons or "") if tags.gate == REFUSED else None
            return Finished(version.name, int(version.version), page, refused)
    return None


def place_of_version(text: str, workspace: Workspace) -> tuple[ModelVersion, Tracking]:
    """Return a registered version and the run that made it, to add to; raise `InputError` if there is none."""
    client = registry_client(workspace)
    version = find_version(text, client)
    tags = tags_of(version)
    return version, Tracking(
        uri=client.tracking_uri,
        experiment_id=client.get_run(version.run_id).info.experiment_id,
        run_id=version.run_id,
        request=tags.request or NOT_RECORDED,
        label=f"{tags.base_id or version.name} · {tags.recipe or version.name}",
        trigger=tags.trigger or NOT_RECORDED,
    )
