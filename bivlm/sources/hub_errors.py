"""Explain what the Hugging Face hub's refusals mean and what can be done about them."""

from __future__ import annotations

import httpx2  # the hub's
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from bivlm.addresses import without_credentials
from bivlm.errors import InputError, describe

_LOGIN = "`hf auth login`, or set HF_TOKEN"


def hub_error(
    error: BaseException, model: str, revision: str | None = None, *, pushing: bool = False
) -> InputError | ConnectionError:
    """Return what to raise for `error`, met while reading `model` from the hub or pushing it there.

    `InputError` where the caller can fix it: no such model or revision, a gated or private one, a token that is unknown
    or lacks the right, the hub switched off. `ConnectionError` where it may be over in a moment.
    """
    wanted = f"{model} at revision {revision}" if revision else model
    subject = f"push to {model}:" if pushing else f"model {model!r}:"
    sought = subject if pushing else f"{subject} no such folder, and"  # names of folders are looked for first
    reason = _first_cause(error)
    if isinstance(reason, OfflineModeIsEnabled) and pushing:
        return InputError(f"{subject} the hub is not asked because HF_HUB_OFFLINE is set")
    if isinstance(reason, OfflineModeIsEnabled):
        return InputError(
            f"{sought} {wanted} is not in the hub's cache; the hub is not asked because HF_HUB_OFFLINE is set"
        )
    if isinstance(reason, httpx2.UnsupportedProtocol):
        return InputError(f"HF_ENDPOINT: found {constants.ENDPOINT!r}, expected an address that begins with https://")
    if not isinstance(reason, HfHubHTTPError):
        return ConnectionError(
            f"{sought} the hub at {without_credentials(constants.ENDPOINT)} cannot be reached: {_line(reason)}"
        )
    status = reason.response.status_code
    said = reason.response.headers.get("X-Error-Message") or reason.server_message or _line(reason)
    if isinstance(reason, GatedRepoError):
        return InputError(
            f"{subject} gated, its owners give it only to those who accept their licence, and {_who(status)}. "
            f"Accept it at {constants.ENDPOINT}/{model}, then {_LOGIN} to a token of the account that did"
        )
    if isinstance(reason, RevisionNotFoundError):
        return InputError(f"{subject} the hub has it, but no revision {revision!r} of it")
    if isinstance(reason, RepositoryNotFoundError) or status == httpx2.codes.NOT_FOUND:
        private = "or the token that was sent may not see it" if get_token() else f"or it is private: {_LOGIN}"
        return InputError(f"{sought} the hub gives no {wanted}: it is not there, {private}")
    if status == httpx2.codes.UNAUTHORIZED:
        if get_token() is None:
            return InputError(f"{subject} the hub wants to know who asks: {_LOGIN} ({said})")
        return InputError(f"{subject} the hub does not accept the token that was sent ({said}): {_LOGIN} anew")
    if status == httpx2.codes.FORBIDDEN:
        return InputError(f"{subject} the hub forbids it with the token that was sent: {said}")
    if status < httpx2.codes.INTERNAL_SERVER_ERROR and status not in _PASSING:
        return InputError(f"{subject} the hub refuses {wanted} (HTTP {status}): {said}")
    return ConnectionError(f"{subject} the hub is in trouble (HTTP {status}): {said}")


_PASSING = {httpx2.codes.REQUEST_TIMEOUT, httpx2.codes.TOO_EARLY, httpx2.codes.TOO_MANY_REQUESTS}


def _first_cause(error: BaseException) -> BaseException:
    """Return the hub's own answer, from within the client's errors that it caused."""
    while not isinstance(error, httpx2.HTTPError | OfflineModeIsEnabled) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _who(status: int) -> str:
    if get_token() is None:
        return "no token was sent"
    return (
        "the token that was sent is of an account that has not"
        if status == httpx2.codes.FORBIDDEN
        else ("the token that was sent is of no such account")
    )


def _line(error: BaseException) -> str:
    """Return the first line of its description."""
    return describe(error).splitlines()[0]
