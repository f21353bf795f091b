"""The champion of a registered model: the alias `champion`, and the history of its moves.

A move is a tag of the registered model and of both versions. MLflow has no transactions: the tag is written first, then
the alias is moved, then the tag says so. Whatever was cut off in between, the next move sees it and finishes it or
drops it, so that the history holds every move that took place, and none that did not. Nobody can tell a move that was
cut off from one that another machine is making; what is done about it is right for both.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from bivlm.errors import InputError
from bivlm.workspace.hashing import digest
from bivlm.workspace.locks import one_at_a_time
from bivlm.workspace.stores.location import cache_folder
from tasks.tracking.champions import Kind, Move, champion_before, moves_of, next_key, now, stays
from tasks.tracking.facts import GATE_TAG, LONGEST, PASSED, REASONS_TAG
from tasks.tracking.registry import CHAMPION, MODEL_TAG, RECORDED_TAG, is_absent, version_at
from tasks.tracking.run import public_uri

BY_GATE = "gate"


@dataclass(frozen=True)
class Outcome:
    """Who is champion now, who was before, whether the alias moved, and all of it in a sentence."""

    champion: int | None
    previous: int | None
    moved: bool
    said: str


def promote_by_gate(client: MlflowClient, name: str, version: int, why: str) -> Outcome:
    """Make a version that has passed its gate champion, unless that would be a step back
    (`tasks.tracking.champions.stays`)."""
    with alone(client, name):
        champion, moves, finished = _settled(client, name)
        if any(move.kind == "gate" and move.after == version for move in finished):
            return _done(finished[-1])
        if reason := stays(version, champion, moves.values()):
            return Outcome(champion, champion, False, reason)
        key, move = _begin(client, name, champion, version, "gate", BY_GATE, why, moves)
        # Two gates at once, on machines that do not see each other's locks: the newer version's shall stand.
        seen = moves_of(client.get_registered_model(name).tags)
        newer = [each.after for other, each in seen.items() if other not in moves and each.after > version]
        if newer:
            client.set_registered_model_alias(name, CHAMPION, str(max(newer)))
            if key in seen and not seen[key].done:  # else the other has seen it take place
                client.delete_registered_model_tag(name, key)
            return Outcome(max(newer), champion, False, f"version {max(newer)}, which is newer, has become champion")
        return _done(_write_down(client, name, key, move))


def promote_by_hand(
    client: MlflowClient, name: str, version: int, who: str, why: str, *, although_refused: bool = False
) -> Outcome:
    """Make a version champion whatever was champion before.

    Raises `InputError` if there is no such version, if it was not recorded to its end, or if its gate did not let it
    pass, unless `although_refused`.
    """
    found = version_of(client, name, version)
    _check_that_it_is_whole(client, found)
    gate = found.tags.get(GATE_TAG, PASSED)
    if gate != PASSED and not although_refused:
        reasons = found.tags.get(REASONS_TAG) or "the run that made it was cut off before; run it again"
        raise InputError(
            f"{name}/{version}: its gate has {gate}: {reasons}; to make it champion all the same say --although-refused"
        )
    with alone(client, name):
        champion, moves, finished = _settled(client, name)
        if champion == version:
            return _done(finished[-1]) if finished else _nothing(version)
        begun = _begin(client, name, champion, version, "promotion", who, why, moves)
        return _done(_write_down(client, name, *begun))


def roll_back(client: MlflowClient, name: str, who: str, why: str, to: int | None = None) -> Outcome:
    """Make a version champion again that was champion before: `to`, else the one before the present.

    A second rollback goes one further back. Raises `InputError` if there is no such version.
    """
    _model(client, name)
    if to is not None:
        version_of(client, name, to)
    with alone(client, name):
        champion, moves, finished = _settled(client, name)
        if finished and finished[-1].kind == "rollback" and to in (None, champion):
            return _done(finished[-1])  # the rollback that is asked for again, because it was cut off
        if to is not None and to == champion:
            return _nothing(to)
        if to is None:
            to = champion_before(champion, moves.values())
            if to is None:
                present = "no version" if champion is None else f"version {champion}"
                raise InputError(
                    f"{name}: {present} is champion, and none was before that one is; nothing to go back to"
                )
            version_of(client, name, to)
        elif to not in (were := {move.after for move in moves.values() if move.done}):
            known = f"expected one of {', '.join(map(str, sorted(were)))}" if were else "no version was"
            raise InputError(f"{name}/{to}: was never champion; {known}. To make it champion: bivlm promote")
        begun = _begin(client, name, champion, to, "rollback", who, why, moves)
        return _done(_write_down(client, name, *begun))


def version_of(client: MlflowClient, name: str, version: int) -> ModelVersion:
    """The version; raises `InputError` naming the model or the version that is not there."""
    _model(client, name)
    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if not is_absent(error):
            raise
        raise InputError(f"{name}/{version}: the registry at {_place(client)} has no such version") from None


def _model(client: MlflowClient, name: str) -> RegisteredModel:
    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if not is_absent(error):
            raise
        raise InputError(f"{name}: no such model in the registry at {_place(client)}") from None


def _check_that_it_is_whole(client: MlflowClient, found: ModelVersion) -> None:
    named = f"{found.name}/{found.version}"
    if MODEL_TAG not in found.tags:
        raise InputError(f"{named}: not a version that `bivlm compress` has registered")
    # Versions of before the tag was there are as whole as their run is finished.
    if RECORDED_TAG not in found.tags and (run := client.get_run(found.run_id)).info.status != "FINISHED":
        raise InputError(f"{named}: the run that makes it is {run.info.status}, expected FINISHED; run it again")


def _settled(client: MlflowClient, name: str) -> tuple[int | None, dict[str, Move], list[Move]]:
    """(champion, moves that took place, those among them that were only now written down to their end).

    Of the moves that had not come to their end: those whose alias has moved took place. A gate's is made now, if it may
    be: its version has passed. Others, of people who will ask again, are dropped.
    """
    model = client.get_registered_model(name)
    champion, moves, finished = version_at(model, CHAMPION), moves_of(model.tags), []
    for key, move in list(moves.items()):
        if move.done:
            continue
        took_place = champion == move.after
        if not took_place and move.kind == "gate" and stays(move.after, champion, moves.values()) is None:
            client.set_registered_model_alias(name, CHAMPION, str(move.after))
            champion, took_place = move.after, True
        if took_place:
            moves[key] = _write_down(client, name, key, move)
            finished.append(moves[key])
        else:
            client.delete_registered_model_tag(name, key)
            del moves[key]
    return champion, moves, finished


def _begin(
    client: MlflowClient,
    name: str,
    before: int | None,
    after: int,
    kind: Kind,
    who: str,
    why: str,
    moves: dict[str, Move],
) -> tuple[str, Move]:
    """The move's key and the move, whose alias has moved and which is not yet written down to its end."""
    key = next_key(moves, secrets.token_hex(4))
    move = Move(kind=kind, before=before, after=after, who=who, why=why[:LONGEST], when=now(), done=False)
    client.set_registered_model_tag(name, key, move.model_dump_json())
    client.set_registered_model_alias(name, CHAMPION, str(after))
    return key, move


