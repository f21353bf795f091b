"""The list of watched base models (``infra/base-models.yaml``), and the checks of names that come from outside.

Events and workflows name models, revisions and recipes. Names are judged by their form before anything is done with
them, folders and S3 prefixes also by where they lie.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bivlm.errors import InputError
from bivlm.names import check_revision, is_commit, is_sha256
from bivlm.recipe.loading import Recipe, load_recipe, shipped_recipes
from bivlm.untrusted import read_yaml
from bivlm.workspace.hashing import canonical_json, digest
from bivlm.workspace.stores.location import cache_folder, is_s3_model

LIST_VARIABLE = "BIVLM_BASE_MODELS"  # the list's file
PLACES_VARIABLE = "BIVLM_MODELS"  # folders and S3 prefixes whose models may be requested by name, with commas
RECIPES_VARIABLE = "BIVLM_RECIPES"  # a folder of NAME.yaml
OUTPUTS_VARIABLE = "BIVLM_OUTPUTS"  # where packed checkpoints go
DEFAULT_RECIPE = "bivlm"

EVENT = "bivlm.base_model.found"
_EVENTS = uuid.uuid5(uuid.NAMESPACE_URL, EVENT)
_SHIPPED_LIST = Path(__file__).parents[2] / "infra" / "base-models.yaml"

Kind = Literal["hub", "folder", "s3"]
EVERY = "/*"  # at the end of a folder or an S3 prefix: every model in it

_RECIPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Watched(BaseModel):
    """An entry of the list: where a model is, and the recipes that every new revision of it is compressed by.

    `model` is ``owner/name`` on the hub, an absolute folder or ``s3://bucket/prefix``; one of the last two that ends in
    ``/*`` stands for every model in it. ``$NAME`` is taken from the environment. `revision` is a branch or tag of the
    hub. `leaderboard` names recipes that are compared on it once a week.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str
    revision: str | None = None
    recipes: list[str] = Field(min_length=1)
    leaderboard: list[str] = []

    @field_validator("model")
    @classmethod
    def _known_form(cls, value: str) -> str:
        expanded = os.path.expandvars(value)
        if "$" in expanded:
            raise ValueError(f"{value!r} names a variable that is not set in the environment")
        if kind_of(expanded.removesuffix(EVERY)) == "hub" and expanded.endswith(EVERY):
            raise ValueError(f"{value!r}: {EVERY} stands for the models in a folder or an S3 prefix")
        return expanded

    @model_validator(mode="after")
    def _in_order(self) -> Watched:
        if self.revision is not None:
            if self.kind != "hub":
                raise ValueError(f"revision {self.revision!r}: a {self.kind} model has none; leave it out")
            check_asked("hub", self.revision)
        for names in (self.recipes, self.leaderboard):
            if len(set(names)) < len(names):
                raise ValueError(f"{', '.join(names)}: a recipe is named twice")
            for name in names:
                named_recipe(name)
        return self

    @property
    def place(self) -> str:
        """The model, or the folder or prefix of which every model is meant."""
        return self.model.removesuffix(EVERY)

    @property
    def every(self) -> bool:
        return self.model.endswith(EVERY)

    @property
    def kind(self) -> Kind:
        return kind_of(self.place)

    def covers(self, model: str) -> bool:
        """Return whether the folder or prefix `model` is this one or one of these."""
        depth = _depth(model, self.place) if self.kind != "hub" else None
        return depth is not None and (depth > 0) == self.every


class _List(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    models: list[Watched]

    @field_validator("models")
    @classmethod
    def _each_once(cls, models: list[Watched]) -> list[Watched]:
        names = [(each.model, each.revision) for each in models]
        if twice := next((model for model, revision in names if names.count((model, revision)) > 1), None):
            raise ValueError(f"{twice} is listed twice; name all its recipes in one entry")
        return models


@dataclass(frozen=True)
class Revision:
    """One revision of a base model and a recipe to compress it by: what an event is about.

    `revision` pins the bytes: the commit on the hub, the sha256 of the checkpoint in a folder
    (`bivlm.checkpoint.reading.Checkpoint.digest`), that of names, lengths and ETags below an S3 prefix.
    """

    model: str
    revision: str
    recipe: str

    @property
    def event_id(self) -> uuid.UUID:
        """The same id whenever and wherever this revision is found."""
        return uuid.uuid5(_EVENTS, canonical_json([self.model, self.revision, self.recipe]).decode())

    def event(self) -> dict[str, Any]:
        """Return name, resource and payload of the event; the id is `event_id`."""
        return {
            "event": EVENT,
            "resource": {
                "prefect.resource.id": f"bivlm.base-model.{model_slug(self.model)}",
                "prefect.resource.name": self.model,
                "bivlm.model_id": self.model,
            },
            "payload": {"revision": self.revision, "recipe": self.recipe},
        }

    def output(self) -> Path:
        """Return the folder for the packed checkpoint: model, recipe and revision below ``BIVLM_OUTPUTS``."""
        return outputs_folder() / model_slug(self.model) / self.recipe / self.revision[:16]


def base_models_file() -> Path:
    """Return the file of ``BIVLM_BASE_MODELS``, else ``infra/base-models.yaml`` of the checkout that this runs from."""
    named = os.environ.get(LIST_VARIABLE)
    file = Path(named).expanduser() if named else _SHIPPED_LIST
    if not file.is_file():
        raise InputError(f"{LIST_VARIABLE}: no file {file}; expected a list of base models, as infra/base-models.yaml")
    return file


def load_base_models(file: str | Path | None = None) -> list[Watched]:
    """Return the entries of the list (default: `base_models_file`); raises `InputError` naming the file and the key."""
    file = Path(file) if file is not None else base_models_file()
    data = read_yaml(file)
    if not isinstance(data, dict):
        raise InputError(f"{file}: expected a mapping with format and models, found {type(data).__name__}")
    try:
        return _List.model_validate(data).models
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, each['loc'])) or '(top)'}: {each['msg']}" for each in error.errors()]
        raise InputError("\n".join([f"{file} is not valid:", *lines])) from None


def nothing_watched() -> str:
    """Return the sentence for a list without entries: it names the file to write them into."""
    return f"no base models are watched; write them into {base_models_file()}"


def listed_if_any() -> list[Watched]:
    """Return the entries of the list; none on a machine that has no list."""
    return load_base_models() if os.environ.get(LIST_VARIABLE) or _SHIPPED_LIST.is_file() else []


def kind_of(model: str) -> Kind:
    """Return what `model` names, by its form alone; raises `InputError` for any other form."""
    if is_s3_model(model):
        return "s3"
    if model.isprintable() and model.startswith("/") and ".." not in PurePosixPath(model).parts:
        return "folder"
    if model.isprintable() and model.count("/") == 1 and not model.startswith("/"):
        with suppress(HFValidationError):
            validate_repo_id(model)
            return "hub"
    raise InputError(
        f"model {model!r}: expected owner/name on the hub, an absolute folder, or s3://bucket/prefix, without '..'"
    )


def check_asked(kind: Kind, revision: str, *, pinned: bool = False) -> None:
    """Raise `InputError` unless `revision` may be requested; a `pinned` one says which bytes (`is_pinned`)."""
    if kind == "hub" and not pinned:
        check_revision(revision, "base model")
    elif not is_pinned(kind, revision):
        digits = 40 if kind == "hub" else 64
        what = "a commit" if kind == "hub" else "the sha256 that the watcher found"
        raise InputError(f"revision {revision!r}: expected {what} ({digits} hexadecimal digits)")


def is_pinned(kind: Kind, revision: str) -> bool:
    """Return whether `revision` says which bytes, not where to look for them."""
    return is_commit(revision) if kind == "hub" else is_sha256(revision)


def check_permitted(model: str, listed: Iterable[Watched]) -> None:
    """Raise `InputError` for a folder or S3 prefix that is neither `listed` nor in a place of ``BIVLM_MODELS``.

    Folders are judged by where they really lie, links followed. Every model of the hub is permitted: its code never
    runs unless it is trusted (`bivlm.checkpoint.remote_code`).
    """
    if kind_of(model) == "hub" or any(each.covers(model) for each in listed):
        return
    named = [each.strip() for each in os.environ.get(PLACES_VARIABLE, "").split(",") if each.strip()]
    places = [each.rstrip("/") if each.startswith("s3://") else str(Path(each).expanduser()) for each in named]
    if all(_depth(model, place) is None for place in places):
        raise InputError(
            f"model {model!r}: neither in the list of base models nor in a place of {PLACES_VARIABLE} "
            f"(in the worker's environment: {', '.join(places) or 'not set'})"
        )


def recipe_source(name: str) -> str:
    """Return what `bivlm.recipe.loading.load_recipe` takes: a file in ``BIVLM_RECIPES``, else a shipped recipe's name.

    Raises `InputError` for a name that is a path, or unknown.
    """
    if not _RECIPE.fullmatch(name) or ".." in name:
        raise InputError(f"recipe {name!r}: expected a name of letters, digits, '.', '_' and '-', not a path")
    folder = os.environ.get(RECIPES_VARIABLE)
    file = Path(folder).expanduser() / f"{name}.yaml" if folder else None
    if file is not None and file.is_file():
        return str(file)
    if name not in shipped_recipes():
        place = f"no {file}" if file else f"{RECIPES_VARIABLE} is not set"
        raise InputError(f"recipe {name!r}: {place}, and not one of {', '.join(shipped_recipes())}")
    return name


def named_recipe(name: str) -> Recipe:
    """Return the recipe of `recipe_source`; raises `InputError` also for a file that gives itself another name."""
    source = recipe_source(name)
    recipe = load_recipe(source)
    if recipe.name != name:
        raise InputError(f"recipe {source}: its name is {recipe.name!r}; expected {name!r}, as the file is called")
    return recipe


def model_slug(model: str) -> str:
    """Return a name for folders and resources: readable, and different for every model."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", model.removeprefix("s3://")).strip("-")[-60:]
    return f"{readable}-{digest(model)[:8]}".lower()


def outputs_folder() -> Path:
    """Return ``BIVLM_OUTPUTS``, else ``outputs`` in the cache folder."""
    named = os.environ.get(OUTPUTS_VARIABLE)
    return Path(named).expanduser().absolute() if named else cache_folder().absolute() / "outputs"


def _depth(model: str, place: str) -> int | None:
    """Return how many folders `model` lies below `place`, 0 if it is that place; None if it lies elsewhere."""
    if model.startswith("s3://") != place.startswith("s3://"):
        return None
    below, above = PurePosixPath(model), PurePosixPath(place)
    if not model.startswith("s3://"):
        below, above = Path(model).resolve(), Path(place).resolve()
    return len(below.relative_to(above).parts) if below.is_relative_to(above) else None
