"""The commands of `bivlm`, a module each or a few that belong together.

``add(commands)`` adds their parsers and returns them; what a parser's ``run`` default does imports what it needs and no
more, and returns the exit code.
"""

from __future__ import annotations

import json
import sys
from typing import Any

DONE, FAILED, BAD_INPUT = 0, 1, 2
NOT_PASSED = 3  # a recipe's gate, or the check of a lineage record: all was done, and what was found is not good enough


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, with escapes for what its encoding may lack."""
    escaped = not (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=escaped, allow_nan=False))
