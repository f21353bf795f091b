"""Block types of GGUF that hold a packed weight exactly, and their bytes.

A weight is ``(stride * code - zero) * scale`` (`bivlm.packing.Integers`). The types used here rebuild a block as

====== ======= ===== =============================================================
type   columns bits  rebuilt as
====== ======= ===== =============================================================
Q2_K   256     2.625 ``d sc q - dmin m``, q of 2 bits, sc and m of 4 bits for 16 columns
Q4_0   32      4.5   ``d (q - 8)``, q of 4 bits
Q4_K   256     4.5   ``d sc q - dmin m``, q of 4 bits, sc and m of 6 bits for 32 columns
Q4_1   32      5     ``d q + m``, q of 4 bits
Q5_0   32      5.5   ``d (q - 16)``, q of 5 bits
Q8_0   32      8.5   ``d q``, q of 8 bits with a sign
====== ======= ===== =============================================================

with float16 d, dmin and, in Q4_1, m. So d = dmin = scale, sc = stride and m = zero make a block of a K type, and
``stride * code - zero`` is the integer of the others. All products and differences have at most 24 significant bits
and are exact in float32: a type either holds a weight to the last bit or it does not.

Layouts: ggml/src/ggml-common.h and `gguf.quants`, which decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from bivlm.packing import Integers


@dataclass(frozen=True)
class Blocks:
    """Some rows of a weight with the numbers of each block's group.

    Attributes:
        codes: uint8 (blocks, columns of a block).
        zeros: uint8 (blocks, 1).
        scales: float16 (blocks, 1).
        stride: as in `Integers`.
    """

    codes: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    stride: int

    @property
    def levels(self) -> np.ndarray:
        """``stride * code - zero``, int16 (blocks, columns of a block)."""
        return self.codes * np.int16(self.stride) - self.zeros.astype(np.int16)


@dataclass(frozen=True)
class BlockType:
    """A block type of GGUF.

    Attributes:
        name: that of its `gguf.GGMLQuantizationType`.
        columns: of a block.
        nbytes: of a block.
        holds: whether it has the range for all numbers of a weight.
        encode: the bytes of blocks, uint8 (blocks, nbytes).
    """

    name: str
    columns: int
    nbytes: int
    holds: Callable[[Integers], bool]
    encode: Callable[[Blocks], np.ndarray]

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.columns

    def fits(self, integers: Integers, columns: int) -> bool:
        """Return whether it holds a weight with rows of so many columns: range, and no block with two scales."""
        whole = columns % self.columns == 0
        return whole and (integers.width >= columns or integers.width % self.columns == 0) and self.holds(integers)

    def rows(self, integers: Integers, rows_m: torch.Tensor) -> np.ndarray:
        """Return the bytes of rows by their numbers, uint8 (m, bytes of a row), of a weight that it `fits`."""
        codes_mN = integers.codes(rows_m).numpy()
        group_of_block = np.arange(0, codes_mN.shape[1], self.columns) // integers.width
        group_of_block = group_of_block.clip(max=integers.scales_MG.shape[1] - 1)  # see `widened`
        scales_mb = integers.scales_MG[rows_m].numpy()[:, group_of_block].astype("<f2")
        zeros_mb = integers.zeros_MG[rows_m].numpy()[:, group_of_block]
        codes = codes_mN.reshape(-1, self.columns)
        blocks = Blocks(codes, zeros_mb.reshape(-1, 1), scales_mb.reshape(-1, 1), integers.stride)
        return self.encode(blocks).reshape(len(rows_m), -1)


def widened(integers: Integers, columns: int, more: int) -> Integers:
    """Return a weight with rows of `columns` columns and `more` behind them, whose numbers are any."""
    if not more:
        return integers

    def codes(rows_m: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(integers.codes(rows_m), (0, more))

    # A row of one group stays one.
    return replace(integers, codes=codes, width=integers.width if integers.width < columns else columns + more)


def smallest_type(integers: Integers, columns: int) -> BlockType | None:
    """Return the type with the fewest bits that holds a weight with rows of so many columns; None if none does."""
    if not _are_halves(integers.scales_MG):
        return None
    return next((each for each in TYPES if each.fits(integers, columns)), None)


def why_none(integers: Integers, columns: int) -> str:
    """Return why no type holds a weight with rows of so many columns, and what one would hold."""
    if columns % 32:
        return f"rows of {columns} columns; blocks need a multiple of 32"
    if integers.width < columns and integers.width % 32:
        return f"groups of {integers.width} columns; blocks need a multiple of 32"
    if not _are_halves(integers.scales_MG):
        worst = integers.scales_MG[integers.scales_MG != integers.scales_MG.to(torch.float16).to(torch.float32)]
        return f"a scale of {float(worst.abs().min()):.3g} is no float16, which has 11 bits down to 6.1e-05"
    return (
        f"codes up to {integers.largest} with zero points of {int(integers.zeros_MG.min())} to "
        f"{int(integers.zeros_MG.max())}; 8 bits fit with zero points of 128 alone, 2 to 4 bits always"
    )


def _are_halves(numbers: torch.Tensor) -> bool:
    return torch.equal(numbers.to(torch.float16).to(torch.float32), numbers)


def _levels_in(low: int, high: int) -> Callable[[Integers], bool]:
    def holds(integers: Integers) -> bool:
        lowest, highest = (
            -int(integers.zeros_MG.max()),
            integers.stride * integers.largest - int(integers.zeros_MG.min()),
        )
        return low <= lowest and highest <= high

    return holds


def _codes_up_to(code: int, multiple: int) -> Callable[[Integers], bool]:
    """Return whether codes are at most `code`, and stride and zero points at most `multiple`."""

    def holds(integers: Integers) -> bool:
        return integers.largest <= code and max(integers.stride, int(integers.zeros_MG.max())) <= multiple

    return holds


def _offsets_are_halves(integers: Integers) -> bool:
    offsets_MG = integers.zeros_MG.to(torch.float32) * integers.scales_MG
    return integers.largest <= 15 and _are_halves(offsets_MG) and _are_halves(integers.stride * integers.scales_MG)


def _bytes(numbers: np.ndarray) -> np.ndarray:
    """Return float16 numbers (blocks, 1) as bytes, uint8 (blocks, 2)."""
    return np.ascontiguousarray(numbers, dtype="<f2").view(np.uint8)


def _nibbles(q: np.ndarray) -> np.ndarray:
    """Return (blocks, 16) bytes of (blocks, 32) numbers below 16: the first half in the low bits."""
    return q[:, :16] | q[:, 16:] << 4


def _q2_k(blocks: Blocks) -> np.ndarray:
    q = blocks.codes.reshape(-1, 2, 4, 32)
    packed = q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6
    multiples = np.repeat(np.uint8(blocks.stride) | blocks.zeros << 4, 16, axis=1)
    d = _bytes(blocks.scales)
    return np.concatenate([multiples, packed.reshape(-1, 64), d, d], axis=1)


def _q4_k(blocks: Blocks) -> np.ndarray:
    q = blocks.codes.reshape(-1, 4, 2, 32)
    packed = (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)
    # Eight sub-blocks have the same sc and m: four bytes with sc whole and its upper bits again, four with m, and four
    # with the lower bits of both.
    sc, m = np.full_like(blocks.zeros, blocks.stride), blocks.zeros
    multiples = np.repeat(np.concatenate([sc | sc >> 4 << 6, m | m >> 4 << 6, (sc & 15) | m << 4], axis=1), 4, axis=1)
    d = _bytes(blocks.scales)
    return np.concatenate([d, d, multiples, packed], axis=1)


def _q4_0(blocks: Blocks) -> np.ndarray:
    return np.concatenate([_bytes(blocks.scales), _nibbles((blocks.levels + 8).astype(np.uint8))], axis=1)


def _q4_1(blocks: Blocks) -> np.ndarray:
    d = _bytes(blocks.stride * blocks.scales.astype(np.float32))
    m = _bytes(-(blocks.zeros * blocks.scales.astype(np.float32)))
    return np.concatenate([d, m, _nibbles(blocks.codes)], axis=1)


def _q5_0(blocks: Blocks) -> np.ndarray:
    q = (blocks.levels + 16).astype(np.uint8)
    high = np.packbits(q >> 4, axis=1, bitorder="little")
    return np.concatenate([_bytes(blocks.scales), high, _nibbles(q & 15)], axis=1)


def _q8_0(blocks: Blocks) -> np.ndarray:
    return np.concatenate([_bytes(blocks.scales), blocks.levels.astype(np.int8).view(np.uint8)], axis=1)


# In the order of their bits. Of two alike the first: Q4_0 is multiplied by inputs of finer scales than Q4_K.
TYPES = (
    BlockType("Q2_K", 256, 84, _codes_up_to(3, 15), _q2_k),
    BlockType("Q4_0", 32, 18, _levels_in(-8, 7), _q4_0),
    BlockType("Q4_K", 256, 144, _codes_up_to(15, 63), _q4_k),
    BlockType("Q4_1", 32, 20, _offsets_are_halves, _q4_1),
    BlockType("Q5_0", 32, 22, _levels_in(-16, 15), _q5_0),
    BlockType("Q8_0", 32, 34, _levels_in(-128, 127), _q8_0),
)
