"""`bivlm gc`: remove from the workspace what is no longer needed."""

from __future__ import annotations

import argparse
import math
from typing import Any

from flows.cli.commands import DONE, announce_start, print_json


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    gc = commands.add_parser("gc", help="remove what no registered version needs from the workspace")
    gc.add_argument("--workspace", metavar="DIR_OR_URL", help="as for compress")
    gc.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    gc.add_argument(
        "--keep-days", type=_number, default=30.0, metavar="N", help="keep what was used since (default: %(default)g)"
    )
    gc.add_argument(
        "--keep-versions",
        type=_count,
        default=3,
        metavar="N",
        help="keep what the latest N versions of a model need, beside those with an alias and former champions "
        "(default: %(default)s)",
    )
    gc.add_argument(
        "--wait", type=_number, default=60.0, metavar="SECONDS", help="before the second look (default: %(default)g)"
    )
    gc.add_argument("--although-empty", action="store_true", help="go on if MLflow has no version at all")
    gc.add_argument("--forget-registry", metavar="ID", help="no longer ask an MLflow that is gone for good")
    gc.add_argument("--json", action="store_true", help="print one JSON object")
    gc.set_defaults(run=_gc)
    return [gc]


def _gc(options: argparse.Namespace) -> int:
    from bivlm.errors import InputError

    if options.dry_run and options.forget_registry is not None:
        raise InputError("--forget-registry is for good, and --dry-run changes nothing: expected one of them")
    announce_start("Prefect and MLflow")
    from flows.cli.local_server import temporary_server
    from flows.housekeeping import gc_flow, in_words

    if options.forget_registry is not None:
        from bivlm.workspace.steps import Workspace
        from bivlm.workspace.stores.location import default_workspace
        from tasks.garbage import forget_registry

        forget_registry(Workspace.open(options.workspace or default_workspace()), options.forget_registry)
    with temporary_server():
        said = gc_flow(
            workspace=options.workspace,
            keep_days=options.keep_days,
            keep_versions=options.keep_versions,
            dry_run=options.dry_run,
            wait_seconds=options.wait,
            although_empty=options.although_empty,
        )
    if options.json:
        print_json(said)
    else:
        print(in_words(said), end="")
    return DONE


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more")
    return number


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 0 or more")
    return int(text)
