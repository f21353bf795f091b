"""The codec of binary weights in blocks of columns: two groups, or two binarizations for the salient columns.

Every weight has a two-bit symbol. In an ordinary column it is ``2 * group + (w < mean)``; in a salient column, which
is binarized twice, ``2 * (w < mean) + (what is left < 0)``. Each row has, for each block, four scales: of group 0, of
group 1, and of the salient columns' first and second binarization. Beside them stand either

- three means (group 0, group 1, salient), as in BiLLM: ``w = mean +- scale``, ``w = (mean +- first) +- second``; or
- for every column two factors near one, as in ARB-LLM_RC: ``w = +- scale * factor`` with the factor of the weight's
  group, ``w = +- first * factor_0 +- second * factor_1``.

Sections of the packed weight:

0. block (uint32), layout (uint8: 0 means, 1 factors), a zero byte, exponent (int16).
1. bitmap of salient columns.
2. float16, row by row and block by block: the means (if any), then the scales; times 2^exponent.
3. symbols, rows aligned to bytes.
4. float16 column factors (2, N), in layout 1.

A product of two float16 numbers is exact in float32, a sum is rounded once, in the order written above: the rebuilt
weight is the same on every device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from bivlm.numerics.half_scales import EXPONENTS, from_halves, to_halves
from bivlm.packing import Codec, FormatBits, Tunable, container
from bivlm.packing.container import ArrayT, Bytes, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.rowtables import (
    base_of,
    blocks_of,
    check_two_bits,
    columns_nbytes,
    entropy,
    look_up,
    pack_columns,
    pack_two_bits,
    read_columns,
    read_rows,
    read_two_bits,
    row_chunks,
    two_bit_nbytes,
    unpack_columns,
    unpack_two_bits,
)

NAME = "rowblock"
SCALES, MEANS, FACTORS = 4, 3, 2
LARGEST_BLOCK = 4096
_PARAMETERS = struct.Struct("<IBBh")
_WITH_MEANS, _WITH_FACTORS = 0, 1


@dataclass(frozen=True)
class _Parameters:
    block: int
    layout: int
    exponent: int

    @property
    def means(self) -> int:
        return MEANS if self.layout == _WITH_MEANS else 0


def pack(
    symbols_MN: torch.Tensor,
    salient_N: torch.Tensor,
    numbers: dict[str, torch.Tensor],
    *,
    block: int,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,), to be rebuilt as `dtype`.

    `symbols_MN` are uint8 below 4, `salient_N` bool; `numbers` are "scales" (M, blocks, 4) and either "means"
    (M, blocks, 3) or "factors" (2, N). Scales and means are in units of 2^exponent.
    """
    layout = _WITH_FACTORS if "factors" in numbers else _WITH_MEANS
    sections = [
        np.frombuffer(_PARAMETERS.pack(block, layout, 0, exponent), np.uint8),
        pack_columns(salient_N),
        _row_bytes(numbers, 0),
        pack_two_bits(symbols_MN),
        _column_bytes(numbers),
    ]
    return container.write(NAME, (symbols_MN.shape[0], symbols_MN.shape[1]), dtype, sections)


def rebuild(
    symbols_MN: torch.Tensor, salient_N: torch.Tensor, numbers: dict[str, torch.Tensor], block: int
) -> torch.Tensor:
    """Return the weight (M, N), see the head of the module; differentiable in the numbers.

    M may be any run of rows of the weight, if the numbers are those of its rows.
    """
    base_N = base_of(salient_N, block)
    low, high, first, second = numbers["scales"].unbind(-1)
    if "factors" in numbers:
        nothing = torch.zeros_like(low)
        one = _look_up([low, -low, nothing, nothing, first, first, -first, -first], base_N, symbols_MN)
        other = _look_up([nothing, nothing, high, -high, second, -second, second, -second], base_N, symbols_MN)
        return one * numbers["factors"][0] + other * numbers["factors"][1]
    mean_low, mean_high, mean = numbers["means"].unbind(-1)
    above, below = mean + first, mean - first
    ordinary = [mean_low + low, mean_low - low, mean_high + high, mean_high - high]
    return _look_up([*ordinary, above + second, above - second, below + second, below - second], base_N, symbols_MN)


class RowBlockCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        m, n = contents.header.shape
        block, layout, reserved, exponent = contents.parameters(_PARAMETERS)
        contents.inside("block", block, range(1, LARGEST_BLOCK + 1))
        contents.inside("layout", layout, range(2))
        contents.inside("reserved byte", reserved, range(1))
        contents.inside("exponent", exponent, EXPONENTS)
        stored = _Parameters(block, layout, exponent)
        contents.lengths(
            {
                "parameters": _PARAMETERS.size,
                "salient columns": columns_nbytes(n),
                "row numbers": 2 * m * blocks_of(n, block) * (stored.means + SCALES),
                "symbols": two_bit_nbytes(m, n),
                "column factors": 0 if stored.means else 2 * FACTORS * n,
            }
        )
        contents.padding(1, n, "salient columns")
        check_two_bits(contents, 3, n, "symbols")
        largest = contents.largest_half(contents.section(2), "row numbers", exponent)
        factor = contents.largest_half(contents.section(4), "column factors")
        return largest * max(3.0, 2.0 * factor)

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        salient_N = unpack_columns(packed, header, 1)
        weight_MN = torch.empty(header.shape, dtype=header.dtype, device=packed.device)
        for rows in row_chunks(header.shape):
            symbols = unpack_two_bits(packed, header, 3, header.shape[1], rows)
            weight_MN[rows] = rebuild(symbols, salient_N, _numbers(packed, header, stored, rows), stored.block)
        return weight_MN

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return parameters ``scales`` (M, blocks, 4) and either ``means`` (M, blocks, 3) or ``factors`` (2, N)."""
        stored = _read_parameters(packed, header)
        salient_N = unpack_columns(packed, header, 1)
        symbols_MN = unpack_two_bits(packed, header, 3, header.shape[1])
        return Tunable(
            _numbers(packed, header, stored), lambda values: rebuild(symbols_MN, salient_N, values, stored.block)
        )

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        exponent = _read_parameters(packed, header).exponent
        return container.rewrite(packed, header, {2: _row_bytes(parameters, exponent), 4: _column_bytes(parameters)})

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return bits; nominal is BiLLM's and ARB-LLM's count, a sign per weight and a second one per salient weight.

        Nominal leaves out the group of a weight, the bitmap of the columns and all scales.
        """
        packed = as_array(packed)
        stored = _read_parameters(packed, header)
        m, n = header.shape
        salient_N = read_columns(packed, header, 1)
        salient = int(salient_N.sum())
        counts = np.zeros(8, np.int64)
        for rows in row_chunks(header.shape):
            kinds = read_two_bits(packed, header, 3, n, rows) + 4 * salient_N.astype(np.uint8)
            counts += np.bincount(kinds.reshape(-1), minlength=8)
        ordinary, twice = counts.reshape(2, 4)
        numbers = m * blocks_of(n, stored.block) * (SCALES + stored.means) + (0 if stored.means else FACTORS * n)
        return FormatBits(
            nominal=float(m * n + m * salient),
            entropy=entropy(ordinary) + entropy(twice) + entropy([salient, n - salient]) + 16 * numbers,
            stored=8 * len(packed),
        )


def _look_up(levels: list[torch.Tensor], base_N: torch.Tensor, symbols_MN: torch.Tensor) -> torch.Tensor:
    return look_up(torch.stack(levels, dim=-1).flatten(1), base_N, symbols_MN)


def _numbers(
    packed: torch.Tensor, header: Header, stored: _Parameters, rows: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """Return scales and means of `rows`, factors of all columns, float32 as stored."""
    shape = (blocks_of(header.shape[1], stored.block), stored.means + SCALES)
    by_row = read_rows(packed, header, 2, stored.exponent, shape, rows)
    if stored.means:
        return {"means": by_row[..., :MEANS].contiguous(), "scales": by_row[..., MEANS:].contiguous()}
    return {"scales": by_row, "factors": from_halves(section(packed, header, 4)).view(FACTORS, -1)}


def _row_bytes(numbers: dict[str, torch.Tensor], exponent: int) -> np.ndarray:
    by_row = [numbers[name].detach() for name in ("means", "scales") if name in numbers]
    return to_halves(torch.cat(by_row, dim=-1).cpu().numpy(), exponent)


def _column_bytes(numbers: dict[str, torch.Tensor]) -> np.ndarray:
    if "factors" not in numbers:
        return np.empty(0, np.uint8)
    return to_halves(numbers["factors"].detach().cpu().numpy())


def _read_parameters(packed: ArrayT, header: Header) -> _Parameters:
    block, layout, _, exponent = container.fields(packed, header, _PARAMETERS)
    return _Parameters(block, layout, exponent)
