"""A compression's place in MLflow: the store, the experiment and the parent run, and what is written on it."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Param, Run
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.addresses import sqlite_address, without_credentials
from bivlm.errors import InputError
from bivlm.names import check_address
from bivlm.recipe.loading import Recipe
from bivlm.workspace.hashing import digest
from bivlm.workspace.locks import one_at_a_time
from bivlm.workspace.steps import Workspace
from tasks.checkpoint import Base
from tasks.report import code_version
from tasks.runtime.naming import model_name, run_name
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.markdown import render
from tasks.tracking.tags import NOT_RECORDED, Tag, having

EXPERIMENT = "bivlm"
public_uri = without_credentials  # what people, files and logs see of an address
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")


@dataclass(frozen=True)
class Tracking:
    """A compression's place in MLflow; `trigger` is what first requested it."""

    uri: str
    experiment_id: str
    run_id: str
    request: str
    label: str  # model and recipe, for people
    trigger: str

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri)


def tracking_place(workspace: Workspace) -> tuple[str, str | None]:
    """Return (tracking URI, artifact root): ``MLFLOW_TRACKING_URI``, else a database file in the workspace.

    A tracking server knows where its artifacts go (None). A database alone does not: they go into the workspace, be it
    a folder or in S3.
    """
    _take_password_out_of_address()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _database_in(workspace.local)
    if "://" not in uri or urlsplit(uri).scheme.partition("+")[0] not in _SCHEMES:
        raise InputError(f"MLFLOW_TRACKING_URI {public_uri(uri)!r}: expected {', '.join(f'{s}://' for s in _SCHEMES)}")
    if _is_server(uri):
        return uri, None
    if workspace.url.startswith("s3://"):
        if {"?", "#"} & set(workspace.url):  # MLflow would read an address up to there
            raise InputError(f"workspace {workspace.url}: found ? or #, which MLflow cannot store artifacts below")
        return uri, f"{workspace.url}/mlflow-artifacts"
    return uri, (workspace.local / "mlflow-artifacts").as_uri()


def _database_in(folder: Path) -> str:
    """Return the address of the folder's own database file; a new one gets its tables first.

    It has another name until all are there: MLflow cannot use a file whose tables it was making when it was killed.
    """
    file = folder / "mlflow.db"
    with one_at_a_time(folder / "locks" / "mlflow.lock"):
        if not file.exists():
            unfinished = folder / ".mlflow.db.partial"
            unfinished.unlink(missing_ok=True)
            MlflowClient(tracking_uri=sqlite_address(unfinished)).search_experiments(max_results=1)
            unfinished.rename(file)
    return sqlite_address(file)


def _take_password_out_of_address() -> None:
    """Move user and password of ``MLFLOW_TRACKING_URI`` to the variables that MLflow reads them from as well.

    As part of the address they stand in its error messages, and from there in logs and in Prefect's states.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    found = urlsplit(check_address(uri, "MLFLOW_TRACKING_URI")) if _is_server(uri) else None
    if found is None or found.username is None:
        return
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(found.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(found.password or "")
    # Only the user and the password go: the address must still lead there.
    os.environ["MLFLOW_TRACKING_URI"] = found._replace(netloc=found.netloc.rpartition("@")[2]).geturl()


def ui_command(uri: str) -> str:
    """Return the command that shows what was tracked at `uri` in the MLflow UI; a server shows its own."""
    if _is_server(uri):
        return f"open {public_uri(uri)}"
    if public_uri(uri) != uri:
        return "mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI"
    program = "mlflow" if shutil.which("mlflow") else shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    return f"{program} ui --backend-store-uri {shlex.quote(uri)}"


def run_page(tracking: Tracking) -> str:
    """Return the address of the parent run in the UI."""
    return f"{page_address(tracking.uri)}/#/experiments/{tracking.experiment_id}/runs/{tracking.run_id}"


def page_address(uri: str) -> str:
    """Return the address of the UI of the store at `uri`: a server's own, else the one that `ui_command` starts."""
    return public_uri(uri).rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def request_digest(base: Base, recipe: Recipe) -> str:
    """Return the hash of what makes two compressions the same: base model, recipe, code."""
    return digest({"checkpoint": base.sha256, "recipe": recipe.canonical(), "code": code_version()})


