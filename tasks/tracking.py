"""What MLflow is told of a compression: one parent run, a child run per evaluation, the model and its version.

Every function finds what an earlier attempt has already written and adds only what is missing, so that each may be
tried again, and a request that was fulfilled before leaves no second trace.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric, Param, Run
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.identity import digest
from bivlm.recipe import Recipe
from bivlm.workspace import Workspace
from tasks.checkpoint import Base
from tasks.naming import model_name, registered_name, run_name, slug
from tasks.policy import TRACKING
from tasks.report import code_version
from tasks.steps import Done, open_workspace

STAGE = "registration"
EXPERIMENT = "bivlm"
ALIAS = "candidate"
REQUEST_TAG = "bivlm.request"
ROLE_TAG = "bivlm.role"  # compression | full precision | packed
SUBJECT_TAG = "bivlm.evaluated"  # checkpoint and benchmark of an evaluation
PACKED_TAG = "bivlm.packed.sha256"
BASE_TAG = "bivlm.base.sha256"
VERSIONS_TAG = "mlflow.modelVersions"


@dataclass(frozen=True)
class Tracking:
    """A compression's place in MLflow."""

    uri: str
    experiment_id: str
    run_id: str
    request: str
    label: str  # model and recipe, for people

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)


@dataclass(frozen=True)
class LoggedData:
    """A data set as MLflow knows it; `digest` is cut to the 36 characters that MLflow allows."""

    name: str
    digest: str
    source: str
    samples: int

    def entity(self) -> Dataset:
        return Dataset(
            name=self.name,
            digest=self.digest,
            source_type="bivlm",
            source=json.dumps({"uri": self.source}),
            profile=json.dumps({"num_samples": self.samples}),
        )


def benchmark_data(evaluation: Done) -> LoggedData:
    """The data set of an evaluation."""
    figures = evaluation.record.figures
    return LoggedData(slug(figures["task"]), figures["benchmark_sha256"][:32], figures["task"], figures["n"])


def calibration_data(calibration: Done) -> LoggedData:
    """The calibration samples as a data set."""
    figures = calibration.record.figures
    return LoggedData(
        "calibration." + slug(figures["source"]), figures["sha256"][:32], figures["source"], figures["samples"]
    )


