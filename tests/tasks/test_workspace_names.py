"""Whatever a workspace is called, its database and artifacts lie in it, and nothing lies beside it."""

import random
import shutil

import pytest
from mlflow import MlflowClient

from bivlm.addresses import sqlite_address
from bivlm.errors import InputError
from bivlm.workspace.steps import Workspace
from tasks.tracking.run import open_experiment, tracking_place

PIECES = [*"aB7?#% :@&=+;'\"\\~ü猫", "%3F", "%00", "?x=1"]


def generated(seed: int) -> str:
    draw = random.Random(seed)
    return f"w{''.join(draw.choices(PIECES, k=draw.randint(2, 7)))}x"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(sqlite_address(file)).search_experiments()
    return file


@pytest.fixture(autouse=True)
def no_tracking_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("name", ["a?b", "a?mode=ro&uri=true#x", "a/b?/c%3F", *map(generated, range(12))])
def test_database_and_artifacts_lie_in_the_workspace(name, empty_database, tmp_path, monkeypatch):
    place, elsewhere = tmp_path / "place", tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    workspace = Workspace.open(str(place / name))
    shutil.copyfile(empty_database, workspace.local / "mlflow.db")
    client, experiment = open_experiment(workspace)
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "whole", "page.txt")
    (page,) = (place / name / "mlflow-artifacts").rglob("page.txt")
    assert page.read_text() == "whole"
    # Found again by another client, and nothing but the workspace was made.
    assert MlflowClient(tracking_place(workspace)[0]).get_run(run.info.run_id).info.experiment_id == experiment
    files = [path for path in place.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(place / name) for path in files)
    assert list(elsewhere.iterdir()) == []
    assert sorted(path.name for path in (place / name).iterdir() if "mlflow" in path.name) == [
        "mlflow-artifacts",
        "mlflow.db",
    ]


def test_a_new_database_in_an_odd_folder_is_made_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace = Workspace.open(str(tmp_path / "a?b%3Fc"))
    client, _ = open_experiment(workspace)
    assert [each.name for each in client.search_experiments()] == ["bivlm", "Default"]
    assert [path.name for path in tmp_path.iterdir()] == ["a?b%3Fc"]
    assert (tmp_path / "a?b%3Fc" / "mlflow.db").stat().st_size > 100_000


def test_an_ordinary_workspace_has_the_address_that_earlier_runs_are_found_at(empty_database, tmp_path):
    workspace = Workspace.open(str(tmp_path / "work"))
    shutil.copyfile(empty_database, workspace.local / "mlflow.db")
    assert tracking_place(workspace) == (
        f"sqlite:///{tmp_path}/work/mlflow.db",
        f"file://{tmp_path}/work/mlflow-artifacts",
    )


@pytest.mark.parametrize("password", ["to/ken", "to#ken", "to?ken"])
def test_a_tracking_address_whose_password_no_client_understands_is_refused(password, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{password}@host:5000")
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI http://host:5000: found an @ after the host") as refused:
        tracking_place(Workspace.open(str(tmp_path)))
    assert "ken" not in str(refused.value)
