"""Models from the hub, with the real client against a hub on this machine."""

import fcntl
import hashlib
import json
import os
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import textwrap
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest
from hub_server import environment
from hub_state import Account, is_large, sha256_of
from huggingface_hub import _tree_cache, constants
from safetensors.torch import load_file
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.sources import hub_download as downloading_module
from bivlm.sources.hub_download import LargeFile, download_large
from bivlm.sources.models import resolve_model
from flows.cli.quiet import hide_loading_bars
from tasks.runtime.policy import is_passing

CONFIG = {"model_type": "llava"}
BIG = os.urandom(25_000_000)  # the client writes ten megabytes at a time


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(downloading_module, "_PAUSE_SECONDS", 0.01)


@pytest.fixture(scope="session")
def sharded_llava(tmp_path_factory):
    """In several shards, with what else lies in a real repository."""
    folder = make_tiny_llava(tmp_path_factory.mktemp("sharded") / "llava", max_shard_size="200KB")
    (folder / "README.md").write_text("---\nlicense: llama3.2\n---\n# A model\n")
    (folder / "LICENSE.txt").write_text("the licence")
    (folder / "USE_POLICY.md").write_text("the policy")
    (folder / "preview.png").write_bytes(b"image")
    (folder / "train.py").write_text("raise SystemExit\n")
    (folder / "model.fp32-00001-of-00002.safetensors").write_bytes(b"another variant")
    for name in ("original/consolidated.00.pth", "original/params.json", "onnx/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"other weights")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


def test_a_model_comes_with_what_it_needs_and_nothing_else(hub, sharded_llava):
    commit = hub.add("maker/llava", sharded_llava).head.oid
    resolved = resolve_model("maker/llava")
    assert (resolved.id, resolved.revision) == ("maker/llava", commit)
    found = {path.relative_to(resolved.folder).as_posix() for path in resolved.folder.rglob("*") if path.is_file()}
    shards = {path.name for path in sharded_llava.glob("model-*.safetensors")}
    assert len(shards) >= 2
    assert found == shards | {
        "config.json", "generation_config.json", "model.safetensors.index.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja",
        "README.md", "LICENSE.txt", "USE_POLICY.md",
    }  # fmt: skip
    assert Checkpoint.open(resolved.folder).digest() == Checkpoint.open(sharded_llava).digest()


@pytest.mark.parametrize("revision", [None, "main", "v1", "commit"])
def test_whatever_revision_was_asked_for_the_commit_is_told(hub, tiny_llava, revision):
    repository = hub.add("maker/llava", tiny_llava)
    first = repository.head.oid
    repository.refs["v1"] = first
    later = {**repository.head.files, "config.json": b"{}"} if revision in ("v1", "commit") else repository.head.files
    repository.commit(later, "later")
    asked = first if revision == "commit" else revision
    expected = first if revision in ("v1", "commit") else repository.head.oid
    resolved = resolve_model("maker/llava", asked)
    assert resolved.revision == expected == resolved.folder.name


def test_a_moved_branch_is_followed_and_a_commit_is_not_asked_for_again(hub, tiny_llava):
    repository = hub.add("maker/llava", tiny_llava)
    first = resolve_model("maker/llava")
    large = len(hub.asked("GET", "/large/"))
    repository.commit({**repository.head.files, "generation_config.json": b"{}"}, "later")
    second = resolve_model("maker/llava")
    assert first.revision != second.revision == repository.head.oid
    assert len(hub.asked("GET", "/large/")) == large, "the weights did not change and were downloaded twice"
    hub.requests.clear()
    assert resolve_model("maker/llava", first.revision) == first
    assert hub.requests == []


def test_without_a_hub_what_is_in_the_cache_is_used(hub, tiny_llava, monkeypatch):
    hub.add("maker/llava", tiny_llava)
    online = resolve_model("maker/llava")
    hub.fail("/", *[503] * 100)
    assert resolve_model("maker/llava") == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("maker/llava") == online
    with pytest.raises(InputError, match=r"maker/other is not in the hub's cache.*HF_HUB_OFFLINE"):
        resolve_model("maker/other")


def test_a_snapshot_with_a_shard_missing_is_completed(hub, sharded_llava, monkeypatch):
    hub.add("maker/llava", sharded_llava)
    folder = resolve_model("maker/llava").folder
    for listing in (folder.parent.parent / "trees").iterdir():
        listing.unlink()  # as a client wrote it that kept none
    monkeypatch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
    shard = next(folder.glob("model-*.safetensors"))
    shard.resolve().unlink()
    shard.unlink()
    assert Checkpoint.open(resolve_model("maker/llava").folder).digest() == Checkpoint.open(sharded_llava).digest()


def test_a_listing_of_many_pages_is_read_to_its_end(hub, sharded_llava):
    hub.page = 3
    hub.add("maker/llava", sharded_llava)
    assert Checkpoint.open(resolve_model("maker/llava").folder).digest() == Checkpoint.open(sharded_llava).digest()


def test_files_in_xet_storage_come_by_plain_http(hub, sharded_llava):
    hub.xet = True
    hub.add("maker/llava", sharded_llava)
    assert Checkpoint.open(resolve_model("maker/llava").folder).digest() == Checkpoint.open(sharded_llava).digest()
    assert not hub.asked("GET", "xet-read-token")


def test_the_token_goes_to_the_hub_and_not_to_where_large_files_are(hub, tiny_llava, monkeypatch):
    hub.accounts["hf_good"] = Account("somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.add("maker/llava", tiny_llava, private=True)
    resolve_model("maker/llava")
    assert hub.asked("GET", "/large/")
    assert all("authorization" not in each.headers for each in hub.asked("GET", "/large/"))
    assert all(each.headers["authorization"] == "Bearer hf_good" for each in hub.asked("GET", "/resolve/"))


def big_model(hub, **more):
    return hub.add("maker/big", {"config.json": json.dumps(CONFIG), "model.safetensors": BIG, **more})


def the_weights(resolved):
    return hashlib.sha256((resolved.folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_ends_in_the_middle_is_taken_up_where_it_was(hub, how, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    big_model(hub)
    hub.fail("/large/", (how, 15_000_000))
    assert the_weights(resolve_model("maker/big")) == hashlib.sha256(BIG).hexdigest()
    first, second = hub.asked("GET", "/large/")
    assert "range" not in first.headers
    # What a reset connection had brought and nobody had read yet is lost, which may be all of it.
    assert how == "reset" or second.headers["range"] == "bytes=10485760-"


def test_a_hub_in_trouble_is_asked_again(hub, monkeypatch):
    big_model(hub)
    hub.fail("/resolve/", 503)
    hub.fail("/large/", 503, 500)
    assert the_weights(resolve_model("maker/big")) == hashlib.sha256(BIG).hexdigest()


def test_a_signed_address_that_has_expired_is_asked_for_anew(hub):
    big_model(hub)
    hub.fail("/large/", 403)
    assert the_weights(resolve_model("maker/big")) == hashlib.sha256(BIG).hexdigest()


def test_what_came_before_the_hub_went_away_is_kept_and_the_trouble_may_pass(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    big_model(hub)
    hub.fail("/large/", ("cut", 12_000_000), 503, 503, 503)
    with pytest.raises(ConnectionError, match=r"maker/big.*in trouble \(HTTP 503\)") as raised:
        resolve_model("maker/big")
    assert is_passing(raised.value)
    assert the_weights(resolve_model("maker/big")) == hashlib.sha256(BIG).hexdigest()
    assert hub.asked("GET", "/large/")[-1].headers["range"] == "bytes=10485760-"


def test_bytes_that_are_not_those_of_the_hub_are_thrown_away(hub):
    repository = big_model(hub)
    sha256 = hashlib.sha256(BIG).hexdigest()
    hub.large[sha256] = bytes(len(BIG))
    with pytest.raises(ConnectionError, match=r"model.safetensors came with other bytes"):
        resolve_model("maker/big")
    hub.large[sha256] = BIG
    assert the_weights(resolve_model("maker/big")) == sha256
    assert repository.head.oid


def test_two_at_once_download_once(hub):
    big_model(hub)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(resolve_model, ["maker/big"] * 2)
    assert first == second
    assert the_weights(first) == hashlib.sha256(BIG).hexdigest()
    assert [each.sent for each in hub.asked("GET", "/large/")] == [len(BIG)]


def test_what_is_too_large_for_plain_requests_is_left_to_the_client(hub, monkeypatch):
    monkeypatch.setattr(downloading_module, "_HTTP_LIMIT", 20_000_000)
    big_model(hub)
    assert the_weights(resolve_model("maker/big")) == hashlib.sha256(BIG).hexdigest()


def test_ctrl_c_ends_all_downloads_and_keeps_what_came(hub, monkeypatch):
    hub.add("maker/big", {"config.json": json.dumps(CONFIG), "model.safetensors": BIG, "tokenizer.json": BIG[::-1]})
    hub.fail("/large/", ("slow", 0), ("slow", 0))

    def interrupted(_job):
        wait = time.monotonic() + 60
        while len(hub.asked("GET", "/large/")) < 2 and time.monotonic() < wait:
            time.sleep(0.01)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_large("maker/big", hub.repositories["maker/big"].head.oid, large_files(hub))
    assert all(each.sent < len(BIG) for each in hub.asked("GET", "/large/"))
    resolve_model("maker/big")


def large_files(hub):
    files = hub.repositories["maker/big"].head.files
    return [LargeFile(name, len(data), sha256_of(data)) for name, data in files.items() if is_large(name)]


def test_a_disk_that_is_too_small_is_told_before_the_download(hub, monkeypatch):
    big_model(hub)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**7))
    with pytest.raises(InputError, match=r"maker/big.*0\.0 GB are to be downloaded to .*HF_HUB_CACHE"):
        resolve_model("maker/big")
    assert not hub.asked("GET", "/large/")


RESOLVE = "from bivlm.sources.models import resolve_model; resolve_model('maker/big')"


def wait_until(met, process):
    deadline = time.monotonic() + 120
    while not met():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_download_that_was_killed_goes_on_where_it_was(hub, tmp_path):
    commit = big_model(hub).head.oid
    blobs = tmp_path / "hf" / "hub" / "models--maker--big" / "blobs"
    hub.fail("/large/", ("stall", 15_000_000))
    partial = blobs / f"{hashlib.sha256(BIG).hexdigest()}.incomplete"
    env = {**os.environ, **environment(hub, tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", RESOLVE], env=env, stderr=subprocess.PIPE)
    wait_until(lambda: partial.exists() and partial.stat().st_size >= 10_000_000, process)
    process.kill()
    process.communicate()
    held = partial.stat().st_size
    assert 10_000_000 <= held < len(BIG)
    assert resolve_model("maker/big").revision == commit
    last = hub.asked("GET", "/large/")[-1]
    assert (last.headers["range"], last.sent) == (f"bytes={held}-", len(BIG) - held)
    assert not partial.exists()
    assert hashlib.sha256((blobs / partial.stem).read_bytes()).hexdigest() == partial.stem


def read_to_the_end(terminal):
    """All that is written to a terminal; a slow download draws its bar often, and a read gives a part of it."""
    shown = b""
    with suppress(OSError):  # nobody has it open any more
        while part := os.read(terminal, 65536):
            shown += part
    return shown


def test_a_bar_in_the_terminal_shows_the_download(hub, monkeypatch):
    big_model(hub)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    hide_loading_bars()  # which must leave this one
    with ThreadPoolExecutor(1) as reader, os.fdopen(theirs, "w") as terminal:
        shown = reader.submit(read_to_the_end, ours)
        monkeypatch.setattr(sys, "stderr", terminal)
        resolve_model("maker/big")
        monkeypatch.undo()
    os.close(ours)
    shown = shown.result()
    assert b"maker/big" in shown and b"25.0M/25.0M" in shown


def test_without_a_terminal_there_is_no_bar(hub, capfd):
    big_model(hub)
    resolve_model("maker/big")
    assert capfd.readouterr().err == ""


REFUSED = {
    "not there, nobody asks": ({}, None, "maker/none", None, "it is not there, or it is private: `hf auth login`"),
    "not there": ({}, "hf_good", "maker/none", None, "not there, or the token that was sent may not see it"),
    "private": ({"private": True}, None, "maker/llava", None, "or it is private"),
    "no such revision": ({}, None, "maker/llava", "v9", "the hub has it, but no revision 'v9'"),
    "gated, nobody asks": ({"gated": True}, None, "maker/llava", None, "gated.*no token was sent.*Accept it at"),
    "gated, not accepted": ({"gated": True}, "hf_good", "maker/llava", None, "gated.*is of an account that has not"),
    "an unknown token": ({"gated": True}, "hf_bad", "maker/llava", None, "does not accept the token.*hf auth login"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_what_to_do(hub, case, monkeypatch):
    settings, token, model, revision, said = REFUSED[case]
    hub.add("maker/llava", {"config.json": json.dumps(CONFIG), "model.safetensors": b"weights"}, **settings)
    hub.accounts["hf_good"] = Account("somebody")
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(InputError, match=said):
        resolve_model(model, revision)
    assert not hub.asked("GET", "/large/")


def test_an_endpoint_that_is_no_address_is_bad_input(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "mirror.example")
    with pytest.raises(InputError, match=r"HF_ENDPOINT: found 'mirror.example', expected an address"):
        resolve_model("maker/llava")


def test_a_gated_model_comes_to_those_who_accepted(hub, tiny_llava, monkeypatch):
    hub.add("maker/llava", tiny_llava, gated=True)
    hub.accounts["hf_good"] = Account("somebody", accepted={"maker/llava"})
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert Checkpoint.open(resolve_model("maker/llava").folder).digest() == Checkpoint.open(tiny_llava).digest()


USELESS = {
    "no config": ({"model.safetensors": b"w"}, "has no config.json"),
    "no weights": ({"config.json": json.dumps(CONFIG), "model.gguf": b"w"}, "neither model.safetensors nor"),
    "an index of what is not there": (
        {"config.json": json.dumps(CONFIG), "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'},
        "names b.safetensors, which the repository does not have",
    ),
    "an architecture of nobody": (
        {"config.json": '{"model_type": "novel"}', "model.safetensors": b"w"},
        "has no image-text model of model_type 'novel'",
    ),
    "weights of another library": ({"config.json": json.dumps(CONFIG), "weights.pth": b"w"}, "transformers reads no"),
}


@pytest.mark.parametrize("case", USELESS)
def test_a_repository_without_a_usable_model_is_refused_before_anything_large(hub, case):
    files, said = USELESS[case]
    hub.add("maker/llava", files)
    with pytest.raises(InputError, match=said):
        resolve_model("maker/llava")
    assert not hub.asked("GET", "/large/")


def test_pickled_weights_are_refused_with_a_command_that_converts_them(hub, tiny_llava, tmp_path, monkeypatch):
    import torch

    pickled = shutil.copytree(tiny_llava, tmp_path / "pickled")
    weights = load_file(pickled / "model.safetensors")
    torch.save(weights, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    commit = hub.add("maker/old", pickled).head.oid
    with pytest.raises(InputError, match=r"its weights are pickles \(pytorch_model.bin\)") as refused:
        resolve_model("maker/old")
    assert not hub.asked("GET", "/large/")
    command = shlex.split(str(refused.value).splitlines()[-1])
    assert command[:2] == ["python", "-c"] and command[-3:] == ["maker/old", "CONVERTED", commit]
    monkeypatch.setattr(sys, "argv", command[1:2] + command[3:])
    monkeypatch.chdir(tmp_path)
    exec(command[2], {})
    converted = Checkpoint.open(tmp_path / "CONVERTED")
    original = Checkpoint.open(tiny_llava)
    assert converted.digests().tensors == original.digests().tensors
    with pytest.raises(InputError, match="pickles"):
        Checkpoint.open(pickled)


def test_the_client_itself_would_begin_anew(hub, tmp_path):
    """Why `downloading` is there; when this fails the client resumes again, and it can go."""
    big_model(hub)
    hub.fail("/large/", ("stall", 15_000_000))
    script = textwrap.dedent("""
        from huggingface_hub import hf_hub_download
        hf_hub_download("maker/big", "model.safetensors")
    """)
    blobs = tmp_path / "hf" / "hub" / "models--maker--big" / "blobs"
    env = {**os.environ, **environment(hub, tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stderr=subprocess.DEVNULL)
    wait_until(lambda: any(path.stat().st_size >= 10_000_000 for path in blobs.glob("*.incomplete")), process)
    process.kill()
    process.wait()
    subprocess.run([sys.executable, "-c", script], env=env, check=True, capture_output=True)
    assert "range" not in hub.asked("GET", "/large/")[-1].headers
