"""A registered model version, back from MLflow."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from bivlm.errors import InputError
from bivlm.workspace.steps import Workspace
from tasks.tracking.models import fluent
from tasks.tracking.registry import is_absent
from tasks.tracking.run import public_uri, tracking_place

VERSION_FORMS = "NAME/VERSION, NAME@ALIAS or models:/NAME/VERSION"
_VERSION = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:/(?P<version>[0-9]{1,9})|@(?P<alias>[^/@]+))")


def is_version(text: str) -> bool:
    """Whether `text` has one of the forms `VERSION_FORMS`."""
    return _VERSION.fullmatch(text) is not None


def registry_client(workspace: Workspace) -> MlflowClient:
    """The registry as a compression finds it: ``MLFLOW_TRACKING_URI``, else the database in the workspace."""
    uri, _ = tracking_place(workspace)
    return MlflowClient(tracking_uri=uri)


def find_version(text: str, client: MlflowClient) -> ModelVersion:
    """The registered version that `text` names; raises `InputError` if there is none."""
    match = _VERSION.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r}: not a model version; expected {VERSION_FORMS}")
    try:
        if match["alias"]:
            return client.get_model_version_by_alias(match["name"], match["alias"])
        return client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if not is_absent(error):
            raise
        place = public_uri(client.tracking_uri)
        raise InputError(f"model version {text}: not in the registry at {place}") from None


def download_version(text: str, workspace: Workspace, folder: Path) -> Path:
    """The packed checkpoint of a registered version, downloaded into `folder`; returns where it lies.

    Raises `InputError` if there is no such version.
    """
    client = registry_client(workspace)
    version = find_version(text, client)
    with fluent(client.tracking_uri):
        found = Path(mlflow.artifacts.download_artifacts(version.source, dst_path=str(folder)))
    checkpoints = sorted(path.parent for path in (found / "artifacts").glob("*/config.json"))
    if len(checkpoints) != 1:
        raise InputError(f"model version {text}: holds no packed checkpoint; expected one that `bivlm compress` logged")
    return checkpoints[0]
