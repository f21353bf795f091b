"""Credentials stay in the environment: nothing that is written, printed or shown in the process list holds them."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest

from flows.cli.main import DONE, FAILED
from infra.processes import family
from tasks.tracking.run import public_uri, ui_command
from tests.flows.running import Running, command_lines
from tests.servers import ACCESS_KEY, SECRET, mlflow_server, s3_files, s3_server  # noqa: F401  fixtures

PASSWORD = "tracking-passw0rd"


def files_with(secret: str, *folders: Path) -> list[Path]:
    """The files under the folders whose bytes hold the secret."""
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(paths) > 20
    return [path for path in paths if secret.encode() in path.read_bytes()]


@pytest.mark.slow
def test_credentials_of_s3_are_written_nowhere(new_compression, s3_server, s3_files, tmp_path):  # noqa: F811
    """The server itself is given its key on its command line, which is not ours, so processes are looked at by name."""
    compression = new_compression(tmp_path / "place")
    database = f"sqlite:///{compression.workspace / 'mlflow.db'}"
    loud = {"PREFECT_LOGGING_LEVEL": "DEBUG", "MLFLOW_LOGGING_LEVEL": "DEBUG", "MLFLOW_TRACKING_URI": database}
    run = Running(compression, "s3://bivlm/work", tmp_path / "place" / "log", **loud)
    ours, seen = psutil.Process(run.process.pid), set()
    while run.process.poll() is None:
        seen |= command_lines(family(ours))
        time.sleep(0.5)
    printed = "\n".join(seen)
    assert "flows.cli.main" in printed and SECRET not in printed
    assert run.end() == DONE, run.errors()
    assert files_with(SECRET, tmp_path / "place", s3_files, tmp_path / "cache") == []
    assert files_with(ACCESS_KEY + ",", tmp_path / "place", s3_files, tmp_path / "cache") == []
    assert SECRET not in run.printed


@pytest.mark.slow
def test_a_password_of_the_tracking_server_is_written_nowhere(new_compression, tmp_path):
    compression = new_compression(tmp_path / "place")
    (tmp_path / "mlflow").mkdir()
    server = mlflow_server(tmp_path / "mlflow", tmp_path / "mlflow.log").start()
    address = server.address.replace("http://", f"http://somebody:{PASSWORD}@")
    environment = {"PREFECT_LOGGING_LEVEL": "DEBUG", "MLFLOW_TRACKING_URI": address}
    try:
        run = Running(compression, str(compression.workspace), tmp_path / "place" / "log", **environment)
        while run.process.poll() is None:
            assert PASSWORD not in "\n".join(command_lines())
            time.sleep(0.5)
        assert run.end() == DONE, run.errors()
        assert server.address in run.printed
    finally:
        server.kill()
    assert files_with(PASSWORD, tmp_path) == []
    assert PASSWORD not in run.printed


@pytest.mark.slow
def test_a_tracking_server_that_cannot_be_reached_does_not_give_its_password_away(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    address = f"http://somebody:{PASSWORD}@127.0.0.1:9"
    environment = {"MLFLOW_TRACKING_URI": address, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    run = Running(compression, str(compression.workspace), tmp_path / "log", **environment)
    assert run.end() == FAILED
    assert "127.0.0.1" in run.errors()
    assert PASSWORD not in run.errors()


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://user:p@ss@host/path", "https://host/path"),
        ("postgresql://user:pass@host/db", "postgresql://host/db"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
    ],
)
def test_an_address_is_shown_without_user_and_password(uri, public):
    assert public_uri(uri) == public
    assert "pass" not in ui_command(uri) and "p@ss" not in ui_command(uri)
