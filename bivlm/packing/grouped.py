"""The codec of grouped integers: RTN, GPTQ and AWQ weights, with everything that a decoder needs.

Sections of the packed weight:

0. parameters: bits b of a code (uint8), whether there are channel scales (uint8), exponents of the scales and of the
   channel scales (int16 each), columns g of a group (uint32).
1. float16 scales (M, G), row by row; G = ceil(N / g), the last group of a row may be short.
2. zero points, b bits each, (M, G) in one sequence without gaps (`radix`).
3. codes, b bits each, every row on a byte boundary (`radix`).
4. float16 channel scales (N,), or nothing.

A weight is rebuilt as ``(code - zero) * scale``, times the scale of its channel where there are any. The first product
has at most 20 significant bits and is exact in float32, the second is one float32 product: the result is the same on
every device, and is rounded once more, to the weight's dtype.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from bivlm.kernels import gpu
from bivlm.numerics.half_scales import EXPONENTS, exponent_of, from_halves, halves, to_halves
from bivlm.packing import Activations, Codec, FormatBits, GpuProduct, Integers, Tunable, container
from bivlm.packing.container import ArrayT, Bytes, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.plane_product import Groups, can_multiply, product, reads
from bivlm.packing.radix import (
    CHUNK_SYMBOLS,
    check_symbols,
    count_symbols,
    pack_symbols,
    planes_of,
    radix,
    symbols_at,
    unpack_values,
)

if TYPE_CHECKING:
    from bivlm.numerics.uniform_grid import GroupedCodes

NAME = "grouped"
CodeBits = Literal[2, 3, 4, 8]
BITS: tuple[int, ...] = get_args(CodeBits)
LARGEST_GROUP = 1 << 20
_PARAMETERS = struct.Struct("<BBhhI")
_SECTIONS = 5
# A chunk of float32 weights then stays in a core's cache between the passes over it.
_CHUNK_WEIGHTS = CHUNK_SYMBOLS >> 2


@dataclass(frozen=True)
class _Parameters:
    bits: int
    channels: int  # 0 or 1
    exponent: int
    channel_exponent: int
    width: int


def packed_nbytes(shape: tuple[int, int], bits: int, group_size: int, channel_scales: bool = False) -> int:
    """Return the bytes that `pack` would store for a layer of this shape, without packing it."""
    from bivlm.numerics.uniform_grid import group_width  # needs torch

    rows, columns = shape
    numbers = rows * -(-columns // group_width(columns, group_size))
    halves = numbers + (columns if channel_scales else 0)
    symbols = radix(1 << bits)
    head = container.envelope_nbytes(_SECTIONS) + _PARAMETERS.size
    return head + 2 * halves + symbols.nbytes(1, numbers) + symbols.nbytes(rows, columns)


def pack(coded: GroupedCodes, dtype: torch.dtype, channel_scales_N: torch.Tensor | None = None) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,), to be rebuilt as `dtype`.

    `channel_scales_N`, float32 as `stored_channel_scales` gives them, multiply the rebuilt columns.
    """
    shape = (coded.codes_MN.shape[0], coded.codes_MN.shape[1])
    codes = _Codes(shape, coded.bits)
    codes.put(0, coded.codes_MN)
    grids = (coded.bits, coded.width, coded.exponent)
    sections = _sections(coded.scales_MG, coded.zeros_MG, codes.section, grids, channel_scales_N)
    return container.write(NAME, shape, dtype, sections)


