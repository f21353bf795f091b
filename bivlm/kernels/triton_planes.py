"""GPU products with a weight whose symbols lie in planes (`bivlm.packing.radix`), straight from them, in Triton.

It is imported on first use, where `bivlm.kernels.gpu` finds Triton. A program takes some rows, some of the columns and
some tokens, reads a word of each row at a time and multiplies its symbols one after another by their inputs. Sums are
float32, in an order that the weight's shape and the number of tokens decide: a product has the same bits each time.
"""

# No `from __future__ import annotations`: Triton's interpreter does not know constexpr by a name in quotes.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bivlm.kernels.gpu import device_of, parts_of_columns

FEW = 4  # tokens that are multiplied without matrix instructions


@dataclass(frozen=True)
class Scaled:
    """Coded weights: a scale and a zero point of each `width` columns of a row, float16 and uint8 (M, G)."""

    width: int
    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class Salient:
    """Weights beside the symbols: their row's scale times one of L centres, in place of what the symbol there says.

    Attributes:
        centres: float32 (2, L): the centres, and what the symbol at the place of each stands for.
        begins: int32 (M L + 1), where each row's and level's columns begin.
        columns: uint16 (S,).
    """

    centres: torch.Tensor
    begins: torch.Tensor
    columns: torch.Tensor


