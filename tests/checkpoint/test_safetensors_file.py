"""Safetensors files are read and written as the safetensors library does it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bivlm.checkpoint.safetensors_file import (
    OutgoingTensor,
    file_order,
    read_entries,
    read_tensor,
    tensor_chunks,
    write_tensors,
)
from bivlm.errors import InputError

TENSORS = {
    "b.weight": torch.arange(15, dtype=torch.bfloat16).reshape(3, 5),
    "a.weight": torch.arange(7, dtype=torch.uint8),
    "é": torch.linspace(0, 1, 4),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
}
NAMES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float32: "F32", torch.int64: "I64"}


def outgoing(name, tensor):
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return OutgoingTensor(name, NAMES[tensor.dtype], tuple(tensor.shape), len(data), lambda: [data])


@pytest.fixture
def saved(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors", metadata={"format": "pt"})
    return tmp_path / "t.safetensors"


def rewritten(file, change):
    """The file with its header changed by `change`, which gets the header as a dict."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_the_written_file_has_the_bytes_that_the_library_writes(saved, tmp_path):
    write_tensors(tmp_path / "ours", file_order(outgoing(*item) for item in TENSORS.items()))
    assert (tmp_path / "ours").read_bytes() == saved.read_bytes()


def test_every_tensor_begins_at_a_multiple_of_its_item_size(tmp_path):
    write_tensors(tmp_path / "ours", file_order(outgoing(*item) for item in TENSORS.items()))
    assert all(entry.begin % TENSORS[entry.name].itemsize == 0 for entry in read_entries(tmp_path / "ours"))


def test_tensors_read_are_those_that_the_library_saved(saved):
    entries = {entry.name: entry for entry in read_entries(saved)}
    for name, tensor in load_file(saved).items():
        assert torch.equal(read_tensor(entries[name]), tensor)
        assert read_tensor(entries[name]).dtype == tensor.dtype


def test_chunks_put_together_are_the_tensor(saved, monkeypatch):
    monkeypatch.setattr("bivlm.checkpoint.safetensors_file.CHUNK_BYTES", 7)
    entry = next(entry for entry in read_entries(saved) if entry.name == "b.weight")
    joined = b"".join(bytes(chunk) for chunk in tensor_chunks(entry))
    assert joined == TENSORS["b.weight"].view(torch.uint8).numpy().tobytes()


def test_a_tensor_that_yields_other_than_it_announced_is_refused(tmp_path):
    wrong = OutgoingTensor("w", "U8", (4,), 4, lambda: [b"abc"])
    with pytest.raises(InputError, match="w: 3 bytes came, 4 were announced"):
        write_tensors(tmp_path / "t", [wrong])


@pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
def test_a_file_cut_short_is_refused_by_name(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"t\.safetensors"):
        read_entries(saved)


def test_bytes_after_the_last_tensor_are_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"x")
    with pytest.raises(InputError, match="1 bytes after the last tensor"):
        read_entries(saved)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.safetensors: the file is missing"):
        read_entries(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["b.weight"].update(data_offsets=[0, 30]),
        lambda header: header["b.weight"].update(shape=[3, 6]),
        lambda header: header["b.weight"].update(shape=[-3, -5]),
        lambda header: header["b.weight"].pop("dtype"),
        lambda header: header.update({"b.weight": 3}),
        lambda header: header.pop("b.weight"),
    ],
    ids=["overlap", "shape", "negative", "no-dtype", "no-record", "gap"],
)
def test_a_header_that_contradicts_itself_is_refused_by_file(saved, change):
    rewritten(saved, change)
    with pytest.raises(InputError, match=r"t\.safetensors"):
        read_entries(saved)


def test_a_dtype_that_cannot_be_read_is_named(saved):
    rewritten(saved, lambda header: header["b.weight"].update(dtype="F4"))
    entry = next(entry for entry in read_entries(saved) if entry.name == "b.weight")
    with pytest.raises(InputError, match=r"b\.weight .*dtype F4"):
        read_tensor(entry)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(saved):
    entry = next(entry for entry in read_entries(saved) if entry.name == "a.weight")
    saved.write_bytes(saved.read_bytes()[:-3])
    with pytest.raises(InputError, match="ends 3 bytes early"):
        read_tensor(entry)
