"""GPU products with a weight on a trellis of 2^12 states, straight from its bits, in Triton (`bivlm.numerics.trellis`).

It is imported on first use, where `bivlm.kernels.gpu` finds Triton. Where a tile is a column of a band of rows, a
program reads four steps of it at a time. Otherwise, a tile being a piece of antidiagonals or several columns of few
rows, it finds the bits of every weight by its place. Sums are float32, in an order that the weight's shape and the
number of tokens decide: a product has the same bits each time.
"""

# No `from __future__ import annotations`: Triton's interpreter does not know constexpr by a name in quotes.
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from bivlm.kernels.gpu import device_of, parts_of_columns

LONGEST = tl.constexpr(256)  # numbers of a tile
SHORTEST = tl.constexpr(64)  # of a tile that bites its tail
FEW = 4  # tokens that are multiplied without matrix instructions
_COLUMNS, _STEPS = 8, 32  # of a program, a step being four rows
_LINES, _ROWS = 8, 128


@dataclass(frozen=True)
class Lines:
    """Which weights follow one another: lines are columns, or antidiagonals, some of which have their tiles together.

    Attributes:
        bits: int64 (lines,), where the tiles of a line begin.
        ahead: int32 (lines,), to be added to a row for its place among them.
        sizes: int32 (lines,), how many weights they have.
    """

    bits: torch.Tensor
    ahead: torch.Tensor
    sizes: torch.Tensor
    diagonal: bool


@dataclass(frozen=True)
class TrellisWeight:
    """A weight (M, N) on one device.

    Attributes:
        stream: uint8, the bits of all tiles.
        quarters: of a bit per step.
        places: uint8 (2, 272), after a step with bits and after one without: what the lower two windows of a state
            together say of its place, and what the upper one says.
        levels: float32 (64,), by place.
        lines: where tiles are not columns of bands of rows.
    """

    stream: torch.Tensor
    shape: tuple[int, int]
    quarters: int
    places: torch.Tensor
    levels: torch.Tensor
    lines: Lines | None = None

    def product(self, x_TN: torch.Tensor) -> torch.Tensor:
        """Return ``x W^T``, float32 (T, M); x is float32 (T, N)."""
        x_TN = x_TN.contiguous()
        with device_of(x_TN):
            y_PTM = self._by_columns(x_TN) if self.lines is None else self._by_lines(x_TN, self.lines)
        return y_PTM[0] if len(y_PTM) == 1 else y_PTM.sum(0)

    def _by_columns(self, x_TN: torch.Tensor) -> torch.Tensor:
        (rows, columns), tokens = self.shape, len(x_TN)
        bands = triton.cdiv(rows, LONGEST.value)
        blocks = triton.cdiv(triton.cdiv(triton.cdiv(rows, bands), 4), _STEPS)
        matrix = tokens > FEW
        some_tokens = min(32, max(16, triton.next_power_of_2(tokens))) if matrix else triton.next_power_of_2(tokens)
        together = 16 if matrix else _COLUMNS
        grid_tokens = triton.cdiv(tokens, some_tokens)
        part = parts_of_columns(columns, together, bands * blocks * grid_tokens)
        parts = triton.cdiv(columns, part)
        y_PTM = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x_TN.device)
        _by_columns[bands * blocks, parts, grid_tokens](
            y_PTM,
            x_TN,
            self.stream,
            self.places,
            self.levels,
            len(self.stream),
            rows,
            columns,
            tokens,
            bands,
            part,
            QUARTERS=self.quarters,
            TOKENS=some_tokens,
            COLUMNS=together,
            STEPS=_STEPS,
            MATRIX=matrix,
            num_warps=4,
            num_stages=1,
        )
        return y_PTM

    def _by_lines(self, x_TN: torch.Tensor, lines: Lines) -> torch.Tensor:
        (rows, columns), tokens = self.shape, len(x_TN)
        some_tokens, blocks = min(FEW, triton.next_power_of_2(tokens)), triton.cdiv(rows, _ROWS)
        grid_tokens = triton.cdiv(tokens, some_tokens)
        steps = columns + (_ROWS - 1 if lines.diagonal else 0)
        part = parts_of_columns(steps, _LINES, blocks * grid_tokens)
        parts = triton.cdiv(steps, part)
        y_PTM = torch.empty(parts, tokens, rows, dtype=torch.float32, device=x_TN.device)
        _by_lines[blocks, parts, grid_tokens](
            y_PTM,
            x_TN,
            self.stream,
            self.places,
            self.levels,
            lines.bits,
            lines.ahead,
            lines.sizes,
            len(self.stream),
            rows,
            columns,
            tokens,
            len(lines.bits),
            part,
            QUARTERS=self.quarters,
            DIAGONAL=lines.diagonal,
            TOKENS=some_tokens,
            LINES=_LINES,
            ROWS=_ROWS,
            num_warps=4,
        )
        return y_PTM


