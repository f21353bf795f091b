"""`bivlm export`: a packed checkpoint in a form that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bivlm.exports import FORMS
from flows.cli.commands import DONE


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parser to the `commands` of another, and return it."""
    export = commands.add_parser(
        "export",
        help="a packed checkpoint in a form that other programs load",
        epilog="examples: bivlm export OUT DENSE --to dense; bivlm export OUT GGUF --to gguf",
    )
    export.add_argument("folder", metavar="DIR", type=Path)
    export.add_argument("output", metavar="OUTPUT", help="a new folder")
    export.add_argument(
        "--to",
        required=True,
        choices=FORMS,
        help="dense: weights rebuilt, for any server; compressed-tensors: integers of rtn and gptq, packed; "
        "gguf: two files for llama.cpp, weights packed",
    )
    export.set_defaults(run=_export)
    return [export]


def _export(options: argparse.Namespace) -> int:
    from bivlm.exports import export
    from bivlm.workspace.places import output_folder

    for sentence in export(options.folder, options.output, options.to):
        print(sentence)
    print(f"exported: {output_folder(options.output)}")
    return DONE
