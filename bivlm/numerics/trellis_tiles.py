"""Which weights a tile of a trellis holds, in which order: what error feedback acts between, and what it does not.

One-sided: rows are cut into bands of up to 256, and a tile is one column of a band, or a few neighbouring columns where
there are few rows. So feedback acts between single columns; 16 by 16 weights a tile would cost 40 % of the error of the
outputs. Two-sided: elements with the same sum of row and column do not feed each other, so a tile is a piece of an
antidiagonal of up to 256; short neighbours are joined.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from bivlm import kernels
from bivlm.numerics.hadamard import Rotation

LONGEST = 256
_JOINED = 128  # antidiagonals together have this many elements or more, if the weight has
FEWEST_ROWS = 64  # of a band with tiles of single columns


def near_equal(size: int, parts: int) -> list[int]:
    """Return sizes that add up to `size` and differ by one at most, larger ones first."""
    low, more = divmod(size, parts)
    return [low + (part < more) for part in range(parts)]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a weight, `sides` 1 or 2."""

    shape: tuple[int, int]
    sides: int

    @cached_property
    def lengths(self) -> np.ndarray:
        """Numbers of each tile in the order of the stream, int64 (R,)."""
        if self.sides == 1:
            columns = self.column_groups
            found = [width * (end - begin) for begin, end in self.bands for width in columns]
        else:
            found = [each for begin, end in self.diagonal_groups for each in self.pieces(begin, end)]
        return np.array(found, np.int64)

    @cached_property
    def bands(self) -> list[tuple[int, int]]:
        """First and last row (exclusive) of each band; one-sided."""
        rows = self.shape[0]
        return list(pairwise(accumulate(near_equal(rows, -(-rows // LONGEST)), initial=0)))

    @cached_property
    def column_groups(self) -> list[int]:
        """How many columns each tile of a band has; one-sided."""
        rows, columns = self.shape
        return [1] * columns if rows >= FEWEST_ROWS else near_equal(columns, -(-columns // max(1, LONGEST // rows)))

    @cached_property
    def diagonal_groups(self) -> list[tuple[int, int]]:
        """First and last antidiagonal (exclusive) of those that are quantized together; two-sided."""
        groups, begin, size = [], 0, 0
        for diagonal in range(sum(self.shape) - 1):
            size += self.diagonal_length(diagonal)
            if size >= _JOINED:
                groups.append((begin, diagonal + 1))
                begin, size = diagonal + 1, 0
        if size:
            begin = groups.pop()[0] if groups else 0
            groups.append((begin, sum(self.shape) - 1))
        return groups

    def diagonal_length(self, diagonal: int) -> int:
        """Return how many elements have this sum of row and column."""
        return min(self.shape[0], diagonal + 1) - self.first_row(diagonal)

    def first_row(self, diagonal: int) -> int:
        """Return the first row of an antidiagonal."""
        return max(0, diagonal - self.shape[1] + 1)

    def pieces(self, begin: int, end: int) -> list[int]:
        """Return the lengths of the tiles of a group of antidiagonals."""
        size = sum(self.diagonal_length(diagonal) for diagonal in range(begin, end))
        return near_equal(size, -(-size // LONGEST))

    def diagonal_slices(self) -> Iterator[slice]:
        """Yield where the elements of every antidiagonal lie in the weight, row by row."""
        columns = self.shape[1]
        for diagonal in range(sum(self.shape) - 1):
            begin = self.first_row(diagonal) * (columns - 1) + diagonal
            step = max(1, columns - 1)
            yield slice(begin, begin + step * (self.diagonal_length(diagonal) - 1) + 1, step)

    def matrix(self, stream: np.ndarray) -> np.ndarray:
        """Return the weight's elements (M, N) from those of all tiles, one after another."""
        columns = self.shape[1]
        found = np.empty(self.shape, stream.dtype)
        if self.sides == 1:
            for begin, end in self.bands:
                found[begin:end] = stream[begin * columns : end * columns].reshape(columns, end - begin).T
            return found
        flat, at = found.reshape(-1), 0
        for where in self.diagonal_slices():
            part = flat[where]
            part[:] = stream[at : at + len(part)]
            at += len(part)
        return found

    def weight(self, stream: np.ndarray, levels: np.ndarray, outputs: Rotation | None) -> np.ndarray:
        """Return the weight, float32 (M, N), whose levels' numbers are those of all tiles in order.

        `levels` is float32 (16,). The rows of the weight were rotated by `outputs`, and are rotated back.
        """
        library = kernels.native()
        if library is None:
            weight_MN = torch.from_numpy(levels[self.matrix(stream)])
            if outputs is not None:
                weight_MN = outputs.apply(weight_MN.T.contiguous(), back=True).T.contiguous()
            return weight_MN.numpy()
        found_MN = np.empty(self.shape, np.float32)
        at, whole = kernels.pointer, ctypes.c_int64
        ends = np.array([end for _, end in self.bands] if self.sides == 1 else [], np.int64)
        rotated = outputs.native_form() if outputs else (whole(0), ctypes.c_float(0), None, None)
        sizes = map(whole, self.shape)
        failed = library.bivlm_trellis_weight(
            at(stream), at(levels), *sizes, at(ends), whole(len(ends)), *rotated, at(found_MN)
        )
        if failed:
            raise MemoryError(f"no memory for a weight of {self.shape[0]} x {self.shape[1]}")
        return found_MN
