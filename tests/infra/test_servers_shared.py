"""Two programs over one folder of servers: each finds what the other has started, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.settings import NAMES
from tests.infra.stand_ins import StandIns

ROOT = Path(__file__).parents[2]


class Shell:
    """A command of `python -m infra.servers` in a program of its own."""

    def __init__(self, folder: Path, command: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.infra.stand_ins", command, "--folder", str(folder)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, said: str) -> None:
        while said not in (line := self._process.stdout.readline()):
            assert line, f"it ended without saying {said!r}"

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> str:
        """The rest of what it says, when it has ended by itself."""
        said, _ = self._process.communicate(timeout=30)
        assert self._process.returncode == 0
        return said

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None


@pytest.fixture
def servers(tmp_path) -> Iterator[StandIns]:
    made = StandIns(tmp_path)
    yield made
    for process in processes_of(tmp_path):
        process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    """The stand-ins that run, whatever the notes say: a server is started in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.name() == "sleep" and Path(process.cwd()) == folder / "run":
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_what_another_has_started_again_is_seen_and_ended(servers, tmp_path):
    servers.start()
    other = StandIns(tmp_path)
    other.stop(["mlflow", "prefect"])
    assert [name for name in NAMES if servers.running(name)] == ["postgres", "s3"]
    other.start()
    assert all(map(servers.running, NAMES))
    servers.stop()
    assert not any(map(other.running, NAMES))
    assert processes_of(tmp_path) == []
    assert not list(tmp_path.glob("run/*.pid"))


def test_who_ends_one_that_is_gone_leaves_its_successor_alone(servers, tmp_path):
    servers.start(["s3"])
    process = servers._process("s3")
    other = StandIns(tmp_path)
    other.kill("s3")
    other.start(["s3"])
    servers._end("s3", process, [process])  # as one who had looked before
    assert other.running("s3") and servers.running("s3")


def test_secrets_that_another_has_renewed_are_known(servers, tmp_path):
    other = StandIns(tmp_path)
    before = servers.environment
    other.rotate()
    assert servers.environment == other.environment
    assert servers.environment["AWS_SECRET_ACCESS_KEY"] != before["AWS_SECRET_ACCESS_KEY"]


def test_a_rotation_beside_run_leaves_it_running_and_ctrl_c_ends_the_new_servers(servers, tmp_path):
    first = Shell(tmp_path, "run")
    first.wait_for("Ctrl-C ends them")
    old = {process.pid for process in processes_of(tmp_path)}
    Shell(tmp_path, "rotate").end()
    assert all(map(servers.running, NAMES))
    time.sleep(1)  # two looks of `run`
    assert not first.ended
    new = {process.pid for process in processes_of(tmp_path)}
    assert len(old) == len(new) == len(NAMES) and not old & new
    first.interrupt()
    assert "ending the servers" in first.end()
    assert processes_of(tmp_path) == []


def test_of_two_runs_the_first_ends_what_the_second_has_started_and_both_end(servers, tmp_path):
    first = Shell(tmp_path, "run")
    first.wait_for("Ctrl-C ends them")
    servers.stop(["mlflow", "prefect"])  # as for a restore
    second = Shell(tmp_path, "run")
    second.wait_for("Ctrl-C ends them")
    assert all(map(servers.running, NAMES))
    first.interrupt()
    first.end()
    assert "all servers have been ended" in second.end()
    assert processes_of(tmp_path) == []
