"""The console command `bivlm`: makes sure that its own packages are the ones imported, then runs `flows.cli`.

A module of its own beside the packages, above all floors: it must not belong to a package that it is still to find, and
`import bivlm` takes seconds that ``bivlm --help`` does not need.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_OURS = ("bivlm", "flows", "tasks")


def main() -> int:
    """Run one command; returns its exit code."""
    put_own_packages_first()
    from flows.cli.main import main as run

    return run()


def put_own_packages_first() -> None:
    """Let this installation's packages be found before a user's modules of the same names, here and in child processes.

    ``PYTHONPATH=.`` in a folder with a `tasks.py` would otherwise hide ours. Nothing changes where nothing hides them.
    """
    # `python -m`, by which Prefect starts its server, would look for modules in the current folder first.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    home = Path(__file__).resolve().parent
    for place, entry in enumerate(sys.path):
        if Path(entry).resolve() == home:
            return
        if any(PathFinder.find_spec(name, [entry]) for name in _OURS):
            sys.path.insert(place, str(home))
            inherited = os.environ.get("PYTHONPATH")
            os.environ["PYTHONPATH"] = f"{home}{os.pathsep}{inherited}" if inherited else str(home)
            return
