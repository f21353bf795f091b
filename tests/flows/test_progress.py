"""Progress is shown where it can be, and ends no run where it cannot."""

from __future__ import annotations

from uuid import uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.sorting import ArtifactSort
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from flows.progress import FlowProgress

AWAY = {PREFECT_API_URL: "http://127.0.0.1:9/api"}  # where nobody listens


def shown(description: str) -> list[float]:
    """What the server has been told, as latest value of each artifact of this description."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(sort=ArtifactSort.CREATED_DESC)  # it gives no more than the first 200
    return [artifact.data for artifact in found if artifact.description == description]


def test_a_server_that_is_away_misses_the_progress_and_is_told_the_rest_when_it_is_back():
    name = f"a model {uuid4()}"
    with temporary_settings(AWAY):
        progress = FlowProgress({"pack": 4}, Console(quiet=True), name)
        progress.advance("pack", 1)
        progress.publish()
    assert shown(name) == []
    progress.advance("pack", 1)
    progress.publish()
    assert shown(name) == [50.0]
    with temporary_settings(AWAY):
        progress.advance("pack", 1)
        progress.publish()
    assert shown(name) == [50.0]
    progress.advance("pack", 1)
    progress.publish()
    assert shown(name) == [100.0]
