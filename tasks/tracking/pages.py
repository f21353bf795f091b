"""MLflow's pages of a registered version, its model, its base model and its run; and the same for a terminal.

Every page is written anew from tags, so that writing it twice, or by two machines at once, does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from bivlm.errors import InputError
from tasks.tracking.champions import Move, line_of, moves_of
from tasks.tracking.markdown import as_minute, cut, render
from tasks.tracking.registry import CANDIDATE, CHAMPION, is_absent, version_at, versions_of, versions_where
from tasks.tracking.run import public_uri
from tasks.tracking.tags import Tag, VersionTags, below, having, tags_of

_HEAD = "Registered as "


@dataclass(frozen=True)
class Standing:
    """Whether a version is champion, was, or is the candidate; as text with dates or the gate's decision."""

    short: str
    rest: str = ""

    def __str__(self) -> str:
        return self.short + self.rest


def standing(model: RegisteredModel, version: ModelVersion) -> Standing:
    """Return where a version stands."""
    number, tags = int(version.version), tags_of(version)
    moves = moves_at(model, number)
    became = [move for move in moves if move.after == number]
    left = [move for move in moves if move.before == number]
    if version_at(model, CHAMPION) == number:
        since = f" since {as_minute(became[-1].when)} UTC, by {became[-1].who}" if became else ""
        return Standing("champion", since)
    if became:
        return Standing("was champion", f" until {as_minute(left[-1].when)} UTC" if left else "")
    kind = "candidate" if version_at(model, CANDIDATE) == number else "an earlier candidate"
    return Standing(f"{kind}, not champion") if tags.passed else Standing(kind, f", gate {tags.gate}")


def moves_at(model: RegisteredModel, version: int | None = None) -> list[Move]:
    """Return the moves of the champion that took place, of one version those from or to it."""
    done = [move for move in moves_of(model.tags).values() if move.done]
    return [move for move in done if version is None or version in (move.before, move.after)]


def write_pages(client: MlflowClient, name: str) -> None:
    """Write the page of a registered model, of each of its versions, and of the base models they were made of."""
    model, versions = client.get_registered_model(name), versions_of(client, name)
    if (text := _model_page(model, versions)) != (model.description or ""):
        client.update_registered_model(name, text)
    for version in versions:
        text = _version_page(model, version)
        if text != (version.description or ""):
            client.update_model_version(name, str(version.version), text)
        if Tag.MODEL in version.tags:
            _write_on_logged_model(client, version.tags[Tag.MODEL], text)
            _write_on_run(client, version, standing(model, version))
    for base_id, version in {version.tags.get(Tag.BASE_MODEL): version for version in versions}.items():
        if base_id is not None:
            _write_on_logged_model(client, base_id, _base_page(client, tags_of(version)))


def versions_of_base(client: MlflowClient, base_id: str, sha256: str | None = None) -> list[ModelVersion]:
    """Return what was made of any revision of a base model, and of models with this sha256, whatever their name."""
    conditions = [having({Tag.BASE_SHA256: sha256})] if sha256 else []
    mark = next((mark for mark in ("'", '"') if mark not in base_id), None)
    if mark is not None:  # MLflow's filters know no escapes
        conditions.append(f"tags.`{Tag.BASE_ID}` = {mark}{base_id}{mark}")
    found = [version for condition in conditions for version in versions_where(client, condition)]
    return list({(version.name, version.version): version for version in found}.values())


def audit_version(client: MlflowClient, version: ModelVersion) -> dict[str, Any]:
    """Return ``{"version", "standing", "tags", "run", "moves"}`` of a registered version.

    The tags are bivlm's own without the prefix; moves are those of the champion from or to this version, in order.
    """
    model = client.get_registered_model(version.name)
    scores = {f"{Tag.ACCURACY}{benchmark}": str(score) for benchmark, score in tags_of(version).scores.items()}
    tags = {key: value for key, value in version.tags.items() if not key.startswith(Tag.MOVE)}
    return {
        "version": f"{version.name}/{version.version}",
        "standing": str(standing(model, version)),
        "tags": below(tags | scores, Tag.OURS),
        "run": version.run_id,
        "moves": [move.model_dump() for move in moves_at(model, int(version.version))],
    }


