"""Servers that refuse, go away and come back, and a disk that is full: nothing is lost, and the run goes on."""

from __future__ import annotations

import subprocess
import time

import pytest
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from bivlm.reports.lineage import find_workspace, read_lineage, verify
from flows.cli.main import BAD_INPUT, DONE, FAILED
from tasks.runtime.steps import open_workspace
from tests.flows.running import Running
from tests.servers import PATIENCE, SECRET, mlflow_server, s3_files, s3_server  # noqa: F401  fixtures

WORKSPACE = "s3://bivlm/work"


def as_if_nothing_had_happened(compression, compressed, workspace):
    """Whether what is stored is what an undisturbed run stores, and holds together."""
    open_workspace.cache_clear()
    found = verify(read_lineage(compression.output), compression.output, find_workspace(workspace))
    return compression.weights() == compressed.weights() and {finding.state for finding in found} == {"holds"}


def wait_for_steps(folder, count):
    """Until so many steps are recorded under the workspace's folder."""
    deadline = time.monotonic() + PATIENCE
    while len(list((folder / "steps").glob("*.json"))) < count:
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.02)


def test_each_server_of_a_test_is_asked_with_its_own_key(s3_endpoint, s3_files, tmp_path, request):  # noqa: F811
    """What MLflow and boto3 kept of the server before it would be refused here, or go there."""
    (tmp_path / "file").touch()
    get_artifact_repository("s3://bivlm-tests/run").log_artifact(str(tmp_path / "file"))
    request.getfixturevalue("s3_server")
    get_artifact_repository("s3://bivlm/run").log_artifact(str(tmp_path / "file"))
    assert (s3_files / "run" / "file").exists()


@pytest.mark.slow
def test_an_s3_server_that_refuses_the_secret_is_bad_input(new_compression, s3_server, s3_files, tmp_path):  # noqa: F811
    compression = new_compression(tmp_path)
    run = Running(compression, WORKSPACE, tmp_path / "log", AWS_SECRET_ACCESS_KEY="not-the-secret")
    assert run.end() == BAD_INPUT
    assert f"workspace {WORKSPACE}: bucket 'bivlm' cannot be opened" in run.errors()
    assert "not-the-secret" not in run.errors() and SECRET not in run.errors()
    assert not any(s3_files.iterdir())


@pytest.mark.slow
def test_an_s3_server_that_goes_away_and_comes_back(new_compression, compressed, s3_server, s3_files, tmp_path):  # noqa: F811
    compression = new_compression(tmp_path)
    run = Running(compression, WORKSPACE, tmp_path / "log", "--no-evaluate")
    wait_for_steps(s3_files / "work", 20)
    s3_server.kill()
    time.sleep(4)
    s3_server.start()
    assert run.end() == DONE, run.errors()
    assert as_if_nothing_had_happened(compression, compressed, WORKSPACE)


@pytest.mark.slow
def test_an_s3_server_that_stays_away_ends_the_run_which_later_goes_on(
    new_compression,
    compressed,
    s3_server,  # noqa: F811
    s3_files,  # noqa: F811
    tmp_path,
):
    compression = new_compression(tmp_path)
    run = Running(compression, WORKSPACE, tmp_path / "log", "--no-evaluate")
    wait_for_steps(s3_files / "work", 20)
    s3_server.kill()
    assert run.end() == FAILED
    assert s3_server.address in run.errors().splitlines()[-1]
    done = {path.name: path.read_bytes() for path in (s3_files / "work" / "steps").iterdir()}

    s3_server.start()
    assert Running(compression, WORKSPACE, tmp_path / "log", "--no-evaluate").end() == DONE
    assert as_if_nothing_had_happened(compression, compressed, WORKSPACE)
    assert {name: (s3_files / "work" / "steps" / name).read_bytes() for name in done} == done


@pytest.mark.slow
def test_a_tracking_server_that_goes_away_and_comes_back(new_compression, compressed, tmp_path):
    compression = new_compression(tmp_path)
    (tmp_path / "mlflow").mkdir()
    server = mlflow_server(tmp_path / "mlflow", tmp_path / "mlflow.log").start()
    try:
        run = Running(compression, str(compression.workspace), tmp_path / "log", MLFLOW_TRACKING_URI=server.address)
        wait_for_steps(compression.workspace, 20)
        server.kill()
        time.sleep(4)
        server.start()
        assert run.end() == DONE, run.errors()
        assert as_if_nothing_had_happened(compression, compressed, str(compression.workspace))
        client = MlflowClient(server.address)
        (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "bivlm"]
        runs = client.search_runs([experiment])
        assert sorted(run.data.tags["bivlm.role"] for run in runs) == ["compression", "full precision", "packed"]
        assert {run.info.status for run in runs} == {"FINISHED"}
        (version,) = client.search_model_versions("name = 'llava-small'")
        assert int(version.version) == 1
    finally:
        server.kill()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with a megabyte of room; making one takes the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_which_goes_on_once_there_is_room(new_compression, compressed, small_disk, tmp_path):
    compression = new_compression(tmp_path)
    database = f"sqlite:///{compression.workspace / 'mlflow.db'}"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(700_000))
    options = ("--no-evaluate", "--no-check")  # or it would be refused before it begins
    run = Running(compression, str(small_disk / "work"), tmp_path / "log", *options, MLFLOW_TRACKING_URI=database)
    assert run.end() == FAILED
    assert "No space left on device" in run.errors().splitlines()[-1]
    assert not compression.output.exists()
    done = {path.name: path.read_bytes() for path in (small_disk / "work" / "steps").iterdir()}
    assert done

    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    again = Running(
        compression, str(small_disk / "work"), tmp_path / "log", "--no-evaluate", MLFLOW_TRACKING_URI=database
    )
    assert again.end() == DONE, again.errors()
    assert as_if_nothing_had_happened(compression, compressed, str(small_disk / "work"))
    assert {name: (small_disk / "work" / "steps" / name).read_bytes() for name in done} == done
