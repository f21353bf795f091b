"""The codec of binarized Haar coefficients: along each row, and along salient columns for what the rows leave.

Every coefficient has a two-bit symbol ``2 * group + (u < mean)`` and is rebuilt as ``mean +- scale of its group``. A
row has, for each block and each of its two bands, a mean and the scales of the inner and the outer group; so has each
salient column for each band. With u the coefficients of the rows, v those of salient columns, P an order of columns
within their blocks (or none)::

    W = haar(u, along rows) in the order P;    W[:, salient] += haar(v, along columns)

The low band is at even places, the high band at odd ones, see `bivlm.numerics.haar`; a block has an even number of
columns.

Sections of the packed weight:

0. block (uint32), 1 if there is an order (uint8), a zero byte, exponent (int16).
1. bitmap of salient columns.
2. float16 (M, blocks, 2 bands, 3): mean, inner and outer scale of rows; times 2^exponent.
3. symbols of rows, aligned to bytes.
4. float16 (S, 2 bands, 3): the same of S salient columns, in ascending order.
5. symbols of salient columns, but stored row by row (M, S), so that two rows can be rebuilt alone.
6. the order, if any: for every place the column within its block that stands there, in bits of ``block - 1``.

Sums are made in the order written, each rounded to float32: the rebuilt weight is the same on every device.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import torch

from bivlm.numerics.haar import haar
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
from bivlm.packing.sparse import pack_small, unpack_small

NAME = "wavelet"
BANDS, NUMBERS = 2, 3
LARGEST_BLOCK = 1024
_PARAMETERS = struct.Struct("<IBBh")


@dataclass(frozen=True)
class Coded:
    """The parts of a weight that tuning does not change.

    Attributes:
        symbols_MN: uint8 (M, N), below 4, of the rows' coefficients.
        residual_MS: uint8 (M, S), below 4, of the salient columns' coefficients.
        salient_N: bool (N,).
        order_N: int64 (N,), which column stands at a place of the transformed row; None if each at its own.
        block: columns of a block.
    """

    symbols_MN: torch.Tensor
    residual_MS: torch.Tensor
    salient_N: torch.Tensor
    order_N: torch.Tensor | None
    block: int


def pack(coded: Coded, numbers: dict[str, torch.Tensor], *, exponent: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,), to be rebuilt as `dtype`.

    `numbers` are "rows" (M, blocks, 2, 3) and "columns" (S, 2, 3), in units of 2^exponent.
    """
    order, block = coded.order_N, coded.block
    inside = np.empty(0, np.int64) if order is None else (order % block).cpu().numpy()
    sections = [
        np.frombuffer(_PARAMETERS.pack(block, order is not None, 0, exponent), np.uint8),
        pack_columns(coded.salient_N),
        to_halves(numbers["rows"].cpu().numpy()),
        pack_two_bits(coded.symbols_MN),
        to_halves(numbers["columns"].cpu().numpy()),
        pack_two_bits(coded.residual_MS),
        pack_small(inside, _order_bits(block)),
    ]
    return container.write(NAME, (coded.symbols_MN.shape[0], coded.symbols_MN.shape[1]), dtype, sections)


