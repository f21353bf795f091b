"""The command line. Each command imports what it needs and no more: `bits` and `inspect` load no orchestrator."""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from flows.cli.commands import (
    BAD_INPUT,
    DONE,
    FAILED,
    ask,
    audit,
    compress,
    export,
    housekeeping,
    leaderboard,
    lineage,
    looking,
    missing_of_pipeline,
    promotion,
    pruning,
    push,
    reproduce,
    trigger,
)
from flows.cli.quiet import quieten
from flows.cli.terminal import nobody_reads, run_command, unwritten_output

# In the order in which ``bivlm --help`` lists their commands.
_MODULES = (
    compress,
    trigger,
    leaderboard,
    pruning,
    looking,
    ask,
    export,
    lineage,
    promotion,
    audit,
    housekeeping,
    push,
    reproduce,
)
_EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 bad input or usage, 3 a gate or a lineage check was not passed"


# Libraries whose exceptions tell of a server, a network or its settings: nothing of ours to correct, so no trace.
_OUTSIDE = {"botocore", "boto3", "httpx", "httpcore", "httpx2", "httpcore2", "requests", "urllib3"}
_OF_THIS_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Bad input, and trouble outside of this program, are one message on stderr. Of any other failure the whole
    trace is shown, because it is a defect. Output that cannot be written is a failure, unless its reader has gone.
    """
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    quieten()
    from bivlm.addresses import text_without_credentials
    from bivlm.errors import InputError, describe

    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C: what was started is ended in order, the temporary server included.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    try:
        if getattr(options, "trust_remote_code", None):
            from bivlm.checkpoint.remote_code import trust

            trust(options.trust_remote_code)
        return options.run(options)
    except InputError as error:
        print(f"bivlm {options.command}: {describe(error)}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"bivlm {options.command}: interrupted; run it again to go on from where it was", file=sys.stderr)
        return FAILED
    except SystemExit as error:
        # rich's: its tables are no longer read, as with ``| head``
        if isinstance(error.__context__, BrokenPipeError):
            return DONE
        raise
    except BaseException as error:  # also what Prefect stops a run with, and work that was cancelled
        if isinstance(error, BrokenPipeError) and nobody_reads():
            return DONE
        if isinstance(error, OSError) and unwritten_output() is not None:
            return FAILED  # `run_command` says so
        if isinstance(error, ModuleNotFoundError) and (missing := missing_of_pipeline()):
            said = f"needs {error.name or missing}, which is not installed; pip install 'bivlm[pipeline]'"
            print(f"bivlm {options.command}: {said}", file=sys.stderr)
            return BAD_INPUT
        # ArithmeticError itself is raised by bivlm alone, of a model that gives NaN: the sentence says all.
        if not _is_outside(error) and type(error) is not ArithmeticError:
            print(text_without_credentials(traceback.format_exc().rstrip()), file=sys.stderr)
        print(f"bivlm {options.command}: failed: {describe(error)}", file=sys.stderr)
        return FAILED


def _is_outside(error: BaseException) -> bool:
    """Return whether the error is about a server, a network, a disk or a limit of this machine."""
    known = isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in _OUTSIDE
    # Without a number it does not come from the system, but from code that wrote a sentence.
    return known or (isinstance(error, OSError) and error.errno in {None, *_OF_THIS_MACHINE})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bivlm",
        description="Vision-language models at one to four bits per weight, counted as bytes on disk.",
        epilog=_EXIT_CODES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _MODULES:
        for command in module.add(commands):
            command.add_argument(
                "--trust-remote-code",
                action="append",
                metavar="DIR_OR_HUB_ID",
                help="let the code that comes with this model run; for workers: $BIVLM_TRUST_REMOTE_CODE",
            )
    return parser