def pack_rows(
    file: Path, pieces: Callable[[], Iterable[torch.Tensor]], shape: tuple[int, int], bits: int, group_size: int
) -> None:
    """Write the bytes of ``pack(round_to_nearest(weight, bits, group_size))`` to `file`, a few rows at a time.

    ``pieces()`` gives all rows of a weight of this shape, one piece after another; it is called twice. Beside a piece
    no more is held than the packed bytes.
    """
    from bivlm.numerics.uniform_grid import group_width, range_exponent, round_to_nearest

    lowest, highest = torch.stack([torch.stack(piece.aminmax()).float() for piece in pieces()]).unbind(1)
    exponent = range_exponent(float(lowest.min()), float(highest.max()), bits)
    width = group_width(shape[1], group_size)
    scales_MG = torch.empty(shape[0], -(-shape[1] // width))
    zeros_MG = torch.empty(scales_MG.shape, dtype=torch.uint8)
    codes, begin = _Codes(shape, bits), 0
    for piece in pieces():
        coded = round_to_nearest(piece, bits, group_size, exponent=exponent)
        rows = slice(begin, begin + len(piece))
        scales_MG[rows], zeros_MG[rows] = coded.scales_MG, coded.zeros_MG
        codes.put(begin, coded.codes_MN)
        begin = rows.stop
    sections = _sections(scales_MG, zeros_MG, codes.section, (bits, width, exponent), None)
    container.write_file(file, NAME, shape, piece.dtype, sections)


def stored_channel_scales(channel_scales_N: torch.Tensor) -> torch.Tensor:
    """Return positive channel scales, float32 (N,), as stored: rounded to float16 times one power of two."""
    numbers = channel_scales_N.cpu().numpy()
    exponent = exponent_of(float(np.max(numbers)))
    return from_halves(torch.from_numpy(to_halves(numbers, exponent)), exponent).to(channel_scales_N.device)


class GroupedCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        rows, columns = contents.header.shape
        stored = _Parameters(*contents.parameters(_PARAMETERS))
        contents.require(
            stored.bits in BITS, f"damaged parameters: codes of {stored.bits} bits, expected one of {BITS}"
        )
        contents.inside("channel scales", stored.channels, range(2))
        contents.inside("group width", stored.width, range(1, columns + 1))
        contents.inside("exponent", stored.exponent, EXPONENTS)
        contents.inside("channel exponent", stored.channel_exponent, EXPONENTS if stored.channels else range(1))
        symbols, numbers = radix(1 << stored.bits), rows * -(-columns // stored.width)
        contents.lengths(
            {
                "parameters": _PARAMETERS.size,
                "scales": 2 * numbers,
                "zero points": symbols.nbytes(1, numbers),
                "codes": symbols.nbytes(rows, columns),
                "channel scales": 2 * columns if stored.channels else 0,
            }
        )
        packed, header = contents.packed, contents.header
        zeros = planes_of(contents.section(2), 1 << stored.bits, 1, numbers)
        check_symbols(contents, zeros, 1 << stored.bits, numbers, "zero points")
        check_symbols(contents, _planes(packed, header, stored), 1 << stored.bits, columns, "codes")
        largest = ((1 << stored.bits) - 1) * contents.largest_half(contents.section(1), "scales", stored.exponent)
        if not stored.channels:
            return largest
        channel = contents.largest_half(contents.section(4), "channel scales", stored.channel_exponent)
        return largest * max(1.0, channel)

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        rows, columns = header.shape
        scales_MG, channels_N = _scales(packed, header, stored)
        zeros_MG = _zeros(packed, header, stored)
        planes = _planes(packed, header, stored)
        table = torch.arange(1 << stored.bits, dtype=torch.float32, device=packed.device)
        weight_MN = torch.empty(rows, columns, dtype=header.dtype, device=packed.device)
        step = max(1, _CHUNK_WEIGHTS // columns)
        for begin in range(0, rows, step):
            chunk = unpack_values([plane[begin : begin + step] for plane in planes], table, columns)
            for grouped, groups in _by_groups(chunk, stored.width):
                grouped.sub_(zeros_MG[begin : begin + step, groups].unsqueeze(-1))
                grouped.mul_(scales_MG[begin : begin + step, groups].unsqueeze(-1))
            if channels_N is not None:
                chunk.mul_(channels_N)
            weight_MN[begin : begin + step] = chunk
        return weight_MN

    def rows(self, packed: torch.Tensor, header: Header, rows_m: torch.Tensor) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        columns = header.shape[1]
        groups = -(-columns // stored.width)
        halves = section(packed, header, 1).view(header.shape[0], -1)[rows_m]
        scales_mG = from_halves(halves.view(-1), stored.exponent).view(-1, groups)
        places = rows_m.unsqueeze(1) * groups + torch.arange(groups, device=packed.device)
        planes = planes_of(section(packed, header, 2), 1 << stored.bits, 1, header.shape[0] * groups)
        zeros = symbols_at(planes, 1 << stored.bits, header.shape[0] * groups, places.view(-1))
        zeros_mG = zeros.view(-1, groups).to(torch.float32)
        table = torch.arange(1 << stored.bits, dtype=torch.float32, device=packed.device)
        weight_mN = unpack_values([plane[rows_m] for plane in _planes(packed, header, stored)], table, columns)
        for grouped, inside in _by_groups(weight_mN, stored.width):
            grouped.sub_(zeros_mG[:, inside].unsqueeze(-1)).mul_(scales_mG[:, inside].unsqueeze(-1))
        if stored.channels:
            weight_mN.mul_(from_halves(section(packed, header, 4), stored.channel_exponent))
        return weight_mN.to(header.dtype)

    def integers(self, packed: torch.Tensor, header: Header) -> Integers | None:
        """Return the codes as they are; None with channel scales, by which a product is rounded once more."""
        stored = _read_parameters(packed, header)
        if stored.channels:
            return None
        planes, columns = _planes(packed, header, stored), header.shape[1]
        table = torch.arange(1 << stored.bits, dtype=torch.uint8, device=packed.device)

        def codes(rows_m: torch.Tensor) -> torch.Tensor:
            return unpack_values([plane[rows_m] for plane in planes], table, columns)

        zeros_MG = _zeros(packed, header, stored).to(torch.uint8)
        scales_MG, _ = _scales(packed, header, stored)
        return Integers(codes, (1 << stored.bits) - 1, 1, scales_MG, zeros_MG, stored.width)

    def multiplies(self, packed: torch.Tensor, header: Header) -> bool:
        stored = _read_parameters(packed, header)
        # A row of one group has words that end after it, with inputs of zero.
        width = stored.width if stored.width < header.shape[1] else 0
        if gpu.on_gpu(packed.device):
            return reads(1 << stored.bits, width)
        return packed.device.type == "cpu" and can_multiply(1 << stored.bits, width)

    def side_table(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        """Return the zero points, a byte each."""
        return _zeros(packed, header, _read_parameters(packed, header)).to(torch.uint8).view(-1)

    def product(
        self,
        packed: torch.Tensor,
        header: Header,
        side_table: torch.Tensor,
        x_TN: torch.Tensor,
        activations: Activations = "float32",
    ) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        if stored.channels:
            x_TN = x_TN * from_halves(section(packed, header, 4), stored.channel_exponent)
        groups = Groups(stored.width, as_array(section(packed, header, 1)), as_array(side_table))
        codes = as_array(section(packed, header, 3))
        y_TM = product(codes, 1 << stored.bits, header.shape, x_TN.numpy(), groups, in_bytes=activations == "int8")
        return torch.from_numpy(y_TM).mul_(2.0**stored.exponent)

    def gpu_product(self, packed: torch.Tensor, header: Header, side_table: torch.Tensor) -> GpuProduct:
        from bivlm.kernels import triton_planes

        stored = _read_parameters(packed, header)
        code = radix(1 << stored.bits)
        weight = triton_planes.PlaneWeight(
            section(packed, header, 3),
            header.shape,
            1 << stored.bits,
            code.per_word,
            code.planes,
            2.0**stored.exponent,
            scaled=triton_planes.Scaled(stored.width, halves(section(packed, header, 1)), side_table),
        )
        if not stored.channels:
            return weight.product
        channels_N = from_halves(section(packed, header, 4), stored.channel_exponent)
        return lambda x_TN: weight.product(x_TN * channels_N)

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return ``scales`` (M, G) and, if there are any, ``channel_scales`` (N,); zero points are integers."""
        stored = _read_parameters(packed, header)
        scales_MG, channels_N = _scales(packed, header, stored)
        parameters = {"scales": scales_MG}
        if channels_N is not None:
            parameters["channel_scales"] = channels_N
        rows, columns = header.shape
        groups = scales_MG.shape[1]
        kind = torch.int8 if stored.bits < 8 else torch.int16
        table = torch.arange(1 << stored.bits, dtype=kind, device=packed.device)
        codes = unpack_values(_planes(packed, header, stored), table, columns)
        levels = torch.nn.functional.pad(codes, (0, groups * stored.width - columns)).view(rows, groups, stored.width)
        levels -= _zeros(packed, header, stored).to(kind).unsqueeze(-1)

        def rebuild(values: dict[str, torch.Tensor]) -> torch.Tensor:
            weight = (levels * values["scales"].unsqueeze(-1)).view(rows, -1)[:, :columns]
            return weight * values["channel_scales"] if stored.channels else weight.contiguous()

        return Tunable(parameters, rebuild)

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        stored = _read_parameters(packed, header)
        numbers = {name: values.detach().cpu().numpy() for name, values in parameters.items()}
        sections = {1: to_halves(numbers["scales"], stored.exponent)}
        if stored.channels:
            sections[4] = to_halves(numbers["channel_scales"], stored.channel_exponent)
        return container.rewrite(packed, header, sections)

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return nominal bits, b per weight as the papers count, and entropy, of the codes with all else as stored."""
        packed = as_array(packed)
        stored = _read_parameters(packed, header)
        counts = count_symbols(_planes(packed, header, stored), 1 << stored.bits, header.shape[1])
        size, used = header.shape[0] * header.shape[1], counts[counts > 0]
        begin, end = header.sections[3]
        return FormatBits(
            nominal=stored.bits * size,
            entropy=float(used @ np.log2(size / used)) + 8 * (len(packed) - (end - begin)),
            stored=8 * len(packed),
        )


class _Codes:
    """The section of codes of a weight of some shape: all planes, one after another."""

    def __init__(self, shape: tuple[int, int], bits: int) -> None:
        sizes = [shape[0] * nbytes for nbytes in radix(1 << bits).plane_row_bytes(shape[1])]
        self.section = np.empty(sum(sizes), np.uint8)
        self._planes = [part.reshape(shape[0], -1) for part in np.split(self.section, np.cumsum(sizes)[:-1])]
        self._bits = bits

    def put(self, first: int, codes_mN: torch.Tensor) -> None:
        """Pack the rows from `first` on, a few at a time so that temporaries stay small."""
        step = max(1, CHUNK_SYMBOLS // codes_mN.shape[1])
        for begin in range(0, len(codes_mN), step):
            some = codes_mN[begin : begin + step]
            for plane, part in zip(self._planes, pack_symbols(some, 1 << self._bits), strict=True):
                plane[first + begin : first + begin + len(some)] = part


def _sections(
    scales_MG: torch.Tensor,
    zeros_MG: torch.Tensor,
    codes: np.ndarray,
    grids: tuple[int, int, int],
    channel_scales_N: torch.Tensor | None,
) -> list[np.ndarray]:
    """Return all sections; `grids` are bits, columns of a group and exponent."""
    bits, width, exponent = grids
    channels = np.empty(0, np.float32) if channel_scales_N is None else channel_scales_N.cpu().numpy()
    channel_exponent = exponent_of(float(np.max(channels, initial=0.0)))
    fields = (bits, channel_scales_N is not None, exponent, channel_exponent, width)
    return [
        np.frombuffer(_PARAMETERS.pack(*fields), np.uint8),
        to_halves(scales_MG.cpu().numpy(), exponent),
        np.concatenate([plane.reshape(-1) for plane in pack_symbols(zeros_MG.reshape(1, -1), 1 << bits)]),
        codes,
        to_halves(channels, channel_exponent),
    ]


def _by_groups(chunk: torch.Tensor, width: int) -> list[tuple[torch.Tensor, slice]]:
    """Return views (rows, groups, columns of a group) of contiguous rows and the groups: whole ones, a short last."""
    columns = chunk.shape[1]
    whole = columns // width
    views = []
    if whole:
        views.append((chunk[:, : whole * width].unflatten(1, (whole, width)), slice(0, whole)))
    if columns % width:
        views.append((chunk[:, whole * width :].unsqueeze(1), slice(whole, whole + 1)))
    return views


def _read_parameters(packed: ArrayT, header: Header) -> _Parameters:
    return _Parameters(*container.fields(packed, header, _PARAMETERS))


def _scales(packed: torch.Tensor, header: Header, stored: _Parameters) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return scales (M, G) and channel scales (N,) or None, float32."""
    scales = from_halves(section(packed, header, 1), stored.exponent).view(header.shape[0], -1)
    return scales, from_halves(section(packed, header, 4), stored.channel_exponent) if stored.channels else None


def _zeros(packed: torch.Tensor, header: Header, stored: _Parameters) -> torch.Tensor:
    """Return zero points (M, G), float32."""
    rows, columns = header.shape
    count = rows * -(-columns // stored.width)
    table = torch.arange(1 << stored.bits, dtype=torch.float32, device=packed.device)
    return unpack_values(planes_of(section(packed, header, 2), 1 << stored.bits, 1, count), table, count).view(rows, -1)


def _planes(packed: ArrayT, header: Header, stored: _Parameters) -> list[ArrayT]:
    return planes_of(section(packed, header, 3), 1 << stored.bits, *header.shape)
