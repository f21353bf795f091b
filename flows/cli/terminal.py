"""Standard output and error of a command: closed, full, of another encoding, or with nobody who reads them."""

from __future__ import annotations

import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


def run_command(command: Callable[[], int]) -> int:
    """Return the exit code of `command`, or 1 and a sentence on stderr if its output cannot be written."""
    _prepare_streams()
    try:
        code = command()
    except SystemExit:  # of argparse, after a usage message or a help page
        if (error := unwritten_output()) is None:
            raise
    else:
        if (error := unwritten_output()) is None:
            return code
    print(f"bivlm: the output cannot be written: {error.strerror}", file=sys.stderr)
    return 1


class _Output(io.TextIOWrapper):
    """A stdout that remembers why it could not be written to: argparse, for one, does not report it."""

    failure: OSError | None = None

    def write(self, text: str) -> int:
        with self._remembering():
            return super().write(text)

    def flush(self) -> None:
        with self._remembering():
            super().flush()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failure = error
            raise


class _Forgiving(io.TextIOWrapper):
    """A stderr that ignores failed writes: nobody would read about them."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _prepare_streams() -> None:
    """Open closed standard streams to nowhere, let the others take any character, ignore a width that is none.

    A closed descriptor would be given to the next file that is opened, a database for instance, and whatever a library
    prints would be written into it. Characters that the encoding lacks are printed as escapes, such as ``\\xb1``.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, kind in (("stdout", _Output), ("stderr", _Forgiving)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115 - stays open to the end
        else:
            setattr(sys, name, _as(kind, stream))
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]*", os.environ.get(name, "1")):
            del os.environ[name]


def _as(kind: type[io.TextIOWrapper], stream: TextIO) -> TextIO:
    """Return the same stream as `kind` that takes any character, unless it is not Python's own, as in a test."""
    if type(stream) is not io.TextIOWrapper:
        return stream
    stream.flush()
    lines, through = stream.line_buffering, stream.write_through
    return kind(stream.buffer, stream.encoding, "backslashreplace", line_buffering=lines, write_through=through)


def unwritten_output() -> OSError | None:
    """Flush stdout, and give it up if it cannot take what was printed, as with a full disk.

    Returns why it cannot; None if it took everything, or if its reader has seen enough, as with ``| head``.
    """
    failure = getattr(sys.stdout, "failure", None)
    try:
        sys.stdout.flush()
    except OSError as error:
        failure = error
    if failure is not None:
        _give_up(sys.stdout.fileno())
    return None if isinstance(failure, BrokenPipeError) else failure


def nobody_reads() -> bool:
    """Return whether output goes to a pipe whose reader has seen enough, as with ``| head``; then give it up."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        return False
    poll = select.poll()
    poll.register(output, 0)  # errors are reported in any case; flushing would only report them if something is left
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    _give_up(output)
    return True


def _give_up(descriptor: int) -> None:
    """Let what is still to be written there, by the end of the interpreter at the latest, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