def tracking_place(workspace: Workspace) -> tuple[str, str | None]:
    """(tracking URI, artifact root): ``MLFLOW_TRACKING_URI`` with its own artifacts, else files in the workspace."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, None
    return f"sqlite:///{workspace.local / 'mlflow.db'}", (workspace.local / "mlflow-artifacts").as_uri()


def ui_command(uri: str) -> str:
    """The command that starts the MLflow UI on what was tracked at `uri`; a server already shows its own."""
    if _is_server(uri):
        return f"open {uri}"
    program = "mlflow" if shutil.which("mlflow") else shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    return f"{program} ui --backend-store-uri {shlex.quote(uri)}"


def run_page(tracking: Tracking) -> str:
    """Where the UI shows the parent run."""
    address = tracking.uri.rstrip("/") if _is_server(tracking.uri) else "http://127.0.0.1:5000"
    return f"{address}/#/experiments/{tracking.experiment_id}/runs/{tracking.run_id}"


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def request_digest(base: Base, recipe: Recipe) -> str:
    """What makes two compressions the same one: base model, recipe, code."""
    return digest({"checkpoint": base.sha256, "recipe": recipe.canonical(), "code": code_version()})


def find_or_create_run(workspace: Workspace, base: Base, recipe: Recipe) -> Tracking:
    """The parent run of this compression, found by its request tag or created.

    Search and creation are not one atomic step, so this is called once, in the flow's body.
    """
    uri, artifact_root = tracking_place(workspace)
    client = MlflowClient(tracking_uri=uri)
    experiment_id = _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT, artifact_root)
    request = request_digest(base, recipe)
    run = _find(client, experiment_id, {REQUEST_TAG: request, ROLE_TAG: "compression"})
    if run is None:
        tags = {
            **_lineage(base, recipe, request),
            ROLE_TAG: "compression",
            "mlflow.note.content": _note(base, recipe),
        }
        run = client.create_run(experiment_id, run_name=run_name(base.model, recipe.name, request), tags=tags)
    params = {key: value for key, value in _params(base, recipe).items() if key not in run.data.params}
    client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
    label = f"{model_name(base.model)} · {recipe.name}"
    return Tracking(uri, experiment_id, run.info.run_id, request, label)


def close_run(tracking: Tracking, *, failed: bool = False) -> None:
    """Mark the parent run as ended."""
    tracking.client.set_terminated(tracking.run_id, "FAILED" if failed else "FINISHED")


@contextmanager
def ends_run(tracking: Tracking) -> Iterator[None]:
    """Within this block the parent run is running; afterwards it has finished, or failed."""
    tracking.client.update_run(tracking.run_id, status="RUNNING")
    try:
        yield
    except BaseException:
        close_run(tracking, failed=True)
        raise
    close_run(tracking)


@task(name="log-compression", **TRACKING)
def log_compression(
    tracking: Tracking, report: dict[str, Any], packed_sha256: str, calibration: Done, model_id: str
) -> None:
    """Bits, layers, report and calibration set on the parent run; metrics belong to the logged model, too."""
    client, run = tracking.client, tracking.client.get_run(tracking.run_id)
    if run.data.tags.get(PACKED_TAG) == packed_sha256:
        return
    bits = report["bits"]
    metrics = {
        "seconds": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        **{f"bits/linears/{key}": value for key, value in bits["linears"].items()},
        **{f"bits/model/{key}": value for key, value in bits["model"].items()},
        **{
            f"bits/{component}/{key}": value
            for component, figures in bits["by_component"].items()
            for key, value in figures.items()
        },
    }
    _log_metrics(client, tracking.run_id, metrics, model_id=model_id)
    data = DatasetInput(calibration_data(calibration).entity(), [InputTag("mlflow.data.context", "calibration")])
    client.log_inputs(tracking.run_id, datasets=[data])
    client.log_text(tracking.run_id, json.dumps(report, indent=2, ensure_ascii=False), "compression_report.json")
    client.log_text(tracking.run_id, json.dumps(report["recipe"], indent=2, ensure_ascii=False), "recipe.json")
    if "mlflow.loggedArtifacts" not in run.data.tags:  # log_table appends to a table that is there
        client.log_table(tracking.run_id, _layer_table(report["layers"]), "layers.json")
    # Last, because it says that all of the above is there.
    client.set_tag(tracking.run_id, PACKED_TAG, packed_sha256)


@task(name="log-evaluation", **TRACKING)
def log_evaluation(tracking: Tracking, role: str, sha256: str, evaluation: Done, model_id: str, workspace: str) -> None:
    """A child run for one model on one benchmark, its metrics linked to model and data set."""
    client, figures, data = tracking.client, evaluation.record.figures, benchmark_data(evaluation)
    subject = digest({"checkpoint": sha256, "step": evaluation.key})
    tags = {REQUEST_TAG: tracking.request, ROLE_TAG: role, SUBJECT_TAG: subject}
    run = _find(client, tracking.experiment_id, tags)
    if run is not None and run.info.status == "FINISHED":
        return
    if run is None:
        tags |= {"mlflow.parentRunId": tracking.run_id, "mlflow.source.name": "bivlm compress"}
        name = f"{figures['task']} · {role} · {tracking.label}"
        run = client.create_run(tracking.experiment_id, run_name=name, tags=tags)
    run_id = run.info.run_id
    client.log_batch(run_id, params=[Param("task", figures["task"]), Param("checkpoint", sha256)])
    client.log_inputs(
        run_id,
        datasets=[DatasetInput(data.entity(), [InputTag("mlflow.data.context", "evaluation")])],
        models=[LoggedModelInput(model_id=model_id)],
    )
    low, high = figures["ci95"]
    metrics = {**figures["metrics"], "accuracy_ci95_low": low, "accuracy_ci95_high": high, "questions": figures["n"]}
    _log_metrics(client, run_id, metrics, model_id=model_id, data=data)
    with tempfile.TemporaryDirectory() as folder:
        for name, reference in evaluation.record.outputs.items():
            open_workspace(workspace).fetch_folder({name: reference}, folder)
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED")


@task(name="log-comparison", **TRACKING)
def log_comparison(
    tracking: Tracking,
    full_precision: dict[str, Done],
    packed: dict[str, Done],
    divergence: Done,
    calibration: Done,
    model_id: str,
) -> None:
    """What the parent run says at a glance: accuracies of both models, and the divergence (linked to the model)."""
    client = tracking.client
    known = client.get_run(tracking.run_id).data.metrics
    metrics = {
        f"{role}/{slug(benchmark)}/accuracy": done.record.figures["metrics"]["accuracy"]
        for role, evaluations in (("full_precision", full_precision), ("packed", packed))
        for benchmark, done in evaluations.items()
    }
    _log_metrics(client, tracking.run_id, {key: value for key, value in metrics.items() if known.get(key) != value})
    kl = divergence.record.figures["kl"]
    if known.get("kl") != kl:
        _log_metrics(client, tracking.run_id, {"kl": kl}, model_id=model_id, data=calibration_data(calibration))


@task(name="log-model", **TRACKING)
def log_model(tracking: Tracking, base: Base, recipe: Recipe, folder: str, sha256: str) -> str:
    """The packed checkpoint as a logged model that `mlflow.pyfunc.load_model` really loads; returns its id."""
    found = _find_model(tracking, {REQUEST_TAG: tracking.request, PACKED_TAG: sha256})
    if found is not None:
        return found
    # MLflow ends the run that it logs a model in; the parent goes on.
    with _fluent(tracking), mlflow.start_run(run_id=tracking.run_id):
        logged = mlflow.pyfunc.log_model(
            name=registered_name(base.model, recipe.name),
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"checkpoint": folder},
            signature=_signature(),
            pip_requirements=[f"bivlm=={code_version()}"],
            params={"recipe": recipe.name, "recipe_sha256": digest(recipe.canonical())},
            tags={**_lineage(base, recipe, tracking.request), PACKED_TAG: sha256},
        )
    tracking.client.update_run(tracking.run_id, status="RUNNING")
    return logged.model_id


@task(name="log-base-model", **TRACKING)
def log_base_model(tracking: Tracking, base: Base) -> str:
    """The full-precision model as a logged model without files, so that its metrics have something to belong to."""
    found = _find_model(tracking, {BASE_TAG: base.sha256, ROLE_TAG: "full precision"})
    if found is not None:
        return found
    tags = {BASE_TAG: base.sha256, ROLE_TAG: "full precision", "bivlm.base.id": base.model.id}
    model = tracking.client.create_logged_model(
        tracking.experiment_id,
        name=f"{model_name(base.model)}-full-precision",
        source_run_id=tracking.run_id,
        tags=tags,
        model_type="full precision",
    )
    tracking.client.finalize_logged_model(model.model_id, "READY")
    return model.model_id


@task(name="register", **TRACKING)
def register(tracking: Tracking, base: Base, recipe: Recipe, model_id: str) -> tuple[str, int]:
    """(name, version) in the model registry; the alias `candidate` then points to that version."""
    client, name = tracking.client, registered_name(base.model, recipe.name)
    versions = [version for version in _versions(client, name) if version.tags.get("bivlm.model_id") == model_id]
    if versions:
        version = max(int(version.version) for version in versions)
    else:
        tags = {**_lineage(base, recipe, tracking.request), "bivlm.model_id": model_id}
        _make_registered_model(client, name)
        source = f"models:/{model_id}"
        with _fluent(tracking):  # a registry in a database looks the source up without a client
            made = client.create_model_version(name, source, tracking.run_id, tags=tags, model_id=model_id)
        version = int(made.version)
    # A tracking server writes this link from the logged model's page itself, a database does not.
    if VERSIONS_TAG not in client.get_logged_model(model_id).tags:
        client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps([{"name": name, "version": version}])})
    client.set_registered_model_alias(name, ALIAS, str(version))
    return name, version


@contextmanager
def _fluent(tracking: Tracking) -> Iterator[None]:
    """Within this block MLflow's functions without a client track at `tracking.uri`.

    `mlflow.set_tracking_uri` also writes MLFLOW_TRACKING_URI, which would send the next compression of this process to
    the tracking store of this one.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking.uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        if configured is not None:
            os.environ["MLFLOW_TRACKING_URI"] = configured


