"""What the user can mend: one exception type, so that the command line can tell bad input from a failed run."""


class InputError(ValueError):
    """A recipe, path, checkpoint, tensor or argument is not usable.

    The message names the thing, the value found and the valid form. It is never retried, and the command line
    ends with exit code 2.
    """
