"""What the user can mend, and what a gate has refused: the command line tells them from a run that failed."""

from __future__ import annotations

from typing import Any


class InputError(ValueError):
    """A recipe, path, checkpoint, tensor or argument is not usable.

    The message names the thing, the value found and the valid form. It is never retried, and the command line
    ends with exit code 2.
    """


class GateNotPassed(Exception):
    """Everything was done and recorded, and a gate's bound is not kept: what was champion before still is.

    The message says which bounds, and what was found. It is never retried, and the command line ends with exit code 3.

    Attributes:
        result: what the run would have returned.
    """

    def __init__(self, message: str, result: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.result = result
