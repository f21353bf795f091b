"""Find the first question and its reply in a conversation as data sets write it.

Three forms of a turn are known: ``{"from": "human", "value": ...}`` (LLaVA-Instruct, ShareGPT4V), ``{"role": "user",
"content": ...}`` (chat messages; the content a string or a list of parts), and ``{"user": ..., "assistant": ...}``, a
question and its reply at once. System prompts before it and turns after it are left out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bivlm.sources.rows import Row

PLACEHOLDER = "<image>"  # LLaVA's mark of where the image stands; the chat template puts it there anew
_USERS = ("human", "user")
_ASSISTANTS = ("gpt", "assistant")


def first_turns(row: Row, key: str, *, images: int) -> tuple[str, str]:
    """Return the first user turn that is answered, without the placeholder of its image, and the reply.

    Raises `InputError` when there is none, or when it is about more than `images` images (0 or 1).
    """
    user, assistant = (row.check_text(key, text) for text in _first_pair(row, key))
    if (found := user.count(PLACEHOLDER) + assistant.count(PLACEHOLDER)) > images:
        row.complain(key, f"at most {images} {PLACEHOLDER}, and not {found}", user)
    return row.check_text(key, user.replace(PLACEHOLDER, "").strip()), assistant


def _first_pair(row: Row, key: str) -> tuple[Any, Any]:
    turns = row.value(key)
    if isinstance(turns, dict):  # a column of structures may be read as one structure of columns
        names, columns = tuple(turns), tuple(turns.values())
        if columns and all(isinstance(column, list | tuple) for column in columns):
            turns = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=False)]
    if not isinstance(turns, list | tuple):
        row.complain(key, "a list of turns")
    if turns and isinstance(turns[0], dict) and {"user", "assistant"} <= turns[0].keys():
        return turns[0]["user"], turns[0]["assistant"]
    for (speaker, user), (answerer, assistant) in pairwise([_turn(row, key, turn) for turn in turns]):
        if speaker in _USERS and answerer in _ASSISTANTS:
            return user, assistant
    row.complain(key, "a user turn that is answered", turns)


def _turn(row: Row, key: str, turn: Any) -> tuple[str, Any]:
    """Return who speaks in a turn, and what is said."""
    for speaker, said in (("from", "value"), ("role", "content")):
        if isinstance(turn, dict) and {speaker, said} <= turn.keys():
            content = turn[said]
            if isinstance(content, list | tuple):
                content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
            return str(turn[speaker]).lower(), content
    row.complain(key, "turns with 'from' and 'value' or 'role' and 'content'", turn)
