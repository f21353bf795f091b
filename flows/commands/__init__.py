"""The commands of `bivlm`, a module each or a few that belong together.

``add(commands)`` adds their parsers and returns them; what a parser's ``run`` default does imports what it needs and no
more, and returns the exit code.
"""

from __future__ import annotations

import json
from typing import Any

DONE, FAILED, BAD_INPUT = 0, 1, 2
NOT_PASSED = 3  # a recipe's gate, or the check of a lineage record: all was done, and what was found is not good enough


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
