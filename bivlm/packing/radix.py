"""Fixed-rate codes for symbols of any small alphabet: n symbols make one word, words lie in planes of 8, 4, 2, 1 bits.

Three base-10 symbols, for example, fill 1,000 of the 1,024 values of a 10-bit word: an 8-bit and a 2-bit plane,
3.333 bits per symbol against log2(10) = 3.322. Rows begin on byte boundaries of every plane, so a kernel can start at
any row. Rebuilding is one table look-up per word.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from bivlm import kernels
from bivlm.packing.container import ArrayT, as_array
from bivlm.packing.contents import Contents

_LARGEST_TABLE = 1 << 16
CHUNK_SYMBOLS = 1 << 20


@dataclass(frozen=True)
class Radix:
    """How symbols of an alphabet of `symbols` are grouped: `per_word` of them in a word of `bits` bits."""

    symbols: int
    per_word: int
    bits: int

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes, lowest bits of the word first."""
        return (8,) * (self.bits // 8) + tuple(width for width in (4, 2, 1) if self.bits & width)

    def row_words(self, columns: int) -> int:
        """Return words in a row of `columns` symbols."""
        return -(-columns // self.per_word)

    def plane_row_bytes(self, columns: int) -> tuple[int, ...]:
        """Return the bytes of one row in each plane."""
        return tuple(-(-self.row_words(columns) * width // 8) for width in self.planes)

    def nbytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a packed (rows, columns) matrix of symbols."""
        return rows * sum(self.plane_row_bytes(columns))


@cache
def radix(symbols: int) -> Radix:
    """Return the densest grouping with at most 65,536 words; whole bytes and short words break ties."""
    choices = []
    per_word = 1
    while symbols**per_word <= _LARGEST_TABLE:
        bits = (symbols**per_word - 1).bit_length()
        choices.append((bits / per_word, bits % 8 != 0, per_word, bits))
        per_word += 1
    _, _, per_word, bits = min(choices)
    return Radix(symbols, per_word, bits)


def planes_of(content: ArrayT, alphabet: int, rows: int, columns: int) -> list[ArrayT]:
    """Return the planes (rows, row bytes), views of the bytes of a packed matrix of symbols."""
    planes, begin = [], 0
    for row_bytes in radix(alphabet).plane_row_bytes(columns):
        planes.append(content[begin : begin + rows * row_bytes].reshape(rows, row_bytes))
        begin += rows * row_bytes
    return planes


def pack_symbols(symbols_MN: torch.Tensor, alphabet: int) -> list[np.ndarray]:
    """Pack uint8 symbols (M, N), each below `alphabet`, into planes: one uint8 array (M, row bytes) per plane."""
    code = radix(alphabet)
    rows, columns = symbols_MN.shape
    words = code.row_words(columns)
    padded = words * code.per_word
    if padded != columns:
        symbols_MN = torch.nn.functional.pad(symbols_MN, (0, padded - columns))
    return _split_planes(_words(symbols_MN.contiguous().view(rows, words, code.per_word), code), code)


def unpack_values(planes: list[torch.Tensor], table_SV: torch.Tensor, columns: int) -> torch.Tensor:
    """Look symbols up while unpacking: ``table[symbol]`` for every symbol, (M, columns), dtype of the table.

    `planes` are uint8 (M, row bytes), as `pack_symbols` made them; `table_SV` has one value per symbol.
    """
    code = radix(len(table_SV))
    rows, words = planes[0].shape[0], code.row_words(columns)
    word_table = table_SV[_word_symbols(code.symbols, code.per_word, code.bits).to(table_SV.device)].contiguous()
    if planes[0].device.type == "cpu" and (library := kernels.native()) is not None:
        return _look_up_native(library, planes, word_table, code, columns)
    out = torch.empty(rows, words * code.per_word, dtype=table_SV.dtype, device=planes[0].device)
    step = max(1, CHUNK_SYMBOLS // max(1, out.shape[1]))
    for begin in range(0, rows, step):
        chunk = _join_planes([plane[begin : begin + step] for plane in planes], code, words)
        target = out[begin : begin + step]
        _gather_rows(word_table, chunk, target.view(-1, code.per_word))
    return out if out.shape[1] == columns else out[:, :columns].contiguous()


def _look_up_native(
    library: ctypes.CDLL, planes: list[torch.Tensor], word_table: torch.Tensor, code: Radix, columns: int
) -> torch.Tensor:
    out, whole = torch.empty(len(planes[0]), columns, dtype=word_table.dtype), ctypes.c_int64
    arrays = [np.ascontiguousarray(plane.numpy()) for plane in planes]

    def part(begin: int, end: int) -> None:
        library.bivlm_look_up_words(
            *_described(arrays, code),
            *map(whole, (begin, end, columns, code.per_word)),
            ctypes.c_void_p(word_table.data_ptr()),
            whole(word_table.element_size()),
            ctypes.c_void_p(out.data_ptr()),
        )

    kernels.in_parts(part, len(out), out.numel(), torch.get_num_threads())
    return out


def _described(planes: Sequence[np.ndarray], code: Radix) -> tuple[Any, Any, Any, ctypes.c_int64]:
    """Return where planes lie, the bytes of a row and the bits of a word in each, and how many they are."""
    count, whole = len(planes), ctypes.c_int64
    return (
        (ctypes.c_void_p * count)(*(plane.ctypes.data for plane in planes)),
        (whole * count)(*(plane.shape[1] for plane in planes)),
        (whole * count)(*code.planes),
        whole(count),
    )


def symbols_at(planes: Sequence[ArrayT], alphabet: int, columns: int, positions_S: ArrayT) -> ArrayT:
    """Return the symbols, int64 (S,), at flat row-major `positions_S` of a packed (M, columns) matrix."""
    code = radix(alphabet)
    library = kernels.native()
    if library is not None and (isinstance(positions_S, np.ndarray) or positions_S.device.type == "cpu"):
        arrays = [np.ascontiguousarray(as_array(plane)) for plane in planes]
        positions, whole = np.ascontiguousarray(as_array(positions_S), np.int64), ctypes.c_int64
        found = np.empty(len(positions), np.int64)
        numbers = map(whole, (columns, code.per_word, code.symbols))
        at = kernels.pointer
        library.bivlm_symbols_at(*_described(arrays, code), *numbers, at(positions), whole(len(found)), at(found))
        return found if isinstance(positions_S, np.ndarray) else torch.from_numpy(found)
    step = CHUNK_SYMBOLS >> 2
    chunks = [
        _symbols_at(planes, code, columns, positions_S[begin : begin + step])
        for begin in range(0, max(1, len(positions_S)), step)
    ]
    return np.concatenate(chunks) if isinstance(positions_S, np.ndarray) else torch.cat(chunks)


def _symbols_at(planes: Sequence[ArrayT], code: Radix, columns: int, positions: ArrayT) -> ArrayT:
    rows, column = positions // columns, positions % columns
    word_index = column // code.per_word
    words, shift = 0 * rows, 0
    for plane, width in zip(planes, code.planes, strict=True):
        bit = word_index * width
        words = words + (((plane[rows, bit // 8] >> (bit % 8)) & ((1 << width) - 1)) << shift)
        shift += width
    return words // code.symbols ** (column % code.per_word) % code.symbols


def read_symbols(planes: Sequence[np.ndarray], alphabet: int, columns: int) -> np.ndarray:
    """Return all symbols of a packed (M, columns) matrix, without torch: uint8 (M, columns)."""
    code = radix(alphabet)
    symbols = _symbols_of_words(code.symbols, code.per_word, code.bits)
    return symbols[_read_words(planes, code, code.row_words(columns))].reshape(len(planes[0]), -1)[:, :columns]


def count_symbols(planes: Sequence[np.ndarray], alphabet: int, columns: int) -> np.ndarray:
    """Return how often each symbol occurs in a packed (M, columns) matrix, int64 (alphabet,)."""
    code = radix(alphabet)
    words = code.row_words(columns)
    of_words = np.zeros(1 << code.bits, np.int64)
    for chunk in _word_chunks(planes, code, words):
        of_words += np.bincount(chunk.reshape(-1), minlength=len(of_words))
    symbols = _symbols_of_words(code.symbols, code.per_word, code.bits)
    counts = np.sum([np.bincount(place, of_words, minlength=alphabet) for place in symbols.T], axis=0).astype(np.int64)
    counts[0] -= len(planes[0]) * (words * code.per_word - columns)  # zeros behind the end of a row
    return counts


def check_symbols(
    contents: Contents,
    planes: Sequence[np.ndarray],
    alphabet: int,
    columns: int,
    what: str,
    first: int | None = None,
) -> int:
    """Return how many symbols are `first` or more (`first` above 0; without it 0), after checking all of them.

    Raises `InputError` unless `planes` hold what `pack_symbols` writes of (M, columns) symbols below `alphabet`: words
    that symbols make, and zeros where a row's last word and bytes are not full.
    """
    code = radix(alphabet)
    words = code.row_words(columns)
    last, shift = np.zeros(len(planes[0]), np.int32), 0
    for plane, width in zip(planes, code.planes, strict=True):
        used = (words - 1) * width % 8
        # The last word of a row, and with it all that stands behind it in its byte.
        ends = plane[:, -1].astype(np.int32) >> used
        contents.require(int(ends.max()) < 1 << width, f"{what}: bits behind the end of a row are set, expected zeros")
        last += ends << shift
        shift += width
    rest, limit = columns % code.per_word or code.per_word, code.symbols**code.per_word
    largest = int(last.max())
    contents.require(
        largest < code.symbols**rest, f"{what}: symbols behind the end of a row are {largest}, expected zeros"
    )
    found = 0
    if first is None and limit == 1 << code.bits:
        return found
    counts = None
    if first is not None:
        counts = (_symbols_of_words(code.symbols, code.per_word, code.bits) >= first).sum(-1, dtype=np.uint8)
    for chunk in _word_chunks(planes, code, words):
        largest = int(chunk.max())
        contents.require(
            largest < limit, f"{what}: word {largest}, expected one of {code.per_word} symbols below {alphabet}"
        )
        if counts is not None:
            found += int(counts[chunk].sum(dtype=np.int64))
    return found


def _word_chunks(planes: Sequence[np.ndarray], code: Radix, words: int) -> Iterator[np.ndarray]:
    """Yield words (rows, words) of a few rows at a time."""
    step = max(1, CHUNK_SYMBOLS // (words * code.per_word))
    for begin in range(0, len(planes[0]), step):
        yield _read_words([plane[begin : begin + step] for plane in planes], code, words)


def _read_words(planes: Sequence[np.ndarray], code: Radix, count: int) -> np.ndarray:
    """Return words (rows, count) from their planes, without torch."""
    if code.planes == (8,):
        return planes[0]
    words, shift = np.zeros((len(planes[0]), count), np.int32), 0
    for plane, width in zip(planes, code.planes, strict=True):
        parts = (plane[..., None] >> np.arange(0, 8, width, dtype=np.uint8)) & ((1 << width) - 1)
        words |= parts.reshape(len(plane), -1)[:, :count].astype(np.int32) << shift
        shift += width
    return words


def _words(symbols: torch.Tensor, code: Radix) -> torch.Tensor:
    """Return words (rows, words) from symbols (rows, words, per_word): symbol i has place value ``alphabet^i``."""
    if code.symbols == 2 and code.per_word == 8:
        # Multiplying moves the lowest bit of byte i to bit 56 + i; nothing else reaches the top byte.
        gathered = symbols.view(torch.int64).squeeze(-1) * 0x0102040810204080
        return (gathered >> 56) & 0xFF
    if code.symbols == 4 and code.per_word == 4:
        gathered = symbols.view(torch.int32).squeeze(-1) * ((1 << 24) | (1 << 18) | (1 << 12) | (1 << 6))
        return (gathered >> 24) & 0xFF
    words = symbols[..., 0].to(torch.int32)
    for i in range(1, code.per_word):
        words = words.add_(symbols[..., i], alpha=code.symbols**i)
    return words


def _split_planes(words: torch.Tensor, code: Radix) -> list[np.ndarray]:
    planes, shift = [], 0
    for width in code.planes:
        part = ((words >> shift) & ((1 << width) - 1)).to(torch.uint8)
        planes.append(_pack_small(part, width).cpu().numpy())
        shift += width
    return planes


def _pack_small(values: torch.Tensor, width: int) -> torch.Tensor:
    """Pack values (rows, count) below 2^width, width 1, 2, 4 or 8, into bytes (rows, ...), lowest bits first."""
    if width == 8:
        return values
    per_byte = 8 // width
    short = -values.shape[1] % per_byte
    if short:
        values = torch.nn.functional.pad(values, (0, short))
    grouped = values.view(values.shape[0], -1, per_byte)
    packed = grouped[..., 0].clone()
    for i in range(1, per_byte):
        packed |= grouped[..., i] << (i * width)
    return packed


def _unpack_small(packed: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """Undo `_pack_small`: (rows, count), uint8."""
    if width == 8:
        return packed
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    values = (packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return values.view(packed.shape[0], -1)[:, :count]


def _join_planes(planes: list[torch.Tensor], code: Radix, count: int) -> torch.Tensor:
    """Return words (rows, count) from their planes; uint8 where the word is one byte, int32 otherwise."""
    if code.planes == (8,):
        return planes[0]
    words, shift = _unpack_small(planes[0], code.planes[0], count).to(torch.int32), code.planes[0]
    for plane, width in zip(planes[1:], code.planes[1:], strict=True):
        words.bitwise_or_(_unpack_small(plane, width, count).to(torch.int32) << shift)
        shift += width
    return words


@cache
def _symbols_of_words(symbols: int, per_word: int, bits: int) -> np.ndarray:
    """Return the symbols, uint8 (2^bits, per_word), of every word; modulo the alphabet where no symbols make a word."""
    words = np.arange(1 << bits)[:, None]
    return (words // symbols ** np.arange(per_word) % symbols).astype(np.uint8)


@cache
def _word_symbols(symbols: int, per_word: int, bits: int) -> torch.Tensor:
    """Return the symbols of every word as a tensor that can be an index."""
    return torch.from_numpy(_symbols_of_words(symbols, per_word, bits)).long()


def _gather_rows(table: torch.Tensor, words: torch.Tensor, out: torch.Tensor) -> None:
    """Write ``out[i] = table[words[i]]`` for rows of a few values."""
    row_bytes = table.shape[1] * table.element_size()
    whole = {2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}.get(row_bytes)
    if words.device.type != "cpu" or whole is None:
        torch.index_select(table, 0, words.reshape(-1).to(torch.int32), out=out)
        return
    # Moving a row as one number of its size is several times faster than as a row of bfloat16.
    source: np.ndarray = table.view(torch.uint8).numpy().reshape(-1).view(whole)
    target: np.ndarray = out.view(torch.uint8).numpy().reshape(-1).view(whole)
    np.take(source, words.reshape(-1).numpy(), out=target, mode="clip")
