"""The codec of trellis-coded weights: sign, group and salient level of every weight by the state of a trellis.

Sections of the packed weight:

0. parameters: bits of a state (uint8), quarters of a bit per step (uint8), sides of the feedback (uint8: 1 or 2), which
   sides are rotated (uint8: 1 inputs, 2 outputs, 3 both), exponent (int16), seed (uint32).
1. float16 (8,): magnitudes of the levels, times 2^exponent.
2. the bits of all tiles, the first of a byte the highest one.

A tile is a sequence of the trellis (`bivlm.numerics.trellis`), `Tiles` says which weights it holds; its bits follow
those of the tile before. What the levels make up is
``R_M W R_N^T``, see `bivlm.numerics.hadamard`: the rotations belong to the weight. All arithmetic is float32 in a fixed
order, so that the rebuilt weight is the same on every device.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bivlm.kernels import gpu
from bivlm.numerics.hadamard import matrix_rotation, rotate, rotate_back, rotation
from bivlm.numerics.half_scales import EXPONENTS, from_halves, to_halves
from bivlm.numerics.trellis import (
    INDEX_OF_PLACE,
    MAGNITUDES,
    PERIOD,
    RATES,
    STATE_BITS,
    TrellisCode,
    bits_of,
    levels_of,
    read,
    trellis_code,
    write,
)
from bivlm.numerics.trellis_product import can_multiply, lines_of, places_of, product
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.packing import Activations, Codec, FormatBits, GpuProduct, Tunable, container
from bivlm.packing.container import ArrayT, Bytes, Header, as_array, section
from bivlm.packing.contents import Contents
from bivlm.packing.lookup import lookup

if TYPE_CHECKING:
    from bivlm.kernels.triton_trellis import Lines

NAME = "trellis"
INPUTS, OUTPUTS = 1, 2
_PARAMETERS = struct.Struct("<BBBBhI")


@dataclass(frozen=True)
class Layout:
    """How a weight is stored, apart from its levels and bits.

    `rotated` says which of its sides are: `INPUTS`, `OUTPUTS`, their sum, or 0.
    """

    state_bits: int
    rate: float
    sides: int
    rotated: int
    seed: int

    @property
    def code(self) -> TrellisCode:
        """The trellis code."""
        return trellis_code(self.state_bits, self.rate)

    def seed_of(self, side: int) -> int:
        """Return the seed of a side's rotation: with one for both, a square weight like the identity would stay so."""
        return self.seed + (2**32 if side == OUTPUTS else 0)

    def rotate(self, weight_MN: torch.Tensor) -> torch.Tensor:
        """Return ``R_M W R_N^T``, float32."""
        weight_MN = rotate(weight_MN, self.seed_of(INPUTS)) if self.rotated & INPUTS else weight_MN.to(torch.float32)
        return rotate(weight_MN.T, self.seed_of(OUTPUTS)).T if self.rotated & OUTPUTS else weight_MN

    def rotate_back(self, weight_MN: torch.Tensor) -> torch.Tensor:
        """Return ``R_M^T W R_N``, float32: undo `rotate`."""
        if self.rotated & OUTPUTS:
            weight_MN = rotate_back(weight_MN.T, self.seed_of(OUTPUTS)).T
        return rotate_back(weight_MN, self.seed_of(INPUTS)) if self.rotated & INPUTS else weight_MN.contiguous()


def packed_nbytes(shape: tuple[int, int], rate: float, sides: int) -> int:
    """Return the bytes that `pack` would store for a layer of this shape."""
    return container.envelope_nbytes(3) + _PARAMETERS.size + 2 * MAGNITUDES + _stream_nbytes(shape, rate, sides)


def stored_magnitudes(magnitudes: np.ndarray, exponent: int) -> np.ndarray:
    """Return magnitudes, float32 (8,), as they are stored."""
    return from_halves(torch.from_numpy(to_halves(magnitudes, exponent)), exponent).numpy()


