"""Conversations as data sets write them, and the first exchange in them.

Three forms of a turn are known: ``{"from": "human", "value": ...}`` (LLaVA-Instruct, ShareGPT4V), ``{"role": "user",
"content": ...}`` (chat messages; the content a string or a list of parts), and ``{"user": ..., "assistant": ...}``, a
whole exchange at once. A calibration sample holds one exchange: the first user's turn that the assistant answers.
System prompts before it and turns after it are left out.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from bivlm.sources.image_folders import check_text
from bivlm.untrusted import short

PLACEHOLDER = "<image>"  # LLaVA's mark of where the picture stands; the chat template puts it there anew
_USERS = ("human", "user")
_ASSISTANTS = ("gpt", "assistant")


class UnusableError(ValueError):
    """An entry of a source that gives no sample; the message says which and why."""


def first_exchange(turns: Any, *, pictures: int) -> tuple[str, str]:
    """(user, assistant) of a conversation about `pictures` pictures (0 or 1), without the picture's placeholder.

    Raises `UnusableError` when there is no such exchange, or when it is about more pictures.
    """
    turns = _listed(turns)
    if turns and isinstance(turns[0], dict) and {"user", "assistant"} <= turns[0].keys():
        return _cleaned(turns[0]["user"], turns[0]["assistant"], pictures)
    spoken = [_turn(turn) for turn in turns]
    for (speaker, user), (answerer, assistant) in pairwise(spoken):
        if speaker in _USERS and answerer in _ASSISTANTS:
            return _cleaned(user, assistant, pictures)
    raise UnusableError(f"found no user's turn that is answered in {short(turns)}")


def caption_exchange(instruction: str, caption: Any) -> tuple[str, str]:
    """(`instruction`, caption) of a caption or of the first of a list of captions; raises `UnusableError`."""
    if isinstance(caption, list | tuple):
        caption = caption[0] if caption else ""
    return instruction, _text(caption)


def pair_exchange(user: Any, assistant: Any) -> tuple[str, str]:
    """(user, assistant) of two columns; raises `UnusableError` when one is no text."""
    return _text(user), _text(assistant)


def _listed(turns: Any) -> list[Any]:
    if isinstance(turns, dict):  # a column of structures may be read as one structure of columns
        keys, columns = tuple(turns), tuple(turns.values())
        if columns and all(isinstance(column, list | tuple) for column in columns):
            return [dict(zip(keys, values, strict=True)) for values in zip(*columns, strict=False)]
    if not isinstance(turns, list | tuple):
        raise UnusableError(f"expected a list of turns, found {short(turns)}")
    return list(turns)


def _turn(turn: Any) -> tuple[str, Any]:
    """(speaker, what is said) of one turn."""
    for speaker, said in (("from", "value"), ("role", "content")):
        if isinstance(turn, dict) and {speaker, said} <= turn.keys():
            content = turn[said]
            if isinstance(content, list | tuple):
                content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
            return str(turn[speaker]).lower(), content
    raise UnusableError(f"expected turns with 'from' and 'value' or 'role' and 'content', found {short(turn)}")


def _cleaned(user: Any, assistant: Any, pictures: int) -> tuple[str, str]:
    user, assistant = _text(user), _text(assistant)
    if (found := user.count(PLACEHOLDER) + assistant.count(PLACEHOLDER)) > pictures:
        raise UnusableError(f"found {found} {PLACEHOLDER}, expected at most {pictures}, in {short(user)}")
    return _text(user.replace(PLACEHOLDER, "").strip()), assistant


def _text(value: Any) -> str:
    try:
        return check_text(value)
    except ValueError as error:
        raise UnusableError(f"found {short(value)}, expected {error}") from None
