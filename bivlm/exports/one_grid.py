"""One kind of grid for all packed weights of a model: bits of a code, columns of a group.

transformers decodes all weights of a compressed-tensors checkpoint by the first of its schemes (5.23,
`transformers.integrations.compressed_tensors.get_dense_scheme`). Codes fit in more bits than they need, and a group is
also several narrower ones with the same scale and zero point: both are exact, and cost bytes. So may a weight that is
rebuilt. Of all grids the one that makes the smallest file is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from math import gcd

from bivlm.exports.int32_words import row_words


@dataclass(frozen=True)
class Layout:
    """How a packed weight is laid out.

    Attributes:
        shape: (M, N).
        bits: that its codes and zero points need.
        width: columns of a group; the last group of a row may have fewer.
        number_nbytes: bytes of a rebuilt weight.
        scale_nbytes: bytes of a scale.
    """

    shape: tuple[int, int]
    bits: int
    width: int
    number_nbytes: int
    scale_nbytes: int

    @property
    def common_width(self) -> int:
        """The largest width of groups that are all of one length and each lie in one of this layout's groups."""
        return gcd(self.width, self.shape[1])


@dataclass(frozen=True)
class Grid:
    """Bits of a code, and columns of a group; None for one group per row."""

    bits: int
    width: int | None

    def holds(self, layout: Layout) -> bool:
        """Return whether a weight laid out like this can be written on this grid, and read by compressed-tensors."""
        rows, columns = layout.shape
        alike = layout.width == columns if self.width is None else layout.common_width % self.width == 0
        if not alike or layout.bits > self.bits:
            return False
        # compressed-tensors 0.20 fails where the zero points of each of several groups are one word of 4 bits.
        return self.bits != 4 or row_words(rows, self.bits) > 1 or self.groups(columns) == 1

    def groups(self, columns: int) -> int:
        """Return the groups of a row."""
        return 1 if self.width is None else columns // self.width

    def nbytes(self, layout: Layout) -> int:
        """Return the bytes of a weight on this grid, rebuilt where the grid does not hold it."""
        rows, columns = layout.shape
        if not self.holds(layout):
            return rows * columns * layout.number_nbytes
        groups = self.groups(columns)
        words = rows * row_words(columns, self.bits) + row_words(rows, self.bits) * groups
        return 4 * words + rows * groups * layout.scale_nbytes


def smallest_grid(layouts: Iterable[Layout]) -> Grid:
    """Return the grid on which the weights of a model take the fewest bytes; the widest of several such grids."""
    counts = Counter(layouts)
    widths = {layout.common_width for layout in counts}
    while more := {gcd(*pair) for pair in product(widths, widths)} - widths:
        widths |= more
    kinds = [None, *sorted(widths, reverse=True)]
    grids = [Grid(bits, width) for bits in sorted({layout.bits for layout in counts}) for width in kinds]
    return min(grids, key=lambda grid: sum(count * grid.nbytes(layout) for layout, count in counts.items()))
