"""Two-bit symbols whose meaning changes from row to row and block to block: a table of eight levels for each.

Of the eight levels a weight can have four, by the kind of its column (salient or not, low band or high band): its
symbol is looked up at ``8 * block + 4 * kind + symbol`` of its row's table. Shared by the codecs of binary methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bivlm.numerics.half_scales import from_halves
from bivlm.packing.container import ArrayT, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.radix import check_symbols, pack_symbols, radix, read_symbols, unpack_values

SYMBOLS = 4
LEVELS = 8  # of a row and block: four symbols, two kinds of column
CHUNK_WEIGHTS = 1 << 18  # looked up together; an index is eight bytes per weight


def two_bit_nbytes(rows: int, columns: int) -> int:
    """Return the bytes of a (rows, columns) matrix of symbols; every row begins on a byte."""
    return radix(SYMBOLS).nbytes(rows, columns)


def pack_two_bits(symbols_MN: torch.Tensor) -> np.ndarray:
    """Pack uint8 symbols (M, N) below 4 into uint8 (two_bit_nbytes,)."""
    if symbols_MN.shape[1] == 0:
        return np.empty(0, np.uint8)
    (plane,) = pack_symbols(symbols_MN, SYMBOLS)
    return plane.reshape(-1)


def unpack_two_bits(
    packed: torch.Tensor, header: Header, index: int, columns: int, rows: slice = slice(None)
) -> torch.Tensor:
    """Return symbols uint8 (rows, columns) of section `index`, M rows in all."""
    if columns == 0:
        count = len(range(*rows.indices(header.shape[0])))
        return torch.empty(count, 0, dtype=torch.uint8, device=packed.device)
    plane = section(packed, header, index).view(header.shape[0], -1)[rows]
    return unpack_values([plane], torch.arange(SYMBOLS, dtype=torch.uint8, device=packed.device), columns)


def read_two_bits(packed: np.ndarray, header: Header, index: int, columns: int, rows: slice) -> np.ndarray:
    """Return the result of `unpack_two_bits`, without torch."""
    plane = section(packed, header, index).reshape(header.shape[0], -1)[rows]
    return read_symbols([plane], SYMBOLS, columns) if columns else np.empty((len(plane), 0), np.uint8)


def read_rows(
    packed: torch.Tensor, header: Header, index: int, exponent: int, shape: Sequence[int], rows: slice = slice(None)
) -> torch.Tensor:
    """Return float32 (rows, *shape) of section `index`, where each of M rows has a float16 tensor of that shape."""
    chunk = section(packed, header, index).view(header.shape[0], -1)[rows]
    return from_halves(chunk.reshape(-1), exponent).view(-1, *shape)


def look_up(table_MX: torch.Tensor, base_N: torch.Tensor, symbols_MN: torch.Tensor) -> torch.Tensor:
    """Return ``table[m, base[n] + symbol[m, n]]``, (M, N); differentiable in the table.

    `table_MX` has `LEVELS` entries per block in each row, `base_N` int64 points to the first of a column's four.
    """
    return table_MX.gather(1, base_N + symbols_MN)


def row_chunks(shape: tuple[int, int]) -> Iterator[slice]:
    """Yield slices of an even number of rows (but the last) with some `CHUNK_WEIGHTS` weights each."""
    step = 2 * max(1, CHUNK_WEIGHTS // (2 * shape[1]))
    for begin in range(0, shape[0], step):
        yield slice(begin, min(begin + step, shape[0]))


def blocks_of(columns: int, block: int) -> int:
    """Return how many blocks of `block` columns there are; the last one may be narrower."""
    return -(-columns // block)


def base_of(kinds_N: torch.Tensor, block: int) -> torch.Tensor:
    """Return where a column's four levels begin in a row's table, int64 (N,); `kinds_N` are 0 or 1."""
    columns = torch.arange(len(kinds_N), device=kinds_N.device)
    return LEVELS * (columns // block) + SYMBOLS * kinds_N.to(torch.int64)


def columns_nbytes(columns: int) -> int:
    """Return the bytes of a bitmap of columns."""
    return -(-columns // 8)


def pack_columns(chosen_N: torch.Tensor) -> np.ndarray:
    """Return a bitmap of columns, uint8 (ceil(N / 8),)."""
    return np.packbits(chosen_N.cpu().numpy(), bitorder="little")


def read_columns(packed: ArrayT, header: Header, index: int) -> np.ndarray:
    """Undo `pack_columns` for section `index`, without torch: bool (N,)."""
    bits = as_array(section(packed, header, index))
    return np.unpackbits(bits, count=header.shape[1], bitorder="little").astype(bool)


def unpack_columns(packed: torch.Tensor, header: Header, index: int) -> torch.Tensor:
    """Undo `pack_columns` for section `index`: bool (N,), on the device of `packed`."""
    return torch.from_numpy(read_columns(packed, header, index)).to(packed.device)


def check_two_bits(contents: Contents, index: int, columns: int, what: str) -> None:
    """Raise `InputError` unless section `index`, of the right length, holds rows of so many two-bit symbols."""
    if columns:
        plane = contents.section(index).reshape(contents.header.shape[0], -1)
        check_symbols(contents, [plane], SYMBOLS, columns, what)


def entropy(counts: Sequence[int] | np.ndarray) -> float:
    """Return the bits of the best code for symbols that occur `counts` times, for all of them together."""
    counts = np.asarray(counts, np.float64)
    counts = counts[counts > 0]
    return float((counts * (math.log2(counts.sum()) - np.log2(counts))).sum()) if len(counts) else 0.0
