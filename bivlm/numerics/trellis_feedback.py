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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bivlm import kernels
from bivlm.numerics import trellis
from bivlm.numerics.trellis import TrellisCode, level_indices
from bivlm.numerics.trellis_tiles import Tiles

_BLOCK = 64  # columns whose errors are fed into all later ones together


def one_sided(
    weight_MN: np.ndarray, shares_NN: np.ndarray | None, code: TrellisCode, levels: np.ndarray, threads: int = 1
) -> np.ndarray:
    """Return the symbols of all tiles, uint8, of a weight of unit variance, float32; `shares` is N, None without H.

    Rows do not feed each other, so that bands are quantized side by side, in as many threads.
    """
    tiles = Tiles(weight_MN.shape, 1)
    quantize = _quantizer(code, levels)

    def band(rows: tuple[int, int]) -> np.ndarray:
        running_NT = weight_MN[rows[0] : rows[1]].T.copy()
        if shares_NN is None:
            # Without feedback all tiles are searched at once.
            return _all_at_once(running_NT, tiles.column_groups, quantize)
        return _band(running_NT, shares_NN, tiles.column_groups, quantize)

    with ThreadPoolExecutor(max(1, min(threads, len(tiles.bands)))) as pool:
        return np.concatenate(list(pool.map(band, tiles.bands)))


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
        weights = output_importance_M[at_i] * importance_N[at_j]
        symbols, rebuilt = _pieces(wanted, weights, tiles.pieces(begin, end), code, levels)
        found.append(symbols)
        _feed_both(weight_MN, rebuilt, at_i, at_j, (fed_MN, fed_NM), (strict_MM, strict_NN))
    return np.concatenate(found)


Quantizer = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _quantizer(code: TrellisCode, levels: np.ndarray) -> Quantizer:
    def quantize(x_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        symbols_RT = trellis.search(x_RT, code, levels)
        return symbols_RT, levels[level_indices(symbols_RT, code)]

    return quantize


def _band(running_NT: np.ndarray, shares_NN: np.ndarray, groups: list[int], quantize: Quantizer) -> np.ndarray:
    """Quantize the columns of a band (as rows) one tile after another, and feed what is left over into later ones."""
    columns, rows = running_NT.shape
    found, begin, number = [], 0, 0
    while begin < columns:
        block = begin
        errors = np.empty((0, rows), np.float32)
        while begin < columns and begin - block < _BLOCK:
            end = begin + groups[number]
            symbols, rebuilt = quantize(running_NT[begin:end].reshape(1, -1))
            found.append(symbols.reshape(-1))
            rebuilt_GT = rebuilt.reshape(-1, rows)
            last = min(columns, max(end, block + _BLOCK))
            for column in range(begin, end):
                error_1T = running_NT[column : column + 1] - rebuilt_GT[column - begin]
                errors = np.concatenate([errors, error_1T])
                kernels.feed_rows(
                    running_NT[column + 1 : last], shares_NN[column : column + 1, column + 1 : last], error_1T
                )
            begin, number = end, number + 1
        kernels.feed_rows(running_NT[last:], shares_NN[block:begin, last:], errors)
    return np.concatenate(found)


def _all_at_once(columns_NT: np.ndarray, groups: list[int], quantize: Quantizer) -> np.ndarray:
    found, ends = [], np.cumsum(groups)
    for begin, end, width in zip(ends - groups, ends, groups, strict=True):
        if width == 1 and len(set(groups)) == 1:
            return quantize(columns_NT)[0].reshape(-1)
        found.append(quantize(columns_NT[begin:end].reshape(1, -1))[0].reshape(-1))
    return np.concatenate(found)


def _pieces(
    wanted: np.ndarray, weights: np.ndarray, lengths: list[int], code: TrellisCode, levels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a group of antidiagonals in pieces; returns symbols and what they stand for, one after another."""
    symbols, rebuilt, at = [], [], 0
    for length in lengths:
        piece = slice(at, at + length)
        x_1T, weight_1T = wanted[None, piece], weights[None, piece] / weights[piece].mean()
        found_1T = trellis.search(x_1T, code, levels, weight_1T)
        symbols.append(found_1T[0])
        rebuilt.append(levels[level_indices(found_1T, code)][0])
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