def _versions(client: MlflowClient, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name = '{name}'", max_results=1000))


def _make_registered_model(client: MlflowClient, name: str) -> None:
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _experiment(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name, artifact_location=artifact_root)
    except MlflowException as error:
        # Somebody else created it between the look and the attempt.
        if error.error_code == "RESOURCE_ALREADY_EXISTS":
            return client.get_experiment_by_name(name).experiment_id
        raise


def _find(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> Run | None:
    """The oldest run with these tags."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def _find_model(tracking: Tracking, tags: dict[str, str]) -> str | None:
    """The id of the logged model with these tags, if it was logged to its end."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    models = tracking.client.search_logged_models([tracking.experiment_id], filter_string=condition)
    ready = [model.model_id for model in models if str(model.status) == "READY"]
    return ready[-1] if ready else None


def _log_metrics(
    client: MlflowClient,
    run_id: str,
    metrics: dict[str, float | None],
    model_id: str | None = None,
    data: LoggedData | None = None,
) -> None:
    now = int(time.time() * 1000)
    link = {"dataset_name": data.name, "dataset_digest": data.digest} if data else {}
    entries = [
        Metric(slug(key, "/"), float(value), now, 0, model_id=model_id, run_id=run_id if model_id else None, **link)
        for key, value in metrics.items()
        if value is not None
    ]
    for start in range(0, len(entries), 500):
        client.log_batch(run_id, metrics=entries[start : start + 500])


def _lineage(base: Base, recipe: Recipe, request: str) -> dict[str, str]:
    return {
        REQUEST_TAG: request,
        "bivlm.base.id": base.model.id,
        "bivlm.base.revision": base.model.revision or "",
        BASE_TAG: base.sha256,
        "bivlm.recipe": recipe.name,
        "bivlm.recipe.sha256": digest(recipe.canonical()),
        "bivlm.code_version": code_version(),
        "mlflow.source.name": "bivlm compress",
    }


def _params(base: Base, recipe: Recipe) -> dict[str, str]:
    canonical = recipe.canonical()
    flat = {"model": base.model.id, "revision": base.model.revision or "", "recipe": recipe.name}
    for component, settings in canonical["components"].items():
        flat |= {f"{component}.{key}": value for key, value in settings.items()}
    flat["keep"] = ", ".join(canonical["keep"])
    flat |= {f"calibration.{key}": value for key, value in canonical["calibration"].items()}
    return {key: str(value)[:6000] for key, value in flat.items()}


def _note(base: Base, recipe: Recipe) -> str:
    return (
        f"**{base.model.id}** compressed with the recipe **{recipe.name}**.\n\n"
        f"- base model: `{base.model.id}`, revision `{base.model.revision or 'none (a folder)'}`\n"
        f"- sha256 of the base model: `{base.sha256}`\n"
        f"- sha256 of the recipe: `{digest(recipe.canonical())}`\n\n"
        "Child runs hold the evaluations; `layers.json` and `compression_report.json` are among the artifacts."
    )


def _layer_table(layers: list[dict[str, Any]]) -> dict[str, list[Any]]:
    rows = [
        {key: value for key, value in layer.items() if key not in ("shape", "bits")}
        | {"shape": " x ".join(map(str, layer["shape"]))}
        | {f"bits_{key}": value for key, value in layer["bits"].items()}
        for layer in layers
    ]
    return {key: [row[key] for row in rows] for key in rows[0]}


def _signature() -> mlflow.models.ModelSignature:
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return mlflow.models.ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.string, "question")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.long, 16)]),
    )
