"""The commands of `bivlm`, one module each, or one for a few that belong together.

``add(commands)`` adds their parsers and returns them; what a parser's ``run`` default does imports what it needs and no
more, and returns the exit code.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

DONE, FAILED, BAD_INPUT = 0, 1, 2
NOT_PASSED = 3  # a recipe's gate, or the check of a lineage record: all was done, and what was found is not good enough


class _Late(ModuleType):
    """A module that is imported when something in it is used."""

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), attribute)


def import_late(name: str) -> None:
    """Put off the import of a module until something in it is used: most of our modules import torch at their top.

    For commands that need nothing of it most of the time.
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is not None:
        sys.modules[name] = _Late(name)
        sys.modules[name].__spec__ = spec


def announce_start(parts: str) -> None:
    """Say on stderr that `parts` are being started, which takes seconds.

    Raises ModuleNotFoundError in a core installation.
    """
    if missing := missing_of_pipeline():
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
    print(f"starting: {parts}", file=sys.stderr)


def missing_of_pipeline() -> str | None:
    """Return what of ``bivlm[pipeline]`` a core installation lacks, None where it is installed."""
    return next((name for name in ("prefect", "mlflow") if find_spec(name) is None), None)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, with escapes for what its encoding may lack."""
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=escaped, allow_nan=False))