def rebuild(coded: Coded, numbers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight (M, N) as at the head of the module; differentiable in the numbers.

    M may be any run of rows that begins with an even one, if symbols and numbers are those of its rows.
    """
    weight_MN = rebuild_rows(coded, numbers["rows"])
    if not coded.residual_MS.shape[1]:
        return weight_MN
    parity_M = torch.arange(len(weight_MN), device=weight_MN.device) % 2
    left_SM = look_up(_levels(numbers["columns"][:, None]), base_of(parity_M, len(parity_M)), coded.residual_MS.T)
    return weight_MN.index_add(1, coded.salient_N.nonzero().view(-1), haar(left_SM, 1).T)


def rebuild_rows(coded: Coded, rows: torch.Tensor) -> torch.Tensor:
    """Return the weight (M, N) without what salient columns add, from the rows' numbers (M, blocks, 2, 3)."""
    parity_N = torch.arange(coded.symbols_MN.shape[1], device=rows.device) % 2
    weight_MN = haar(look_up(_levels(rows), base_of(parity_N, coded.block), coded.symbols_MN), 1)
    return weight_MN if coded.order_N is None else weight_MN[:, coded.order_N.argsort()]


class WaveletCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        m, n = contents.header.shape
        block, ordered, reserved, exponent = contents.parameters(_PARAMETERS)
        fault = f"damaged parameters: block {block}, expected an even number from 2 to {LARGEST_BLOCK}"
        contents.require(block in range(2, LARGEST_BLOCK + 1, 2), fault)
        contents.inside("order", ordered, range(2))
        contents.inside("reserved byte", reserved, range(1))
        contents.inside("exponent", exponent, EXPONENTS)
        contents.length(1, "salient columns", columns_nbytes(n))
        contents.padding(1, n, "salient columns")
        salient = int(read_columns(contents.packed, contents.header, 1).sum())
        contents.lengths(
            {
                "parameters": _PARAMETERS.size,
                "salient columns": columns_nbytes(n),
                "row numbers": 2 * m * blocks_of(n, block) * BANDS * NUMBERS,
                "symbols": two_bit_nbytes(m, n),
                "column numbers": 2 * salient * BANDS * NUMBERS,
                "residual symbols": two_bit_nbytes(m, salient),
                "order": -(-n * _order_bits(block) // 8) if ordered else 0,
            }
        )
        check_two_bits(contents, 3, n, "symbols")
        check_two_bits(contents, 5, salient, "residual symbols")
        if ordered:
            contents.padding(6, n * _order_bits(block), "order")
            places_N = np.arange(n)
            order_N = places_N // block * block + unpack_small(contents.section(6), n, _order_bits(block))
            fault = f"the order of columns is no permutation of each block of {block}"
            contents.require(np.array_equal(np.sort(order_N), places_N), fault)
            contents.require(np.array_equal(order_N // block, places_N // block), fault)
        rows = contents.largest_half(contents.section(2), "row numbers", exponent)
        columns = contents.largest_half(contents.section(4), "column numbers", exponent)
        return 4 * (rows + columns)  # a level is two numbers, a pair of levels is added

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        block, ordered, exponent = _read_parameters(packed, header)
        weight_MN = torch.empty(header.shape, dtype=header.dtype, device=packed.device)
        for rows in row_chunks(header.shape):
            coded = _coded(packed, header, block, ordered, rows)
            weight_MN[rows] = rebuild(coded, _numbers(packed, header, block, exponent, rows))
        return weight_MN

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return ``rows`` (M, blocks, 2, 3) and ``columns`` (S, 2, 3): mean, inner and outer scale of a band."""
        block, ordered, exponent = _read_parameters(packed, header)
        coded = _coded(packed, header, block, ordered)
        return Tunable(_numbers(packed, header, block, exponent), lambda values: rebuild(coded, values))

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        _, _, exponent = _read_parameters(packed, header)
        numbers = {name: to_halves(values.detach().cpu().numpy(), exponent) for name, values in parameters.items()}
        return container.rewrite(packed, header, {2: numbers["rows"], 4: numbers["columns"]})

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return bits; nominal is HBLLM's count, a sign per weight and a second one per salient weight.

        Nominal leaves out groups, the bitmap of the columns, their order, and all means and scales. Pairs of an order
        may change places with each other at no cost, which its entropy allows for.
        """
        packed = as_array(packed)
        block, ordered, _ = _read_parameters(packed, header)
        m, n = header.shape
        salient = int(read_columns(packed, header, 1).sum())
        places = entropy([salient, n - salient])
        if ordered:
            widths = [min(block, n - begin) for begin in range(0, n, block)]
            places += sum(math.lgamma(width + 1) - math.lgamma(width // 2 + 1) for width in widths) / math.log(2)
        symbols = _symbol_entropy(packed, header, 3, n, along_rows=True)
        symbols += _symbol_entropy(packed, header, 5, salient, along_rows=False)
        numbers = BANDS * NUMBERS * (m * blocks_of(n, block) + salient)
        return FormatBits(
            nominal=float(m * n + m * salient),
            entropy=symbols + places + 16 * numbers,
            stored=8 * len(packed),
        )


def _levels(numbers: torch.Tensor) -> torch.Tensor:
    """Return levels (X, blocks * 8) of numbers (X, blocks, 2, 3): both groups of the low band, then of the high one."""
    mean, inner, outer = numbers.unbind(-1)
    return torch.stack([mean + inner, mean - inner, mean + outer, mean - outer], dim=-1).flatten(1)


def _symbol_entropy(packed: np.ndarray, header: Header, index: int, columns: int, *, along_rows: bool) -> float:
    """Return the bits that the symbols of a section need, each band with a code of its own."""
    counts = np.zeros((2, 4), np.int64)
    for rows in row_chunks(header.shape):
        symbols = read_two_bits(packed, header, index, columns, rows)
        for band, count in enumerate(counts):
            count += np.bincount((symbols[:, band::2] if along_rows else symbols[band::2]).reshape(-1), minlength=4)
    low, high = counts
    return entropy(low) + entropy(high)


def _coded(packed: torch.Tensor, header: Header, block: int, ordered: bool, rows: slice = slice(None)) -> Coded:
    salient_N = unpack_columns(packed, header, 1)
    return Coded(
        unpack_two_bits(packed, header, 3, header.shape[1], rows),
        unpack_two_bits(packed, header, 5, int(salient_N.sum()), rows),
        salient_N,
        _order(packed, header, block) if ordered else None,
        block,
    )


def _order(packed: torch.Tensor, header: Header, block: int) -> torch.Tensor:
    """Return the column that stands at each place, int64 (N,)."""
    columns = torch.arange(header.shape[1], device=packed.device)
    return columns // block * block + unpack_small(section(packed, header, 6), header.shape[1], _order_bits(block))


def _numbers(
    packed: torch.Tensor, header: Header, block: int, exponent: int, rows: slice = slice(None)
) -> dict[str, torch.Tensor]:
    """Return numbers of `rows` and of all salient columns, float32 as stored."""
    shape = (blocks_of(header.shape[1], block), BANDS, NUMBERS)
    columns = from_halves(section(packed, header, 4), exponent).view(-1, BANDS, NUMBERS)
    return {"rows": read_rows(packed, header, 2, exponent, shape, rows), "columns": columns}


def _read_parameters(packed: ArrayT, header: Header) -> tuple[int, bool, int]:
    """Return the block, whether there is an order, and the exponent."""
    block, ordered, _, exponent = container.fields(packed, header, _PARAMETERS)
    return block, bool(ordered), exponent


def _order_bits(block: int) -> int:
    return (block - 1).bit_length()