def _write_down(client: MlflowClient, name: str, key: str, move: Move) -> Move:
    """On both versions, and last on the model, that the alias has moved."""
    done = move.model_copy(update={"done": True})
    text = done.model_dump_json()
    for version in (move.before, move.after):
        if version is not None:
            try:
                client.set_model_version_tag(name, str(version), key, text)
            except MlflowException as error:
                if not is_absent(error):  # somebody has deleted the version; the model's tag remembers it
                    raise
    client.set_registered_model_tag(name, key, text)
    return done


def _done(move: Move) -> Outcome:
    before = "no version" if move.before is None else f"version {move.before}"
    # A gate's reasons were told already.
    why = "" if move.kind == "gate" else f"; by {move.who}: {move.why}"
    return Outcome(move.after, move.before, True, f"version {move.after} is champion, {before} was{why}")


def _nothing(version: int) -> Outcome:
    return Outcome(version, version, False, f"version {version} is champion already; nothing was done")


@contextmanager
def alone(client: MlflowClient, name: str) -> Iterator[None]:
    """On this machine one at a time moves the aliases of a model."""
    which = digest([_place(client), name])[:32]
    with one_at_a_time(cache_folder() / "locks" / f"champion-{which}.lock"):
        yield


def _place(client: MlflowClient) -> str:
    return public_uri(client.tracking_uri)
