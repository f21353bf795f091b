"""Words of codes are those of compressed-tensors, which reads them."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.exports.int32_words import pack_words, row_words


def drawn(rows, columns, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return codes.to(torch.uint8), (codes - 2 ** (bits - 1)).to(torch.int8)  # theirs have a sign


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 130), bits=st.integers(1, 8), seed=st.integers(0, 1000))
def test_rows_and_columns_are_packed_as_theirs(rows, columns, bits, seed):
    codes, signed = drawn(rows, columns, bits, seed)
    words = torch.from_numpy(pack_words(codes.numpy(), bits))
    assert words.shape == (rows, row_words(columns, bits))
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)
    down = torch.from_numpy(pack_words(np.ascontiguousarray(codes.numpy().T), bits).T)
    assert torch.equal(down, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize(
    ("bits", "codes", "word"), [(4, [1, 2, 3], 0x321), (3, [7, 0, 1], 0b001000111), (8, [255], 255)]
)
def test_the_lowest_bits_are_the_first_code(bits, codes, word):
    assert pack_words(np.array([codes], np.uint8), bits).tolist() == [[word]]
