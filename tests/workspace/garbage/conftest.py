from types import SimpleNamespace

import pytest
from s3_server import s3_endpoint, s3_location  # noqa: F401  fixtures
from side_by_side import sleep
from stored_in_memory import MemoryStore

from bivlm.workspace import steps as workspace_module
from bivlm.workspace.steps import Workspace


@pytest.fixture(params=["folder", "s3"])
def location(request, tmp_path):
    """Where a workspace may be."""
    if request.param == "s3":
        return request.getfixturevalue("s3_location")
    return str(tmp_path / "workspace")


class Clock:
    """The store's clock, which only tests move; that of the machine may be `ahead`, its stopwatch goes along."""

    now, ahead = 1_000_000_000.0, 0.0

    def __call__(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    machine = SimpleNamespace(time=lambda: clock.now + clock.ahead, monotonic=clock, sleep=sleep)
    monkeypatch.setattr(workspace_module, "time", machine)
    return clock


@pytest.fixture
def new_place(tmp_path, clock):
    """A function that makes an empty workspace in memory."""
    return lambda: Workspace(MemoryStore(tmp_path, clock))


@pytest.fixture
def place(new_place) -> Workspace:
    return new_place()
