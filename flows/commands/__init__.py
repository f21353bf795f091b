"""The commands of `bivlm`, a module each or a few that belong together.

``add(commands)`` adds their parsers and returns them; what a parser's ``run`` default does imports what it needs and no
more, and returns the exit code.
"""

from __future__ import annotations

import json
from typing import Any

DONE, FAILED, BAD_INPUT, GATE_NOT_PASSED = 0, 1, 2, 3


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
