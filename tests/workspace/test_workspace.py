import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import boto3
import pytest

from bivlm.errors import InputError
from bivlm.workspace.hashing import digest
from bivlm.workspace.steps import Reference, StepRecord, Workspace, WorkspaceError, parse_record
from bivlm.workspace.stores.folder import write_atomically

IDENTITY = {"stage": "pack", "version": 1, "inputs": {}, "recipe": None}
KEY = digest(IDENTITY)


@pytest.fixture
def damage(location):
    """Replace or remove the stored bytes of an object behind the workspace's back."""

    def change(reference, data):
        name = f"objects/{reference.sha256[:2]}/{reference.sha256}"
        if location.startswith("s3://"):
            client, key = boto3.client("s3"), f"{location.removeprefix('s3://bivlm-tests/')}/{name}"
            if data is None:
                client.delete_object(Bucket="bivlm-tests", Key=key)
            else:
                client.put_object(Bucket="bivlm-tests", Key=key, Body=data)
        elif data is None:
            (Path(location) / name).unlink()
        else:
            (Path(location) / name).write_bytes(data)

    return change


def test_what_is_put_comes_back(workspace, tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    reference = workspace.put_file(tmp_path / "weights")
    assert reference == workspace.put_bytes(b"weights")
    assert workspace.fetch(reference).read_bytes() == b"weights"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go on as a worker on another machine, with no local copies."""
    return lambda: monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))


def test_any_worker_finds_a_finished_step(workspace, location, elsewhere):
    record = StepRecord(
        identity=IDENTITY,
        outputs={"plan": workspace.put_bytes(b"{}")},
        figures={"error": 0.25, "groups": [1, 2]},
        seconds=2,
    )
    workspace.finish_step(record)
    elsewhere()
    assert Workspace.open(location).step(KEY) == record


def test_a_step_nobody_ran_is_not_done(workspace):
    assert workspace.step(KEY) is None


@pytest.mark.parametrize("data", [None, b"", b"other b"], ids=["missing", "cut off", "other bytes of the same length"])
def test_a_step_whose_output_is_missing_or_differs_is_not_done(
    workspace, location, damage, data, tmp_path, monkeypatch
):
    reference = workspace.put_bytes(b"weights")
    workspace.finish_step(StepRecord(identity=IDENTITY, outputs={"shard": reference}, seconds=1))
    damage(reference, data)
    monkeypatch.setenv("BIVLM_CACHE", str(tmp_path / "another machine"))
    assert Workspace.open(location).step(KEY) is None
    with pytest.raises(WorkspaceError, match=reference.sha256):
        Workspace.open(location).fetch(reference)


def test_running_the_step_again_mends_it(workspace, damage):
    reference = workspace.put_bytes(b"weights")
    damage(reference, b"other b")
    workspace.put_bytes(b"weights")
    assert workspace.read(reference) == b"weights"


OF_ANOTHER_STEP = StepRecord(identity=IDENTITY | {"version": 2}, seconds=1).model_dump_json().encode()


@pytest.mark.parametrize(
    "content",
    [b'{"identity": {"st', b"", b"null", b'{"identity": {}, "seconds": 1}', OF_ANOTHER_STEP],
    ids=["cut off", "empty", "no record", "no stage", "another step's"],
)
def test_a_record_that_is_not_that_of_its_step_is_no_record(workspace, location, content):
    workspace.finish_step(StepRecord(identity=IDENTITY, seconds=1))
    assert workspace.step(KEY) is not None
    if location.startswith("s3://"):
        key = f"{location.removeprefix('s3://bivlm-tests/')}/steps/{KEY}.json"
        boto3.client("s3").put_object(Bucket="bivlm-tests", Key=key, Body=content)
    else:
        (Path(location) / "steps" / f"{KEY}.json").write_bytes(content)
    assert workspace.step(KEY) is None


def test_a_record_with_a_flipped_bit_is_the_same_record_or_none(tmp_path):
    workspace = Workspace.open(tmp_path)
    record = StepRecord(
        identity=IDENTITY,
        outputs={"plan": workspace.put_bytes(b"{}")},
        figures={"error": 0.25, "name": "ä", "histogram": [1, 2]},
        seconds=0.5,
        environment={"torch": "2.13.0"},
    )
    workspace.finish_step(record)
    path = tmp_path / "steps" / f"{KEY}.json"
    content = path.read_bytes()
    for position in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        assert parse_record(bytes(damaged), KEY) in (None, record), position
    path.write_bytes(damaged)
    assert workspace.step(KEY) is None
    path.write_bytes(content)
    assert workspace.step(KEY) == record


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "[" * 5000, '{"a":' * 5000, "9" * 5000, "NaN", '{"checksum": []}', "{}", "\xff"]
)
def test_an_odd_record_or_state_is_none(tmp_path, content):
    workspace = Workspace.open(tmp_path)
    workspace.finish_step(StepRecord(identity=IDENTITY, seconds=0.5))
    workspace.put_state("watched", {"a": 1})
    (tmp_path / "steps" / f"{KEY}.json").write_text(content, encoding="latin-1")
    (tmp_path / "state" / "watched.json").write_text(content, encoding="latin-1")
    assert (workspace.step(KEY), workspace.record(KEY), workspace.state("watched")) == (None, None, None)


def test_a_step_cannot_be_finished_before_its_outputs_are_stored(workspace):
    missing = Reference(sha256="0" * 64, nbytes=3)
    with pytest.raises(WorkspaceError, match="'shard' of pack is not stored"):
        workspace.finish_step(StepRecord(identity=IDENTITY, outputs={"shard": missing}, seconds=1))


def test_a_folder_comes_back_file_by_file(workspace, tmp_path):
    (tmp_path / "samples" / "images").mkdir(parents=True)
    (tmp_path / "samples" / "images" / "0.png").write_bytes(b"png")
    (tmp_path / "samples" / "conversations.jsonl").write_bytes(b"{}\n")
    outputs = workspace.put_folder(tmp_path / "samples")
    assert list(outputs) == ["conversations.jsonl", "images/0.png"]
    copy = workspace.fetch_folder(outputs, tmp_path / "copy")
    assert (copy / "images" / "0.png").read_bytes() == b"png"


def test_an_output_never_leaves_its_folder(workspace, tmp_path):
    with pytest.raises(InputError, match="leaves the folder"):
        workspace.fetch_folder({"../outside": workspace.put_bytes(b"x")}, tmp_path / "copy")


def test_a_damaged_local_copy_of_a_sound_object_is_fetched_again(s3_location):
    workspace = Workspace.open(s3_location)
    reference = workspace.put_bytes(b"weights")
    workspace.fetch(reference).write_bytes(b"other b")
    assert workspace.fetch(reference).read_bytes() == b"weights"


def test_a_file_that_goes_before_it_is_read_is_put_again(workspace, monkeypatch):
    """As a collection on this machine or, for a folder, on any takes it away."""
    reference = workspace.put_bytes(b"weights")
    workspace.fetch(reference)
    path = workspace.store.path

    def goes(name, anew=False):
        monkeypatch.undo()
        found = path(name, anew)
        workspace.store.delete(name)
        return found

    monkeypatch.setattr(workspace.store, "path", goes)
    assert workspace.put_bytes(b"weights") == reference
    assert workspace.read(reference) == b"weights"


def test_an_object_that_goes_before_it_is_downloaded_is_missing(s3_location, tmp_path, monkeypatch):
    workspace = Workspace.open(s3_location)
    reference = workspace.put_bytes(b"weights")
    name = f"objects/{reference.sha256[:2]}/{reference.sha256}"
    size = workspace.store.size

    def goes(name):
        found = size(name)
        workspace.store.delete(name)
        return found

    monkeypatch.setattr(workspace.store, "size", goes)
    assert workspace.store.path(name) is None
    assert not any(path.is_file() for path in workspace.local.rglob("*"))  # nor a part of it


def test_a_file_that_others_may_be_about_to_open_stays_where_it_is(s3_location):
    """Put again by one process, or fetched anew because it is damaged, while another one has its path."""
    workspace = Workspace.open(s3_location)
    reference = workspace.put_bytes(b"weights")
    path = workspace.fetch(reference)
    inode = path.stat().st_ino
    workspace.store.put_bytes(f"objects/{reference.sha256[:2]}/{reference.sha256}", b"weights")
    assert path.stat().st_ino == inode
    path.write_bytes(b"other b")
    with path.open("rb") as opened:
        assert workspace.fetch(reference) == path
        assert opened.read() == b"other b"
    assert path.read_bytes() == b"weights"


def make_old(folder, hours):
    then = time.time() - hours * 3600
    os.utime(folder, (then, then))


def test_the_folder_of_a_step_that_works_for_days_stays(tmp_path):
    workspace = Workspace.open(tmp_path)
    with workspace.scratch() as mine:
        make_old(mine, 50)
        make_old(mine.parent, 50)
        with Workspace.open(tmp_path).scratch() as other:
            assert mine.is_dir() and other != mine
            assert list(mine.iterdir()) == list(other.iterdir()) == []
    assert list((tmp_path / "scratch").iterdir()) == []


def run_until_killed(script: str, folder: Path) -> None:
    """Run Python that has `folder` and `kill()`, in a fresh interpreter: a fork would inherit locks of threads."""
    begin = "import os, pathlib, signal, sys; folder = pathlib.Path(sys.argv[1])\n"
    begin += "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
    command = [sys.executable, "-c", begin + textwrap.dedent(script), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_folder_of_a_killed_step_goes_after_a_day(tmp_path):
    half_a_step = """
        from bivlm.workspace.scratch import scratch_folder
        with scratch_folder(folder / "scratch") as place:
            (place / "half").write_bytes(b"half")
            kill()
    """
    run_until_killed(half_a_step, tmp_path)
    (left,) = (tmp_path / "scratch").iterdir()
    assert (left / "work" / "half").is_file()
    for hours in (23, 25):
        make_old(left, hours)
        with Workspace.open(tmp_path).scratch():
            assert left.exists() == (hours < 24)


def test_what_others_put_among_the_folders_of_steps_stays(tmp_path):
    scratch = tmp_path / "scratch"
    (scratch / "mine").mkdir(parents=True)
    (scratch / "mine" / "file").write_text("mine")
    (scratch / "notes.md").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lock").touch()
    (scratch / "link").symlink_to(tmp_path / "elsewhere")
    for path in scratch.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    with Workspace.open(tmp_path).scratch():
        pass
    assert sorted(path.name for path in scratch.rglob("*")) == ["file", "link", "mine", "notes.md"]
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["lock"]


@pytest.mark.parametrize("location", ["s3://", "s3:///prefix", "s3://Not_A_Bucket"])
def test_what_is_not_an_s3_location_is_refused(location):
    with pytest.raises(InputError, match="expected s3://bucket"):
        Workspace.open(location)


def test_a_bucket_that_does_not_exist_is_refused(s3_location):
    with pytest.raises(InputError, match="no-such-bucket"):
        Workspace.open("s3://no-such-bucket/prefix")


def test_a_file_is_not_a_workspace(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        Workspace.open(tmp_path / "file")


def test_a_writer_killed_in_the_middle_leaves_no_object(tmp_path):
    half_a_file = """
        from bivlm.workspace.stores.folder import write_atomically
        write_atomically(folder / "objects" / "whole", lambda file: (file.write(b"half"), file.flush(), kill()))
    """
    run_until_killed(half_a_file, tmp_path)
    (left,) = (tmp_path / "objects").iterdir()
    assert left.name.startswith(".partial-") and left.read_bytes() == b"half"


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "objects" / "whole", fail)
    assert list((tmp_path / "objects").iterdir()) == []


def test_the_peak_of_memory_counts_from_its_reset():
    """In a fresh process: other tests' threads and caches move this one's memory."""
    code = """
from bivlm.workspace.environment import peak_bytes, reset_peak
block = bytearray(256 << 20)
block[::4096] = b"x" * len(block[::4096])
high = peak_bytes()
del block
print(not reset_peak() or peak_bytes() < high - (128 << 20))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_what_is_stored_can_be_read_by_whoever_may_read_new_files(tmp_path):
    write_atomically(tmp_path / "object", lambda file: file.write(b"weights"))
    (tmp_path / "new").touch()
    assert (tmp_path / "object").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a pipe", "a folder"])
def test_a_record_that_is_no_file_is_refused_by_name_and_not_waited_for(tmp_path, make):
    workspace = Workspace.open(tmp_path)
    (tmp_path / "steps").mkdir()
    make(tmp_path / "steps" / f"{KEY}.json")
    with pytest.raises(InputError, match=rf"{KEY}.json: expected a file"):
        workspace.step(KEY)
