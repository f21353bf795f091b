"""Products with a weight whose symbols lie in planes, straight from them (`kernels/plane_product.c`).

Sums are float32. Each has an order of its own: it is the same however many threads, rows and tokens there are,
except that salient weights beside the symbols are added up four by four where there is a single token.
Activations may be rounded to eight bits, with a scale for the columns of each word: their products with
levels, rounded as finely, are added up exactly within a word, then in float32.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from bivlm import kernels
from bivlm.packing.radix import planes_of, radix

# What the kernel calls an alphabet: the bits of a symbol, or its size and ten, where words are numbers in that base;
# and the symbols of a word, or of 32 bits.
_BITS = {2: (1, 32), 4: (2, 16), 8: (3, 16), 16: (4, 8), 256: (8, 4)}
_KINDS = _BITS | {base: (base + 10, radix(base).per_word) for base in (6, 10, 12, 14)}
_LARGEST_BYTE = 127
_CACHE_LINE = 64
_PLANES = 3
_OF_PLANES = {"planes": ctypes.c_void_p, "readable": ctypes.c_int64, "row_bytes": ctypes.c_int64}
_SALIENT_TOKENS = 8
MOST_COLUMNS = 1 << 16  # where there are salient weights


@dataclass(frozen=True)
class Levels:
    """What symbols stand for, float32 (alphabet,): `table`, and beside it, if given, each row's scale times `by_row`.

    `row_scales` are float16 (M,), as bytes.
    """

    table: np.ndarray
    by_row: np.ndarray | None = None
    row_scales: np.ndarray | None = None


@dataclass(frozen=True)
class Groups:
    """A scale and a zero point of each `width` columns of a row, float16 (M, G) as bytes, and uint8 (M, G)."""

    width: int
    scales: np.ndarray
    zeros: np.ndarray


@dataclass(frozen=True)
class Salient:
    """Weights beside the symbols: their row's scale times one of `centres`, float32 (L,).

    Attributes:
        centres: float32 (L,).
        marks: uint8 (L,), the symbol at the place of a weight with each level.
        begins: uint32 (M L + 1), where each row's and level's columns begin.
        columns: uint16 (S,).
    """

    centres: np.ndarray
    marks: np.ndarray
    begins: np.ndarray
    columns: np.ndarray


@cache
def lanes(in_bytes: bool = False) -> int:
    """Return how many floats this machine's vectors have, 16 or 8, for activations of bytes or of floats; 0 without."""
    library = kernels.native()
    return 0 if library is None else library.bivlm_plane_lanes(ctypes.c_int(in_bytes))


def can_multiply(alphabet: int, width: int = 0) -> bool:
    """Return whether this machine multiplies by a weight of this alphabet, in groups of `width` columns, if any."""
    return lanes() > 0 and reads(alphabet, width)


def reads(alphabet: int, width: int = 0) -> bool:
    """Return whether the format is one that products read, on whatever machine; see `can_multiply`."""
    return alphabet in _KINDS and width % _KINDS[alphabet][1] == 0


