"""The watcher's record of base models, kept in the workspace, so that any machine may watch.

Prefect's server knows the runs of a revision and how they ended (`tasks.watching.events`). The workspace keeps what
must outlive that server: how a folder looked last, when each event was emitted, and how the matter ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from prefect import get_run_logger, task
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from bivlm.errors import InputError, describe
from tasks.runtime.policy import OVER_NETWORK, is_passing
from tasks.runtime.states import COMPLETED, GATE_STATE, INPUT_STATE
from tasks.runtime.steps import open_workspace
from tasks.watching.revisions import Look, folder_listing, hub_revision, models_of, s3_listing, settle
from tasks.watching.watch_lists import Revision, Watched, model_slug

State = TypeVar("State", bound=BaseModel)

LONGEST_PAUSE = timedelta(days=1)
# How the first versions of bivlm called the outcomes, in an `answer` beside what was found.
_EARLIER_OUTCOMES = {"compressed": COMPLETED, "gate not passed": GATE_STATE, "bad input": INPUT_STATE}


class Found(BaseModel):
    """A revision that was found: when it was first seen, when the server took its event, how its run ended for good."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str
    recipe: str
    event: str
    first_seen: AwareDatetime
    emitted: tuple[AwareDatetime, ...] = ()
    outcome: str | None = None


@dataclass(frozen=True)
class Seen:
    """The revisions that one look at the list saw; and by model, why another has none yet, or could not be read."""

    revisions: list[Revision] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    troubled: dict[str, str] = field(default_factory=dict)


@task(name="look-at-base-models", **OVER_NETWORK)
def look_at_base_models(entries: Sequence[Watched], settled_seconds: float, workspace: str) -> Seen:
    """Return the current revision of every listed model. Trouble with one model does not hide the others."""
    seen = Seen()
    for entry in entries:
        models: list[str] = []
        with _trouble_noted(seen, entry.model):
            models = models_of(entry)
        for model in models:
            with _trouble_noted(seen, model):
                if revision := _revision(entry, model, settled_seconds, workspace, seen.waiting):
                    seen.revisions.extend(Revision(model, revision, recipe) for recipe in entry.recipes)
    # Two entries may cover one model.
    return Seen(list(dict.fromkeys(seen.revisions)), seen.waiting, seen.troubled)


@contextmanager
def _trouble_noted(seen: Seen, model: str) -> Iterator[None]:
    """Note any error as this model's trouble; log an unforeseen one with its trace."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, InputError | OSError) or is_passing(error)):
            get_run_logger().error("%s: %s", model, describe(error), exc_info=error)
        seen.troubled[model] = describe(error)


def _revision(
    entry: Watched, model: str, settled_seconds: float, workspace: str, waiting: dict[str, str]
) -> str | None:
    if entry.kind == "hub":
        return hub_revision(model, entry.revision)
    store, name = open_workspace(workspace), f"base-models/looks/{model_slug(model)}"
    before = _parsed(Look, store.state(name))
    listing = s3_listing if entry.kind == "s3" else folder_listing
    look = settle(before, lambda: listing(model), settled_seconds)
    if look != before:
        store.put_state(name, look.model_dump(mode="json"))
    if look.revision is None:
        waiting[model] = look.problem or "seen, and not yet known to stay as it is"
    return look.revision


@task(name="recall-found", **OVER_NETWORK)
def recall_found(revisions: Sequence[Revision], workspace: str) -> dict[Revision, Found]:
    """Return what the workspace knows of each revision; a new one, or one that cannot be read, is written down.

    An outcome that an earlier version of bivlm wrote stands, so that the revision is not announced again.
    """
    store, known = open_workspace(workspace), {}
    for each in revisions:
        found = _parsed(Found, store.state(_name(each)))
        if found is None:
            found = Found(**vars(each), event=str(each.event_id), first_seen=datetime.now(UTC))
            store.put_state(_name(each), found.model_dump(mode="json"))
        if found.outcome is None:
            answer = store.state(f"base-models/{each.event_id}/answer") or {}
            found = found.model_copy(update={"outcome": _EARLIER_OUTCOMES.get(str(answer.get("outcome")))})
        known[each] = found
    return known


@task(name="remember-found", **OVER_NETWORK)
def remember_found(found: Found, workspace: str) -> None:
    """Write down what is known of a revision."""
    name = _name(Revision(found.model, found.revision, found.recipe))
    open_workspace(workspace).put_state(name, found.model_dump(mode="json"))


def is_due(found: Found, last_run: datetime | None, again_after: timedelta, now: datetime) -> bool:
    """Return whether to emit the event (again): never tried yet, or long enough ago and without an outcome.

    The pause begins at the last emission, or when the last run ended. It doubles with every emission, up to a day.
    """
    moments = [*found.emitted, *([last_run] if last_run else [])]
    doublings = min(max(len(found.emitted) - 1, 0), 10)  # more would soon exceed what a timedelta can hold
    pause = min(again_after * 2**doublings, max(LONGEST_PAUSE, again_after))
    return found.outcome is None and (not moments or now >= max(moments) + pause)


def _parsed(kind: type[State], content: dict[str, Any] | None) -> State | None:
    """Return a state, or None if there is none that can be read: the place is then looked at anew."""
    try:
        return None if content is None else kind.model_validate(content)
    except ValidationError:
        return None


def _name(revision: Revision) -> str:
    return f"base-models/{revision.event_id}/found"
