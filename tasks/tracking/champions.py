"""Which versions of a registered model were champion, and which may come next: the rules, without MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bivlm.errors import InputError
from bivlm.untrusted import parse_model
from tasks.tracking.tags import Tag

LONGEST = 500  # characters of who and why

Kind = Literal["gate", "promotion", "rollback"]


class Move(BaseModel):
    """One move of the alias `champion`; `done` says whether the alias has moved.

    JSON calls the versions ``from`` and ``to``; `when` is ISO 8601 in UTC. A gate's `why` has its reasons.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    kind: Kind
    before: int | None = Field(alias="from")
    after: int = Field(alias="to")
    who: str
    why: str
    when: str
    done: bool


def moves_of(tags: Mapping[str, str]) -> dict[str, Move]:
    """Return the moves in a registered model's tags by their keys, in order; raise `InputError` naming a bad one."""
    found = {
        key: parse_model(Move, value, f"tag {key}", "a move of a champion")
        for key, value in tags.items()
        if key.startswith(Tag.MOVE)
    }
    # Two machines may have given the same number at once.
    return dict(sorted(found.items(), key=lambda item: (item[0].partition("-")[0], item[1].when)))


def next_key(moves: Iterable[str], letters: str) -> str:
    """Return the key of the next move, with `letters` that no other has."""
    numbers = [int(key.removeprefix(Tag.MOVE).partition("-")[0]) for key in moves]
    return f"{Tag.MOVE}{max(numbers, default=0) + 1:06d}-{letters}"


def now() -> str:
    """Return the time as moves have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def line_of(moves: Iterable[Move]) -> list[int]:
    """Return the champions a rollback can return to, oldest first: an earlier rollback removed those after its own."""
    line: list[int] = []
    for move in moves:
        if not move.done:
            continue
        if move.kind == "rollback" and move.after in line:
            line = line[: len(line) - line[::-1].index(move.after)]
        elif not line or line[-1] != move.after:
            line.append(move.after)
    return line


def champion_before(champion: int | None, moves: Iterable[Move]) -> int | None:
    """Return the version that was champion before `champion`, or None."""
    line = line_of(moves)
    while line and line[-1] == champion:
        line.pop()
    return line[-1] if line else None


def stays(version: int, champion: int | None, moves: Iterable[Move]) -> str | None:
    """Return why a gate that `version` passed leaves the champion unchanged, or None if it may move it.

    A gate never promotes a version older than a past champion, and never undoes a rollback.
    """
    were = {move.after for move in moves if move.done} | ({champion} if champion is not None else set())
    if version == champion:
        return f"version {version} is champion already"
    if version in were:
        now_is = "none is now" if champion is None else f"version {champion} is now"
        return f"version {version} was champion before, and {now_is}: a gate does not take that back"
    if were and version < max(were):
        newest = max(were)
        is_or_was = "is" if newest == champion else "was"
        return f"version {newest}, which is newer, {is_or_was} champion: a gate does not go back"
    return None


def one_line(what: str, text: str) -> str:
    """Return `text` without spaces around it; raise `InputError` unless it is one readable line."""
    text = text.strip()
    if not text or len(text) > LONGEST or not text.isprintable():
        raise InputError(f"{what} {text[:80]!r}: expected one line of at most {LONGEST} characters")
    return text
