"""The real servers, once for all integration tests; the folder of each is one that PostgreSQL's user can enter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.quiet import quieten
from infra.servers import Servers

quieten()


def stack_folder() -> Path:
    """A new folder that everybody may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="bivlm-stack-"))
    folder.chmod(0o711)
    return folder


@pytest.fixture(scope="session")
def stack() -> Iterator[Servers]:
    """PostgreSQL, S3, MLflow and Prefect; whoever kills one starts it again."""
    servers = Servers(stack_folder())
    try:
        yield servers.start()
    finally:
        servers.stop()
        shutil.rmtree(servers.folder)


@pytest.fixture
def second_stack() -> Iterator[Servers]:
    """An empty one, not started, to be used up."""
    servers = Servers(stack_folder())
    try:
        yield servers
    finally:
        servers.stop()
        shutil.rmtree(servers.folder)
