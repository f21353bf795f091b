"""The grid of a model: every weight is held exactly or rebuilt, in the fewest bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bivlm.exports.one_grid import Grid, Layout, smallest_grid


def layout(rows, columns, bits, width):
    return Layout((rows, columns), bits, width, number_nbytes=2, scale_nbytes=4)


@pytest.mark.parametrize(
    ("layouts", "grid"),
    [
        pytest.param([layout(64, 256, 4, 128)] * 2, Grid(4, 128), id="alike"),
        pytest.param([layout(64, 256, 3, 256), layout(64, 96, 3, 96)], Grid(3, None), id="one-group-per-row"),
        pytest.param([layout(64, 256, 4, 256), layout(64, 512, 4, 512)], Grid(4, None), id="rows-of-two-lengths"),
        pytest.param([layout(64, 256, 4, 256), layout(64, 512, 4, 128)], Grid(4, 128), id="per-row-beside-groups"),
        pytest.param([layout(64, 4304, 4, 128)], Grid(4, 16), id="a-short-last-group"),
        pytest.param([layout(999, 4096, 2, 128), layout(9, 4304, 2, 128)], Grid(2, 128), id="one-short-group-in-many"),
        pytest.param([layout(99, 4096, 2, 128), layout(99, 4096, 4, 64)], Grid(4, 64), id="bits-and-groups-alike-much"),
        pytest.param([layout(999, 4096, 2, 128), layout(9, 4096, 8, 128)], Grid(2, 128), id="few-of-many-bits"),
    ],
)
def test_the_smallest_grid_is_taken(layouts, grid):
    assert smallest_grid(layouts) == grid


LAYOUTS = st.builds(
    layout,
    st.integers(9, 40),
    st.sampled_from([16, 33, 48, 64]),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([4, 7, 16]),
)


@given(st.lists(LAYOUTS, min_size=1, max_size=4))
def test_no_other_grid_is_smaller(layouts):
    def nbytes(grid):
        return sum(grid.nbytes(each) for each in layouts)

    others = [Grid(bits, width) for bits in range(1, 9) for width in (None, *range(1, 17))]
    assert nbytes(smallest_grid(layouts)) == min(map(nbytes, others))


def test_what_a_grid_holds():
    assert Grid(4, 16).holds(layout(9, 64, 4, 32)) and Grid(4, 16).holds(layout(9, 64, 2, 64))
    assert not Grid(4, 16).holds(layout(9, 64, 8, 32))  # bits
    assert not Grid(4, 16).holds(layout(9, 64, 4, 8))  # wider than the weight's own groups
    assert not Grid(4, 16).holds(layout(9, 72, 4, 16))  # a short last group
    assert Grid(4, None).holds(layout(9, 72, 4, 72)) and not Grid(4, None).holds(layout(9, 72, 4, 36))
    assert not Grid(4, 16).holds(layout(8, 64, 4, 32)) and Grid(8, 16).holds(layout(8, 64, 4, 32))  # their defect
