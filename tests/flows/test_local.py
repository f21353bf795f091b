"""Temporary Prefect servers whose process was killed."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from flows.cli import DONE
from flows.local import OWNER_VARIABLE, end_orphaned_servers
from tests.flows.running import Running


@pytest.fixture
def pretended_server():
    """A process that looks like the temporary server of `owner`."""
    started = []

    def start(owner: str) -> subprocess.Popen:
        marks = {"PREFECT__SERVER_EPHEMERAL": "1", OWNER_VARIABLE: owner}
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=os.environ | marks))
        while psutil.Process(started[-1].pid).environ().get(OWNER_VARIABLE) != owner:
            time.sleep(0.01)  # until it has replaced its parent's memory by its own
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_server_of_a_dead_process_is_ended_and_one_of_a_living_process_is_not(pretended_server):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    orphan = pretended_server(f"{gone.pid}:{time.time()}")
    of_another_process_of_this_id = pretended_server(f"{os.getpid()}:{psutil.Process().create_time() - 10_000}")
    alive = pretended_server(f"{os.getpid()}:{psutil.Process().create_time()}")
    assert sorted(end_orphaned_servers()) == sorted([orphan.pid, of_another_process_of_this_id.pid])
    assert orphan.wait(5) == of_another_process_of_this_id.wait(5) == -signal.SIGTERM
    assert alive.poll() is None


@pytest.mark.slow
def test_an_orphaned_server_neither_stops_the_next_run_nor_stays(new_compression, compressed, tmp_path):
    compression = new_compression(tmp_path)
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": str(tmp_path / "prefect")}
    run = Running(compression, str(compression.workspace), tmp_path / "log", **own)
    while not list((compression.workspace / "steps").glob("*.json")):
        time.sleep(0.05)
    # The process alone, not its group: the server lives on, with the database open.
    servers = [child for child in psutil.Process(run.process.pid).children() if "uvicorn" in " ".join(child.cmdline())]
    run.process.kill()
    run.process.wait()  # not `communicate`: the server holds the pipe open
    assert [server.is_running() for server in servers] == [True]
    again = Running(compression, str(compression.workspace), tmp_path / "log", **own)
    assert again.end() == DONE, again.errors()
    assert compression.weights() == compressed.weights()
    servers[0].wait(10)