@triton.jit
def _bits(stream, nbytes, begin, inside, COUNT: tl.constexpr):
    """Return COUNT bits, at most 25, from bit `begin` on, the first one highest; zeros beside the stream."""
    BYTES: tl.constexpr = (COUNT + 14) // 8
    first = begin >> 3
    word = tl.zeros(inside.shape, tl.uint32)
    for number in tl.static_range(BYTES):
        at = first + number
        byte = tl.load(stream + at, mask=inside & (at >= 0) & (at < nbytes), other=0)
        word = (word << 8) | byte.to(tl.uint32)
    down = 8 * BYTES - COUNT - (begin & 7).to(tl.int32)
    return ((word >> down.to(tl.uint32)) & ((1 << COUNT) - 1)).to(tl.int32)


@triton.jit
def _before(bits, seam, taken):
    """Return the state, 12 bits, before a step of which `bits` end there, when the tile began `taken` bits ago."""
    own = tl.minimum(taken, 12)
    return ((seam << own) | (bits & ((1 << own) - 1))) & 4095


@triton.jit
def _level(places, levels, state, without):
    """Return the level of a state after a step `without` bits (1), or with some (0)."""
    lower = tl.load(places + without * 272 + (state & 255)).to(tl.int32)
    upper = tl.load(places + without * 272 + 256 + (state >> 8)).to(tl.int32)
    return tl.load(levels + (lower ^ upper))


@triton.jit
def _level_of_step(places, levels, word, NUMBER: tl.constexpr, QUARTERS: tl.constexpr):
    """Return the level of one of the four steps whose bits, behind 12 others, are a word."""
    ENDS: tl.constexpr = ((NUMBER + 1) * QUARTERS + 3) // 4
    WITHOUT: tl.constexpr = 1 if (NUMBER * QUARTERS + 3) // 4 == ENDS else 0
    return _level(places, levels, (word >> (QUARTERS - ENDS)) & 4095, WITHOUT)


@triton.jit
def _added(sums, x_TN, level_NM, MATRIX: tl.constexpr):
    """Return sums (T, M), or (T, N, M) that are yet to be added up, with what these columns make up."""
    if MATRIX:
        sums = tl.dot(x_TN, level_NM, sums, input_precision="tf32x3")
    else:
        sums += x_TN[:, :, None] * level_NM[None, :, :]
    return sums


@triton.jit
def _of_columns(sums, MATRIX: tl.constexpr):
    return sums if MATRIX else tl.sum(sums, axis=1)


