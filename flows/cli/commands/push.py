"""`bivlm push`: push a packed checkpoint to the hub, or only its card."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.cli.commands import DONE, print_json


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    push = commands.add_parser("push", help="a packed checkpoint to the Hugging Face hub, with a model card")
    push.add_argument("folder", metavar="DIR", type=Path)
    push.add_argument("repository", metavar="OWNER/NAME")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--revision", metavar="BRANCH", help="made if it is missing (default: main)")
    push.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")
    push.add_argument("--json", action="store_true", help="print one JSON object")
    push.set_defaults(run=_push)
    return [push]


def _push(options: argparse.Namespace) -> int:
    """Push, or with ``--dry-run`` print the card and ask nobody; raises as `bivlm.reports.pushing.package` and `push`
    do."""
    from bivlm.reports.pushing import package, push

    prepared = package(options.folder, options.repository)
    if options.dry_run:
        print(prepared.card, end="")
        return DONE
    print(f"{options.folder} is what its records say; looking what {options.repository} has", file=sys.stderr)
    pushed = push(prepared, options.repository, private=options.private, branch=options.revision)
    if options.json:
        print_json(asdict(pushed))
        return DONE
    if not pushed.written and not pushed.deleted:
        print(f"nothing new: {pushed.url} has it all at commit {pushed.commit}")
        return DONE
    for what, names in (("written", pushed.written), ("deleted", pushed.deleted)):
        for name in names:
            print(f"{what}: {name}")
    print(f"{pushed.url}, branch {pushed.branch}, commit {pushed.commit}")
    return DONE
