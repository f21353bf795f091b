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

EXPERIMENT = "bivlm"
_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
REQUEST_TAG = "bivlm.request"
ROLE_TAG = "bivlm.role"  # compression | full precision | packed
BASE_TAG = "bivlm.base.sha256"
BASE_ID_TAG = "bivlm.base.id"
TRIGGER_TAG = "bivlm.trigger"
NOTE_TAG = "mlflow.note.content"
NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Tracking:
    """A compression's place in MLflow; `trigger` is what first asked for it."""

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
    """(tracking URI, artifact root): ``MLFLOW_TRACKING_URI``, else a database file in the workspace.

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
    """The address of the folder's own database file, whose tables are made first if it is new.

    Under another name until they are all there: MLflow cannot go on from a file whose tables it was making when it was
    killed.
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


def public_uri(uri: str) -> str:
    """`uri` without the user name and password that it may hold: for people, files and logs."""
    return without_credentials(uri)


def ui_command(uri: str) -> str:
    """The command that starts the MLflow UI on what was tracked at `uri`; a server already shows its own."""
    if _is_server(uri):
        return f"open {public_uri(uri)}"
    if public_uri(uri) != uri:
        return "mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI"
    program = "mlflow" if shutil.which("mlflow") else shlex.quote(str(Path(sys.executable).with_name("mlflow")))
    return f"{program} ui --backend-store-uri {shlex.quote(uri)}"


def run_page(tracking: Tracking) -> str:
    """Where the UI shows the parent run."""
    return f"{page_address(tracking.uri)}/#/experiments/{tracking.experiment_id}/runs/{tracking.run_id}"


def page_address(uri: str) -> str:
    """Where the UI of the store at `uri` is: a server's own, else the one that `ui_command` starts."""
    return public_uri(uri).rstrip("/") if _is_server(uri) else "http://127.0.0.1:5000"


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def request_digest(base: Base, recipe: Recipe) -> str:
    """What makes two compressions the same one: base model, recipe, code."""
    return digest({"checkpoint": base.sha256, "recipe": recipe.canonical(), "code": code_version()})


@task(name="find-or-create-run", **OVER_NETWORK)
def find_or_create_run(workspace: str, base: Base, recipe: Recipe, trigger: str) -> Tracking:
    """The parent run of this compression, found by its request tag or created for `trigger`.

    Search and creation are not one atomic step: to be called under the lock of the request.
    """
    client, experiment_id = open_experiment(open_workspace(workspace))
    uri = client.tracking_uri
    request = request_digest(base, recipe)
    run = find_run(client, experiment_id, {REQUEST_TAG: request, ROLE_TAG: "compression"})
    if run is None:
        tags = {
            **lineage_tags(base, recipe, request, trigger),
            ROLE_TAG: "compression",
            NOTE_TAG: note(base, recipe, trigger),
        }
        run = client.create_run(experiment_id, run_name=run_name(base.model, recipe.name, request), tags=tags)
    params = {key: value for key, value in _params(base, recipe).items() if key not in run.data.params}
    client.log_batch(run.info.run_id, params=[Param(key, value) for key, value in params.items()])
    label = f"{model_name(base.model)} · {recipe.name}"
    # Whoever asks again finds what the first has made, or takes it up.
    first = run.data.tags.get(TRIGGER_TAG, NOT_RECORDED)
    return Tracking(uri, experiment_id, run.info.run_id, request, label, first)


def open_experiment(workspace: Workspace) -> tuple[MlflowClient, str]:
    """A client of the workspace's tracking store, and the id of the experiment, created if it is not there."""
    uri, artifact_root = tracking_place(workspace)
    client = MlflowClient(tracking_uri=uri)
    return client, _experiment(client, os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT, artifact_root)


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
        # A tracking server that is gone, too, must not hide what went wrong; the next attempt takes the run up.
        with suppress(MlflowException):
            close_run(tracking, failed=True)
        raise
    close_run(tracking)


def find_run(client: MlflowClient, experiment_id: str, tags: dict[str, str]) -> Run | None:
    """The oldest run with these tags."""
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    runs = client.search_runs([experiment_id], condition, max_results=1, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def lineage_tags(base: Base, recipe: Recipe, request: str, trigger: str) -> dict[str, str]:
    """Where a run, a model or a version comes from; the same tags on all of them."""
    revision = {"bivlm.base.revision": base.model.revision} if base.model.revision else {}
    return {
        REQUEST_TAG: request,
        BASE_ID_TAG: base.model.id,
        **revision,
        BASE_TAG: base.sha256,
        "bivlm.recipe": recipe.name,
        "bivlm.recipe.sha256": digest(recipe.canonical()),
        "bivlm.code_version": code_version(),
        TRIGGER_TAG: trigger,
        "mlflow.source.name": "bivlm compress",
    }


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


def _params(base: Base, recipe: Recipe) -> dict[str, str]:
    canonical = recipe.canonical()
    flat = {"model": base.model.id, "revision": base.model.revision or "", "recipe": recipe.name}
    for component, settings in canonical["components"].items():
        flat |= {f"{component}.{key}": value for key, value in settings.items()}
    flat["keep"] = ", ".join(canonical["keep"])
    flat |= {f"calibration.{key}": value for key, value in canonical["calibration"].items()}
    return {key: str(value)[:6000] for key, value in flat.items()}


def note(base: Base, recipe: Recipe, trigger: str, result: str = "") -> str:
    """The description of the run, for people: what it is, what came of it (`result`, a sentence), where from, why."""
    return (
        f"**{base.model.id}** compressed with the recipe **{recipe.name}**. {result}\n\n"
        f"- base model: `{base.model.id}`, revision `{base.model.revision or 'none (a folder)'}`\n"
        f"- sha256 of the base model: `{base.sha256}`\n"
        f"- sha256 of the recipe: `{digest(recipe.canonical())}`\n"
        f"- asked for: {trigger}\n\n"
        "Child runs hold the evaluations. Among the artifacts: `report.html` (all of it on one page), `lineage.json` "
        "(every step with its key and hashes; `bivlm lineage` verifies it), `layers.json`, the figures."
    )
