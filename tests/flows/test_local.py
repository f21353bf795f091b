"""Temporary Prefect servers whose process was killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from flows.cli.local_server import OWNER_VARIABLE, _is_up, end_orphaned_servers
from flows.cli.main import DONE
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


SERVED = """
from flows.cli.quiet import quieten
quieten()
from prefect import flow, task
from flows.cli.local_server import temporary_server

@task
def one():
    return 1

@flow
def counted():
    return one() + one.submit().result()

if __name__ == "__main__":
    with temporary_server():
        print(counted())
"""


def served(folder, home, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "served.py").write_text(SERVED)
    own = {"PREFECT_API_URL": "", "PREFECT_HOME": str(home)} | environment
    environment = {name: value for name, value in (os.environ | own).items() if value}
    command = [sys.executable, "served.py"]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_a_temporary_server_is_reached_past_a_dead_proxy_in_a_home_of_an_odd_name(tmp_path):
    dead = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    home = tmp_path / "place" / "a?b#c%3F d"
    home.mkdir(parents=True)
    done = served(tmp_path, home, NO_PROXY="example.org", **dead)
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert (home / "prefect.db").stat().st_size > 100_000
    assert list((tmp_path / "place").iterdir()) == [home]


@pytest.mark.slow
def test_a_temporary_server_that_takes_too_long_is_told_with_its_seconds(tmp_path):
    done = served(tmp_path, tmp_path, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS="1")
    said = "ConnectionError: the temporary Prefect server timed out: it did not answer within 1 s"
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]


def test_another_processs_server_at_the_port_is_not_taken_for_ours():
    asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with socket.create_server(("127.0.0.1", 0)) as others:
        port = others.getsockname()[1]
        server = SimpleNamespace(server_process=asleep, port=port, api_url=f"http://127.0.0.1:{port}/api")
        with pytest.raises(TimeoutError):
            _is_up(server, time.monotonic() + 1)
        asleep.kill()
        assert _is_up(server, time.monotonic() + 60) is False
    asleep.wait()
