"""The versions in MLflow whose steps stay in a workspace, and the two passes in which the rest goes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn
from prefect import task

from bivlm.checkpoint.reading import LINEAGE
from bivlm.errors import InputError
from bivlm.untrusted import parse_object, short
from bivlm.workspace import garbage
from bivlm.workspace.garbage import Collected, Inventory, Names, collectable, lineage_steps, needed_by
from bivlm.workspace.hashing import canonical_json, digest
from bivlm.workspace.steps import StepRecord, Workspace
from tasks.runtime.policy import OVER_NETWORK
from tasks.runtime.steps import open_workspace
from tasks.tracking.champions import moves_of
from tasks.tracking.run import fluent, public_uri, tracking_place
from tasks.tracking.tags import Tag

DAY_SECONDS = 24 * 3600.0
REGISTRIES = "registries"  # in the workspace: which stores of MLflow have versions whose steps are here
_PAGE = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class KeptVersion:
    """A registered version whose steps stay, and why."""

    name: str
    version: int
    reason: str


@dataclass(frozen=True)
class Kept:
    """The registered versions that stay, and what they need of the workspace."""

    versions: tuple[KeptVersion, ...]
    needed: Names


@dataclass(frozen=True)
class Found:
    """A first look: the contents of the workspace, and what of them may go."""

    inventory: Inventory
    marked: Names

    def by_stage(self) -> dict[str, dict[str, int]]:
        """Return the numbers of steps, and of those that may go, by stage."""
        held, going = Counter(), Counter()
        for name, record in self.inventory.steps.items():
            stage = record.stage if record is not None else "(cannot be read)"
            held[stage] += 1
            going[stage] += name in self.marked
        return {stage: {"steps": held[stage], "going": going[stage]} for stage in sorted(held)}


@task(name="note-registry", **OVER_NETWORK)
def note_registry(workspace: str, uri: str) -> None:
    """Note in the workspace that MLflow at `uri` has versions made here: it is asked before anything goes."""
    store = open_workspace(workspace).store
    name = f"{REGISTRIES}/{_identity(MlflowClient(tracking_uri=uri))}.json"
    content = canonical_json({"uri": public_uri(uri)}) + b"\n"
    if store.read_bytes(name) != content:
        store.put_bytes(name, content)


def forget_registry(workspace: Workspace, identity: str) -> None:
    """Remove the note of an MLflow that is gone for good; raise `InputError` if there is none."""
    known = _registries(workspace)
    if identity not in known:
        raise InputError(f"registry {identity!r}: not one that {workspace.url} knows; expected {_listed(known)}")
    workspace.store.delete(f"{REGISTRIES}/{identity}.json")


@task(name="versions-to-keep", **OVER_NETWORK)
def versions_to_keep(workspace: str, keep_versions: int, although_empty: bool = False) -> Kept:
    """Return what registered versions need: those with an alias, every past champion, the latest `keep_versions`.

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
    kept = tuple(KeptVersion(version.name, int(version.version), reason) for version, reason in chosen)
    return Kept(kept, needed_by(steps for version, _ in chosen for steps in _lineages(client, version)))


@task(name="look-at-workspace", **OVER_NETWORK)
def look(workspace: str, needed: Names, keep_days: float) -> Found:
    """Return what the workspace holds now, and what may go of it."""
    inventory = garbage.look(open_workspace(workspace))
    return Found(inventory, collectable(inventory, needed, keep_days * DAY_SECONDS))


@task(name="collect", **OVER_NETWORK)
def collect(workspace: str, found: Found, needed: Names, keep_days: float) -> Collected:
    """Remove what may go by `found` and still may."""
    place = open_workspace(workspace)
    return garbage.collect(place, found.marked, found.inventory, needed, keep_days * DAY_SECONDS)


def _identity(client: MlflowClient) -> str:
    """Return the name of an MLflow, whatever address it is reached by: when its first experiment was made."""
    made = _if_there(lambda: client.get_experiment("0").creation_time, None)
    address = public_uri(client.tracking_uri)
    return digest({"made": made} if made else {"place": urlsplit(address)._replace(query="").geturl()})[:16]


def _if_there(ask: Callable[[], T], otherwise: T) -> T:
    """Return what MLflow answers, or `otherwise` where it has no such thing."""
    try:
        return ask()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return otherwise


def _registries(workspace: Workspace) -> dict[str, str]:
    """Return the address by identity of every MLflow that holds versions made in the workspace."""
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
    """Return the versions that stay and why, of everything that bivlm registered."""
    versions: dict[str, list[ModelVersion]] = {}
    for version in _pages(client.search_model_versions):
        if Tag.REQUEST in version.tags:
            versions.setdefault(version.name, []).append(version)
    models = {model.name: model for model in _pages(client.search_registered_models)}
    for name, ours in sorted(versions.items()):
        aliases = models[name].aliases
        champions = _champions(name, models[name].tags)
        latest = sorted(ours, key=lambda version: -int(version.version))
        for place, version in enumerate(latest):
            number = int(version.version)
            if own := sorted(alias for alias, of in aliases.items() if int(of) == number):
                yield version, ", ".join(own)
            elif number in champions:
                yield version, "was champion"
            elif place < keep_versions:
                yield version, f"one of the latest {keep_versions}"


def _champions(name: str, tags: dict[str, str]) -> set[int]:
    """Return the versions that ever were champion, or were about to be."""
    try:
        moves = moves_of(tags).values()
    except InputError as error:
        raise InputError(f"registered model {name}: {error}") from None
    return {version for move in moves for version in (move.before, move.after) if version is not None}


def _pages(search: Callable[..., Any]) -> list[Any]:
    return get_results_from_paginated_fn(lambda size, token: search(max_results=size, page_token=token), _PAGE)


def _lineages(client: MlflowClient, version: ModelVersion) -> Iterator[dict[str, StepRecord]]:
    """Return the steps in the lineage records of a version: on its run, and beside its checkpoint.

    They differ after the same request was evaluated otherwise: the checkpoint is not logged again.
    """
    said = f"version {version.name}/{version.version}: {LINEAGE}"
    run_id, model_id = version.run_id, version.tags.get(Tag.MODEL)
    on_run = _if_there(lambda: client.list_artifacts(run_id), []) if run_id else []
    places = [f"runs:/{run_id}/{LINEAGE}" for file in on_run if file.path == LINEAGE]
    places += _if_there(lambda: _beside_checkpoint(client, model_id), []) if model_id else []
    if not places:
        raise InputError(
            f"{said} is neither on its run nor beside its checkpoint, so that it is not known what it needs. Nothing "
            "was removed; delete the version if it is of no use"
        )
    with fluent(client.tracking_uri), tempfile.TemporaryDirectory() as folder:
        for place in places:
            file = Path(mlflow.artifacts.download_artifacts(place, dst_path=folder))
            yield lineage_steps(file.read_bytes(), said)


def _beside_checkpoint(client: MlflowClient, model_id: str) -> list[str]:
    location = client.get_logged_model(model_id).artifact_location.rstrip("/")
    folders = [file.path for file in client.list_logged_model_artifacts(model_id, "artifacts") if file.is_dir]
    files = [file.path for folder in folders for file in client.list_logged_model_artifacts(model_id, folder)]
    return [f"{location}/{path}" for path in files if path.rpartition("/")[2] == LINEAGE]
