"""The codec of a sign per weight and eight bits for the salient ones.

Ordinary: ``w = +- row_scale``. Salient: ``w = row_zero + level * row_step`` with a level from 0 to 255.

Sections of the packed weight:

0. mode (uint8: 0 sparse, 1 bitmap), Rice parameter (uint8), exponent (int16), salient weights S (uint32).
1. float16 (M, 3) or, if S = 0, (M, 1): row scale, step and zero; times 2^exponent.
2. one bit per weight, rows aligned to bytes: the sign (1 below zero); of a salient weight the level's lowest bit.
3. the levels' upper seven bits, in the order of positions.
4. - 5. positions: unary gaps and gap remainders (`sparse`), or a bitmap of all weights and nothing. The smaller one.

A level has 8 bits and a step 11, so that their product is exact in float32 and the sum is rounded once: the rebuilt
weight is the same on every device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from bivlm.numerics.half_scales import EXPONENTS, to_halves
from bivlm.packing import Codec, FormatBits, Tunable, container
from bivlm.packing.container import ArrayT, Bytes, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.radix import (
    CHUNK_SYMBOLS,
    check_symbols,
    count_symbols,
    pack_symbols,
    radix,
    symbols_at,
    unpack_values,
)
from bivlm.packing.rowtables import entropy, read_rows
from bivlm.packing.sparse import (
    check_positions,
    check_salient,
    pack_positions,
    pack_small,
    rice_cost,
    unpack_positions,
    unpack_small,
)

NAME = "signs"
LEVEL_BITS = 8
_PARAMETERS = struct.Struct("<BBhI")
_SPARSE, _BITMAP = 0, 1
_NAMES = ("row_scales", "row_steps", "row_zeros")


@dataclass(frozen=True)
class _Parameters:
    mode: int
    rice: int
    exponent: int
    salient: int

    @property
    def numbers(self) -> int:
        return len(_NAMES) if self.salient else 1


def pack(
    negative_MN: torch.Tensor,
    positions_S: np.ndarray,
    levels_S: np.ndarray,
    numbers: dict[str, torch.Tensor],
    *,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,), to be rebuilt as `dtype`.

    `negative_MN` is bool; `positions_S` are flat, row-major and ascending, `levels_S` below 256. `numbers` are
    "row_scales", "row_steps" and "row_zeros", (M,) each, in units of 2^exponent; only the first if S = 0.
    """
    shape, salient = (negative_MN.shape[0], negative_MN.shape[1]), len(positions_S)
    bits_MN = negative_MN.to(torch.uint8)
    bits_MN.view(-1)[torch.from_numpy(positions_S).to(bits_MN.device)] = torch.from_numpy(
        (levels_S & 1).astype(np.uint8)
    ).to(bits_MN.device)
    rice, sparse_nbytes = rice_cost(positions_S)
    if sparse_nbytes <= -(-bits_MN.numel() // 8):
        mode, places = _SPARSE, pack_positions(positions_S, rice)
    else:
        chosen = np.zeros(bits_MN.numel(), np.uint8)
        chosen[positions_S] = 1
        mode, rice, places = _BITMAP, 0, (np.packbits(chosen, bitorder="little"), np.empty(0, np.uint8))
    sections = [
        np.frombuffer(_PARAMETERS.pack(mode, rice, exponent, salient), np.uint8),
        _row_bytes(numbers, salient, 0),
        np.concatenate([plane.reshape(-1) for plane in pack_symbols(bits_MN, 2)]),
        pack_small(levels_S >> 1, LEVEL_BITS - 1),
        *places,
    ]
    return container.write(NAME, shape, dtype, sections)


class SignsCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        m, n = contents.header.shape
        stored = _Parameters(*contents.parameters(_PARAMETERS))
        sparse = stored.mode == _SPARSE
        contents.inside("mode", stored.mode, range(2))
        check_salient(contents, stored.salient, stored.rice)
        contents.inside("exponent", stored.exponent, EXPONENTS)
        contents.lengths(
            {
                "parameters": _PARAMETERS.size,
                "row numbers": 2 * m * stored.numbers,
                "signs": radix(2).nbytes(m, n),
                "levels": -(-stored.salient * (LEVEL_BITS - 1) // 8),
                "positions": None if sparse else -(-contents.size // 8),
                "position remainders": -(-stored.salient * stored.rice // 8) if sparse else 0,
            }
        )
        check_symbols(contents, [_plane(contents.packed, contents.header)], 2, n, "signs")
        contents.padding(3, stored.salient * (LEVEL_BITS - 1), "levels")
        if sparse:
            check_positions(contents, 4, stored.salient, stored.rice)
        else:
            contents.inside("Rice parameter", stored.rice, range(1))
            contents.padding(4, contents.size, "positions")
            ones = int(np.bitwise_count(contents.section(4)).sum(dtype=np.int64))
            contents.require(ones == stored.salient, f"{ones} positions, expected {stored.salient}")
        halves = contents.section(1).reshape(m, stored.numbers, 2)
        largest = [
            contents.largest_half(halves[:, i].reshape(-1), name.replace("_", " "), stored.exponent)
            for i, name in enumerate(_NAMES[: stored.numbers])
        ]
        scale, step, zero = (*largest, 0.0, 0.0)[:3]
        return max(scale, ((1 << LEVEL_BITS) - 1) * step + zero)

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        numbers = _numbers(packed, header, stored)
        weight_MN = torch.empty(header.shape, dtype=header.dtype, device=packed.device)
        step = max(1, CHUNK_SYMBOLS // header.shape[1])
        for begin in range(0, header.shape[0], step):
            rows = slice(begin, begin + step)
            weight_MN[rows] = _signed(numbers["row_scales"][rows], _bits(packed, header, rows))
        if stored.salient:
            positions, levels = _salient(packed, header, stored)
            weight_MN.view(-1)[positions] = _salient_weights(numbers, positions, levels, header).to(header.dtype)
        return weight_MN

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return parameters ``row_scales`` (M,) and, if S > 0, ``row_steps`` (M,) and ``row_zeros`` (M,)."""
        stored = _read_parameters(packed, header)
        bits_MN = _bits(packed, header)
        places = _salient(packed, header, stored) if stored.salient else None

        def rebuild(values: dict[str, torch.Tensor]) -> torch.Tensor:
            weight_MN = _signed(values["row_scales"], bits_MN)
            if places is None:
                return weight_MN
            positions, levels = places
            salient = _salient_weights(values, positions, levels, header)
            return weight_MN.view(-1).index_put((positions,), salient).view(header.shape)

        return Tunable(_numbers(packed, header, stored), rebuild)

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        return container.rewrite(packed, header, {1: _row_bytes(parameters, stored.salient, stored.exponent)})

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return bits; nominal is PB-LLM's count, 1 per ordinary and 8 per salient weight: 1.7 at a share of 0.1.

        Nominal leaves out positions and all numbers of rows.
        """
        packed = as_array(packed)
        stored = _read_parameters(packed, header)
        m, n = header.shape
        size, salient = m * n, stored.salient
        signs = count_symbols([_plane(packed, header)], 2, n)
        least = entropy([salient, size - salient]) + 16 * m * stored.numbers
        if salient:
            _, levels = _salient(packed, header, stored)
            signs -= np.bincount(levels & 1, minlength=2)
            least += entropy(np.bincount(levels, minlength=1 << LEVEL_BITS))
        return FormatBits(
            nominal=float(size + (LEVEL_BITS - 1) * salient),
            entropy=least + entropy(signs),
            stored=8 * len(packed),
        )


def _signed(row_scales: torch.Tensor, bits_MN: torch.Tensor) -> torch.Tensor:
    scales = row_scales[:, None]
    return torch.where(bits_MN.bool(), -scales, scales)


def _salient_weights(
    numbers: dict[str, torch.Tensor], positions: torch.Tensor, levels: torch.Tensor, header: Header
) -> torch.Tensor:
    rows = positions // header.shape[1]
    return levels * numbers["row_steps"][rows] + numbers["row_zeros"][rows]


def _plane(packed: ArrayT, header: Header) -> ArrayT:
    return section(packed, header, 2).reshape(header.shape[0], -1)


def _bits(packed: torch.Tensor, header: Header, rows: slice = slice(None)) -> torch.Tensor:
    """Return the bit of every weight of `rows`, uint8 (rows, N)."""
    table = torch.arange(2, dtype=torch.uint8, device=packed.device)
    return unpack_values([_plane(packed, header)[rows]], table, header.shape[1])


def _salient(packed: ArrayT, header: Header, stored: _Parameters) -> tuple[ArrayT, ArrayT]:
    """Return flat positions and levels of the salient weights, int64 (S,) each."""
    if stored.mode == _SPARSE:
        positions = unpack_positions(
            section(packed, header, 4), section(packed, header, 5), stored.salient, stored.rice
        )
    else:
        size = header.shape[0] * header.shape[1]
        chosen = unpack_small(section(packed, header, 4), size, 1)
        positions = np.flatnonzero(chosen) if isinstance(chosen, np.ndarray) else chosen.nonzero().view(-1)
    upper = unpack_small(section(packed, header, 3), stored.salient, LEVEL_BITS - 1)
    return positions, 2 * upper + symbols_at([_plane(packed, header)], 2, header.shape[1], positions)


def _numbers(packed: torch.Tensor, header: Header, stored: _Parameters) -> dict[str, torch.Tensor]:
    by_row = read_rows(packed, header, 1, stored.exponent, (stored.numbers,))
    return {name: values.contiguous() for name, values in zip(_NAMES, by_row.unbind(1), strict=False)}


def _row_bytes(numbers: dict[str, torch.Tensor], salient: int, exponent: int) -> np.ndarray:
    names = _NAMES if salient else _NAMES[:1]
    return to_halves(torch.stack([numbers[name].detach().cpu() for name in names], dim=1).numpy(), exponent)


def _read_parameters(packed: ArrayT, header: Header) -> _Parameters:
    return _Parameters(*container.fields(packed, header, _PARAMETERS))
