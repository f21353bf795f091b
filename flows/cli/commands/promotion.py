"""`bivlm promote` and `bivlm rollback`: the champion of a registered model, moved by hand."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.commands import DONE, print_json

_WHO = "whose decision it is (default: $BIVLM_WHO, else the user's name on this machine)"


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    promote = commands.add_parser("promote", help="make a registered version champion, by hand")
    promote.add_argument("version", metavar="NAME/VERSION", help="or NAME@candidate")
    promote.add_argument("--although-refused", action="store_true", help="even if its gate did not let it pass")

    rollback = commands.add_parser("rollback", help="make the champion before the present one champion again")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="one that was champion (default: the one before)")

    for command, run in ((promote, _promote), (rollback, _rollback)):
        command.add_argument("--why", required=True, metavar="TEXT", help="one line, for the history")
        command.add_argument("--who", metavar="NAME", help=_WHO)
        command.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=run)
    return [promote, rollback]


def _promote(options: argparse.Namespace) -> int:
    who, why = _said(options)
    from tasks.tracking.lookup import find_version
    from tasks.tracking.promotion import promote_by_hand

    client = _registry(options.workspace)
    version = find_version(options.version, client)
    refused = options.although_refused
    outcome = promote_by_hand(client, version.name, int(version.version), who, why, although_refused=refused)
    return _told(options, client, version.name, outcome)


def _rollback(options: argparse.Namespace) -> int:
    who, why = _said(options)
    from tasks.tracking.promotion import roll_back

    client = _registry(options.workspace)
    return _told(options, client, options.name, roll_back(client, options.name, who, why, options.to))


def _said(options: argparse.Namespace) -> tuple[str, str]:
    """Who and why. Looked at first: MLflow takes seconds to import."""
    import getpass
    import os

    from bivlm.errors import InputError
    from tasks.tracking.champions import one_line

    who = options.who or os.environ.get("BIVLM_WHO")
    if who is None:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):  # a user without a name, as in a container
            raise InputError("who: this machine knows no name for you; say --who NAME, or set BIVLM_WHO") from None
    return one_line("--who", who), one_line("--why", options.why)


def _registry(workspace: str | None) -> Any:
    from bivlm.workspace.steps import Workspace
    from bivlm.workspace.stores.location import default_workspace
    from tasks.tracking.lookup import registry_client

    return registry_client(Workspace.open(workspace or default_workspace()))


def _told(options: argparse.Namespace, client: Any, name: str, outcome: Any) -> int:
    from dataclasses import asdict

    from tasks.tracking.pages import write_pages

    write_pages(client, name)
    if options.json:
        print_json({"model": name, **asdict(outcome)})
    else:
        print(f"{name}: {outcome.said}")
    return DONE
