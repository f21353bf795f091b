"""The command line. Each command imports what it needs and no more: `bits` and `inspect` load no orchestrator."""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from flows.commands import (
    BAD_INPUT,
    DONE,
    FAILED,
    audit,
    compress,
    housekeeping,
    leaderboard,
    lineage,
    looking,
    promotion,
    pruning,
    push,
    reproduce,
    trigger,
)
from flows.quiet import quieten

# In the order in which ``bivlm --help`` lists their commands.
_MODULES = (
    compress,
    trigger,
    leaderboard,
    pruning,
    looking,
    lineage,
    promotion,
    audit,
    housekeeping,
    push,
    reproduce,
)
_EXIT_CODES = "exit codes: 0 done, 1 the run failed, 2 bad input or usage, 3 a gate or a lineage check was not passed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Bad input is told in one message on stderr. Of any other failure the whole trace is shown, because it is ours to
    mend.
    """
    options = _parser().parse_args(arguments)
    quieten()
    from bivlm.errors import InputError

    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C: what was started is ended in order, the temporary server included.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    try:
        if getattr(options, "trust_remote_code", None):
            from bivlm.remote_code import trust

            trust(options.trust_remote_code)
        return options.run(options)
    except InputError as error:
        print(f"bivlm {options.command}: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"bivlm {options.command}: interrupted; run it again to go on from where it was", file=sys.stderr)
        return FAILED
    except SystemExit as error:
        if isinstance(
            error.__context__, BrokenPipeError
        ):  # rich's: nobody reads its tables any more, as with ``| head``
            return DONE
        raise
    except ConnectionError as error:  # nothing of ours to mend, so no trace
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return DONE
        print(f"bivlm {options.command}: failed: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:
        # This very class is raised by bivlm alone, of a model that gives NaN: the sentence says all.
        if type(error) is not ArithmeticError:
            traceback.print_exc()
        print(f"bivlm {options.command}: failed: {error}", file=sys.stderr)
        return FAILED


def _nobody_reads() -> bool:
    """Whether our output goes to a pipe whose reader has seen enough, as with ``| head``; it is then given up."""
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file
        return False
    poll = select.poll()
    poll.register(output, 0)  # what is wrong with it is told in any case; flushing would only tell if something is left
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bivlm",
        description="Vision-language models at one to four bits a weight, counted as bytes on disk.",
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


if __name__ == "__main__":
    sys.exit(main())
