"""Tiles divide a weight among them, in an order in which errors can be fed on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.numerics.trellis_tiles import LONGEST, Tiles, near_equal

SIDE = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(250, 260), st.integers(1, 600))


def places_of(tiles):
    """Row and column of every number, tile by tile: a list of int64 (2, length)."""
    rows, columns = tiles.shape
    stream = np.empty(rows * columns, np.int64)
    stream[tiles.matrix(np.arange(rows * columns)).ravel()] = np.arange(rows * columns)
    return np.split(np.stack(np.divmod(stream, columns)), np.cumsum(tiles.lengths)[:-1], axis=1)


@settings(max_examples=80, deadline=None)
@given(rows=SIDE, columns=SIDE, sides=st.sampled_from([1, 2]))
def test_every_weight_is_in_one_place_of_one_tile(rows, columns, sides):
    tiles = Tiles((rows, columns), sides)
    assert tiles.lengths.dtype == np.int64
    assert tiles.lengths.sum() == rows * columns
    assert np.array_equal(np.sort(tiles.matrix(np.arange(rows * columns)), axis=None), np.arange(rows * columns))
    # Long enough to bite their tails, as far as the weight is, and no longer than a state's worth of bits is spread.
    assert min(64, rows * columns) <= tiles.lengths.min() <= tiles.lengths.max() <= LONGEST == 256


@settings(max_examples=60, deadline=None)
@given(rows=SIDE, columns=SIDE)
def test_one_sided_tiles_are_columns_of_a_band_in_their_order(rows, columns):
    tiles = Tiles((rows, columns), 1)
    last = (0, -1)
    for row, column in places_of(tiles):
        width = column[-1] - column[0] + 1
        assert width == 1 or rows < 64
        # Column by column, each from the band's first row to its last.
        assert np.array_equal(column, np.repeat(np.arange(column[0], column[-1] + 1), len(row) // width))
        assert np.array_equal(row, np.tile(np.arange(row[0], row[-1] + 1), width))
        band, before = last
        assert (row[0] == band and column[0] == before + 1) or (row[0] > band and before == columns - 1)
        last = (row[0], column[-1])
    heights = {end - begin for begin, end in tiles.bands}
    assert max(heights) - min(heights) <= 1


@settings(max_examples=60, deadline=None)
@given(rows=SIDE, columns=SIDE)
def test_two_sided_tiles_are_pieces_of_antidiagonals_in_their_order(rows, columns):
    """So everything that is fed into a weight, from before it in its row and above it in its column, comes before."""
    tiles = Tiles((rows, columns), 2)
    places = places_of(tiles)
    diagonals = np.concatenate([row + column for row, column in places])
    assert (np.diff(diagonals) >= 0).all()
    rows_in_turn = np.concatenate([row for row, _ in places])
    assert (np.diff(rows_in_turn)[np.diff(diagonals) == 0] == 1).all()
    for row, column in places:
        if (row + column).min() == (row + column).max():
            assert len(set(row)) == len(set(column)) == len(row)
        else:
            assert min(len(row), len(column)) >= 1


@settings(max_examples=60, deadline=None)
@given(rows=SIDE, columns=SIDE)
def test_antidiagonals_are_quantized_together_only_where_they_are_short(rows, columns):
    tiles = Tiles((rows, columns), 2)
    groups = tiles.diagonal_groups
    assert [begin for begin, _ in groups] == [0, *[end for _, end in groups[:-1]]]
    assert groups[-1][1] == rows + columns - 1
    assert [length for group in groups for length in tiles.pieces(*group)] == tiles.lengths.tolist()
    sizes = [[tiles.diagonal_length(diagonal) for diagonal in range(*group)] for group in groups]
    assert sum(map(sum, sizes)) == rows * columns
    for size in sizes[:-1]:
        assert sum(size[:-1]) < 128 <= sum(size)


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (10, 3), (3420, 14), (256, 1), (7, 7)])
def test_near_equal_parts_differ_by_one(size, parts):
    found = near_equal(size, parts)
    assert sum(found) == size and len(found) == parts
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("shape", "sides", "expected"),
    [
        ((3420, 2), 1, [245] * 8 + [244] * 20),
        ((2, 300), 1, [200] * 3),
        ((300, 3), 1, [150] * 6),
        ((1, 1), 2, [1]),
        ((1, 300), 2, [128, 172]),
        ((14, 14), 2, [196]),
        ((17, 17), 2, [136, 153]),
        ((150, 150), 2, None),
    ],
)
def test_tiles_of_some_shapes(shape, sides, expected):
    found = Tiles(shape, sides).lengths.tolist()
    if expected is None:  # the middle antidiagonals stand alone, up to the longest one
        expected = [*range(128, 151), *range(149, 127, -1)]
        at = found.index(150)
        found = found[at - 22 : at + 23]
    assert found == expected


def test_two_sided_numbers_run_down_from_the_first_row():
    found = Tiles((3, 4), 2).matrix(np.arange(12))
    assert found.tolist() == [[0, 1, 3, 6], [2, 4, 7, 9], [5, 8, 10, 11]]


def test_one_sided_numbers_run_down_columns():
    assert Tiles((3, 4), 1).matrix(np.arange(12)).tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
