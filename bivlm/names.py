"""Names that come from outside, before they become part of a path, and addresses before they are shown."""

from __future__ import annotations

import re

from bivlm.errors import InputError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Less than git allows in the name of a branch or tag: nothing that a path or an address treats in a way of its own.
_REVISION = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9_][A-Za-z0-9_.+/=-]{0,199}")


def is_commit(text: object) -> bool:
    """Whether `text` is a commit's hash of git."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_sha256(text: object) -> bool:
    """Whether `text` is a SHA-256 in hex."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def check_revision(revision: str | None, what: str) -> str | None:
    """`revision`, of which the hub's client makes the name of a file; raises `InputError` naming `what` it is of."""
    if revision is not None and (_REVISION.fullmatch(revision) is None or revision.endswith(("/", ".", ".lock"))):
        raise InputError(f"{what}: revision {revision!r}: expected the name of a branch or tag, or a commit")
    return revision


def check_commit(commit: object, what: str) -> str:
    """`commit` as a hub says it, or a file in its cache; raises `InputError` naming `what` it is of."""
    if not is_commit(commit):
        raise InputError(f"{what}: the hub, or its cache, says that it is at commit {commit!r}; expected 40 hex digits")
    return str(commit)


def without_credentials(address: str) -> str:
    """`address` without the user name and password that it may hold: for people, files and logs."""
    scheme, separator, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{separator}{place.rpartition('@')[2]}{slash}{path}"
