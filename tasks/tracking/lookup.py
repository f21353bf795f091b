"""A registered model version, back from MLflow."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.errors import InputError
from bivlm.identity import digest
from bivlm.recipe import Recipe
from bivlm.workspace import Workspace
from tasks.policy import OVER_NETWORK
from tasks.steps import open_workspace
from tasks.tracking.models import fluent
from tasks.tracking.run import BASE_TAG, public_uri, tracking_place

VERSION_FORMS = "NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION"
_VERSION = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


def is_version(text: str) -> bool:
    """Whether `text` has one of the forms `VERSION_FORMS`."""
    return _VERSION.fullmatch(text) is not None


def download_version(text: str, workspace: Workspace, folder: Path) -> Path:
    """The packed checkpoint of a registered version, downloaded into `folder`; returns where it lies.

    MLflow is found as a compression finds it: ``MLFLOW_TRACKING_URI``, else the database in the workspace. Raises
    `InputError` if there is no such version.
    """
    match = _VERSION.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r}: not a model version; expected {VERSION_FORMS}")
    uri, _ = tracking_place(workspace)
    client = MlflowClient(tracking_uri=uri)
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            version = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise InputError(f"model version {text}: not in the registry at {public_uri(uri)}") from None
    with fluent(uri):
        found = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder)))
    checkpoints = sorted(path.parent for path in (found / "artifacts").glob("*/config.json"))
    if len(checkpoints) != 1:
        raise InputError(f"model version {text}: holds no packed checkpoint; expected one that `bivlm compress` logged")
    return checkpoints[0]


@task(name="find-version", **OVER_NETWORK)
def find_version(model: str, revision: str, recipe: Recipe, workspace: str) -> str | None:
    """NAME/VERSION of the newest finished version of `model` at the pinned `revision` by `recipe`; else None.

    A folder's revision is the sha256 of its checkpoint, which may have been compressed under another path.
    """
    uri, _ = tracking_place(open_workspace(workspace))
    client = MlflowClient(tracking_uri=uri)
    tag = BASE_TAG if model.startswith("/") else "bivlm.base.revision"
    condition = f"tags.`bivlm.recipe.sha256` = '{digest(recipe.canonical())}' and tags.`{tag}` = '{revision}'"
    found = [
        version
        for version in client.search_model_versions(condition, max_results=1000)
        if (model.startswith("/") or version.tags.get("bivlm.base.id") == model)
        and client.get_run(version.run_id).info.status == "FINISHED"
    ]
    newest = max(found, key=lambda version: int(version.version), default=None)
    return None if newest is None else f"{newest.name}/{newest.version}"


def version_page(version: str, workspace: Workspace) -> str:
    """Where the UI shows NAME/VERSION."""
    uri, _ = tracking_place(workspace)
    address = public_uri(uri).rstrip("/") if uri.startswith(("http://", "https://")) else "http://127.0.0.1:5000"
    name, _, number = version.partition("/")
    return f"{address}/#/models/{name}/versions/{number}"
