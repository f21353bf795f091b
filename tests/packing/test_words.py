"""What native code reads of words and gaps is what numpy and torch read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm import kernels
from bivlm.packing import radix, sparse

pytestmark = pytest.mark.skipif(kernels.native() is None, reason="the native code was not built")


def both(work):
    """What `work()` gives with native code, and without."""
    native = work()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "native", lambda: None)
        return native, work()


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 70),
    alphabet=st.integers(2, 260),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_words_are_looked_up(rows, columns, alphabet, dtype, seed):
    rng = np.random.default_rng(seed)
    symbols = torch.from_numpy(rng.integers(0, min(alphabet, 256), (rows, columns), dtype=np.uint8))
    planes = [torch.from_numpy(plane) for plane in radix.pack_symbols(symbols, alphabet)]
    table = torch.from_numpy(rng.integers(-100, 100, alphabet)).to(dtype)
    for found in both(lambda: radix.unpack_values(planes, table, columns)):
        assert found.dtype == dtype and torch.equal(found, table[symbols.long()])
    positions = torch.from_numpy(np.sort(rng.integers(0, rows * columns, 20)))
    for kind in (lambda each: each, torch.Tensor.numpy):
        given_as = [*map(kind, planes)], kind(positions)
        for found in both(lambda given_as=given_as: radix.symbols_at(given_as[0], alphabet, columns, given_as[1])):
            assert type(found) is type(given_as[1])
            assert np.array_equal(np.asarray(found), symbols.view(-1)[positions].numpy())


def test_rows_are_shared_among_threads():
    threads = torch.get_num_threads()
    symbols = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (801, 1000), dtype=np.uint8))
    planes = [torch.from_numpy(plane) for plane in radix.pack_symbols(symbols, 6)]
    try:
        torch.set_num_threads(3)
        assert torch.equal(radix.unpack_values(planes, torch.arange(6, dtype=torch.uint8), 1000), symbols)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=150, deadline=None)
@given(positions=st.sets(st.integers(0, 1 << 40), max_size=60), k=st.integers(25, 41), small=st.booleans())
def test_positions_are_those_that_were_packed(positions, k, small):
    at = np.array(sorted(each % 5000 for each in positions) if small else sorted(positions), np.int64)
    at, k = np.unique(at), k - 25 if small else k
    streams = sparse.pack_positions(at, k)
    for kind in (lambda each: each, torch.from_numpy):
        for found in both(lambda kind=kind: sparse.unpack_positions(*map(kind, streams), len(at), k)):
            assert np.array_equal(np.asarray(found), at)
