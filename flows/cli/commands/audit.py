"""`bivlm audit`: show where a registered version comes from, or all that was made of a base model."""

from __future__ import annotations

import argparse
from typing import Any

from flows.cli.commands import DONE, print_json
from flows.cli.commands.promotion import open_registry


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    audit = commands.add_parser("audit", help="where a registered version comes from; what was made of a base model")
    asked = audit.add_mutually_exclusive_group(required=True)
    asked.add_argument("version", nargs="?", metavar="NAME/VERSION", help="or NAME@champion, NAME@candidate")
    asked.add_argument("--base", metavar="ID_OR_SHA256", help="of a base model")
    audit.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    audit.add_argument("--json", action="store_true", help="print one JSON object")
    audit.set_defaults(run=_audit)
    return [audit]


def _audit(options: argparse.Namespace) -> int:
    from flows.cli.console import print_made_of, print_version
    from tasks.tracking.pages import audit_base, audit_version
    from tasks.tracking.registry import find_version

    client = open_registry(options.workspace)
    if options.base is not None:
        found = {"base": options.base, "made": audit_base(client, options.base)}
    else:
        found = audit_version(client, find_version(options.version, client))
    if options.json:
        print_json(found)
    elif options.base is not None:
        print_made_of(options.base, found["made"])
    else:
        print_version(found)
    return DONE
