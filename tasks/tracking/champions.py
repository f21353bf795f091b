"""Which version of a registered model was champion, since when, by whom and why; and what may come next.

The history is a list of moves of the alias, numbered in their order. A move is written down before the alias moves and
again afterwards: one that was cut off in between is seen, and finished or dropped by the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from bivlm.errors import InputError
from bivlm.untrusted import parse_model

PREFIX = "bivlm.move."  # of the key that a move is kept by; its number and some random letters follow
LONGEST = 500  # characters of who and why, as said by hand

Kind = Literal["gate", "promotion", "rollback"]


class Move(BaseModel):
    """One move of the champion's alias.

    Attributes:
        kind: by a gate, or by hand: forwards, or back to one that was champion before.
        before, after: versions; JSON calls them ``from`` and ``to``.
        who, why: of a gate the reasons with their figures.
        when: ISO 8601, UTC.
        done: whether the alias has moved.
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
    """The moves that a registered model's tags hold, by their keys, in order; raises `InputError` naming a bad one."""
    found = {}
    for key, value in tags.items():
        if key.startswith(PREFIX):
            found[key] = parse_model(Move, value, f"tag {key}", "a move of a champion")
    # Two of one number were made at once on two machines.
    return dict(sorted(found.items(), key=lambda item: (item[0].removeprefix(PREFIX).split("-")[0], item[1].when)))


def next_key(moves: Iterable[str], letters: str) -> str:
    """The key of the next move, with `letters` that nobody else has."""
    numbers = [int(key.removeprefix(PREFIX).split("-")[0]) for key in moves]
    return f"{PREFIX}{max(numbers, default=0) + 1:06d}-{letters}"


def now() -> str:
    """The time, as moves have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def line_of(moves: Iterable[Move]) -> list[int]:
    """The champions that a rollback can go back along, oldest first: a rollback has taken away what came after."""
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
    """Which version was champion before `champion` is; None if none was."""
    line = line_of(moves)
    while line and line[-1] == champion:
        line.pop()
    return line[-1] if line else None


def stays(version: int, champion: int | None, moves: Iterable[Move]) -> str | None:
    """Why a gate that `version` has passed leaves the champion alone; None if it may move it.

    A gate moves only forwards: to a version that is newer than every one that was ever champion. A champion that was
    taken back by hand does not come back because its compression is asked for again.
    """
    were = {move.after for move in moves if move.done} | ({champion} if champion is not None else set())
    if version == champion:
        return f"version {version} is champion already"
    if version in were:
        now_is = "none is now" if champion is None else f"version {champion} is now"
        return f"version {version} was champion before, and {now_is}: a gate does not take that back"
    if were and version < max(were):
        return (
            f"version {max(were)}, which is newer, {_is_or_was(max(were), champion)} champion: a gate does not go back"
        )
    return None


def one_line(what: str, text: str) -> str:
    """`text` for a history; raises `InputError` unless it is one line of something that can be read."""
    text = text.strip()
    if not text or len(text) > LONGEST or not text.isprintable():
        raise InputError(f"{what} {text[:80]!r}: expected one line of at most {LONGEST} characters")
    return text


def _is_or_was(version: int, champion: int | None) -> str:
    return "is" if version == champion else "was"
