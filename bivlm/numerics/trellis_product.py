"""Products with a weight on a trellis of 2^12 states, straight from its bits (`kernels/trellis_product.c`).

Sums are float32. A weight is cut into parts, one sum each, by its shape alone: so however many threads there are, the
numbers are the same.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

from bivlm import kernels
from bivlm.numerics.trellis import INDEX_OF_PLACE, PERIOD, TrellisCode, bits_of
from bivlm.numerics.trellis_tiles import FEWEST_ROWS, Tiles

_BESIDE, _BEHIND = 32, 16  # zeros beside the inputs, and room behind the outputs
_PARTS, _PART = 8, 1 << 19  # at most so many parts, of so many weights or more


@dataclass(frozen=True)
class Part:
    """Bands, or groups of antidiagonals: where each begins and the last one ends, and the bit of the first."""

    begins: np.ndarray
    bit: int


@cache
def parts_of(tiles: Tiles, rate: float) -> list[Part]:
    """Return the parts of a shape's tiles, of nearly as many weights each."""
    if tiles.sides == 1:
        groups = tiles.bands
        counts = [len(tiles.column_groups)] * len(groups)
    else:
        groups = tiles.diagonal_groups
        counts = [len(tiles.pieces(begin, end)) for begin, end in groups]
    first = np.concatenate([[0], np.cumsum(counts)])
    bits = np.concatenate([[0], np.cumsum(bits_of(rate, tiles.lengths))])
    numbers = np.concatenate([[0], np.cumsum(tiles.lengths)])[first]
    parts = max(1, min(_PARTS, int(numbers[-1]) // _PART))
    cuts = np.unique(np.searchsorted(numbers, np.arange(parts) * numbers[-1] / parts))
    ends = [*cuts[1:].tolist(), len(groups)]
    return [
        Part(np.array([*(groups[at][0] for at in range(begin, end)), groups[end - 1][1]]), int(bits[first[begin]]))
        for begin, end in zip(cuts.tolist(), ends, strict=True)
    ]


@cache
def lines_of(tiles: Tiles, rate: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return of every line of a weight where its tiles begin, how far ahead it is among them and how many they hold.

    A line is an antidiagonal, or a column where tiles have several of them; None where tiles are columns of bands.
    The weight in a row of a line is number row + ahead, int32, among those, int32, from bit, int64, on.
    """
    if tiles.sides == 1:
        rows, widths = tiles.shape[0], np.array(tiles.column_groups)
        if rows >= FEWEST_ROWS:
            return None
        begins = np.cumsum(bits_of(rate, tiles.lengths)) - bits_of(rate, tiles.lengths)
        first = np.repeat(np.cumsum(widths) - widths, widths)
        ahead = rows * (np.arange(tiles.shape[1]) - first)
        return np.repeat(begins, widths), ahead.astype(np.int32), np.repeat(rows * widths, widths).astype(np.int32)
    bits, aheads, sizes, bit = [], [], [], 0
    for begin, end in tiles.diagonal_groups:
        lengths = [tiles.diagonal_length(diagonal) for diagonal in range(begin, end)]
        aheads += [sum(lengths[: diagonal - begin]) - tiles.first_row(diagonal) for diagonal in range(begin, end)]
        bits += [bit] * len(lengths)
        sizes += [sum(lengths)] * len(lengths)
        bit += int(bits_of(rate, np.array(tiles.pieces(begin, end))).sum())
    return np.array(bits, np.int64), np.array(aheads, np.int32), np.array(sizes, np.int32)


def places_of(code: TrellisCode) -> np.ndarray:
    """Return what the lower two windows of a state together say of its place, and what the upper one says.

    uint8 (2, 272), after a step with bits and after one without.
    """
    lower = code.windows[:, 1, :, None] ^ code.windows[:, 0, None, :]
    return np.concatenate([lower.reshape(2, 256), code.windows[:, 2]], axis=1)


def can_multiply(code: TrellisCode) -> bool:
    """Return whether this machine has native code for products with weights of this code."""
    library = kernels.native()
    return library is not None and code.windows.size > 0 and bool(library.bivlm_can_multiply())


def product(
    stream: np.ndarray,
    code: TrellisCode,
    tiles: Tiles,
    magnitudes: np.ndarray,
    x_TN: np.ndarray,
    threads: int = 1,
    *,
    widest: bool = True,
) -> np.ndarray:
    """Return ``x W^T``, float32 (T, M), of the weight W (M, N) in the bits of all tiles, uint8; x is float32 (T, N).

    Only where `can_multiply`. Without `widest` AVX-512 is left out.
    """
    library = kernels.native()
    assert library is not None
    rows, columns = tiles.shape
    inputs_TN = np.zeros((len(x_TN), columns + 2 * _BESIDE), np.float32)
    inputs_TN[:, _BESIDE:-_BESIDE] = x_TN if tiles.sides == 1 else x_TN[:, ::-1]
    magnitudes = np.ascontiguousarray(magnitudes, np.float32)
    parts = parts_of(tiles, code.rate)
    found_PTM = np.zeros((len(parts), len(x_TN), rows + _BEHIND), np.float32)
    at, whole = kernels.pointer, ctypes.c_int64

    def one(number: int) -> int:
        part = parts[number]
        return library.bivlm_trellis_product(
            at(stream),
            *map(whole, (stream.size, part.bit, round(PERIOD * code.rate))),
            at(code.windows),
            at(INDEX_OF_PLACE),
            at(magnitudes),
            *map(whole, (rows, columns, tiles.sides)),
            at(part.begins),
            whole(len(part.begins) - 1),
            at(inputs_TN),
            at(found_PTM[number]),
            *map(whole, (len(x_TN), inputs_TN.shape[1], found_PTM.shape[2], widest)),
        )

    if any(kernels.in_threads(one, range(len(parts)), threads=threads)):
        raise MemoryError(f"no memory for a product with a weight of {rows} x {columns}")
    return np.ascontiguousarray(found_PTM.sum(0)[:, :rows])
