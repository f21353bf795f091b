"""A compression killed at random moments, again and again, ends as one that was left in peace."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bivlm.reports.lineage import find_workspace, read_lineage, verify
from flows.cli.main import DONE
from tasks.runtime.steps import open_workspace
from tests.flows.running import Running
from tests.servers import s3_files, s3_server  # noqa: F401  fixtures

pytestmark = pytest.mark.slow
KILLS = 20


def steps_in(folder: Path) -> dict[str, bytes]:
    """The records of finished steps as they are stored."""
    return {path.name: path.read_bytes() for path in (folder / "steps").glob("*.json")}


def seconds_to_the_end(compression) -> float:
    """Let it end; returns how long the work takes on this machine, from "ready" on."""
    run = Running(compression, str(compression.workspace), compression.place / "log")
    begun = time.perf_counter()
    assert run.end() == DONE, run.errors()
    return time.perf_counter() - begun


def kill_again_and_again(compression, workspace: str, folder: Path, seconds: float) -> None:
    """Kill it `KILLS` times within most of the `seconds` of a run, then let it end.

    `folder` holds the workspace's files. A step is done twice if its record is ever another one than it was.
    """
    seed = random.randrange(1 << 30)
    print(f"seed {seed}, {seconds:.1f} s a run")
    moments = random.Random(seed)
    recorded: dict[str, bytes] = {}
    hits = 0
    for _ in range(KILLS):
        run = Running(compression, workspace, compression.place / "log")
        time.sleep(moments.uniform(0, 0.7 * seconds))
        hits += run.kill()
        now = steps_in(folder)
        assert {name: now[name] for name in recorded} == recorded
        recorded = now
    run = Running(compression, workspace, compression.place / "log")
    assert run.end() == DONE, run.errors()
    now = steps_in(folder)
    assert {name: now[name] for name in recorded} == recorded
    print(f"{hits} of {KILLS} kills found it at work")


def assert_nothing_is_there_twice(client: MlflowClient) -> None:
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "bivlm"]
    runs = client.search_runs([experiment])
    roles = sorted(run.data.tags["bivlm.role"] for run in runs)
    assert roles == ["compression", "full precision", "packed"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    models = client.search_logged_models([experiment])
    assert sorted(model.name for model in models) == ["llava-full-precision", "llava-small"]
    assert [version.version for version in client.search_model_versions("name = 'llava-small'")] == [1]


def assert_as_if_left_in_peace(compression, compressed, workspace: str, client: MlflowClient) -> None:
    assert compression.weights() == compressed.weights()
    found = verify(read_lineage(compression.output), compression.output, find_workspace(workspace))
    assert {finding.state for finding in found} == {"holds"}
    ours, theirs = read_lineage(compression.output), read_lineage(compressed.output)
    assert ours.steps.keys() == theirs.steps.keys()
    assert_nothing_is_there_twice(client)


def on_a_trellis(compression):
    settings = {"method": "trellis", "feedback": "both"}
    compression.recipe["components"] = dict.fromkeys(("vision", "adaptor", "language"), settings)
    compression.recipe["budget"] = {"bits": 2.0, "importance": "curvature", "least": 1.5}
    return compression


@pytest.fixture(scope="module")
def seconds_of_a_run(new_compression, tmp_path_factory):
    return seconds_to_the_end(new_compression(tmp_path_factory.mktemp("timed")))


def test_killed_on_a_folder(new_compression, compressed, tmp_path, seconds_of_a_run):
    compression = new_compression(tmp_path)
    workspace = str(compression.workspace)
    kill_again_and_again(compression, workspace, compression.workspace, seconds_of_a_run)
    assert_as_if_left_in_peace(compression, compressed, workspace, compression.client)


def test_killed_with_feedback_from_all_blocks(new_compression, tmp_path):
    left_alone = on_a_trellis(new_compression(tmp_path / "left alone"))
    seconds = seconds_to_the_end(left_alone)
    compression = on_a_trellis(new_compression(tmp_path / "killed"))
    workspace = str(compression.workspace)
    kill_again_and_again(compression, workspace, compression.workspace, seconds)
    assert_as_if_left_in_peace(compression, left_alone, workspace, compression.client)


def test_killed_on_s3(new_compression, compressed, tmp_path, seconds_of_a_run, s3_server, s3_files, monkeypatch):  # noqa: F811
    """Files and signatures are checked by a real server; every attempt is a machine without local copies."""
    compression = new_compression(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{compression.workspace / 'mlflow.db'}")
    kill_again_and_again(compression, "s3://bivlm/work", s3_files / "work", seconds_of_a_run)
    open_workspace.cache_clear()
    assert_as_if_left_in_peace(compression, compressed, "s3://bivlm/work", compression.client)
    stored = [path for path in s3_files.rglob("*") if path.is_file()]
    assert any("mlflow-artifacts" in path.parts for path in stored)
    for path in stored:
        if path.parent.parent.name == "objects":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