def audit_base(client: MlflowClient, base: str) -> list[dict[str, Any]]:
    """Return all registered versions made of a base model, given by its id or at least 8 digits of its sha256.

    A row is ``{"version", "standing", "base", "revision", "sha256", "recipe", "trigger", "bits", "accuracy",
    "gate"}``. Raises `InputError` if nothing was made of it.
    """
    found = versions_of_base(client, base)
    if not found and len(base) >= 8 and set(base) <= set("0123456789abcdef"):
        found = versions_where(client, f"tags.`{Tag.BASE_SHA256}` LIKE '{base}%'")
    if not found:
        raise InputError(
            f"base model {base!r}: the registry at {public_uri(client.tracking_uri)} has nothing that was made of it; "
            "expected its id as it was compressed (the folder, or OWNER/NAME), or its sha256"
        )
    return [
        {
            "version": f"{version.name}/{version.version}",
            "standing": str(stands),
            "base": tags.base_id,
            "revision": tags.base_revision,
            "sha256": tags.base_sha256,
            "recipe": tags.recipe,
            "trigger": tags.trigger,
            "bits": tags.linears,
            "accuracy": tags.accuracy,
            "gate": tags.gate,
        }
        for version, tags, stands in _described(client, found)
    ]


def _described(
    client: MlflowClient, versions: Iterable[ModelVersion]
) -> list[tuple[ModelVersion, VersionTags, Standing]]:
    versions = list(versions)
    models = {name: client.get_registered_model(name) for name in {version.name for version in versions}}
    return [(version, tags_of(version), standing(models[version.name], version)) for version in versions]


def _version_page(model: RegisteredModel, version: ModelVersion) -> str:
    moves = moves_at(model, int(version.version))[:-6:-1]
    return cut(render("version", v=tags_of(version), version=version, standing=standing(model, version), moves=moves))


def _model_page(model: RegisteredModel, versions: list[ModelVersion]) -> str:
    champion, moves = version_at(model, CHAMPION), moves_at(model)
    before = [version for version in line_of(moves) if version != champion][:-6:-1]
    rows = [(version, tags_of(version), standing(model, version)) for version in versions]
    return cut(render("model", champion=champion, before=before, moves=moves[:-9:-1], versions=rows))


def _base_page(client: MlflowClient, tags: VersionTags) -> str:
    """Return the page of the full-precision model that the version with these tags was made of."""
    found = _described(client, versions_of_base(client, tags.base_id, tags.base_sha256))
    of_this = [each for each in found if each[1].base_sha256 == tags.base_sha256]
    return cut(render("base", v=tags, of_this=of_this, others=[each for each in found if each not in of_this]))


def _write_on_logged_model(client: MlflowClient, model_id: str, text: str) -> None:
    """Write the page of a logged model, unless it was deleted."""
    try:
        if client.get_logged_model(model_id).tags.get(Tag.NOTE) != text:
            client.set_logged_model_tags(model_id, {Tag.NOTE: text})
    except MlflowException as error:
        if not is_absent(error):
            raise


def _write_on_run(client: MlflowClient, version: ModelVersion, stands: Standing) -> None:
    """Begin the run's description with the place of its version, unless the run was deleted."""
    try:
        note = client.get_run(version.run_id).data.tags.get(Tag.NOTE, "")
    except MlflowException as error:
        if not is_absent(error):
            raise
        return
    rest = note.partition("\n\n")[2] if note.startswith(_HEAD) else note
    text = f"{render('run', version=version, standing=stands, gate=version.tags.get(Tag.GATE))}\n\n{rest}"
    if note != text:
        client.set_tag(version.run_id, Tag.NOTE, text)