@triton.jit(
    do_not_specialize=["nbytes", "rows", "columns", "tokens", "bands", "part"],
    do_not_specialize_on_alignment=["outputs", "inputs", "stream"],
)
def _by_columns(
    outputs,
    inputs,
    stream,
    places,
    levels,
    nbytes,
    rows,
    columns,
    tokens,
    bands,
    part,
    QUARTERS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Write a part's sums, float32 (parts, T, M), of a weight whose tiles are the columns of bands of rows."""
    blocks = tl.num_programs(0) // bands
    band, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    low, more = rows // bands, rows % bands
    height, longer = low + (band < more).to(tl.int32), tl.minimum(band, more)
    first_row = band * low + longer
    low_bits, high_bits = (low * QUARTERS + 3) // 4, ((low + 1) * QUARTERS + 3) // 4
    tile_bits = (height * QUARTERS + 3) // 4
    band_bit = (longer.to(tl.int64) * high_bits + (band - longer).to(tl.int64) * low_bits) * columns
    step = block * STEPS + tl.arange(0, STEPS)
    taken = step * QUARTERS
    known = step * 4 < height
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    there_T = (token < tokens)[:, None]
    x_T = inputs + token[:, None] * columns
    zero = tl.zeros([TOKENS, STEPS] if MATRIX else [TOKENS, COLUMNS, STEPS], tl.float32)
    sums_0, sums_1, sums_2, sums_3 = zero, zero, zero, zero
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, columns)
    for at in range(begin, end, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = (column < end)[:, None] & known[None, :]
        tile = band_bit + column[:, None].to(tl.int64) * tile_bits
        word = _bits(stream, nbytes, tile + taken[None, :] - 12, inside, 12 + QUARTERS)
        state = word >> QUARTERS
        if block == 0:
            early = inside & (taken < 12)[None, :]
            seam = _bits(stream, nbytes, tile + tile_bits - 12 + 0 * taken[None, :], early, 12)
            state = tl.where(early, _before(state, seam, taken[None, :]), state)
        word = (state << QUARTERS) | (word & ((1 << QUARTERS) - 1))
        x = tl.load(x_T + column[None, :], mask=there_T & (column < end)[None, :], other=0.0)
        for number in tl.static_range(4):
            level = _level_of_step(places, levels, word, number, QUARTERS)
            if number == 0:
                sums_0 = _added(sums_0, x, level, MATRIX)
            elif number == 1:
                sums_1 = _added(sums_1, x, level, MATRIX)
            elif number == 2:
                sums_2 = _added(sums_2, x, level, MATRIX)
            else:
                sums_3 = _added(sums_3, x, level, MATRIX)
    row = step * 4
    target = outputs + (tl.program_id(1) * tokens + token[:, None]).to(tl.int64) * rows + first_row + row[None, :]
    tl.store(target, _of_columns(sums_0, MATRIX), mask=there_T & (row < height)[None, :])
    tl.store(target + 1, _of_columns(sums_1, MATRIX), mask=there_T & (row + 1 < height)[None, :])
    tl.store(target + 2, _of_columns(sums_2, MATRIX), mask=there_T & (row + 2 < height)[None, :])
    tl.store(target + 3, _of_columns(sums_3, MATRIX), mask=there_T & (row + 3 < height)[None, :])


@triton.jit(
    do_not_specialize=["nbytes", "rows", "columns", "tokens", "lines", "part"],
    do_not_specialize_on_alignment=["outputs", "inputs", "stream"],
)
def _by_lines(
    outputs,
    inputs,
    stream,
    places,
    levels,
    line_bits,
    line_ahead,
    line_sizes,
    nbytes,
    rows,
    columns,
    tokens,
    lines,
    part,
    QUARTERS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write a part's sums, float32 (parts, T, M), of a weight whose tiles are pieces of `Lines`."""
    first_row = tl.program_id(0) * ROWS
    row = first_row + tl.arange(0, ROWS)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    there_T = (token < tokens)[:, None, None]
    sums = tl.zeros([TOKENS, LINES, ROWS], tl.float32)
    first = tl.program_id(1) * part
    last = first + part
    if DIAGONAL:
        first += first_row
        last += first_row
    last = tl.minimum(last, lines)
    for at in range(first, last, LINES):
        line = at + tl.arange(0, LINES)
        here = line < last
        begin = tl.load(line_bits + line, mask=here, other=0)[:, None]
        ahead = tl.load(line_ahead + line, mask=here, other=0)[:, None]
        size = tl.load(line_sizes + line, mask=here, other=1)[:, None]
        column = tl.broadcast_to(line[:, None], (LINES, ROWS))
        if DIAGONAL:
            column = column - row[None, :]
        inside = here[:, None] & (row < rows)[None, :] & (column >= 0) & (column < columns)
        # Of `pieces` tiles the first ones are longer by one.
        pieces = (size + LONGEST - 1) // LONGEST
        low, more = size // pieces, size % pieces
        low_bits, high_bits = (low * QUARTERS + 3) // 4, ((low + 1) * QUARTERS + 3) // 4
        place = row[None, :] + ahead
        piece = place // (low + 1)
        piece = tl.where(piece < more, piece, more + (place - more * (low + 1)) // low)
        longer = tl.minimum(piece, more)
        place -= piece * low + longer
        length = low + (piece < more).to(tl.int32)
        tile = begin + longer * high_bits + (piece - longer) * low_bits
        tile_bits = tl.where(piece < more, high_bits, low_bits)
        taken = ((place + 1) * QUARTERS + 3) // 4
        state = _bits(stream, nbytes, tile + taken - 12, inside, 12)
        early = inside & (taken < 12)
        seam = _bits(stream, nbytes, tile + tile_bits - 12, early & (length >= SHORTEST), 12)
        state = tl.where(early, _before(state, seam, taken), state)
        without = (taken == (place * QUARTERS + 3) // 4).to(tl.int32)
        level = tl.where(inside, _level(places, levels, state, without), 0.0)
        x = tl.load(
            inputs + token[:, None, None] * columns + column[None, :, :], mask=there_T & inside[None, :, :], other=0.0
        )
        sums += x * level[None, :, :]
    target = outputs + (tl.program_id(1) * tokens + token[:, None]).to(tl.int64) * rows + row[None, :]
    tl.store(target, tl.sum(sums, axis=1), mask=(token < tokens)[:, None] & (row < rows)[None, :])
