"""Real servers in processes of their own, which tests can kill and start again at the same address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

ACCESS_KEY, SECRET = "bivlm-tests", "s3cret-of-the-tests"
BUCKET = "bivlm"
PATIENCE = 600  # seconds; what takes longer hangs, however many others use the machine


class Server:
    """A command that serves `port` until it is killed; `start` and `kill` as often as a test likes."""

    def __init__(self, command: list[str], port: int, log: Path, environment: dict[str, str] | None = None) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._command, self._port, self._log, self._environment = command, port, log, environment or {}
        self._process: subprocess.Popen | None = None

    def start(self) -> Server:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + PATIENCE
        try:
            while not self._answers():
                assert self._process.poll() is None, f"the server ended: {self._log.read_text()[-2000:]}"
                assert time.monotonic() < deadline, f"the server does not answer: {self._log.read_text()[-2000:]}"
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise
        return self

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self._port)) == 0


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def rclone(folder: Path, log: Path, secret: str = SECRET) -> Server:
    """An S3 server over the files in `folder`; a bucket is a folder in it. It checks signatures."""
    port = free_port()
    program = str(Path(sys.executable).with_name("rclone"))
    address = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{secret}"]
    options = ["--vfs-cache-mode", "off", "--config", "/dev/null"]
    return Server([program, "serve", "s3", *address, *options, str(folder)], port, log)


def mlflow_server(folder: Path, log: Path) -> Server:
    """A tracking server with its database and artifacts in `folder`."""
    port = free_port()
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    address = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return Server([sys.executable, "-m", "mlflow", "server", *store, *address], port, log)


@pytest.fixture
def s3_files(tmp_path: Path) -> Path:
    """The folder behind `s3_server`: what is stored, as plain files."""
    (tmp_path / "s3" / BUCKET).mkdir(parents=True)
    return tmp_path / "s3" / BUCKET


@pytest.fixture
def s3_server(s3_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A running S3 server, and the environment that leads boto3 there."""
    server = rclone(s3_files.parent, tmp_path / "rclone.log").start()
    for name, value in s3_environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "cache"))
    forget_s3_clients()
    yield server
    server.kill()
    forget_s3_clients()


def forget_s3_clients() -> None:
    """Make boto3 and MLflow read the environment again, as they do in the processes of users, which know one server.

    boto3's default session keeps the first credentials, and MLflow keeps clients for five minutes.
    """
    boto3.DEFAULT_SESSION = None
    if mlflow_clients := sys.modules.get("mlflow.store.artifact.s3_artifact_repo"):
        mlflow_clients._cached_get_s3_client.cache_clear()


def s3_environment(server: Server) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.address,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
