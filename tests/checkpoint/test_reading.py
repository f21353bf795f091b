"""A checkpoint folder is opened as it is or refused with the name of what is wrong."""

import hashlib
import shutil
import socket

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from changed_files import change_json
from safetensors.torch import load_file, save_file
from tiny_llava import make_tiny_llava

from bivlm.checkpoint.reading import Checkpoint
from bivlm.errors import InputError
from bivlm.sources.models import resolve_model


@pytest.fixture
def folder(tiny_llava, tmp_path):
    return shutil.copytree(tiny_llava, tmp_path / "llava")


@pytest.fixture(scope="module")
def sharded_once(tmp_path_factory):
    return make_tiny_llava(tmp_path_factory.mktemp("sharded") / "llava", max_shard_size="100KB")


@pytest.fixture
def sharded(sharded_once, tmp_path):
    return shutil.copytree(sharded_once, tmp_path / "sharded")


def test_every_tensor_reads_as_the_library_reads_it(tiny_llava):
    checkpoint = Checkpoint.open(tiny_llava)
    expected = load_file(tiny_llava / "model.safetensors")
    assert list(checkpoint.entries) == sorted(expected)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in expected.items())


def test_shards_hold_the_tensors_of_the_single_file(tiny_llava, sharded):
    single, parts = Checkpoint.open(tiny_llava), Checkpoint.open(sharded)
    assert len(parts.weight_files) > 2
    assert list(parts.entries) == list(single.entries)
    assert all(torch.equal(parts.read(name), single.read(name)) for name in single.entries)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("file", ["../llava/model.safetensors", "/etc/hosts", "C:\\model.safetensors", "a\\b", "", 3])
def test_an_index_that_points_out_of_its_folder_is_refused(sharded, file):
    index = sharded / "model.safetensors.index.json"
    change_json(index, lambda value: value["weight_map"].update({"extra": file}))
    with pytest.raises(InputError, match="not a file of this folder"):
        Checkpoint.open(sharded)


def test_a_tensor_that_the_index_promises_in_vain_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    file = sorted(sharded.glob("*.safetensors"))[0].name
    change_json(index, lambda value: value["weight_map"].update({"extra": file}))
    with pytest.raises(InputError, match=f"tensor extra is in {file}; it is not there"):
        Checkpoint.open(sharded)


def test_a_tensor_in_two_shards_is_named(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    with pytest.raises(InputError, match="is both in"):
        Checkpoint.open(sharded)


def test_an_index_without_a_weight_map_is_refused(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="weight_map"):
        Checkpoint.open(sharded)


def test_pickled_weights_are_refused_as_such(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pickles \(pytorch_model\.bin\)"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(InputError, match=file):
        Checkpoint.open(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_config_that_is_no_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_an_unknown_tensor_is_named(tiny_llava):
    with pytest.raises(InputError, match="no tensor lm_head"):
        Checkpoint.open(tiny_llava).read("lm_head")


def test_the_digest_does_not_depend_on_where_the_folder_lies(tiny_llava, folder):
    assert Checkpoint.open(folder).digest() == Checkpoint.open(tiny_llava).digest()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_the_digest_follows_the_content(tiny_llava, folder, file):
    raw = (folder / file).read_bytes()
    changed = raw[:-1] + bytes([raw[-1] ^ 1]) if file.endswith("safetensors") else raw + b"\n"
    (folder / file).write_bytes(changed)
    assert Checkpoint.open(folder).digest() != Checkpoint.open(tiny_llava).digest()


@pytest.mark.parametrize("file", ["README.md", "compression_report.json", "LICENSE.txt"])
def test_the_digest_leaves_out_what_the_model_does_not_read(tiny_llava, folder, file):
    (folder / file).write_text("text")
    assert Checkpoint.open(folder).digest() == Checkpoint.open(tiny_llava).digest()


def test_a_folder_resolves_to_itself(tiny_llava):
    resolved = resolve_model(str(tiny_llava))
    assert (resolved.folder, resolved.id, resolved.revision) == (tiny_llava, str(tiny_llava), None)


def test_a_folder_has_no_revision(tiny_llava):
    with pytest.raises(InputError, match="has no revision 'main'"):
        resolve_model(str(tiny_llava), "main")


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_model_resolves_to_its_commit(tiny_llava, offline_hub):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = offline_hub / "models--maker--llava"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    # As in the hub's cache: files are links to a folder beside the snapshots.
    shutil.copytree(tiny_llava, repository / "blobs")
    (repository / "snapshots" / commit).mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (repository / "snapshots" / commit / blob.name).symlink_to(blob)
    resolved = resolve_model("maker/llava", "main")
    assert (resolved.id, resolved.revision) == ("maker/llava", commit)
    assert Checkpoint.open(resolved.folder).digest() == Checkpoint.open(tiny_llava).digest()


@pytest.mark.parametrize("model", ["maker/none", "no/such/folder/at/all", "maker/none?", "mistyped"])
def test_a_model_that_is_nowhere_is_refused(offline_hub, model):
    with pytest.raises(InputError, match="no such folder"):
        resolve_model(model)


def test_a_hub_that_cannot_be_reached_is_no_bad_input(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ConnectionError, match=r"maker/llava.*and the hub at http:.* cannot be reached"):
        resolve_model("maker/llava")


def test_digests_are_those_of_files_and_of_tensors_with_dtype_and_shape(sharded):
    checkpoint = Checkpoint.open(sharded)
    digests = checkpoint.digests()
    for name, sha256 in digests.files.items():
        assert sha256 == hashlib.sha256((sharded / name).read_bytes()).hexdigest()
    assert set(digests.tensors) == set(checkpoint.entries)
    for file in checkpoint.weight_files:
        for name, tensor in load_file(file).items():
            shape = "x".join(str(size) for size in tensor.shape)
            content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert tensor.dtype == torch.bfloat16
            assert digests.tensors[name] == hashlib.sha256(f"BF16 {shape}\n".encode() + content).hexdigest()


def test_a_tensor_that_changed_since_it_was_hashed_is_refused(tiny_llava, folder):
    sha256 = Checkpoint.open(folder).digests().tensors
    name, entry = next((n, e) for n, e in Checkpoint.open(folder).entries.items() if len(e.shape) == 2)
    assert torch.equal(Checkpoint.open(folder).read(name, sha256[name]), Checkpoint.open(folder).read(name))
    content = bytearray(entry.file.read_bytes())
    content[entry.begin] ^= 1
    entry.file.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} in .*: other bytes than when the checkpoint was opened"):
        Checkpoint.open(folder).read(name, sha256[name])
