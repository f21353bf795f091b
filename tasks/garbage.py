"""What MLflow says must stay of a workspace, and the two passes in which the rest goes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from prefect import task

from bivlm.checkpoint.reading import LINEAGE
from bivlm.errors import InputError
from bivlm.untrusted import parse_object, short
from bivlm.workspace import garbage as collection
from bivlm.workspace.hashing import canonical_json, digest
from bivlm.workspace.roots import Collectable, Inventory, Needed, collectable, lineage_steps
from bivlm.workspace.steps import Workspace
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.champions import moves_of
from tasks.tracking.run import fluent, public_uri, tracking_place
from tasks.tracking.tags import Tag

DAY_SECONDS = 24 * 3600.0
REGISTRIES = "registries"  # in the workspace: which stores of MLflow have versions whose steps are here
_PAGE = 1000


@dataclass(frozen=True)
class KeptVersion:
    """A registered version whose steps stay, and why."""

    name: str
    version: int
    reason: str


@dataclass(frozen=True)
class Kept:
    """What stays: the versions that decide it, and what they need."""

    versions: tuple[KeptVersion, ...]
    needed: Needed


@dataclass(frozen=True)
class Found:
    """A first look: what the workspace holds, and what of it may go."""

    inventory: Inventory
    marked: Collectable

    def by_stage(self) -> dict[str, dict[str, int]]:
        """Steps and those of them that may go, by stage."""
        held, going = Counter(), Counter()
        for key, step in self.inventory.steps.items():
            stage = step.record.stage if step.record is not None else "(cannot be read)"
            held[stage] += 1
            going[stage] += key in self.marked.steps
        return {stage: {"steps": held[stage], "going": going[stage]} for stage in sorted(held)}


@task(name="note-registry", **OVER_NETWORK)
def note_registry(workspace: str, uri: str) -> None:
    """Write into the workspace that MLflow at `uri` has versions made here: it is asked before anything goes."""
    store = open_workspace(workspace).store
    name = f"{REGISTRIES}/{_identity(MlflowClient(tracking_uri=uri))}.json"
    content = canonical_json({"uri": public_uri(uri)}) + b"\n"
    if store.read_bytes(name) != content:
        store.put_bytes(name, content)


def forget_registry(workspace: Workspace, identity: str) -> None:
    """Take back what `note_registry` wrote of an MLflow that is gone for good; raises `InputError` if it wrote none."""
    known = _registries(workspace)
    if identity not in known:
        raise InputError(f"registry {identity!r}: not one that {workspace.url} knows; expected {_listed(known)}")
    workspace.store.delete(f"{REGISTRIES}/{identity}.json")


@task(name="versions-to-keep", **OVER_NETWORK)
def versions_to_keep(workspace: str, keep_versions: int, although_empty: bool = False) -> Kept:
    """What registered versions need: those with an alias, those that ever were champion, the latest `keep_versions`.

    Raises `InputError` if another MLflow than the one that is asked holds versions made in this workspace, if this one
    holds none at all (unless `although_empty`), and if the lineage record of a version that stays cannot be read.
    """
    place = open_workspace(workspace)
    client = MlflowClient(tracking_uri=tracking_place(place)[0])
    asked = public_uri(client.tracking_uri)
    others = {key: uri for key, uri in _registries(place).items() if key != _identity(client)}
    if others:
        raise InputError(
            f"workspace {place.url}: asked was MLflow at {asked}, and versions made here are also in "
            f"{_listed(others)}. What those need is not known, so nothing was removed; set MLFLOW_TRACKING_URI to the "
            "MLflow that is used, or --forget-registry one that is gone for good"
        )
    chosen = list(_chosen(client, keep_versions))
    if not chosen and not although_empty:
        raise InputError(
            f"MLflow at {asked} has no version that bivlm registered, so that nothing of {place.url} would be kept for "
            "one: is MLFLOW_TRACKING_URI right? --although-empty to go on"
        )
    needed = Needed()
    for version, _ in chosen:
        needed |= Needed.by(_lineages(client, version))
    kept = (KeptVersion(version.name, int(version.version), reason) for version, reason in chosen)
    return Kept(tuple(kept), needed)


@task(name="look-at-workspace", **OVER_NETWORK)
def look(workspace: str, needed: Needed, keep_days: float) -> Found:
    """What the workspace holds now, and what may go of it."""
    inventory = collection.look(open_workspace(workspace))
    return Found(inventory, collectable(inventory, needed, keep_days * DAY_SECONDS))


@task(name="collect", **OVER_NETWORK)
def collect(workspace: str, found: Found, needed: Needed, keep_days: float) -> collection.Collected:
    """Remove what was found to be going, as far as it still is."""
    place = open_workspace(workspace)
    return collection.collect(place, found.marked, found.inventory, needed, keep_days * DAY_SECONDS)


def _identity(client: MlflowClient) -> str:
    """What an MLflow is called whatever address it is reached by: when its first experiment was made."""
    try:
        made: Any = client.get_experiment("0").creation_time
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        made = None
    address = public_uri(client.tracking_uri)
    return digest({"made": made} if made else {"place": urlsplit(address)._replace(query="").geturl()})[:16]


def _registries(workspace: Workspace) -> dict[str, str]:
    """Address by identity of every MLflow that holds versions made in the workspace."""
    found = {}
    for entry in workspace.store.entries(REGISTRIES):
        if entry.name.endswith(".json") and (data := workspace.store.read_bytes(entry.name)) is not None:
            uri = parse_object(data, f"{workspace.url}: {entry.name}").get("uri")
            if not isinstance(uri, str):
                raise InputError(f"{workspace.url}: {entry.name}: uri: expected text, found {short(uri)}")
            found[Path(entry.name).stem] = uri
    return found


def _listed(registries: dict[str, str]) -> str:
    return ", ".join(f"{identity} ({uri})" for identity, uri in sorted(registries.items())) or "none"


def _chosen(client: MlflowClient, keep_versions: int) -> Iterator[tuple[ModelVersion, str]]:
    """The versions that stay and why, of everything that bivlm registered."""
    versions: dict[str, list[ModelVersion]] = {}
    for version in _pages(client.search_model_versions):
        if Tag.REQUEST in version.tags:
            versions.setdefault(version.name, []).append(version)
    models = {model.name: model for model in _pages(client.search_registered_models)}
    for name, ours in sorted(versions.items()):
        aliases: dict[int, list[str]] = {}
        for alias, number in models[name].aliases.items():
            aliases.setdefault(int(number), []).append(alias)
        champions = _champions(name, models[name].tags)
        latest = sorted(ours, key=lambda version: -int(version.version))
        for place, version in enumerate(latest):
            number = int(version.version)
            if number in aliases:
                yield version, ", ".join(sorted(aliases[number]))
            elif number in champions:
                yield version, "was champion"
            elif place < keep_versions:
                yield version, f"one of the latest {keep_versions}"


def _champions(name: str, tags: dict[str, str]) -> set[int]:
    """The versions that ever were champion, or were about to be."""
    try:
        moves = moves_of(tags).values()
    except InputError as error:
        raise InputError(f"registered model {name}: {error}") from None
    return {version for move in moves for version in (move.before, move.after) if version is not None}


def _pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _lineages(client: MlflowClient, version: ModelVersion) -> Iterator[dict[str, Any]]:
    """The steps in the lineage records of a version: beside its checkpoint, and on its run.

    They differ after the same request was evaluated otherwise: the checkpoint is not logged again.
    """
    said = f"version {version.name}/{version.version}: {LINEAGE}"
    places = [f"runs:/{version.run_id}/{LINEAGE}"] if version.run_id and _on_run(client, version.run_id) else []
    if model_id := version.tags.get(Tag.MODEL):
        places += _beside_checkpoint(client, model_id)
    if not places:
        raise InputError(
            f"{said} is neither on its run nor beside its checkpoint, so that it is not known what it needs. Nothing "
            "was removed; delete the version if it is of no use"
        )
    with fluent(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
        for place in places:
            file = Path(mlflow.artifacts.download_artifacts(place, dst_path=folder))
            yield lineage_steps(file.read_bytes(), said)


def _on_run(client: MlflowClient, run_id: str) -> bool:
    try:
        return any(file.path == LINEAGE for file in client.list_artifacts(run_id))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _beside_checkpoint(client: MlflowClient, model_id: str) -> list[str]:
    try:
        location = client.get_logged_model(model_id).artifact_location.rstrip("/")
        folders = [file.path for file in client.list_logged_model_artifacts(model_id, "artifacts") if file.is_dir]
        files = [file.path for folder in folders for file in client.list_logged_model_artifacts(model_id, folder)]
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    return [f"{location}/{path}" for path in files if path.rpartition("/")[2] == LINEAGE]
