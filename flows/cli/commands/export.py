"""`bivlm export`: a packed checkpoint in a form that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flows.cli.commands import DONE


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parser to the `commands` of another, and return it."""
    export = commands.add_parser(
        "export",
        help="a packed checkpoint in a form that other programs load",
        epilog="example: bivlm export OUT DENSE --to dense",
    )
    export.add_argument("folder", metavar="DIR", type=Path)
    export.add_argument("output", metavar="OUTPUT", type=Path, help="a new folder")
    export.add_argument("--to", required=True, choices=("dense",), help="dense: weights rebuilt, for any server")
    export.set_defaults(run=_export)
    return [export]


def _export(options: argparse.Namespace) -> int:
    from bivlm.checkpoint.exporting import export_dense

    output = export_dense(options.folder, options.output)
    print(f"exported: {output}")
    return DONE
