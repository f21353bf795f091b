"""The full-precision and the packed model in MLflow: logged models, and the registry's versions with their facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from prefect import task

from bivlm.checkpoint.outputs import own_copy
from bivlm.evaluation.chance import AtChance
from bivlm.recipe.loading import Recipe
from bivlm.reports.lineage import Lineage, stage_hashes
from bivlm.workspace.hashing import digest
from tasks.checkpoint import Base
from tasks.report import code_version
from tasks.runtime.naming import model_name, registered_name, slug
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import StepResult
from tasks.tracking.champions import now
from tasks.tracking.promotion import alone
from tasks.tracking.record import chance_in_words
from tasks.tracking.registry import CANDIDATE, tag_version, version_at, versions_of
from tasks.tracking.run import Tracking, fluent, lineage_tags, unless_there
from tasks.tracking.tags import ALL, LONGEST, NOTHING, UNDECIDED, Score, Tag, as_many, having, tags_of

SERVED_MODEL = Path(__file__).parents[1] / "served_model.py"


@task(name="log-model", **OVER_NETWORK)
def log_model(tracking: Tracking, base: Base, recipe: Recipe, folder: str, sha256: str) -> str:
    """Log the packed checkpoint as a model that `mlflow.pyfunc.load_model` loads; return its id."""
    tags = {Tag.REQUEST: tracking.request, Tag.PACKED: sha256}
    for model in _models(tracking, tags):
        if model.status == LoggedModelStatus.READY:
            return model.model_id
        tracking.client.delete_logged_model(model.model_id)  # an attempt that was killed while it logged
    # MLflow ends the run that it logs a model in; the parent continues.
    with own_copy(Path(folder)) as copy, fluent(tracking.uri), mlflow.start_run(run_id=tracking.run_id):
        logged = mlflow.pyfunc.log_model(
            name=registered_name(base.model, recipe.name),
            python_model=str(SERVED_MODEL),
            artifacts={"checkpoint": copy.as_uri()},  # of a path MLflow would decode %41
            signature=_signature(),
            pip_requirements=[f"bivlm=={code_version()}"],
            params={"recipe": recipe.name, "recipe_sha256": digest(recipe.canonical())},
            tags={**lineage_tags(base, recipe, tracking.request, tracking.trigger), Tag.PACKED: sha256},
        )
    tracking.client.update_run(tracking.run_id, status="RUNNING")
    return logged.model_id


@task(name="log-base-model", **OVER_NETWORK)
def log_base_model(tracking: Tracking, base: Base) -> str:
    """Log the full-precision model without files, so that its metrics have a model to belong to; return its id."""
    tags = {Tag.BASE_SHA256: base.sha256, Tag.ROLE: "full precision"}
    for model in _models(tracking, tags):
        if model.status != LoggedModelStatus.READY:
            tracking.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        return model.model_id
    model = tracking.client.create_logged_model(
        tracking.experiment_id,
        name=f"{model_name(base.model)}-full-precision",
        source_run_id=tracking.run_id,
        tags=tags | {Tag.BASE_ID: base.model.id},
        model_type="full precision",
    )
    tracking.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


@task(name="register", **OVER_NETWORK)
def register(
    tracking: Tracking, base: Base, recipe: Recipe, model_id: str, facts: dict[str, str], scores: dict[str, str]
) -> tuple[str, int]:
    """Return (name, version) in the registry, with `facts` and `scores` as tags; the newest is `candidate`.

    Scores on fewer questions do not replace those on more (`scores_of`).
    """
    client, name = tracking.client, registered_name(base.model, recipe.name)
    made = next((each for each in versions_of(client, name) if each.tags.get(Tag.MODEL) == model_id), None)
    if made is None:
        tags = lineage_tags(base, recipe, tracking.request, tracking.trigger)
        tags |= {Tag.MODEL: model_id, **facts, **scores} | ({Tag.GATE: UNDECIDED} if recipe.gate else {})
        with unless_there():
            client.create_registered_model(name)
        with fluent(tracking.uri):  # a registry in a database looks the source up without a client
            made = client.create_model_version(name, f"models:/{model_id}", tracking.run_id, tags, model_id=model_id)
    better = as_many(scores[Tag.QUESTIONS], tags_of(made).questions)
    tag_version(client, made, facts | scores if better else facts)
    version = int(made.version)
    # A tracking server writes this link from the logged model's page itself, a database does not.
    if Tag.VERSIONS not in client.get_logged_model(model_id).tags:
        client.set_logged_model_tags(model_id, {Tag.VERSIONS: json.dumps([{"name": name, "version": version}])})
    _let_the_newest_be_candidate(client, name, version)
    if Tag.RECORDED not in made.tags:  # last, because it says that all of the above is there
        tag_version(client, made, {Tag.RECORDED: now()})
    return name, version


def facts_of(
    tracking: Tracking, lineage: Lineage, calibration: StepResult, report: Mapping[str, Any], base_model_id: str
) -> dict[str, str]:
    """Return the tags that say where a version comes from: its origins, a hash for each stage, its bits."""
    samples, bits = calibration.record.figures, report["bits"]
    stages = {stage: sha256 for stage, sha256 in stage_hashes(lineage).items() if stage not in lineage.evaluations}
    return {
        Tag.EXPERIMENT: tracking.experiment_id,
        Tag.BASE_MODEL: base_model_id,
        Tag.CALIBRATION: f"{samples['source']}, {samples['samples']} samples",
        Tag.SAMPLES: samples["sha256"],
        Tag.PACKED: lineage.packed.sha256,
        Tag.MADE: lineage.created,
        Tag.LINEARS: f"{bits['linears']['stored']:.3f}",
        Tag.WHOLE_MODEL: f"{bits['model']['stored']:.2f}",
        **_stage_tags(stages),
    }


def scores_of(lineage: Lineage, evaluation: Mapping[str, Any] | None, questions: str) -> dict[str, str]:
    """Return the tags that say what a version can do, after how many `questions` (`questions_asked`)."""
    tags = {Tag.QUESTIONS: questions, **_stage_tags(lineage.evaluations)}
    if evaluation is not None:
        tags[Tag.KL] = f"{evaluation['kl']:.4g}"
        tags[Tag.KL_SAMPLES] = evaluation["measured_on"][:LONGEST]
        tags[Tag.NOT_ABOVE_CHANCE] = chance_in_words([AtChance(**found) for found in evaluation["at_chance"]])
        for benchmark, packed in evaluation["packed"].items():
            loss = evaluation["loss"][benchmark]
            score = Score(
                packed=packed["metrics"]["accuracy"],
                full_precision=evaluation["full_precision"][benchmark]["metrics"]["accuracy"],
                questions=packed["n"],
                lost=loss["loss"],
                low=loss["low"],
                high=loss["high"],
            )
            tags[Tag.ACCURACY + slug(benchmark)] = score.model_dump_json()
    return tags


def questions_asked(recipe: Recipe, evaluate: bool, questions: int | None) -> str:
    """Return how many questions of each of the recipe's benchmarks are asked, as `Tag.QUESTIONS` says it."""
    if not recipe.evaluation:
        return ALL
    return NOTHING if not evaluate else ALL if questions is None else str(questions)


def _stage_tags(hashes: Mapping[str, str]) -> dict[str, str]:
    return {Tag.STAGE + slug(stage): sha256 for stage, sha256 in hashes.items()}


def _let_the_newest_be_candidate(client: MlflowClient, name: str, version: int) -> None:
    """Move the alias `candidate` to `version`, or a newer one; an earlier request made again moves nothing.

    Another machine may set the alias between reading and writing it, so it is read again afterwards.
    """
    with alone(client, name):
        while (version_at(client.get_registered_model(name), CANDIDATE) or 0) < version:
            client.set_registered_model_alias(name, CANDIDATE, str(version))
            version = max(int(each.version) for each in versions_of(client, name))


def _models(tracking: Tracking, tags: dict[str, str]) -> list[LoggedModel]:
    """Return the logged models with these tags, oldest first."""
    oldest_first = [{"field_name": "creation_time", "ascending": True}]
    return tracking.client.search_logged_models([tracking.experiment_id], having(tags), order_by=oldest_first)


def _signature() -> mlflow.models.ModelSignature:
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return mlflow.models.ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, 16)]),
    )
