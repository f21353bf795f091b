import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.packing.radix import pack_symbols, radix, symbols_at, unpack_values


@settings(max_examples=60, deadline=None)
@given(alphabet=st.integers(2, 36), rows=st.integers(1, 5), columns=st.integers(1, 70), seed=st.integers(0, 2**31))
def test_symbols_come_back(alphabet, rows, columns, seed):
    symbols = torch.randint(0, alphabet, (rows, columns), generator=torch.Generator().manual_seed(seed))
    planes = [torch.from_numpy(plane) for plane in pack_symbols(symbols.to(torch.uint8), alphabet)]
    table = torch.arange(alphabet, dtype=torch.int16)
    assert torch.equal(unpack_values(planes, table, columns), symbols.to(torch.int16))
    assert sum(plane.numel() for plane in planes) == radix(alphabet).nbytes(rows, columns)
    positions = torch.arange(rows * columns)
    assert torch.equal(symbols_at(planes, alphabet, columns, positions), symbols.view(-1))


def test_three_base_ten_symbols_fill_ten_bits():
    assert (radix(10).per_word, radix(10).bits, radix(10).planes) == (3, 10, (8, 2))


@pytest.mark.parametrize("alphabet", [2, 4, 6, 8, 10, 12, 16])
def test_alphabets_of_sign_and_group_cost_at_most_a_tenth_of_a_bit_over_their_logarithm(alphabet):
    assert math.log2(alphabet) <= radix(alphabet).bits / radix(alphabet).per_word < math.log2(alphabet) + 0.1


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 255, 256, 257])
def test_every_row_begins_on_a_byte(columns):
    """A row's bytes do not depend on the rows before it."""
    symbols = torch.randint(0, 10, (4, columns), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    together = pack_symbols(symbols, 10)
    alone = [pack_symbols(symbols[row : row + 1], 10) for row in range(4)]
    for plane, whole in enumerate(together):
        assert all((whole[row] == alone[row][plane][0]).all() for row in range(4))
