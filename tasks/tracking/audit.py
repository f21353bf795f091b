"""What MLflow's registry holds of a version, of a model, of a base model: for a terminal."""

from __future__ import annotations

from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel

from bivlm.errors import InputError
from tasks.tracking.champions import PREFIX, moves_of
from tasks.tracking.facts import GATE_TAG, LINEARS_TAG
from tasks.tracking.pages import mean_accuracy, standing, versions_of_base
from tasks.tracking.registry import versions_where
from tasks.tracking.run import BASE_ID_TAG, BASE_TAG, TRIGGER_TAG, public_uri


def audit_version(client: MlflowClient, version: ModelVersion) -> dict[str, Any]:
    """``{"version", "standing", "tags", "run", "moves"}`` of a registered version.

    The tags are bivlm's own without the prefix; moves are those of the champion from or to this version, in order.
    """
    model = client.get_registered_model(version.name)
    number = int(version.version)
    moves = [move for move in moves_of(model.tags).values() if move.done and number in (move.before, move.after)]
    facts = {
        key.removeprefix("bivlm."): value
        for key, value in version.tags.items()
        if key.startswith("bivlm.") and not key.startswith(PREFIX)
    }
    return {
        "version": f"{version.name}/{number}",
        "standing": standing(model, version),
        "tags": facts,
        "run": version.run_id,
        "moves": [move.model_dump() for move in moves],
    }


def audit_base(client: MlflowClient, base: str) -> list[dict[str, Any]]:
    """All registered versions made of a base model, given by its id or its sha256, whole or the first 8 or more digits.

    A row a version: ``{"version", "standing", "base", "revision", "sha256", "recipe", "trigger", "bits", "accuracy",
    "gate"}``. Raises `InputError` if nothing was made of it.
    """
    found = versions_of_base(client, base)
    if not found and len(base) >= 8 and set(base) <= set("0123456789abcdef"):
        found = versions_where(client, f"tags.`{BASE_TAG}` LIKE '{base}%'")
    if not found:
        raise InputError(
            f"base model {base!r}: the registry at {public_uri(client.tracking_uri)} has nothing that was made of it; "
            "expected its id as it was compressed (the folder, or OWNER/NAME), or its sha256"
        )
    models: dict[str, RegisteredModel] = {
        name: client.get_registered_model(name) for name in {version.name for version in found}
    }
    return [
        {
            "version": f"{version.name}/{version.version}",
            "standing": standing(models[version.name], version),
            "base": version.tags.get(BASE_ID_TAG),
            "revision": version.tags.get("bivlm.base.revision"),
            "sha256": version.tags.get(BASE_TAG),
            "recipe": version.tags.get("bivlm.recipe"),
            "trigger": version.tags.get(TRIGGER_TAG),
            "bits": version.tags.get(LINEARS_TAG),
            "accuracy": mean_accuracy(version.tags),
            "gate": version.tags.get(GATE_TAG),
        }
        for version in found
    ]
