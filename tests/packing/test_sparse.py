import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.packing.sparse import pack_positions, pack_small, rice_cost, unpack_positions, unpack_small


@settings(max_examples=100, deadline=None)
@given(positions=st.sets(st.integers(0, 5000), max_size=300), k=st.integers(0, 9))
def test_positions_come_back_at_any_parameter(positions, k):
    positions = np.array(sorted(positions), np.int64)
    unary, remainders = pack_positions(positions, k)
    found = unpack_positions(torch.from_numpy(unary), torch.from_numpy(remainders), len(positions), k)
    assert np.array_equal(found.numpy(), positions)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 7), max_size=50), bits=st.integers(3, 5))
def test_small_numbers_come_back(values, bits):
    packed = pack_small(np.array(values, np.int64), bits)
    assert unpack_small(torch.from_numpy(packed), len(values), bits).tolist() == values


@pytest.mark.parametrize("share", [0.002, 0.01, 0.03, 0.05, 0.1])
def test_rice_code_is_within_two_percent_of_the_entropy_of_random_positions(share):
    positions = np.flatnonzero(np.random.default_rng(0).random(1_000_000) < share)
    k, nbytes = rice_cost(positions)
    assert nbytes == sum(stream.nbytes for stream in pack_positions(positions, k))
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * 1_000_000
    assert 8 * nbytes < 1.02 * entropy
