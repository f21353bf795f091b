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
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
from more_itertools import divide

from bivlm import kernels
from bivlm.numerics import trellis
from bivlm.numerics.trellis import TrellisCode
from bivlm.numerics.trellis_tiles import Tiles

_BLOCK = 64  # columns whose errors are fed into all later ones together


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
    with ThreadPoolExecutor(max(1, threads)) as pool:
        return np.concatenate([symbols for found in pool.map(some, filter(None, groups)) for symbols in found])


def two_sided(
    weight_MN: np.ndarray,
    output_shares_MM: np.ndarray,
    shares_NN: np.ndarray,
    output_importance_M: np.ndarray,
    importance_N: np.ndarray,
    code: TrellisCode,
    levels: np.ndarray,
) -> np.ndarray:
    """Return the symbols of all tiles, uint8, of a weight of unit variance, float32.

    Importances are the ``1 / U_ii^2`` of both sides: within a tile a squared error counts by their product.
    """
    tiles = Tiles(weight_MN.shape, 2)
    rows, columns = weight_MN.shape
    fed_MN = np.zeros(weight_MN.shape, np.float32)  # sum F N_H over the columns before
    fed_NM = np.zeros((columns, rows), np.float32)  # the same by outputs, transposed
    strict_MM, strict_NN = np.triu(output_shares_MM, 1), np.triu(shares_NN, 1)
    found = []
    for begin, end in tiles.diagonal_groups:
        firsts = [(tiles.first_row(d), tiles.diagonal_length(d)) for d in range(begin, end)]
        at_i = np.concatenate([np.arange(first, first + length) for first, length in firsts])
        at_j = np.repeat(np.arange(begin, end), [length for _, length in firsts]) - at_i
        wanted = weight_MN[at_i, at_j] - (fed_MN[at_i, at_j] + fed_NM[at_j, at_i])
        weights = output_importance_M[at_i].astype(np.float64) * importance_N[at_j]
        symbols, rebuilt = _pieces(wanted, weights, tiles.pieces(begin, end), code, levels)
        found.append(symbols)
        _feed_both(weight_MN, rebuilt, at_i, at_j, (fed_MN, fed_NM), (strict_MM, strict_NN))
    return np.concatenate(found)


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
            block, last = begin, int(ends[min(np.searchsorted(ends, begin + _BLOCK), len(ends) - 1)])
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
    wanted: np.ndarray, weights: np.ndarray, lengths: list[int], code: TrellisCode, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a group of antidiagonals in pieces; returns symbols and what they stand for, one after another."""
    symbols, rebuilt, at = [], [], 0
    for length in lengths:
        piece = slice(at, at + length)
        x_1T, weight_1T = wanted[None, piece], (weights[None, piece] / weights[piece].mean()).astype(np.float32)
        found_1T, indices_1T = trellis.search(x_1T, code, levels, weight_1T)
        symbols.append(found_1T[0])
        rebuilt.append(levels[indices_1T[0]])
        at += length
    return np.concatenate(symbols), np.concatenate(rebuilt)


def _feed_both(
    weight_MN: np.ndarray,
    rebuilt: np.ndarray,
    at_i: np.ndarray,
    at_j: np.ndarray,
    fed: tuple[np.ndarray, np.ndarray],
    strict: tuple[np.ndarray, np.ndarray],
) -> None:
    """Feed the errors of some elements, in their order, into later ones of their rows and columns."""
    library = kernels.native()
    (fed_MN, fed_NM), (strict_MM, strict_NN) = fed, strict
    if library is not None:
        at = kernels.pointer
        arrays = (weight_MN, np.ascontiguousarray(rebuilt), at_i, at_j, fed_MN, fed_NM, strict_MM, strict_NN)
        sizes = (len(at_i), *weight_MN.shape)
        library.bivlm_feed_both(*map(at, arrays), *map(ctypes.c_int64, sizes))
        return
    for i, j, q in zip(at_i.tolist(), at_j.tolist(), rebuilt, strict=True):
        error = weight_MN[i, j] - (fed_MN[i, j] + fed_NM[j, i]) - q
        product = error + fed_MN[i, j]
        fed_MN[i, j + 1 :] += error * strict_NN[j, j + 1 :]
        fed_NM[j, i + 1 :] += product * strict_MM[i, i + 1 :]
