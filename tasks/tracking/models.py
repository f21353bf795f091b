"""The full-precision and the packed model in MLflow: logged models, and the registry's versions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.checkpoint.outputs import own_copy
from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import digest
from tasks.checkpoint import Base
from tasks.report import code_version
from tasks.runtime.naming import model_name, registered_name
from tasks.runtime.policy import OVER_NETWORK
from tasks.tracking.champions import now
from tasks.tracking.facts import ASKED_TAG, GATE_TAG, NOTHING, UNDECIDED, as_many
from tasks.tracking.promotion import alone
from tasks.tracking.record import PACKED_TAG
from tasks.tracking.registry import CANDIDATE, MODEL_TAG, RECORDED_TAG, tag_version, version_at, versions_of
from tasks.tracking.run import BASE_ID_TAG, BASE_TAG, REQUEST_TAG, ROLE_TAG, Tracking, lineage_tags

VERSIONS_TAG = "mlflow.modelVersions"
SERVED_MODEL = Path(__file__).parents[1] / "served_model.py"


@task(name="log-model", **OVER_NETWORK)
def log_model(tracking: Tracking, base: Base, recipe: Recipe, folder: str, sha256: str) -> str:
    """The packed checkpoint as a logged model that `mlflow.pyfunc.load_model` really loads; returns its id."""
    tags = {REQUEST_TAG: tracking.request, PACKED_TAG: sha256}
    for model in _models(tracking, tags):
        if model.status == LoggedModelStatus.READY:
            return model.model_id
        tracking.client.delete_logged_model(model.model_id)  # an attempt that was killed while it logged
    # MLflow ends the run that it logs a model in; the parent goes on.
    with own_copy(Path(folder)) as copy, fluent(tracking.uri), mlflow.start_run(run_id=tracking.run_id):
        logged = mlflow.pyfunc.log_model(
            name=registered_name(base.model, recipe.name),
            python_model=str(SERVED_MODEL),
            artifacts={"checkpoint": copy.as_uri()},  # of a path MLflow would decode %41
            signature=_signature(),
            pip_requirements=[f"bivlm=={code_version()}"],
            params={"recipe": recipe.name, "recipe_sha256": digest(recipe.canonical())},
            tags={**lineage_tags(base, recipe, tracking.request, tracking.trigger), PACKED_TAG: sha256},
        )
    tracking.client.update_run(tracking.run_id, status="RUNNING")
    return logged.model_id


@task(name="log-base-model", **OVER_NETWORK)
def log_base_model(tracking: Tracking, base: Base) -> str:
    """The full-precision model as a logged model without files, so that its metrics have something to belong to."""
    tags = {BASE_TAG: base.sha256, ROLE_TAG: "full precision"}
    for model in _models(tracking, tags):
        if model.status != LoggedModelStatus.READY:
            tracking.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model.model_id
    model = tracking.client.create_logged_model(
        tracking.experiment_id,
        name=f"{model_name(base.model)}-full-precision",
        source_run_id=tracking.run_id,
        tags=tags | {BASE_ID_TAG: base.model.id},
        model_type="full precision",
    )
    tracking.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


@task(name="register", **OVER_NETWORK)
def register(
    tracking: Tracking, base: Base, recipe: Recipe, model_id: str, facts: dict[str, str], scores: dict[str, str]
) -> tuple[str, int]:
    """(name, version) in the model registry, with `facts` and `scores` as tags; the newest has the alias `candidate`.

    Scores on fewer questions do not take the place of those on more (`tasks.tracking.facts.scores_of`).
    """
    client, name = tracking.client, registered_name(base.model, recipe.name)
    known = [each for each in versions_of(client, name) if each.tags.get(MODEL_TAG) == model_id]
    if known:
        made = known[0]
    else:
        tags = {
            **lineage_tags(base, recipe, tracking.request, tracking.trigger),
            MODEL_TAG: model_id,
            **facts,
            **scores,
        }
        tags |= {GATE_TAG: UNDECIDED} if recipe.gate else {}
        _make_registered_model(client, name)
        source = f"models:/{model_id}"
        with fluent(tracking.uri):  # a registry in a database looks the source up without a client
            made = client.create_model_version(name, source, tracking.run_id, tags=tags, model_id=model_id)
    version = int(made.version)
    # Of a version that was there before; a new one was made with them.
    better = as_many(scores[ASKED_TAG], made.tags.get(ASKED_TAG, NOTHING))
    tag_version(client, made, facts | scores if better else facts)
    # A tracking server writes this link from the logged model's page itself, a database does not.
    if VERSIONS_TAG not in client.get_logged_model(model_id).tags:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([{"name": name, "version": version}])})
    _let_the_newest_be_candidate(client, name, version)
    if RECORDED_TAG not in made.tags:  # last, because it says that all of the above is there
        tag_version(client, made, {RECORDED_TAG: now()})
    return name, version


@contextmanager
def fluent(uri: str) -> Iterator[None]:
    """Within this block MLflow's functions without a client track at `uri`.

    `mlflow.set_tracking_uri` also writes MLFLOW_TRACKING_URI, which would send the next compression of this process to
    the tracking store of this one.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if configured is not None:
            os.environ["MLFLOW_TRACKING_URI"] = configured


def _let_the_newest_be_candidate(client: MlflowClient, name: str, version: int) -> None:
    """After `version` was registered; an earlier request that is made again leaves the candidate where it is.

    Somebody on another machine may set the alias between our look and our writing, so we look again afterwards.
    """
    with alone(client, name):
        while (version_at(client.get_registered_model(name), CANDIDATE) or 0) < version:
            client.set_registered_model_alias(name, CANDIDATE, str(version))
            version = max(int(each.version) for each in versions_of(client, name))


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _models(tracking: Tracking, tags: dict[str, str]) -> list[LoggedModel]:
    """The logged models with these tags, oldest first."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    oldest_first = [{"field_name": "creation_time", "ascending": True}]
    return tracking.client.search_logged_models(
        [tracking.experiment_id], filter_string=condition, order_by=oldest_first
    )


def _signature() -> mlflow.models.ModelSignature:
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return mlflow.models.ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, 16)]),
    )
