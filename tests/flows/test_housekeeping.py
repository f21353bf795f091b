"""`bivlm gc` and its flow: what registered versions need stays, the rest goes, and doubt removes nothing."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bivlm.errors import InputError
from bivlm.reports.lineage import find_workspace, read_lineage, verify
from bivlm.workspace.hashing import step_identity
from bivlm.workspace.steps import Workspace
from flows.cli.main import BAD_INPUT, DONE, main
from flows.housekeeping import gc_flow
from tasks.garbage import _chosen, note_registry, versions_to_keep
from tasks.runtime.steps import do_step
from tests.flows.running import Running
from tests.servers import mlflow_server, s3_files, s3_server  # noqa: F401  fixtures


def make_old(folder: Path, days: float) -> None:
    """As if everything in the folder had been used last so many days ago."""
    then = time.time() - days * 24 * 3600
    for path in folder.rglob("*"):
        os.utime(path, (then, then))


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def step_of_nobody(workspace: Workspace, number: int):
    """A finished step that no version names."""
    identity = step_identity("statistics", 1, {}, number, exact=True)
    return do_step(workspace, identity, lambda folder: {"bytes": (folder / "file").write_bytes(bytes([number] * 1000))})


@pytest.fixture
def made(compressed_copy):
    """A compression with its registered candidate, and beside it a step that no version names, all of long ago."""
    step_of_nobody(Workspace.open(compressed_copy.workspace), 7)
    make_old(compressed_copy.workspace, 1000)
    return compressed_copy


def gc(compression, **changes):
    return gc_flow(**{"workspace": str(compression.workspace), "wait_seconds": 0.0} | changes)


def test_what_a_registered_version_is_made_of_stays_for_ever_and_the_rest_goes(made, counted):
    compression = made
    said = gc(compression)
    curves = said["stages"].pop("error curve")["steps"]  # of the figures, which are on the run
    version = {"name": "llava-small", "version": 1, "reason": "candidate"}
    assert said["versions"] == [version]
    assert {stage: each["going"] for stage, each in said["stages"].items() if each["going"]} == {"statistics": 1}
    assert said["removed"]["steps"] == curves + 1
    found = verify(read_lineage(compression.output), compression.output, find_workspace(str(compression.workspace)))
    assert {finding.state for finding in found} == {"holds"}
    assert 7 not in [record["identity"]["recipe"] for record in compression.steps("statistics")]
    assert compression.run()["reused"]
    assert {stage: calls for stage, calls in counted.items() if stage != "plan"} == {  # plans are loaded for the curves
        "statistics": [],
        "pack": [],
        "evaluation": [],
        "divergence": [],
    }


def test_a_dry_run_says_the_same_and_removes_nothing(made, capsys):
    compression = made
    before = files_in(compression.workspace)
    assert main(["gc", "--workspace", str(compression.workspace), "--dry-run"]) == DONE
    printed = capsys.readouterr().out
    assert "Nothing was removed: a dry run." in printed
    assert files_in(compression.workspace) == before
    assert main(["gc", "--workspace", str(compression.workspace), "--wait", "0", "--json"]) == DONE
    said = json.loads(capsys.readouterr().out)
    assert {key: said["marked"][key] for key in ("steps", "objects", "nbytes")} == {
        key: said["removed"][key] for key in ("steps", "objects", "nbytes")
    }
    assert said["removed"]["nbytes"] > 1000


@pytest.mark.slow
def test_nothing_goes_for_another_mlflow_than_the_one_that_has_the_versions(made, monkeypatch, tmp_path, capsys):
    compression = made
    other = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    with pytest.raises(InputError, match=r"versions made here are also in [0-9a-f]{16} \(sqlite:.*mlflow\.db\)"):
        gc(compression)
    (registry,) = (compression.workspace / "registries").iterdir()
    place = ["gc", "--workspace", str(compression.workspace), "--wait", "0"]
    assert main([*place, "--dry-run", "--forget-registry", registry.stem]) == BAD_INPUT
    assert registry.exists()  # a dry run forgets nothing
    assert main([*place, "--forget-registry", "nobody"]) == BAD_INPUT
    assert "not one that" in capsys.readouterr().err
    assert main([*place, "--forget-registry", registry.stem]) == BAD_INPUT
    assert "no version that bivlm registered" in capsys.readouterr().err
    assert len(compression.steps("pack")) > 0
    assert main([*place, "--forget-registry", registry.stem, "--although-empty"]) == BAD_INPUT  # it is forgotten
    assert main([*place, "--although-empty"]) == DONE
    assert compression.steps("pack") == []


def test_the_same_mlflow_at_another_address_is_the_same(made, tmp_path):
    compression = made
    moved = tmp_path / "moved.db"
    moved.write_bytes((compression.workspace / "mlflow.db").read_bytes())
    note_registry.fn(str(compression.workspace), f"sqlite:///{moved}")
    assert len(list((compression.workspace / "registries").iterdir())) == 1


def test_nothing_goes_while_mlflow_does_not_answer(made, monkeypatch):
    compression = made
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
        versions_to_keep.fn(str(compression.workspace), 3)


def test_nothing_goes_if_the_record_of_a_version_cannot_be_found(new_compression, tmp_path):
    compression = new_compression(tmp_path)
    result = compression.run(evaluate=False)
    artifacts = compression.workspace / "mlflow-artifacts"
    records = list(artifacts.rglob("lineage.json"))
    assert len(records) == 2  # on the run, and beside the checkpoint
    records[0].unlink()
    assert gc(compression, dry_run=True)["versions"] != []
    records[1].unlink()
    with pytest.raises(InputError, match=f"version {result['mlflow']['registered_model']}/1: lineage.json is neither"):
        gc(compression)
    assert len(compression.steps("pack")) > 0


@pytest.mark.parametrize("needed_at", ["the first", "the second"])
def test_what_a_version_needs_at_either_asking_stays(made, monkeypatch, needed_at):
    """Its only reason to stay is an alias, which it has at one of the two."""
    name, client = "llava-small", made.client

    def change_alias(_seconds):
        if needed_at == "the first":
            client.delete_registered_model_alias(name, "candidate")
        else:
            client.set_registered_model_alias(name, "candidate", "1")

    if needed_at == "the second":
        client.delete_registered_model_alias(name, "candidate")
    monkeypatch.setattr("flows.housekeeping.time", SimpleNamespace(sleep=change_alias))
    monkeypatch.setattr("tasks.garbage._champions", lambda name, tags: set())
    gc(made, keep_versions=0, although_empty=True)
    found = verify(read_lineage(made.output), made.output, find_workspace(str(made.workspace)))
    assert {finding.state for finding in found} == {"holds"}


def test_of_machines_that_share_an_s3_workspace_one_collects_at_a_time(s3_location, monkeypatch):
    from tasks import garbage as retention

    store, turns = Workspace.open(s3_location).store, []
    monkeypatch.setattr(retention, "versions_to_keep", lambda *_: retention.Kept((), frozenset()))
    look = retention.look

    def during(*arguments):
        turns.extend(entry.name for entry in store.entries("turns") if entry.name.endswith(".asked"))
        return look(*arguments)

    monkeypatch.setattr(retention, "look", during)
    gc_flow(workspace=s3_location, dry_run=True)
    assert len(turns) == 1


@pytest.fixture
def registry(mlflow_database, tmp_path) -> MlflowClient:
    """A registered model with versions 1 to 7, and another one that is not ours."""
    database = tmp_path / "registry.db"
    database.write_bytes(mlflow_database.read_bytes())
    client = MlflowClient(f"sqlite:///{database}")
    for name, tags in (("llava-small", {"bivlm.request": "r"}), ("somebody-else's", {})):
        client.create_registered_model(name)
        for _ in range(7):
            client.create_model_version(name, source="file:///nowhere", tags=tags)
    return client


def test_versions_stay_that_have_an_alias_were_champion_or_are_among_the_latest(registry):
    registry.set_registered_model_alias("llava-small", "champion", "2")
    registry.set_registered_model_alias("llava-small", "candidate", "7")
    move = {"kind": "gate", "from": 1, "to": 2, "who": "gate", "why": "w", "when": "2026-11-24", "done": True}
    registry.set_registered_model_tag("llava-small", "bivlm.move.000001-a", json.dumps(move))
    chosen = {int(version.version): reason for version, reason in _chosen(registry, 2)}
    assert chosen == {7: "candidate", 6: "one of the latest 2", 2: "champion", 1: "was champion"}


def test_a_history_of_champions_that_cannot_be_read_is_no_empty_one(registry):
    registry.set_registered_model_tag("llava-small", "bivlm.move.000001-a", "{}")
    with pytest.raises(InputError, match=r"registered model llava-small: tag bivlm\.move\.000001-a"):
        list(_chosen(registry, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_collected_again_and_again_beside_a_compression_that_finds_old_steps(
    new_compression,
    compressed,
    tmp_path,
    s3_server,  # noqa: F811
    s3_files,  # noqa: F811
    kind,
    monkeypatch,
):
    """Nothing keeps the steps but that they are found again: the run ends as one that was left in peace."""
    compression = new_compression(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{compression.workspace / 'mlflow.db'}")
    workspace = "s3://bivlm/work" if kind == "s3" else str(compression.workspace)
    files = s3_files / "work" if kind == "s3" else compression.workspace
    first = compression.run(workspace=workspace)
    compression.client.delete_model_version(first["mlflow"]["registered_model"], "1")
    make_old(files, 100)
    run = Running(compression, workspace, tmp_path / "log")
    rounds, removed = 0, 0
    while run.process.poll() is None:
        said = gc_flow(workspace=workspace, wait_seconds=0.0, keep_days=1, although_empty=True)
        rounds, removed = rounds + 1, removed + said["removed"]["steps"]
    assert run.end() == DONE, run.errors()
    print(f"{rounds} rounds removed {removed} steps")
    assert compression.weights() == compressed.weights()
    found = verify(read_lineage(compression.output), compression.output, find_workspace(workspace))
    assert {finding.state for finding in found} == {"holds"}


@pytest.mark.slow
def test_with_a_tracking_server(new_compression, tmp_path, monkeypatch):
    """Lineage records come through the server, and it is known by what it is rather than by its address."""
    compression = new_compression(tmp_path)
    (tmp_path / "mlflow").mkdir()
    server = mlflow_server(tmp_path / "mlflow", tmp_path / "mlflow.log").start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        compression.run(evaluate=False)
        make_old(compression.workspace, 100)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address.replace("127.0.0.1", "localhost"))
        said = gc(compression)
        assert [(each["version"], each["reason"]) for each in said["versions"]] == [(1, "candidate")]
        found = verify(read_lineage(compression.output), compression.output, find_workspace(str(compression.workspace)))
        assert {finding.state for finding in found} == {"holds"}
    finally:
        server.kill()