def pack(
    symbols: np.ndarray,
    magnitudes: np.ndarray,
    layout: Layout,
    shape: tuple[int, int],
    *,
    exponent: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the packed weight, uint8 (bytes,), to be rebuilt as `dtype`.

    `symbols` are the new bits of every step of every tile, uint8, in the order of the stream; `magnitudes` float32
    (8,) as `stored_magnitudes` gives them.
    """
    fields = (
        layout.state_bits,
        round(PERIOD * layout.rate),
        layout.sides,
        layout.rotated,
        exponent,
        layout.seed,
    )
    stream = write(symbols, _tiles(shape, layout.sides).lengths, layout.rate)
    head = np.frombuffer(_PARAMETERS.pack(*fields), np.uint8)
    return container.write(NAME, shape, dtype, [head, to_halves(magnitudes, exponent), stream])


class TrellisCodec(Codec):
    """Reads what `pack` wrote."""

    name = NAME

    def check(self, contents: Contents) -> float:
        state_bits, quarters, sides, rotated, exponent, _ = contents.parameters(_PARAMETERS)
        rate = quarters / PERIOD
        contents.require(
            state_bits in STATE_BITS, f"damaged parameters: {state_bits} state bits, expected {STATE_BITS}"
        )
        contents.require(rate in RATES, f"damaged parameters: {rate} bits a step, expected one of {RATES}")
        contents.inside("sides", sides, range(1, 3))
        contents.inside("rotated", rotated, range(4))
        contents.inside("exponent", exponent, EXPONENTS)
        # No list of tiles is made for a shape that the bits are too few for.
        contents.lengths({"parameters": _PARAMETERS.size, "magnitudes": 2 * MAGNITUDES, "bits": None})
        contents.require(rate * contents.size <= 8 * len(contents.section(2)), "too few bits for its shape")
        bits = _stream_bits(contents.header.shape, rate, sides)
        expected = {"parameters": _PARAMETERS.size, "magnitudes": 2 * MAGNITUDES, "bits": -(-bits // 8)}
        contents.lengths(expected)
        rest = 0xFF >> bits % 8 if bits % 8 else 0
        contents.require(int(contents.section(2)[-1]) & rest == 0, "bits behind the last one are set, expected zeros")
        largest = contents.largest_half(contents.section(1), "magnitudes", exponent)
        # A rotation may gather everything in one place.
        rows, columns = contents.header.shape
        return largest * (rows if rotated & OUTPUTS else 1) ** 0.5 * (columns if rotated & INPUTS else 1) ** 0.5

    def unpack(self, packed: torch.Tensor, header: Header) -> torch.Tensor:
        layout, exponent = read_layout(packed, header)
        magnitudes = from_halves(section(packed, header, 1), exponent).cpu().numpy()
        levels = levels_of(magnitudes / np.float32(_scale(exponent)))
        rows, columns = header.shape
        outputs = rotation(rows, layout.seed_of(OUTPUTS)) if layout.rotated & OUTPUTS else None
        weight_MN = torch.from_numpy(_tiles(header.shape, layout.sides).weight(_read(packed, header), levels, outputs))
        if layout.rotated & INPUTS:
            rotation(columns, layout.seed_of(INPUTS)).apply(weight_MN, back=True)
        if (scale := _scale(exponent)) != 1:
            weight_MN.mul_(scale)
        return weight_MN.to(header.dtype).to(packed.device)

    def multiplies(self, packed: torch.Tensor, header: Header) -> bool:
        code = read_layout(packed, header)[0].code
        if gpu.on_gpu(packed.device):
            return code.windows.size > 0
        return packed.device.type == "cpu" and can_multiply(code)

    def product(
        self,
        packed: torch.Tensor,
        header: Header,
        side_table: torch.Tensor,
        x_TN: torch.Tensor,
        activations: Activations = "float32",
    ) -> torch.Tensor:
        layout, exponent = read_layout(packed, header)
        rows, columns = header.shape
        x_TN = x_TN.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if layout.rotated & INPUTS:
            rotation(columns, layout.seed_of(INPUTS)).apply(x_TN)
        magnitudes = from_halves(section(packed, header, 1), exponent).numpy() / np.float32(_scale(exponent))
        tiles, threads = _tiles(header.shape, layout.sides), torch.get_num_threads()
        stream = as_array(section(packed, header, 2))
        y_TM = torch.from_numpy(product(stream, layout.code, tiles, magnitudes, x_TN.numpy(), threads))
        if layout.rotated & OUTPUTS:
            rotation(rows, layout.seed_of(OUTPUTS)).apply(y_TM, back=True)
        return y_TM.mul_(_scale(exponent))

    def gpu_product(self, packed: torch.Tensor, header: Header, side_table: torch.Tensor) -> GpuProduct:
        from bivlm.kernels.triton_trellis import TrellisWeight

        (layout, exponent), device = read_layout(packed, header), packed.device
        rows, columns = header.shape
        magnitudes = from_halves(section(packed, header, 1), exponent).cpu().numpy() / np.float32(_scale(exponent))
        levels = torch.from_numpy(levels_of(magnitudes)[INDEX_OF_PLACE]).to(device)
        places = torch.from_numpy(places_of(layout.code)).to(device)
        weight = TrellisWeight(
            section(packed, header, 2),
            header.shape,
            round(PERIOD * layout.rate),
            places,
            levels,
            _lines(header.shape, layout.sides, layout.rate, device),
        )
        inputs = matrix_rotation(columns, layout.seed_of(INPUTS), device) if layout.rotated & INPUTS else None
        outputs = matrix_rotation(rows, layout.seed_of(OUTPUTS), device) if layout.rotated & OUTPUTS else None

        def product(x_TN: torch.Tensor) -> torch.Tensor:
            x_TN = x_TN.to(torch.float32)
            y_TM = weight.product(inputs.apply(x_TN) if inputs else x_TN)
            y_TM = outputs.apply(y_TM, back=True) if outputs else y_TM
            return y_TM if exponent <= 0 else y_TM * _scale(exponent)

        return product

    def tunable(self, packed: torch.Tensor, header: Header) -> Tunable:
        """Return ``magnitudes`` (8,)."""
        layout, exponent = read_layout(packed, header)
        indices_MN = level_indices(packed, header)
        magnitudes = from_halves(section(packed, header, 1), exponent)

        up = _scale(exponent)

        def rebuild(values: dict[str, torch.Tensor]) -> torch.Tensor:
            levels = torch.cat([values["magnitudes"], -values["magnitudes"]]) / up
            return _rotated_back()(lookup(levels, indices_MN), layout) * up

        return Tunable({"magnitudes": magnitudes}, rebuild)

    def retuned(self, packed: torch.Tensor, header: Header, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        _, exponent = read_layout(packed, header)
        return container.rewrite(
            packed, header, {1: to_halves(parameters["magnitudes"].detach().cpu().numpy(), exponent)}
        )

    def bits(self, packed: Bytes, header: Header) -> FormatBits:
        """Return bits; nominal is the rate, entropy the bits of the tiles and the levels."""
        layout, _ = read_layout(as_array(packed), header)
        rows, columns = header.shape
        entropy = _stream_bits(header.shape, layout.rate, layout.sides) + 16 * MAGNITUDES
        return FormatBits(nominal=layout.rate * rows * columns, entropy=float(entropy), stored=8 * len(packed))


def read_layout(packed: ArrayT, header: Header) -> tuple[Layout, int]:
    """Return the layout of a packed weight and the exponent of its magnitudes."""
    state_bits, quarters, sides, rotated, exponent, seed = container.fields(packed, header, _PARAMETERS)
    return Layout(state_bits, quarters / PERIOD, sides, rotated, seed), exponent


def level_indices(packed: torch.Tensor, header: Header) -> torch.Tensor:
    """Return the level of every (rotated) weight, uint8 (M, N)."""
    layout, _ = read_layout(packed, header)
    return torch.from_numpy(_tiles(header.shape, layout.sides).matrix(_read(packed, header))).to(packed.device)


def _read(packed: torch.Tensor, header: Header) -> np.ndarray:
    layout, _ = read_layout(packed, header)
    return read(as_array(section(packed, header, 2)), _tiles(header.shape, layout.sides).lengths, layout.code)


def _scale(exponent: int) -> float:
    """Return what levels are divided by while they are rotated: sums of the largest numbers would overflow."""
    return 2.0 ** max(0, exponent)


@cache
def _tiles(shape: tuple[int, int], sides: int) -> Tiles:
    return Tiles(shape, sides)


@cache
def _lines(shape: tuple[int, int], sides: int, rate: float, device: torch.device) -> Lines | None:
    from bivlm.kernels.triton_trellis import Lines

    if (found := lines_of(_tiles(shape, sides), rate)) is None:
        return None
    bits, ahead, sizes = (torch.from_numpy(each).to(device) for each in found)
    return Lines(bits, ahead, sizes, sides == 2)


@cache
def _stream_bits(shape: tuple[int, int], rate: float, sides: int) -> int:
    return int(bits_of(rate, _tiles(shape, sides).lengths).sum())


def _stream_nbytes(shape: tuple[int, int], rate: float, sides: int) -> int:
    return -(-_stream_bits(shape, rate, sides) // 8)


@cache
def _rotated_back() -> Any:
    """Return `Layout.rotate_back` as a function with a gradient, made on first use as `bivlm.packing.lookup` is."""

    class RotatedBack(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, weight_MN: torch.Tensor, layout: Layout) -> torch.Tensor:
            context.layout = layout
            return layout.rotate_back(weight_MN).contiguous()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return context.layout.rotate(gradient), None

    return RotatedBack.apply
