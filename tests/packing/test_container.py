import numpy as np
import pytest
import torch

from bivlm.errors import InputError
from bivlm.packing import container, open_packed


@pytest.fixture
def packed():
    return container.write("test", (2, 3), torch.bfloat16, [np.arange(5, dtype=np.uint8), np.empty(0, np.uint8)])


def test_header_says_what_was_written(packed):
    header = container.read_header(packed)
    assert (header.codec, header.shape, header.dtype, header.nbytes) == ("test", (2, 3), torch.bfloat16, packed.numel())
    begin, end = header.sections[0]
    assert packed[begin:end].tolist() == [0, 1, 2, 3, 4]


def test_every_flipped_bit_is_noticed(packed):
    for byte in range(packed.numel()):
        for bit in range(8):
            damaged = packed.clone()
            damaged[byte] ^= 1 << bit
            with pytest.raises(InputError, match="layer 7"):
                container.verify(damaged, container.read_header(damaged, "layer 7"), "layer 7")


@pytest.mark.parametrize("length", [0, 10, 27, 30, 40])
def test_truncated_tensor_is_refused_by_name(packed, length):
    with pytest.raises(InputError, match="layer 7"):
        container.read_header(packed[:length], "layer 7")


def test_other_format_version_is_refused(packed):
    packed[4] = 2
    with pytest.raises(InputError, match="layer 7: packed format version 2, this code reads version 1"):
        container.read_header(packed, "layer 7")


def test_unknown_codec_is_refused(packed):
    with pytest.raises(InputError, match="layer 7: unknown codec 'test'"):
        open_packed(packed, "layer 7")


def test_random_weights_are_no_packed_weight():
    with pytest.raises(InputError, match=r"torch\.bfloat16 of shape \(4, 4\)"):
        container.read_header(torch.zeros(4, 4, dtype=torch.bfloat16), "layer 7")


@pytest.mark.parametrize(
    ("at", "content", "message"),
    [
        (16, bytes(4), r"shape \(0, 3\), expected one row and one column or more"),
        (20, bytes(4), r"shape \(2, 0\), expected one row and one column or more"),
        (7, b"\1", "reserved byte 1"),
        (6, b"\0", "0 sections"),
        (6, b"\xff", "255 sections"),
        (5, b"\3", "dtype code 3"),
        (8, b"\xffsigns", r"unknown codec '\\\\xffsigns'"),
        (28, b"\xff" * 8, "41 bytes, its header says 8589934626"),
    ],
)
def test_an_impossible_header_is_refused_by_name(packed, at, content, message):
    packed[at : at + len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    with pytest.raises(InputError, match=f"layer 7: .*{message}"):
        open_packed(packed, "layer 7")
