"""`bivlm lineage`: show where a packed checkpoint comes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flows.cli.commands import DONE, NOT_PASSED, import_late, print_json


def add(commands: Any) -> list[argparse.ArgumentParser]:
    """Add the parsers to the `commands` of another, and return them."""
    lineage = commands.add_parser(
        "lineage", help="where a packed checkpoint comes from, and whether what is stored is still that"
    )
    lineage.add_argument("model", metavar="DIR_OR_VERSION", help="a folder, or NAME/VERSION or NAME@ALIAS in MLflow")
    lineage.add_argument(
        "--workspace",
        metavar="DIR_OR_URL",
        help="where its steps are (default: the recorded one, if it is this machine's own)",
    )
    lineage.add_argument("--json", action="store_true", help="print one JSON object")
    lineage.set_defaults(run=_lineage)
    return [lineage]


def _lineage(options: argparse.Namespace) -> int:
    import tempfile

    import_late("torch")
    from bivlm.reports.lineage import own_workspace, read_lineage, verify
    from bivlm.workspace.steps import Workspace

    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.model)
        if not folder.is_dir():
            folder = _downloaded(options.model, options.workspace, Path(place))
        lineage = read_lineage(folder)
        place = Workspace.look_into(options.workspace) if options.workspace else own_workspace(lineage)
        findings = verify(lineage, folder, place)
    if options.json:
        print_json({"lineage": lineage.model_dump(mode="json"), "findings": [vars(finding) for finding in findings]})
    else:
        from flows.cli.console import print_lineage

        print_lineage(options.model, lineage, findings)
    return NOT_PASSED if any(finding.state == "broken" for finding in findings) else DONE


def _downloaded(version: str, workspace: str | None, place: Path) -> Path:
    """Download a registered version's checkpoint. A folder needs no MLflow, which takes seconds to import."""
    from bivlm.errors import InputError
    from bivlm.workspace.steps import Workspace
    from bivlm.workspace.stores.location import default_workspace
    from tasks.tracking.registry import VERSION_FORMS, download_version, is_version

    if not is_version(version):
        raise InputError(f"{version!r}: no such folder, and not a model version; expected DIR, {VERSION_FORMS}")
    return download_version(version, Workspace.open(workspace or default_workspace()), place)
