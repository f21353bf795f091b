"""Checks of a packed weight's contents, shared by the codecs.

A checksum shows damage, not intent: the writer of a file writes its checksum. So every codec makes sure that its
sections are ones that its `pack` could have written before anything is allocated or indexed by what they say. After
that the readers trust them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bivlm.errors import InputError
from bivlm.packing.container import Header

_HALF_MAGNITUDE, _HALF_INFINITY = 0x7FFF, 0x7C00  # bit patterns; those of magnitudes are in the order of the values
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Contents:
    """A packed weight whose contents are to be checked.

    Attributes:
        packed: uint8 (bytes,).
        header: of `packed`; its lengths add up.
        name: of the tensor, for messages.
    """

    packed: np.ndarray
    header: Header
    name: str

    @property
    def size(self) -> int:
        """Number of weights, M * N."""
        return self.header.shape[0] * self.header.shape[1]

    def require(self, holds: bool, fault: str) -> None:
        """Raise `InputError` with the tensor's name, codec and shape, and the `fault`, unless the condition `holds`."""
        if not holds:
            raise InputError(f"{self.name}: codec {self.header.codec!r}, shape {self.header.shape}: {fault}")

    def section(self, index: int) -> np.ndarray:
        """Return the bytes of a section, uint8, a view."""
        begin, end = self.header.sections[index]
        return self.packed[begin:end]

    def parameters(self, layout: struct.Struct, *, more: bool = False) -> tuple[int, ...]:
        """Read the first section as `layout`; with `more`, other bytes may follow.

        Raises `InputError` if the section has another length.
        """
        head = self.section(0)
        fits = len(head) >= layout.size if more else len(head) == layout.size
        least = " or more" if more else ""
        self.require(fits, f"{len(head)} bytes of parameters, expected {layout.size}{least}")
        return layout.unpack_from(head.tobytes())

    def inside(self, what: str, value: int, valid: range) -> None:
        """Raise `InputError` unless a parameter is in a range."""
        expected = f"{valid[0]}" if valid[0] == valid[-1] else f"{valid[0]} to {valid[-1]}"
        self.require(value in valid, f"damaged parameters: {what} {value}, expected {expected}")

    def lengths(self, expected: Mapping[str, int | None]) -> None:
        """Raise `InputError` naming the first wrong one unless the sections have so many bytes, in order.

        The length of a section with None depends on contents that are checked later.
        """
        found = len(self.header.sections)
        self.require(found == len(expected), f"{found} sections, codec {self.header.codec!r} has {len(expected)}")
        for index, (what, nbytes) in enumerate(expected.items()):
            if nbytes is not None:
                self.length(index, what, nbytes)

    def length(self, index: int, what: str, nbytes: int) -> None:
        """Raise `InputError` unless there is a section `index` and it has so many bytes."""
        found = len(self.header.sections)
        self.require(index < found, f"{found} sections, expected {index + 1} or more")
        begin, end = self.header.sections[index]
        self.require(end - begin == nbytes, f"{end - begin} bytes of {what}, expected {nbytes}")

    def largest_half(self, halves: np.ndarray, what: str, exponent: int = 0) -> float:
        """Return the largest magnitude of float16 numbers (bytes as uint8) times 2^exponent; 0 if there are none.

        Raises `InputError` unless all are finite, as float16 and as float32.
        """
        magnitude = int(np.max(halves.view("<u2") & _HALF_MAGNITUDE, initial=0))
        self.require(magnitude < _HALF_INFINITY, f"{what}: NaN or infinite, expected finite numbers")
        largest = float(np.ldexp(float(np.uint16(magnitude).view(np.float16)), exponent))
        self.require(largest <= _LARGEST, f"{what}: up to {largest:.3g}, expected at most {_LARGEST:.3g} (float32)")
        return largest

    def padding(self, index: int, bits: int, what: str) -> None:
        """Raise `InputError` unless section `index`, one sequence of `bits` bits, has zeros behind its last one."""
        if bits % 8:
            rest = int(self.section(index)[-1]) >> bits % 8
            self.require(rest == 0, f"{what}: bits behind the last one are set, expected zeros")
