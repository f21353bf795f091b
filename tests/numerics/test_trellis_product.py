"""Products straight from the bits, against a product in float64 with the weight that was read."""

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.numerics.trellis import INDEX_OF_PLACE, PLACES, RATES, bits_of, levels_of, of_windows, read, trellis_code
from bivlm.numerics.trellis_product import can_multiply, lines_of, parts_of, places_of, product
from bivlm.numerics.trellis_tiles import Tiles

pytestmark = pytest.mark.skipif(
    not can_multiply(trellis_code(12, 2.0)),
    reason="the native code was not built, or this processor has no AVX2",
)


def bits(tiles, rate, seed=0):
    count = int(bits_of(rate, tiles.lengths).sum())
    stream = np.random.default_rng(seed).integers(0, 256, -(-count // 8), dtype=np.uint8)
    if count % 8:
        stream[-1] &= 0xFF00 >> count % 8 & 255
    return stream


def some_code(rate, seed):
    """A code that nobody trained: any tables give some product."""
    windows = np.random.default_rng(seed).integers(0, PLACES, (2, 3, 16), dtype=np.uint8)
    return of_windows(windows, trained(rate).magnitudes, rate, 0.0)


def trained(rate):
    return trellis_code(12, rate)


def expected(stream, code, tiles, x):
    levels = levels_of(code.magnitudes).astype(np.float64)
    return x @ levels[tiles.matrix(read(stream, tiles.lengths, code))].T


def inputs(tokens, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, columns)).astype(np.float32)


def found(stream, code, tiles, x, **how):
    return product(stream, code, tiles, code.magnitudes, x, **how)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 40), st.integers(1, 600)),
    columns=st.one_of(st.integers(1, 40), st.integers(1, 600)),
    sides=st.integers(1, 2),
    rate=st.sampled_from(RATES),
    tokens=st.integers(1, 5),
    widest=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_product_is_that_of_the_weight(rows, columns, sides, rate, tokens, widest, seed):
    tiles, code, x = Tiles((rows, columns), sides), some_code(rate, seed), inputs(tokens, columns, seed)
    stream = bits(tiles, rate, seed)
    wanted = expected(stream, code, tiles, x)
    y = found(stream, code, tiles, x, widest=widest)
    assert y.shape == (tokens, rows) and y.dtype == np.float32
    assert np.abs(y - wanted).max() <= 2e-6 * max(1e-3, np.abs(x).max() * columns**0.5 * 3)


@pytest.mark.parametrize("sides", [1, 2])
def test_parts_are_all_tiles_once_and_the_same_for_any_number_of_threads(sides):
    tiles, code, x = Tiles((1900, 1300), sides), trained(1.75), inputs(2, 1300)
    parts = parts_of(tiles, 1.75)
    assert len(parts) > 2
    groups = tiles.bands if sides == 1 else tiles.diagonal_groups
    assert [begin for part in parts for begin in part.begins[:-1].tolist()] == [begin for begin, _ in groups]
    stream = bits(tiles, 1.75)
    one = found(stream, code, tiles, x)
    assert found(stream, code, tiles, x, threads=3).tobytes() == one.tobytes()
    np.testing.assert_allclose(one, expected(stream, code, tiles, x), atol=1e-3)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (257, 300), (300, 257)])
@pytest.mark.parametrize("rate", [0.5, 2.0, 3.0])
def test_nothing_is_read_beside_the_bits(sides, shape, rate):
    """The bits lie at the end of a page, then at the beginning of one; pages beside them cannot be read."""
    tiles, code, x = Tiles(shape, sides), trained(rate), inputs(1, shape[1])
    stream = bits(tiles, rate)
    wanted = expected(stream, code, tiles, x)
    page = mmap.PAGESIZE
    inside = -(-len(stream) // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    whole = np.frombuffer(memory, np.uint8)
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    for guard in (0, page + inside):
        assert mprotect(ctypes.c_void_p(whole.ctypes.data + guard), ctypes.c_size_t(page), 0) == 0
    for begin in (page, page + inside - len(stream)):
        whole[begin : begin + len(stream)] = stream
        y = found(whole[begin : begin + len(stream)], code, tiles, x)
        np.testing.assert_allclose(y, wanted, atol=1e-4)


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (50, 3), (63, 20), (70, 300)])
def test_lines_say_where_every_weight_is(shape, sides):
    """One bit a weight: a weight's bit is its own number in its tile, behind the tiles before."""
    tiles = Tiles(shape, sides)
    numbers = tiles.matrix(np.arange(shape[0] * shape[1]))
    if (lines := lines_of(tiles, 1.0)) is None:
        assert shape[0] >= 64 and sides == 1
        return
    bits, ahead, sizes = lines
    row, column = np.indices(shape)
    line = column if sides == 1 else row + column
    np.testing.assert_array_equal(bits[line] + row + ahead[line], numbers)
    assert (row + ahead[line] < sizes[line]).all() and (row + ahead[line] >= 0).all()


def test_places_of_two_windows_are_those_of_each():
    code = some_code(0.75, 4)
    states = np.arange(4096)
    for without, places in enumerate(places_of(code)):
        place = places[states & 255] ^ places[256 + (states >> 8)]
        np.testing.assert_array_equal(INDEX_OF_PLACE[place], code.table[without])


def test_free_tables_have_no_product():
    assert not can_multiply(trellis_code(14, 2.0))
