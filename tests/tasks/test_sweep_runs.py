"""What MLflow holds of a pruning sweep that was cut off and logged again."""

import pytest
from mlflow import MlflowClient

from bivlm.workspace.steps import Workspace
from tasks.tracking.sweeps import log_sweep

ROWS = [
    {"model": "m", "place": "vision", "score": "s", "layer": layer, "share": 0.5, "task": "t", "accuracy": 50.0}
    | {"loss": 1.0, "checkpoint": "c"}
    for layer in (1, 2)
]


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """Log the sweep; returns its cells' runs."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    workspace = Workspace.open(tmp_path / "workspace")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "sweep.csv").write_text("x")

    def log():
        parent = log_sweep.fn(ROWS, str(tmp_path / "files"), ["sweep.csv"], workspace.url)
        client = MlflowClient()
        runs = client.search_runs([client.get_run(parent).info.experiment_id])
        return [run for run in runs if run.data.tags["bivlm.role"] == "pruned"]

    return log


def test_a_cell_that_was_cut_off_is_taken_up(logged, monkeypatch):
    def away(*_, **__):
        raise ConnectionError("away for a moment")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", away)
        with pytest.raises(ConnectionError):
            logged()
    for _ in range(2):
        runs = logged()
        assert [run.info.status for run in runs] == ["FINISHED"] * 2
        assert {run.data.params["layer"]: run.data.metrics["t/accuracy"] for run in runs} == {"1": 50.0, "2": 50.0}
