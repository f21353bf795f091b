"""Trellis-coded quantization with error feedback, tile by tile, in a fixed order of summation.

With ``H^-1 = U^T U`` (`bivlm.numerics.error_feedback`) and ``N = diag(U)^-1 U``, unit upper triangular, an error of the
weight is ``E = F N``: F is what each column's quantization leaves over once the errors before it were fed into it, and
``tr(E H E^T) = sum F_ij^2 / U_jj^2``. Two-sided, with the second moment G of the gradients of the outputs beside H,
``E = N_G^T F N_H`` and ``tr(G E H E^T) = sum F_ij^2 / (U_Gii^2 U_Hjj^2)``: element (i, j) is quantized to

    u_ij = w_ij - sum_(j' < j) F_ij' N_H[j', j] - sum_(i' < i) N_G[i', i] P_i'j,    P = F N_H,

which needs only elements with a smaller row, column, or both. Elements of one antidiagonal do not need each other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby, pairwise, product
from typing import Any

import numpy as np
from more_itertools import divide

from bivlm import kernels
from bivlm.numerics import trellis
from bivlm.numerics.trellis import TrellisCode
from bivlm.numerics.trellis_tiles import Tiles

_BLOCK = 64  # rows or columns whose errors are fed into those farther away together
_NEAR_BLOCKS = 3


def one_sided(
    weight_MN: np.ndarray, shares_NN: np.ndarray | None, code: TrellisCode, levels: np.ndarray, threads: int = 1
) -> np.ndarray:
    """Return the symbols of all tiles, uint8, of a weight of unit variance, float32; `shares` is N, None without H.

    Rows do not feed each other, so that bands are quantized side by side, in as many threads.
    """
    tiles = Tiles(weight_MN.shape, 1)

    def some(bands: list[tuple[int, int]]) -> list[np.ndarray]:
        rows = weight_MN[bands[0][0] : bands[-1][1]]
        running_NBT = np.ascontiguousarray(rows.reshape(len(bands), -1, rows.shape[1]).transpose(2, 0, 1))
        if np.shares_memory(running_NBT, weight_MN):  # one row
            running_NBT = running_NBT.copy()
        return _bands(running_NBT, shares_NN, tiles.column_groups, code, levels)

    groups = [
        list(part)
        for _, same in groupby(tiles.bands, lambda band: band[1] - band[0])
        for part in divide(max(1, threads), list(same))
    ]
    with _side_by_side(threads) as map_all:
        return np.concatenate([symbols for found in map_all(some, filter(None, groups)) for symbols in found])


Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@contextmanager
def _side_by_side(threads: int) -> Iterator[Map]:
    """Yield ``map`` in as many threads."""
    if threads <= 1:
        yield map
        return
    with ThreadPoolExecutor(threads) as pool:
        yield pool.map


def two_sided(
    weight_MN: np.ndarray,
    output_shares_MM: np.ndarray,
    shares_NN: np.ndarray,
    output_importance_M: np.ndarray,
    importance_N: np.ndarray,
    code: TrellisCode,
    levels: np.ndarray,
    threads: int = 1,
) -> np.ndarray:
    """Return the symbols of all tiles, uint8, of a weight of unit variance, float32.

    Importances are the ``1 / U_ii^2`` of both sides: within a tile a squared error counts by their product.
    """
    tiles = Tiles(weight_MN.shape, 2)
    both = _BothSides(weight_MN, output_shares_MM, shares_NN)
    found: list[np.ndarray] = []
    with _side_by_side(threads) as map_all:
        for begin, end in tiles.diagonal_groups:
            firsts = [(tiles.first_row(d), tiles.diagonal_length(d)) for d in range(begin, end)]
            at_i = np.concatenate([np.arange(first, first + length) for first, length in firsts])
            at_j = np.repeat(np.arange(begin, end), [length for _, length in firsts]) - at_i
            wanted = both.wanted(at_i, at_j)
            weights = output_importance_M[at_i].astype(np.float64) * importance_N[at_j]
            symbols, rebuilt = _pieces(wanted, weights, tiles.pieces(begin, end), code, levels, map_all, threads)
            found.append(symbols)
            both.feed(rebuilt, at_i, at_j)
            both.feed_farther(begin, end, map_all)
    return np.concatenate(found)


class _BothSides:
    """What was fed into each element of a weight (M, N) from those quantized before, negative.

    Feeding each error into all later elements at once would read both matrices for every antidiagonal. So an error goes
    at once only into elements up to three blocks on; those farther away take a whole block of errors, when all of it is
    there: blocks are as high as wide, and it is complete two antidiagonals before the nearest of them are quantized, if
    the three blocks were two; the third leaves room for antidiagonals that are quantized together.
    """

    def __init__(self, weight_MN: np.ndarray, output_shares_MM: np.ndarray, shares_NN: np.ndarray) -> None:
        rows, columns = weight_MN.shape
        self._weight_MN = weight_MN
        self._shares = output_shares_MM, shares_NN
        self._fed_MN = np.zeros((rows, columns), np.float32)  # - sum F N_H over the columns before
        self._fed_NM = np.zeros((columns, rows), np.float32)  # - sum N_G P over the rows before, transposed
        self._errors_NM = np.zeros((columns, rows), np.float32)  # F, transposed
        self._products_MN = np.zeros((rows, columns), np.float32)  # P = F N_H
        fed = (self._fed_MN, self._fed_NM, *self._shares, self._errors_NM, self._products_MN)
        self._weight_at, *self._fed_at = map(kernels.pointer, (weight_MN, *fed))
        # Blocks by the antidiagonal of their last element.
        self._complete: dict[int, list[tuple[int, int]]] = {}
        for top, left in product(range(0, rows, _BLOCK), range(0, columns, _BLOCK)):
            last = min(top + _BLOCK, rows) + min(left + _BLOCK, columns) - 2
            self._complete.setdefault(last, []).append((top, left))
        # Where a side has few elements more antidiagonals are joined than there is room for.
        self._near = _NEAR_BLOCKS if min(rows, columns) >= 2 * _BLOCK else max(rows, columns)

    def wanted(self, at_i: np.ndarray, at_j: np.ndarray) -> np.ndarray:
        """Return u of some elements."""
        return self._weight_MN[at_i, at_j] + (self._fed_MN[at_i, at_j] + self._fed_NM[at_j, at_i])

    def feed(self, rebuilt: np.ndarray, at_i: np.ndarray, at_j: np.ndarray) -> None:
        """Feed what is left over of some elements, in their order, into those near by."""
        library = kernels.native()
        shares_MM, shares_NN = self._shares
        rows, columns = self._weight_MN.shape
        if library is not None:
            sizes = (len(at_i), rows, columns, _BLOCK, self._near)
            arrays = map(kernels.pointer, (rebuilt, at_i, at_j))
            library.bivlm_feed_both(self._weight_at, *arrays, *self._fed_at, *map(ctypes.c_int64, sizes))
            return
        for i, j, q in zip(at_i.tolist(), at_j.tolist(), rebuilt, strict=True):
            before = self._fed_MN[i, j]
            error = self._weight_MN[i, j] + (before + self._fed_NM[j, i]) - q
            self._errors_NM[j, i], self._products_MN[i, j] = error, error - before
            later_j, later_i = (slice(at + 1, (at // _BLOCK + self._near) * _BLOCK) for at in (j, i))
            self._fed_MN[i, later_j] -= error * shares_NN[j, later_j]
            self._fed_NM[j, later_i] -= self._products_MN[i, j] * shares_MM[i, later_i]

    def feed_farther(self, begin: int, end: int, map_all: Map) -> None:
        """Feed the blocks whose last element lies on the antidiagonals from `begin` to `end` into all farther ones."""
        for diagonal in range(begin, end):
            list(map_all(self._feed_block, self._complete.get(diagonal, ())))

    def _feed_block(self, corner: tuple[int, int]) -> None:
        shares_MM, shares_NN = self._shares
        top, left = corner
        rows, columns = slice(top, top + _BLOCK), slice(left, left + _BLOCK)
        farther_i, farther_j = (slice(at + self._near * _BLOCK, None) for at in (top, left))
        # Blocks of other rows feed other elements of `fed_MN`, blocks of other columns others of `fed_NM`.
        kernels.feed_rows(self._fed_MN[rows, farther_j], self._errors_NM[columns, rows], shares_NN[columns, farther_j])
        kernels.feed_rows(
            self._fed_NM[columns, farther_i], self._products_MN[rows, columns], shares_MM[rows, farther_i]
        )


def _bands(
    running_NBT: np.ndarray, shares_NN: np.ndarray | None, groups: list[int], code: TrellisCode, levels: np.ndarray
) -> list[np.ndarray]:
    """Quantize bands of equal heights, some columns of each at a time; return the symbols of each band.

    What is left over of columns is fed into later ones.
    """
    columns, bands, rows = running_NBT.shape
    flat_NT = running_NBT.reshape(columns, -1)
    errors_NT = np.empty_like(flat_NT)
    symbols_NBT = np.empty(running_NBT.shape, np.uint8)
    ends = np.cumsum(groups)
    begin = block = last = 0
    for width in groups:
        end = begin + width
        if begin == last:  # a block ends with a tile, at its last column or just behind
            block, last = begin, int(ends[min(int(np.searchsorted(ends, begin + _BLOCK)), len(ends) - 1)])
        x_BT = running_NBT[begin:end].transpose(1, 0, 2).reshape(bands, -1)
        found_BT, indices_BT = trellis.search(x_BT, code, levels)
        symbols_NBT[begin:end] = found_BT.reshape(bands, width, rows).transpose(1, 0, 2)
        if shares_NN is not None:
            rebuilt_WT = levels[indices_BT.reshape(bands, width, rows).transpose(1, 0, 2)].reshape(width, -1)
            for at in range(begin, end):
                np.subtract(flat_NT[at], rebuilt_WT[at - begin], out=errors_NT[at])
                kernels.feed_rows(flat_NT[at + 1 : last], shares_NN[at : at + 1, at + 1 : last], errors_NT[at : at + 1])
            if last == end:
                kernels.feed_rows(flat_NT[end:], shares_NN[block:end, end:], errors_NT[block:end])
        begin = end
    return [np.concatenate(_by_tile(symbols_NBT[:, band], groups)) for band in range(bands)]


def _by_tile(symbols_NT: np.ndarray, groups: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(groups)
    return [symbols_NT[end - width : end].reshape(-1) for end, width in zip(ends, groups, strict=True)]


def _pieces(
    wanted: np.ndarray,
    weights: np.ndarray,
    lengths: list[int],
    code: TrellisCode,
    levels: np.ndarray,
    map_all: Map,
    threads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize the tiles of some antidiagonals; returns their symbols and what they stand for, one after another."""
    parts, at = [], 0
    for length, same in groupby(lengths):
        count = len(list(same))
        tiles_RT, weights_RT = (each[at : at + length * count].reshape(count, length) for each in (wanted, weights))
        weights_RT = (weights_RT / weights_RT.mean(1, keepdims=True)).astype(np.float32)
        cuts = [count * part // threads for part in range(threads + 1)]
        parts += [(tiles_RT[begin:end], weights_RT[begin:end]) for begin, end in pairwise(cuts) if begin < end]
        at += length * count
    found = list(map_all(lambda part: trellis.search(part[0], code, levels, part[1]), parts))
    symbols, indices = (np.concatenate([each[which].reshape(-1) for each in found]) for which in (0, 1))
    return symbols, levels[indices]
