"""Compressions in processes of their own, for tests that take something away from them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.servers import PATIENCE

# "ready" is said after the imports, which take longer than the work on the tiny model.
# What is started in the background may have inherited that Ctrl-C is ignored.
SCRIPT = textwrap.dedent("""
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from flows.cli.quiet import quieten
    quieten()
    from flows.cli.main import main
    import flows.compress, mlflow.pyfunc, transformers.models.llava.modeling_llava
    print("ready", flush=True)
    sys.exit(main(sys.argv[1:]))
""")


class Running:
    """`bivlm compress`, or another command, in a process group of its own, as far as it is ready to begin."""

    def __init__(self, compression, workspace: str, log: Path, *options: str, **environment: str) -> None:
        arguments = ["compress", "--model", str(compression.model), "--recipe", str(compression.recipe_file())]
        arguments += ["--output", str(compression.output), "--workspace", workspace, *options]
        self._start(arguments, log, environment)

    @classmethod
    def command(cls, arguments: list[str], log: Path, **environment: str) -> Running:
        """Any command."""
        running = cls.__new__(cls)
        running._start(arguments, log, environment)
        return running

    def _start(self, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        # Into a file: nobody reads along, and a full pipe would hold the process up.
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, *arguments],
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env={name: value for name, value in (os.environ | environment).items() if value},
            )
        assert self.process.stdout.readline() == "ready\n", self.errors()

    def kill(self) -> bool:
        """Kill the process group; whether it was still at work."""
        at_work = self.process.poll() is None
        if at_work:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        return at_work

    def end(self, timeout: float = PATIENCE) -> int:
        """Wait until it ends by itself; returns the exit code."""
        self.printed, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode

    def errors(self) -> str:
        """What it has written to stderr."""
        return self.log.read_text()


def command_lines(processes: Iterable[psutil.Process] | None = None) -> set[str]:
    """What `ps` shows of `processes` (default: all) that have not ended meanwhile."""
    lines = set()
    for process in psutil.process_iter() if processes is None else processes:
        with suppress(psutil.Error):
            lines.add(" ".join(process.cmdline()))
    return lines