@dataclass(frozen=True)
class PlaneWeight:
    """A weight (M, N) on one device.

    Attributes:
        symbols: uint8, all planes one after another.
        base: size of the alphabet.
        per_word: columns of a word.
        planes: bits of a word in each plane, lowest first.
        factor: of all weights.
        table: float32 (2, base), what a symbol stands for: the first, and the row's scale times the second. None for
            integers.
        row_scales: float16 (M,), if there are any.
    """

    symbols: torch.Tensor
    shape: tuple[int, int]
    base: int
    per_word: int
    planes: tuple[int, ...]
    factor: float
    table: torch.Tensor | None = None
    by_row: bool = False
    row_scales: torch.Tensor | None = None
    scaled: Scaled | None = None
    salient: Salient | None = None

    def product(self, x_TN: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T``, float32 (T, M); x is float32, float16 or bfloat16 (T, N)."""
        (rows, columns), tokens = self.shape, len(x_TN)
        x_TN = x_TN.contiguous()
        together, bits = _unit(self.per_word, self.planes)
        per_unit, units = together * self.per_word, -(-columns // (together * self.per_word))
        words = -(-columns // self.per_word)
        row_bytes = [-(-words * width // 8) for width in self.planes] + [0] * (3 - len(self.planes))
        matrix, precision = tokens > FEW, self._precision(x_TN.dtype)
        some_tokens, some_rows, some_units = triton.next_power_of_2(tokens), 4, 128
        if matrix:
            most = 64 if precision == "tf32" else 32  # for more, the registers do not suffice
            some_tokens, some_rows, some_units = min(most, max(16, some_tokens)), most, 16
        grid_rows, grid_tokens = triton.cdiv(rows, some_rows), triton.cdiv(tokens, some_tokens)
        part = parts_of_columns(units, some_units, grid_rows * grid_tokens)
        parts = triton.cdiv(units, part)
        y_PTM = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x_TN.device)
        scaled, salient = self.scaled, self.salient
        with device_of(x_TN):
            _product[grid_rows, parts, grid_tokens](
                y_PTM,
                x_TN,
                self.symbols,
                self.table,
                self.row_scales,
                scaled.scales if scaled else None,
                scaled.zeros if scaled else None,
                salient.centres if salient else None,
                salient.begins if salient else None,
                salient.columns if salient else None,
                rows,
                columns,
                tokens,
                units,
                part,
                *row_bytes,
                triton.cdiv(columns, scaled.width) if scaled else 0,
                scaled.width if scaled else 0,
                self.factor,
                KIND=self._kind,
                BASE=self.base,
                COLUMNS=per_unit,
                FIRST=bits[0],
                SECOND=bits[1],
                THIRD=bits[2],
                LEVELS=salient.centres.shape[1] if salient else 0,
                TOKENS=some_tokens,
                ROWS=some_rows,
                UNITS=some_units,
                MATRIX=matrix,
                PRECISION=precision,
                num_warps=4,
                num_stages=1,  # what is looked up is not worth copying ahead
            )
        return y_PTM[0] if parts == 1 else y_PTM.sum(0)

    @property
    def _kind(self) -> int:
        if self.scaled is not None:
            return INTEGERS
        if self.by_row:
            return BY_ROW
        return SIGNS if self.base in (2, 4) else TABLE

    def _precision(self, inputs: torch.dtype) -> str:
        """Return how matrix instructions take float32: float16 levels and 16-bit inputs lose nothing as tf32."""
        return "tf32" if self._kind in (SIGNS, TABLE) and inputs != torch.float32 else "tf32x3"


SIGNS, TABLE, BY_ROW, INTEGERS = range(4)


def _unit(per_word: int, planes: tuple[int, ...]) -> tuple[int, tuple[int, int, int]]:
    """Return how many words are read at once, of which no plane has more than a byte, and their bits in each plane."""
    together = 8 // max(planes) if per_word == 1 else 1
    first, second, third = (*(together * width for width in planes), 0, 0)[:3]
    return together, (first, second, third)


@triton.jit
def _field(bytes_MU, unit_U, inside_MU, BITS: tl.constexpr):
    """Return a plane's bits of each unit."""
    if BITS == 0:
        found = tl.zeros(inside_MU.shape, tl.int32)
    else:
        found = tl.load(bytes_MU + unit_U * BITS // 8, mask=inside_MU, other=0).to(tl.int32)
        if BITS < 8:
            found = (found >> (unit_U * BITS % 8)) & ((1 << BITS) - 1)
    return found


@triton.jit
def _symbol(
    first,
    second,
    third,
    AT: tl.constexpr,
    BASE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
):
    """Return the symbols of one column of each unit: digits, or the bits of all planes together."""
    if (BASE & (BASE - 1)) == 0:
        symbol = (first >> (AT * (FIRST // COLUMNS))) & ((1 << (FIRST // COLUMNS)) - 1)
        if SECOND:
            beside = (second >> (AT * (SECOND // COLUMNS))) & ((1 << (SECOND // COLUMNS)) - 1)
            symbol |= beside << (FIRST // COLUMNS)
    else:
        word = (first | (second << FIRST) | (third << (FIRST + SECOND))).to(tl.uint32)
        for _ in tl.static_range(AT):
            word = word // BASE
        symbol = (word % BASE).to(tl.int32)
    return symbol


@triton.jit
def _salient_weights(entry, row_M, begins, centres, scale_M, LEVELS: tl.constexpr):
    """Return by how much entries of the lists differ from what their symbols stand for; entries are (M, some)."""
    found = scale_M * tl.load(centres) - tl.load(centres + LEVELS)
    found = tl.broadcast_to(found, entry.shape)
    for level in tl.static_range(1, LEVELS):
        begin = tl.load(begins + row_M * LEVELS + level)
        here = scale_M * tl.load(centres + level) - tl.load(centres + LEVELS + level)
        found = tl.where(entry >= begin, here, found)
    return found


@triton.jit
def _beside(x_T, there_T, columns, row_M, rows, begins, centres, scale_M, LEVELS: tl.constexpr, ENTRIES: tl.constexpr):
    """Return what salient weights add to the sums (T, M), in the first part."""
    there_M = row_M < rows
    start_M = tl.load(begins + row_M * LEVELS, mask=there_M, other=0)
    stop_M = tl.load(begins + row_M * LEVELS + LEVELS, mask=there_M, other=0)
    stop_M = tl.where(tl.program_id(1) == 0, stop_M, start_M)
    sums = tl.zeros([there_T.shape[0], there_M.shape[0], ENTRIES], tl.float32)
    for at in range(0, tl.max(stop_M - start_M), ENTRIES):
        entry = start_M + at + tl.arange(0, ENTRIES)[None, :]
        inside = entry < stop_M
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        weight = _salient_weights(entry, tl.minimum(row_M, rows - 1), begins, centres, scale_M, LEVELS)
        known = there_T[:, :, None] & inside[None, :, :]
        x = tl.load(x_T[:, :, None] + column[None, :, :], mask=known, other=0.0).to(tl.float32)
        sums += tl.where(inside, weight, 0.0)[None, :, :] * x
    return tl.sum(sums, axis=2)


@triton.jit
def _level(symbol, table, low, high, zero, scale, scale_M, KIND: tl.constexpr, BASE: tl.constexpr):
    """Return what symbols stand for."""
    if KIND == 0:
        level = tl.where((symbol & 2) != 0, high, low)
        level = tl.where((symbol & 1) != 0, -level, level)
    elif KIND == 3:
        level = (symbol - zero).to(tl.float32) * scale
    else:
        level = tl.load(table + symbol)
        if KIND == 2:
            level += scale_M * tl.load(table + BASE + symbol)
    return level


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "tokens", "units", "part", "row_bytes_0", "row_bytes_1", "row_bytes_2", "groups", "width"
    ],
    do_not_specialize_on_alignment=["outputs", "inputs", "symbols", "zeros", "salient_columns"],
)  # fmt: skip
def _product(
    outputs,
    inputs,
    symbols,
    table,
    row_scales,
    scales,
    zeros,
    centres,
    begins,
    salient_columns,
    rows,
    columns,
    tokens,
    units,
    part,
    row_bytes_0,
    row_bytes_1,
    row_bytes_2,
    groups,
    width,
    factor,
    KIND: tl.constexpr,
    BASE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    LEVELS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    MATRIX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write a part's sums, float32 (parts, T, M)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    row_M, there_M, there_T = row[:, None], (row < rows)[:, None], (token < tokens)[:, None]
    x_T = inputs + token[:, None] * columns
    whole = rows.to(tl.int64)
    first_M = symbols + row_M.to(tl.int64) * row_bytes_0
    second_M = symbols + whole * row_bytes_0 + row_M.to(tl.int64) * row_bytes_1
    third_M = symbols + whole * (row_bytes_0 + row_bytes_1) + row_M.to(tl.int64) * row_bytes_2
    scale_M = tl.full([ROWS, 1], 1.0, tl.float32)
    if KIND == 2 or LEVELS > 0:
        scale_M = tl.load(row_scales + row_M, mask=there_M, other=0.0).to(tl.float32)
    low, high = 0.0, 0.0
    if KIND == 0:
        low, high = tl.load(table), tl.load(table + BASE - 2)
    sums = tl.zeros([TOKENS, ROWS] if MATRIX else [TOKENS, ROWS, UNITS], tl.float32)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, units)
    for at in range(begin, end, UNITS):
        unit = at + tl.arange(0, UNITS)
        inside = there_M & (unit < end)[None, :]
        first = _field(first_M, unit[None, :], inside, FIRST)
        second = _field(second_M, unit[None, :], inside, SECOND)
        third = _field(third_M, unit[None, :], inside, THIRD)
        if KIND == 3:
            place = row_M * groups + (unit * COLUMNS // width)[None, :]
            scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros + place, mask=inside, other=0).to(tl.int32)
        else:
            scale, zero = 1.0, 0
        for number in tl.static_range(COLUMNS):
            symbol = _symbol(first, second, third, number, BASE, COLUMNS, FIRST, SECOND, THIRD)
            level = _level(symbol, table, low, high, zero, scale, scale_M, KIND, BASE)
            column = unit * COLUMNS + number
            known = there_T & ((unit < end) & (column < columns))[None, :]
            x = tl.load(x_T + column[None, :], mask=known, other=0.0).to(tl.float32)
            if MATRIX:
                sums = tl.dot(x, tl.trans(level), sums, input_precision=PRECISION)
            else:
                sums += level[None, :, :] * x[:, None, :]
    y = sums if MATRIX else tl.sum(sums, axis=2)
    if LEVELS > 0:
        y += _beside(x_T, there_T, salient_columns, row_M, rows, begins, centres, scale_M, LEVELS, 1 if MATRIX else 32)
    target = outputs + (tl.program_id(1) * tokens + token[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(target, y * factor, mask=there_T & (row < rows)[None, :])