class _Product(ctypes.Structure):
    """`PlaneProduct` of `kernels/plane_product.c`."""

    _fields_: ClassVar = [
        *((name, ctypes.c_int64) for name in ("kind", "lanes", "tokens", "blocks")),
        *((name, kind * _PLANES) for name, kind in _OF_PLANES.items()),
        *((name, ctypes.c_void_p) for name in ("inputs", "table", "by_row", "row_scales", "scales", "zeros")),
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "first_group", "group")),
        ("levels", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begins", "columns", "centres", "marks", "plain")),
        ("plain_apart", ctypes.c_int64),
        ("outputs", ctypes.c_void_p),
        ("out_apart", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bytes", "input_scales", "token_sums", "level_bytes")),
        *((name, ctypes.c_float) for name in ("level_unit", "lowest_level")),
    ]


def product(
    symbols: np.ndarray,
    alphabet: int,
    shape: tuple[int, int],
    x_TN: np.ndarray,
    means: Levels | Groups,
    salient: Salient | None = None,
    *,
    in_bytes: bool = False,
) -> np.ndarray:
    """Return ``x W^T``, float32 (T, M), of the weight W (M, N) in the bytes of all planes; x is float32 (T, N).

    `salient` weights take their rows' scales from `means`. With `in_bytes` activations are rounded where there are
    products for that (symbols that are bits, levels that rows share); salient weights are multiplied by x as it is.
    """
    library = kernels.native()
    assert library is not None
    (rows, columns), tokens = shape, len(x_TN)
    if alphabet not in _BITS or (isinstance(means, Levels) and means.by_row is not None):
        in_bytes = False
    (kind, steps), width = _KINDS[alphabet], lanes(in_bytes)
    y_TM = np.empty((tokens, rows), np.float32)
    arrays = {"outputs": y_TM}
    if in_bytes:
        ordered, scales, sums = _ordered_bytes(x_TN, steps, width)
        arrays |= {"bytes": ordered, "input_scales": scales}
    else:
        ordered, sums = _ordered(x_TN, steps, width)
        arrays |= {"inputs": ordered}
    job = _Product(kind, width, tokens, ordered.shape[1], out_apart=rows)
    for number, plane in enumerate(planes_of(symbols, alphabet, *shape)):
        job.planes[number], job.row_bytes[number] = plane.ctypes.data, plane.shape[1]
        job.readable[number] = symbols.ctypes.data + symbols.nbytes - plane.ctypes.data
    if isinstance(means, Groups):
        first_group, group, job.groups = _group_places(columns, means.width, steps, width)
        arrays |= {"table": _sixteen(np.arange(alphabet)), "scales": means.scales, "zeros": means.zeros}
        arrays |= {"sums": sums, "first_group": first_group, "group": group}
    else:
        arrays |= {"table": _sixteen(means.table)}
        if in_bytes:
            levels, job.level_unit, job.lowest_level = _level_bytes(tuple(means.table.tolist()))
            arrays |= {"level_bytes": levels, "token_sums": sums.sum((1, 2))}
        if means.row_scales is not None:
            arrays |= {"row_scales": means.row_scales}
        if means.by_row is not None:
            arrays |= {"by_row": _sixteen(means.by_row)}
    if salient is not None:
        plain_NT = _plain(x_TN)
        job.levels, job.plain_apart = len(salient.centres), plain_NT.shape[1]
        arrays |= {"begins": salient.begins, "columns": salient.columns, "plain": plain_NT}
        arrays |= {"centres": salient.centres, "marks": salient.marks}
    for name, array in arrays.items():
        setattr(job, name, kernels.pointer(array))

    def part(begin: int, end: int) -> int:
        return library.bivlm_plane_product(ctypes.byref(job), ctypes.c_int64(begin), ctypes.c_int64(end))

    if any(kernels.in_parts(part, rows, rows * columns, torch.get_num_threads())):
        raise MemoryError(f"no memory for a product with a weight of {rows} x {columns}")
    return y_TM


def _sixteen(numbers: np.ndarray) -> np.ndarray:
    """Return them again and again: where a symbol has fewer than four bits, those above it belong to others."""
    return np.resize(numbers, 16).astype(np.float32)


def _aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Return an array that begins with a cache line: vectors of one that lies in two take twice as long to read."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(nbytes + _CACHE_LINE, np.uint8)
    begin = -room.ctypes.data % _CACHE_LINE
    return room[begin : begin + nbytes].view(dtype).reshape(shape)


def _ordered(x_TN: np.ndarray, steps: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs as words are read: (T, blocks, steps, lanes), zeros at the end; and their sums over steps."""
    tokens, columns = x_TN.shape
    blocks = -(-columns // (steps * width))
    padded = np.zeros((tokens, blocks * width * steps), np.float32)
    padded[:, :columns] = x_TN
    ordered = _aligned((tokens, blocks, steps, width), np.float32)
    ordered[:] = padded.reshape(tokens, blocks, width, steps).swapaxes(2, 3)
    return ordered, ordered.sum(2)


def _ordered_bytes(x_TN: np.ndarray, steps: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return inputs of eight bits as words are read, int8 (T, blocks, steps / 4, lanes, 4): every fourth column's.

    And the scales of words, and the sums of what they stand for, float32 (T, blocks, lanes).
    """
    library, (tokens, columns) = kernels.native(), x_TN.shape
    assert library is not None
    x_TN = np.ascontiguousarray(x_TN)
    blocks = -(-columns // (steps * width))
    ordered = _aligned((tokens, blocks, steps // 4, width, 4), np.int8)
    scales, sums = np.empty((2, tokens, blocks, width), np.float32)
    sizes = map(ctypes.c_int64, (tokens, columns, steps, width, blocks))
    library.bivlm_order_bytes(
        kernels.pointer(x_TN), *sizes, kernels.pointer(ordered), kernels.pointer(scales), kernels.pointer(sums)
    )
    return ordered, scales, sums


@cache
def _level_bytes(levels: tuple[float, ...]) -> tuple[np.ndarray, float, float]:
    """Return levels as uint8 (16,), their unit and the lowest level.

    Of the units for which the span of all levels is 64 to 127 the one that rounds levels least.
    """
    exact = np.array(levels, np.float64)
    lowest, span = float(exact.min()), float(np.ptp(exact))
    if span == 0:
        return np.zeros(16, np.uint8), 0.0, lowest
    spans_U = np.arange(64, _LARGEST_BYTE + 1)
    scaled_UL = (exact - lowest) / span * spans_U[:, None]
    best = int(np.argmin(np.abs(scaled_UL - np.rint(scaled_UL)).max(1) / spans_U))
    return _sixteen(np.rint(scaled_UL[best])).astype(np.uint8), span / int(spans_U[best]), lowest


@cache
def _group_places(columns: int, width: int, steps: int, lanes: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the first group of each block, those of its words from there on, int32, and how many groups there are."""
    blocks = -(-columns // (steps * lanes))
    groups = -(-columns // width)
    group = np.minimum(np.arange(blocks * lanes, dtype=np.int32).reshape(blocks, lanes) * steps // width, groups - 1)
    return np.ascontiguousarray(group[:, 0]), group - group[:, :1], groups


def _plain(x_TN: np.ndarray) -> np.ndarray:
    """Return inputs column by column, (N, T), with zeros in place of tokens that are not there if there are several."""
    tokens, columns = x_TN.shape
    if tokens == 1:
        return np.ascontiguousarray(x_TN.reshape(columns, 1))
    plain_NT = np.zeros((columns, -(-tokens // _SALIENT_TOKENS) * _SALIENT_TOKENS), np.float32)
    plain_NT[:, :tokens] = x_TN.T
    return plain_NT
