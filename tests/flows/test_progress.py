"""Progress is shown where it can be, and ends no run where it cannot."""

from __future__ import annotations

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console

from flows.progress import ARTIFACT_KEY, FlowProgress

AWAY = {PREFECT_API_URL: "http://127.0.0.1:9/api"}  # where nobody listens


def shown() -> list[float]:
    """What the server has been told, as latest value of each artifact of ours."""
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    return [artifact.data for artifact in found if artifact.key == ARTIFACT_KEY]


def test_a_server_that_is_away_misses_the_progress_and_is_told_the_rest_when_it_is_back():
    before = len(shown())
    with temporary_settings(AWAY):
        progress = FlowProgress({"pack": 4}, Console(quiet=True), "a model")
        progress.advance("pack", 1)
        progress.publish()
    assert len(shown()) == before
    progress.advance("pack", 1)
    progress.publish()
    assert 50.0 in shown() and len(shown()) == before + 1
    with temporary_settings(AWAY):
        progress.advance("pack", 1)
        progress.publish()
    progress.advance("pack", 1)
    progress.publish()
    assert 100.0 in shown() and len(shown()) == before + 1
