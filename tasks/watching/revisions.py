"""Find the current revision of a base model.

The hub reports it. In a folder and below an S3 prefix files arrive one by one, so nothing counts before it is whole and
two looks, some time apart, have seen it unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from prefect import task
from pydantic import BaseModel, ConfigDict

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.names import check_commit, check_revision
from bivlm.sources.hub_errors import hub_error
from bivlm.sources.models import HUB_TROUBLE
from bivlm.workspace.hashing import digest
from tasks.runtime.policy import OVER_NETWORK
from tasks.watching.watch_lists import EVERY, Watched, is_pinned, kind_of


class Look(BaseModel):
    """One look at a folder or an S3 prefix, for the next look to compare with.

    Attributes:
        listing: sha256 of the names, lengths and times (ETags in S3) of all files.
        since: when it was first seen like this.
        revision: of this listing, once it was whole and settled.
        problem: why it is no whole model yet.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    listing: str
    since: datetime
    revision: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Listing:
    """Everything at a place now: its digest, and functions for its problem and its revision (may take minutes)."""

    digest: str
    problem: Callable[[], str]
    revision: Callable[[], str]


@task(name="pin-revision", **OVER_NETWORK)
def pin_revision(model: str, revision: str | None) -> str:
    """Return the commit of a branch (default: the main one) on the hub, or the revision a folder or S3 prefix has now.

    Raises `InputError` if that is not the given revision. A commit is returned as it is: a model in the hub's cache
    needs no hub.
    """
    kind = kind_of(model)
    if kind == "hub":
        if Path(model).is_dir():
            raise InputError(f"model {model!r}: a folder of that name is in {Path.cwd()}; expected a model of the hub")
        return revision if revision and is_pinned(kind, revision) else hub_revision(model, revision)
    if kind == "s3":
        from bivlm.sources.s3_models import cached_copy, list_prefix

        if revision is not None and cached_copy(model, revision) is not None:
            return revision
        found = list_prefix(model).revision
    else:
        found = Checkpoint.open(model).digest()
    if revision not in (None, found):
        raise InputError(f"model {model}: now at {found}; {revision}, which was asked for, is gone")
    return found


def hub_revision(model: str, branch: str | None = None) -> str:
    """Return the commit of `branch` (default: the main one). It asks the hub, whose cache knows nothing new.

    Raises `InputError` and `ConnectionError` as `bivlm.sources.models.resolve_model` does.
    """
    check_revision(branch, f"model {model!r}")
    try:
        commit = HfApi().model_info(model, revision=branch).sha
    except HFValidationError:
        raise InputError(f"model {model!r}: not a hub id of the form owner/name") from None
    except HUB_TROUBLE as error:
        raise hub_error(error, model, branch) from error
    return check_commit(commit, f"model {model!r}")  # it becomes the name of a folder


def folder_listing(folder: str | Path) -> Listing:
    """List a folder's files, links followed, hidden folders (git's) left out. Its revision is `Checkpoint.digest`."""
    folder = Path(folder)
    found = {}
    for place, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = Path(place) / name
            try:
                status = path.stat()
            except FileNotFoundError:  # renamed or removed meanwhile, or a link to nothing
                found[str(path)] = [-1, -1]
                continue
            found[path.relative_to(folder).as_posix()] = [status.st_size, status.st_mtime_ns]

    def problem() -> str:
        try:
            Checkpoint.open(folder)
        except (InputError, OSError) as error:
            return str(error)
        return ""

    return Listing(digest(found), problem, lambda: Checkpoint.open(folder).digest())


def s3_listing(url: str) -> Listing:
    """List the objects below an S3 prefix. Their revision is that of `bivlm.sources.s3_models`."""
    from bivlm.sources.s3_models import list_prefix, what_is_missing

    listing = list_prefix(url)
    return Listing(listing.revision, lambda: what_is_missing(listing), lambda: listing.revision)


def settle(
    before: Look | None, listing: Callable[[], Listing], settled_seconds: float, now: datetime | None = None
) -> Look:
    """Return the look at a place that follows the look `before`.

    It has a revision if the model is whole and unchanged since a look at least `settled_seconds` ago. Hashing a folder
    takes minutes: the revision of a listing is kept, and a folder that changed while it was hashed has none.
    """
    now = now or datetime.now(UTC)
    seen = listing()
    if before is None or before.listing != seen.digest:
        return Look(listing=seen.digest, since=now, problem=seen.problem())
    if before.revision is not None:
        return before
    problem = seen.problem()
    if problem or (now - before.since).total_seconds() < settled_seconds:
        return before.model_copy(update={"problem": problem})
    revision = seen.revision()
    again = listing()
    if again.digest != seen.digest:
        return Look(listing=again.digest, since=datetime.now(UTC), problem=again.problem())
    return before.model_copy(update={"revision": revision, "problem": ""})


def models_of(entry: Watched) -> list[str]:
    """Return the models of an entry of the list: itself, or every model in its place now.

    Raises `InputError` for a missing folder of models; a single model may appear later.
    """
    if not entry.every:
        return [entry.model]
    if entry.kind == "s3":
        from bivlm.sources.s3_models import list_models

        return list_models(entry.place)
    place = Path(entry.place)
    if not place.is_dir():
        raise InputError(f"{entry.model}: no such folder {place}; {EVERY} stands for the models in it")
    return sorted(str(path) for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
