"""What the watcher has seen of base models, kept in the workspace; and what became of each revision.

A revision has a folder of two states, named by its event: ``found`` is written by the watcher, ``answer`` by the flow
that compresses. Neither writes the other's, so that none is lost where both are at work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar

from prefect import get_run_logger, task
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from bivlm.errors import InputError, describe
from tasks.runtime.policy import OVER_NETWORK, is_passing
from tasks.runtime.steps import open_workspace
from tasks.watching.revisions import Listing, Look, folder_listing, hub_revision, models_of, s3_listing, settle
from tasks.watching.watch_lists import Revision, Watched, model_slug

State = TypeVar("State", bound=BaseModel)

LONGEST_PAUSE = timedelta(days=1)

# What ends the matter: the same event again would end in the same way.
Outcome = Literal["compressed", "gate not passed", "bad input"]


class Found(BaseModel):
    """What the watcher knows of a revision: when it was first seen, and when the server took its event."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str
    recipe: str
    event: str
    first_seen: AwareDatetime
    emitted: tuple[AwareDatetime, ...] = ()


class Answer(BaseModel):
    """What became of a revision: which flow run took it up, when, and how that ended (None: not yet, or not well)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str
    recipe: str
    event: str
    flow_run: str | None
    taken: AwareDatetime
    ended: AwareDatetime | None = None
    outcome: Outcome | None = None
    detail: str = ""
    version: str | None = None


@dataclass(frozen=True)
class Seen:
    """What one look at the list came to: the revisions there are, and by model what keeps another from being one."""

    revisions: list[Revision]
    waiting: dict[str, str]
    troubled: dict[str, str]


@task(name="look-at-base-models", **OVER_NETWORK)
def look_at_base_models(entries: Sequence[Watched], settled_seconds: float, workspace: str) -> Seen:
    """The revision that every listed model is at.

    Trouble with one model does not keep the others from being seen: it is told in `Seen.troubled`.
    """
    seen = Seen([], {}, {})
    for entry in entries:
        try:
            models = models_of(entry)
        except Exception as error:
            _note_trouble(seen, entry.model, error)
            continue
        for model in models:
            try:
                revision = _revision(entry, model, settled_seconds, workspace, seen.waiting)
            except Exception as error:
                _note_trouble(seen, model, error)
                continue
            if revision is not None:
                seen.revisions.extend(Revision(model, revision, recipe) for recipe in entry.recipes)
    # A model may be covered by two entries.
    return Seen(list(dict.fromkeys(seen.revisions)), seen.waiting, seen.troubled)


def _note_trouble(seen: Seen, model: str, error: Exception) -> None:
    """Whatever it is: one model's trouble must not hide the others. What nobody foresaw is logged with its trace."""
    expected = isinstance(error, InputError | OSError) or is_passing(error)
    if not expected:
        get_run_logger().error("%s: %s", model, describe(error), exc_info=error)
    seen.troubled[model] = describe(error)


def _revision(
    entry: Watched, model: str, settled_seconds: float, workspace: str, waiting: dict[str, str]
) -> str | None:
    if entry.kind == "hub":
        return hub_revision(model, entry.revision)
    store, name = open_workspace(workspace), f"base-models/looks/{model_slug(model)}"
    before = _parsed(Look, store.state(name))

    def listing() -> Listing:
        return s3_listing(model) if entry.kind == "s3" else folder_listing(model)

    look = settle(before, listing, settled_seconds)
    if look != before:
        store.put_state(name, look.model_dump(mode="json"))
    if look.revision is None:
        waiting[model] = look.problem or "seen, and not yet known to stay as it is"
    return look.revision


@task(name="remember-found", **OVER_NETWORK)
def remember_found(revision: Revision, workspace: str) -> tuple[Found, Answer | None]:
    """What is known of `revision`, which is written down if it is new; and what became of it."""
    found = _parsed(Found, open_workspace(workspace).state(_found(revision)))
    if found is None:
        found = Found(**vars(revision), event=str(revision.event_id), first_seen=_now())
        open_workspace(workspace).put_state(_found(revision), found.model_dump(mode="json"))
    return found, read_answer(revision, workspace)


@task(name="remember-emitted", **OVER_NETWORK)
def remember_emitted(revision: Revision, found: Found, workspace: str) -> Found:
    """Write down that the server took the event just now."""
    found = found.model_copy(update={"emitted": (*found.emitted, _now())})
    open_workspace(workspace).put_state(_found(revision), found.model_dump(mode="json"))
    return found


def read_answer(revision: Revision, workspace: str) -> Answer | None:
    """What became of `revision`; None if no flow run has taken it up."""
    return _parsed(Answer, open_workspace(workspace).state(_answer(revision)))


@task(name="remember-answer", **OVER_NETWORK)
def remember_answer(answer: Answer, workspace: str) -> None:
    """Write down what became of a revision."""
    revision = Revision(answer.model, answer.revision, answer.recipe)
    open_workspace(workspace).put_state(_answer(revision), answer.model_dump(mode="json"))


def taken_now(revision: Revision, flow_run: str | None) -> Answer:
    """The answer of a flow run that begins."""
    return Answer(**vars(revision), event=str(revision.event_id), flow_run=flow_run, taken=_now())


def ended_now(answer: Answer, outcome: Outcome | None, detail: str, version: str | None = None) -> Answer:
    """The answer of a flow run that ends."""
    update = {"ended": _now(), "outcome": outcome, "detail": detail[:2000], "version": version}
    return answer.model_copy(update=update)


def is_due(found: Found, answer: Answer | None, again_after: timedelta, now: datetime | None = None) -> bool:
    """Whether the event has to be emitted (again): never yet, or long enough ago to no known end.

    The pause doubles with every time, up to a day, so that what fails again and again is not tried again and again.
    """
    if answer is not None and answer.outcome is not None:
        return False
    moments = [*found.emitted, *([answer.ended or answer.taken] if answer else [])]
    if not found.emitted:
        return answer is None or (now or _now()) >= max(moments) + again_after
    doublings = min(len(found.emitted) - 1, 10)  # more are over a day in any case, and at last over what a time can be
    pause = min(again_after * 2**doublings, max(LONGEST_PAUSE, again_after))
    return (now or _now()) >= max(moments) + pause


def _parsed(kind: type[State], content: dict[str, Any] | None) -> State | None:
    """A state as what it should be; None if it is not, which means that it is looked at or asked for anew."""
    try:
        return None if content is None else kind.model_validate(content)
    except ValidationError:
        return None


def _found(revision: Revision) -> str:
    return f"base-models/{revision.event_id}/found"


def _answer(revision: Revision) -> str:
    return f"base-models/{revision.event_id}/answer"


def _now() -> datetime:
    return datetime.now(UTC)
