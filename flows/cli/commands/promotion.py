"""`bivlm promote` and `bivlm rollback`: move the champion of a registered model by hand."""

from __future__ import annotations

import argparse
import getpass
import os
from dataclasses import asdict
from typing import Any

from bivlm.errors import InputError
from flows.cli.commands import DONE, print_json


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    promote = commands.add_parser("promote", help="make a registered version champion, by hand")
    promote.add_argument("version", metavar="NAME/VERSION", help="or NAME@candidate")
    promote.add_argument("--although-refused", action="store_true", help="even if its gate did not let it pass")

    rollback = commands.add_parser("rollback", help="make the champion before the present one champion again")
    rollback.add_argument("name", metavar="NAME")
    rollback.add_argument("--to", type=int, metavar="VERSION", help="one that was champion (default: the one before)")

    whose = "whose decision it is (default: $BIVLM_WHO, else the user's name on this machine)"
    for command in (promote, rollback):
        command.add_argument("--why", required=True, metavar="TEXT", help="one line, for the history")
        command.add_argument("--who", metavar="NAME", help=whose)
        command.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=_move)
    return [promote, rollback]


def open_registry(workspace: str | None) -> Any:
    """Return a client of the registry that a compression with this workspace uses."""
    from bivlm.workspace.steps import Workspace
    from bivlm.workspace.stores.location import default_workspace
    from tasks.tracking.registry import registry_client

    return registry_client(Workspace.open(workspace or default_workspace()))


def _move(options: argparse.Namespace) -> int:
    from tasks.tracking.champions import one_line
    from tasks.tracking.pages import write_pages
    from tasks.tracking.promotion import promote_by_hand, roll_back
    from tasks.tracking.registry import find_version

    who, why = one_line("--who", _who(options.who)), one_line("--why", options.why)
    client = open_registry(options.workspace)
    if options.command == "promote":
        version = find_version(options.version, client)
        name, refused = version.name, options.although_refused
        outcome = promote_by_hand(client, name, int(version.version), who, why, although_refused=refused)
    else:
        name = options.name
        outcome = roll_back(client, name, who, why, options.to)
    write_pages(client, name)
    if options.json:
        print_json({"model": name, **asdict(outcome)})
    else:
        print(f"{name}: {outcome.said}")
    return DONE


def _who(said: str | None) -> str:
    who = said or os.environ.get("BIVLM_WHO")
    if who is not None:
        return who
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        raise InputError("who: this machine knows no name for you; say --who NAME, or set BIVLM_WHO") from None