@task(name="find-or-create-run", **OVER_NETWORK)
def find_or_create_run(workspace: str, base: Base, recipe: Recipe, trigger: str) -> Tracking:
    """Return the parent run of this compression, found by its request tag or created for `trigger`.

    Search and creation are not atomic: call it under the lock of the request.
    """
    client, experiment_id = open_experiment(open_workspace(workspace))
    request = request_digest(base, recipe)
    run = find_run(client, experiment_id, {Tag.REQUEST: request, Tag.ROLE: "compression"})
    if run is None:
        tags = {Tag.ROLE: "compression", Tag.NOTE: note(base, recipe, trigger)}
        tags |= lineage_tags(base, recipe, request, trigger)
        run = client.create_run(experiment_id, run_name=run_name(base.model, recipe.name, request), tags=tags)
    params = {key: value for key, value in _params(base, recipe).items() if key not in run.data.params}
    client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
    label = f"{model_name(base.model)} · {recipe.name}"
    first = run.data.tags.get(Tag.TRIGGER, NOT_RECORDED)  # a repeated request finds what the first one made
    return Tracking(client.tracking_uri, experiment_id, run.info.run_id, request, label, first)


def open_experiment(workspace: Workspace) -> tuple[MlflowClient, str]:
    """Return a client of the workspace's tracking store and the id of the experiment, created if it is not there."""
    uri, artifact_root = tracking_place(workspace)
    client, name = MlflowClient(tracking_uri=uri), os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    if (experiment := client.get_experiment_by_name(name)) is None:
        with unless_there():
            client.create_experiment(name, artifact_location=artifact_root)
        experiment = client.get_experiment_by_name(name)
    return client, experiment.experiment_id


@contextmanager
def ends_run(tracking: Tracking) -> Iterator[None]:
    """Mark the parent run as running within this block; afterwards as finished, or failed."""
    tracking.client.update_run(tracking.run_id, status="RUNNING")
    try:
        yield
    except BaseException:
        # A tracking server that is gone, too, must not hide what went wrong; the next attempt resumes the run.
        with suppress(MlflowException):
            tracking.client.set_terminated(tracking.run_id, "FAILED")
        raise
    tracking.client.set_terminated(tracking.run_id, "FINISHED")


@contextmanager
def fluent(uri: str) -> Iterator[None]:
    """Let MLflow's functions without a client track at `uri` within this block.

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


def find_run(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> Run | None:
    """Return the oldest run with these tags."""
    runs = client.search_runs([experiment_id], having(tags), max_results=1, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def lineage_tags(base: Base, recipe: Recipe, request: str, trigger: str) -> dict[str, str]:
    """Return the tags that say where a run, a model or a version comes from."""
    revision = {Tag.BASE_REVISION: base.model.revision} if base.model.revision else {}
    return {
        Tag.REQUEST: request,
        Tag.BASE_ID: base.model.id,
        **revision,
        Tag.BASE_SHA256: base.sha256,
        Tag.RECIPE: recipe.name,
        Tag.RECIPE_SHA256: digest(recipe.canonical()),
        Tag.CODE_VERSION: code_version(),
        Tag.TRIGGER: trigger,
        Tag.SOURCE: "bivlm compress",
    }


@contextmanager
def unless_there() -> Iterator[None]:
    """Leave this block if MLflow says that what is created in it is there already: another run was faster."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _params(base: Base, recipe: Recipe) -> dict[str, str]:
    canonical = recipe.canonical()
    flat = {"model": base.model.id, "revision": base.model.revision or "", "recipe": recipe.name}
    for component, settings in canonical["components"].items():
        flat |= {f"{component}.{key}": value for key, value in settings.items()}
    flat["keep"] = ", ".join(canonical["keep"])
    flat |= {f"calibration.{key}": value for key, value in canonical["calibration"].items()}
    return {key: str(value)[:6000] for key, value in flat.items()}


def note(base: Base, recipe: Recipe, trigger: str, result: str = "") -> str:
    """Return the run's description: what it is, what came of it (`result`, a sentence), where from, why."""
    recipe_sha256 = digest(recipe.canonical())
    values = {"recipe": recipe.name, "recipe_sha256": recipe_sha256, "trigger": trigger, "result": result}
    return render("description", base=base.model, sha256=base.sha256, **values)
