"""The model registry: versions with their aliases and tags."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

CANDIDATE, CHAMPION = "candidate", "champion"
MODEL_TAG = "bivlm.model_id"
RECORDED_TAG = "bivlm.recorded"  # of a version: when everything about it was there
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
_PAGE = 1000


def is_absent(error: MlflowException) -> bool:
    """Whether MLflow says that there is no such thing, or that nothing can have such a name."""
    return error.error_code in _ABSENT


def version_at(model: RegisteredModel, alias: str) -> int | None:
    """The version that an alias points to."""
    version = model.aliases.get(alias)
    return None if version is None else int(version)


def versions_where(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """All versions that meet an MLflow filter, newest first of each model."""
    found, token = [], None
    while True:
        page = client.search_model_versions(condition, max_results=_PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return sorted(found, key=lambda version: (version.name, -int(version.version)))


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a registered model, newest first."""
    return versions_where(client, f"name = '{name}'")


def tag_version(client: MlflowClient, version: ModelVersion, tags: Mapping[str, Any]) -> None:
    """Write those of `tags` that the version does not have yet, or has otherwise."""
    for key, value in tags.items():
        if version.tags.get(key) != str(value):
            client.set_model_version_tag(version.name, str(version.version), key, str(value))
