"""Errors for bad input and for a failed gate, and the description of any failure.

The command line tells the first two from a run that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bivlm.addresses import text_without_credentials


class InputError(ValueError):
    """A recipe, path, checkpoint, tensor or argument is not usable.

    The message names the thing, the value found and the valid form. It is never retried, and the command line
    ends with exit code 2. Addresses in the message are shown without credentials.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(text_without_credentials(str(message)))


class GateNotPassed(Exception):
    """Everything was done and recorded, and a gate's bound is not kept: what was champion before still is.

    The message says which bounds, and what was found. It is never retried, and the command line ends with exit code 3.

    Attributes:
        result: what the run would have returned.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result


def describe(error: BaseException) -> str:
    """Return what went wrong as a sentence for people, logs and records, without credentials.

    The message alone for `InputError` and `GateNotPassed`, which are sentences. For any other exception its type and
    message, such as ``RuntimeError: the disk is gone``. Where the message is empty or the word None, as of timeouts and
    of lost keys, the request that it belongs to, and the first exception among its causes that has a message.
    """
    if isinstance(error, InputError | GateNotPassed) and _message(error):
        return _message(error)
    name, message, request = type(error).__name__, _message(error), _request(error)
    if request:
        return f"{name}: {request}{f' ({message})' if message else ''}"
    if isinstance(error, KeyError):
        message = f"key {error.args[0]!r} not found" if error.args else ""
    if message:
        return f"{name}: {message}"
    cause = next((each for each in _causes(error) if _message(each) or _request(each)), None)
    return f"{name}, caused by {describe(cause)}" if cause else f"{name}, without a message of its own"


def _message(error: BaseException) -> str:
    message = str(error).strip()
    return "" if message == "None" else text_without_credentials(message)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen = {id(error)}
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None or id(cause) in seen:
            return
        seen.add(id(cause))
        yield cause
        error = cause


def _request(error: BaseException) -> str:
    """Return the request of an httpx error and, after a timeout, how many seconds it was given; empty without one."""
    try:
        request = error.request  # type: ignore[attr-defined]
        asked = text_without_credentials(f"{request.method} {request.url}")
        patience = request.extensions.get("timeout", {})
    except (AttributeError, RuntimeError):  # none, or not known to it
        return ""
    # The first word of ConnectTimeout, ReadTimeout, WriteTimeout or PoolTimeout.
    phase = type(error).__name__.removesuffix("Timeout").lower()
    seconds = patience.get(phase)
    return asked if seconds is None else f"{asked} was not answered within {seconds:g} s"
