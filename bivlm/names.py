"""Names that come from outside, before they become part of a path or an address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec

from bivlm.addresses import PROXIES, without_credentials
from bivlm.errors import InputError

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Less than git allows in the name of a branch or tag: nothing that a path or an address treats in a way of its own.
_REVISION = re.compile(r"(?!.*\.\.)(?!.*//)[A-Za-z0-9_][A-Za-z0-9_.+/=-]{0,199}")


def is_commit(text: object) -> bool:
    """Return whether `text` is a git commit hash."""
    return isinstance(text, str) and _COMMIT.fullmatch(text) is not None


def is_sha256(text: object) -> bool:
    """Return whether `text` is a SHA-256 in hex."""
    return isinstance(text, str) and _SHA256.fullmatch(text) is not None


def check_revision(revision: str | None, what: str) -> str | None:
    """Return `revision` if the hub's client can make a file name of it; else raise `InputError` naming `what`."""
    if revision is not None and (_REVISION.fullmatch(revision) is None or revision.endswith(("/", ".", ".lock"))):
        raise InputError(f"{what}: revision {revision!r}: expected the name of a branch or tag, or a commit")
    return revision


def check_commit(commit: object, what: str) -> str:
    """Return `commit`, as a hub or its cache says it, if it is a commit hash; else raise `InputError` naming `what`."""
    if not is_commit(commit):
        raise InputError(f"{what}: the hub, or its cache, says that it is at commit {commit!r}; expected 40 hex digits")
    return str(commit)


def check_address(address: str, variable: str) -> str:
    """Return the http(s) `address` that `variable` holds.

    Raises `InputError` naming `variable` for an @ after the host: of a user or password that is not percent-encoded,
    whose parts every client would take for a host and a port, and print.
    """
    _, *after = re.split(r"[/?#]", address.partition("://")[2], maxsplit=1)
    if "@" in "".join(after):
        raise InputError(
            f"{variable} {without_credentials(address)}: found an @ after the host; expected user and password "
            "percent-encoded (/ as %2F, ? as %3F, # as %23, @ as %40)"
        )
    return address


def check_proxies(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `InputError` naming a proxy variable that HTTP clients, which read it in any case, cannot use."""
    for name in (*PROXIES, *(each.upper() for each in PROXIES)):
        address = environment.get(name, "")
        scheme, separator, _ = address.partition("://")
        if not separator or scheme.lower() in ("http", "https"):
            continue
        shown = without_credentials(address)
        if scheme.lower() not in ("socks5", "socks5h"):
            raise InputError(f"{name} {shown}: expected an address with http://, https://, socks5:// or socks5h://")
        if find_spec("socksio") is None:
            raise InputError(
                f"{name} {shown}: SOCKS needs the package socksio; expected `pip install socksio`, or a proxy with "
                "http://"
            )
