"""Addresses: shown without credentials, made of paths, and reached without a proxy where they lead to this machine."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
# Of a file on this machine: it has no user, and an @ is part of a name.
_OF_A_FILE = re.compile(r"(?:file|sqlite(?:\+\w+)?):///", re.IGNORECASE)
_SECRET_PARAMETER = re.compile(
    r"[?&;#][^=?&;#\s]*(?:sig|token|passw|pwd|secret|credential|key|auth)[^=?&;#\s]*=", re.IGNORECASE
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_credentials(address: str) -> str:
    """Return `address` without user, password and signed query parameters: for people, files and logs.

    Everything between ``://`` and the last ``@`` is cut, because a password may hold ``/``, ``@``, ``#`` or ``?``. An
    ordinary ``@`` in a path therefore cuts the host as well (``s3://bucket/a@b`` is shown as ``s3://b``): a shortened
    address is better than a printed password. The value of the first parameter whose name says that it is secret, and
    all that follows, become ``***``; with an ``@`` after it the whole address does, since it could be either. Addresses
    of files (``file:///``, ``sqlite:///``) have no user and are kept.
    """
    if _OF_A_FILE.match(address):
        return address
    scheme, separator, rest = address.partition("://")
    if not separator:
        return address
    if parameter := _SECRET_PARAMETER.search(rest):
        if "@" in rest[parameter.end() :]:
            return f"{scheme}://***"
        rest = f"{rest[: parameter.end()]}***"
    return f"{scheme}://{rest.rpartition('@')[2]}"


def text_without_credentials(text: str) -> str:
    """Return `text`, such as the message of a library, with each address in it as `without_credentials` shows it."""
    return _ADDRESS.sub(lambda found: without_credentials(found[0]), text)


def sqlite_address(file: Path, driver: str = "") -> str:
    """Return SQLAlchemy's address of the SQLite database `file`, an absolute path; `driver` is as ``aiosqlite``.

    ``sqlite:///PATH``, as SQLAlchemy writes it. Its text form has no way to quote ``?``; a path with one becomes a URI
    that SQLite itself reads, in which it is quoted.
    """
    from sqlalchemy.engine import URL, make_url

    plain = URL.create(f"sqlite+{driver}" if driver else "sqlite", database=str(file))
    text = plain.render_as_string(hide_password=False)
    if make_url(text).database == str(file):
        return text
    # With a driver's name, because MLflow makes the folder of what follows a bare sqlite:///, which is a URI here.
    quoted = URL.create(f"sqlite+{driver or 'pysqlite'}", database=file.as_uri(), query={"uri": "true"})
    return quoted.render_as_string(hide_password=False)


def keep_loopback_direct(environment: MutableMapping[str, str] = os.environ) -> None:
    """Extend ``NO_PROXY`` and ``no_proxy`` by this machine's own addresses, if a proxy is set.

    To be called before any HTTP client is made. Without a proxy in the environment nothing is set: on some systems a
    lone ``NO_PROXY`` would switch off the proxies of the system's settings.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in PROXIES):
        return
    known = [each.strip() for name in ("NO_PROXY", "no_proxy") for each in environment.get(name, "").split(",")]
    # A * means every host, and only where it stands alone.
    hosts = "*" if "*" in known else ",".join(dict.fromkeys([*filter(None, known), *_LOOPBACK]))
    environment.update(NO_PROXY=hosts, no_proxy=hosts)
