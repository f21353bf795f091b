"""The envelope of a packed weight: one 1-D ``uint8`` tensor that says what it is.

Layout, little-endian::

    bytes  field
    0:4    magic "BVLM"
    4      format version (1)
    5      dtype of the rebuilt weight (0 bfloat16, 1 float16, 2 float32)
    6      number of sections
    7      reserved, 0
    8:16   codec name, ASCII, padded with zeros
    16:20  M, out_features
    20:24  N, in_features
    24:28  CRC-32 of bytes 0:24 and of everything after byte 28
    28:    the sections' lengths, uint32 each, then the sections one after another

The envelope does not know what the sections mean; the codec does.

Packed bytes are a tensor on any device, or a numpy array: whatever only reads bytes takes both, so that bits can be
counted without torch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import numpy as np
import torch  # on first use, see `flows.cli.commands.import_late`

from bivlm.errors import InputError

MAGIC = b"BVLM"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<4sBBBB8sIII")
_CHECKSUM_AT = 24
# The largest number of each dtype that a weight can be rebuilt in.
_DTYPES = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0, "float32": float(np.finfo(np.float32).max)}

Bytes: TypeAlias = "np.ndarray | torch.Tensor"
# Of a function that takes one of the two and returns the same; named in quotes, as torch is loaded on first use.
ArrayT = TypeVar("ArrayT", "np.ndarray", "torch.Tensor")


@dataclass(frozen=True)
class Header:
    """The header of a packed weight.

    `sections` are (begin, end) byte offsets into the packed tensor.
    """

    codec: str
    shape: tuple[int, int]
    dtype_name: str
    crc32: int
    sections: tuple[tuple[int, int], ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rebuilt weight."""
        return getattr(torch, self.dtype_name)

    @property
    def largest(self) -> float:
        """The largest number of that dtype."""
        return _DTYPES[self.dtype_name]

    @property
    def nbytes(self) -> int:
        """Length of the whole packed tensor in bytes."""
        return self.sections[-1][1]


def envelope_nbytes(sections: int) -> int:
    """Return the bytes of the header and the table of `sections` lengths."""
    return _HEADER.size + 4 * sections


def write(codec: str, shape: tuple[int, int], dtype: torch.dtype, sections: Sequence[np.ndarray]) -> torch.Tensor:
    """Join `sections` (each a 1-D uint8 array) into one packed tensor, uint8 of shape (bytes,).

    Raises `InputError` for a dtype that has no code or a section of 4 GiB and more.
    """
    return torch.from_numpy(np.concatenate(_parts(codec, shape, dtype, sections)))


def write_file(
    file: Path, codec: str, shape: tuple[int, int], dtype: torch.dtype, sections: Sequence[np.ndarray]
) -> None:
    """Write the bytes of `write` straight into `file`: the sections are not held twice."""
    with file.open("wb") as stream:
        for part in _parts(codec, shape, dtype, sections):
            stream.write(part.data)


def _parts(codec: str, shape: tuple[int, int], dtype: torch.dtype, sections: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the packed tensor in pieces: header, table of lengths, sections."""
    names = list(_DTYPES)
    name = str(dtype).removeprefix("torch.")
    if name not in names:
        raise InputError(f"a packed weight is rebuilt as bfloat16, float16 or float32, not {dtype}")
    lengths = [section.nbytes for section in sections]
    if max(lengths) >= 2**32:
        raise InputError(f"a section of a packed weight has {max(lengths)} bytes; the format holds less than 4 GiB")
    table = np.array(lengths, dtype="<u4").view(np.uint8)
    body = [table, *(np.ascontiguousarray(section, dtype=np.uint8).reshape(-1) for section in sections)]
    fields = (MAGIC, FORMAT_VERSION, names.index(name), len(sections), 0, codec.encode("ascii"), *shape)
    checksum = zlib.crc32(_HEADER.pack(*fields, 0)[:_CHECKSUM_AT])
    for part in body:
        checksum = zlib.crc32(part.data, checksum)
    return [np.frombuffer(_HEADER.pack(*fields, checksum), dtype=np.uint8), *body]


def as_array(packed: Bytes) -> np.ndarray:
    """Return packed bytes as an array, without a copy where they lie on the CPU."""
    return packed if isinstance(packed, np.ndarray) else packed.cpu().numpy()


def section(packed: ArrayT, header: Header, index: int) -> ArrayT:
    """Return the bytes of a section, uint8, a view."""
    begin, end = header.sections[index]
    return packed[begin:end]


def fields(packed: ArrayT, header: Header, layout: struct.Struct) -> tuple[int, ...]:
    """Read the first section, whose contents were checked, as `layout`."""
    return layout.unpack(as_array(section(packed, header, 0)).tobytes())


def rewrite(packed: torch.Tensor, header: Header, sections: Mapping[int, np.ndarray]) -> torch.Tensor:
    """Return the packed tensor with other bytes, as many as before, in some `sections`, and its new checksum."""
    kept = [as_array(section(packed, header, index)) for index in range(len(header.sections))]
    for index, content in sections.items():
        if content.nbytes != kept[index].nbytes:
            raise ValueError(f"section {index} has {kept[index].nbytes} bytes, not {content.nbytes}")
        kept[index] = content
    return write(header.codec, header.shape, header.dtype, kept)


def read_header(packed: Bytes, name: str = "packed weight") -> Header:
    """Parse and check the header of `packed`, uint8 of shape (bytes,).

    Raises `InputError`, naming `name`, if the tensor is not a packed weight of a known version, has no weights, or has
    another length than its header says. The checksum is checked by `verify`, the contents by the codec.
    """
    if str(packed.dtype) not in ("uint8", "torch.uint8") or packed.ndim != 1 or len(packed) < _HEADER.size:
        raise InputError(
            f"{name}: expected a packed weight (1-D uint8, {_HEADER.size} bytes or more), "
            f"found {packed.dtype} of shape {tuple(packed.shape)}"
        )
    head = as_array(packed[: _HEADER.size]).tobytes()
    magic, version, dtype, count, reserved, codec, m, n, crc32 = _HEADER.unpack(head)
    if magic != MAGIC:
        raise InputError(f"{name}: not a packed weight (begins with {magic!r}, expected {MAGIC!r})")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{name}: packed format version {version}, this code reads version {FORMAT_VERSION}; update bivlm"
        )
    begin = envelope_nbytes(count)
    if dtype >= len(_DTYPES) or count == 0 or reserved or len(packed) < begin:
        raise InputError(
            f"{name}: damaged header (dtype code {dtype}, {count} sections, reserved byte {reserved}, {len(packed)} "
            f"bytes; expected a code below {len(_DTYPES)}, a section or more, 0, at least {begin} bytes)"
        )
    if m == 0 or n == 0:
        raise InputError(f"{name}: packed weight of shape {(m, n)}, expected one row and one column or more")
    lengths = as_array(packed[_HEADER.size : begin]).view("<u4")
    ends = begin + np.cumsum(lengths, dtype=np.int64)
    if int(ends[-1]) != len(packed):
        raise InputError(f"{name}: {len(packed)} bytes, its header says {int(ends[-1])}: truncated or damaged")
    begins = [begin, *ends[:-1].tolist()]
    return Header(
        codec=codec.rstrip(b"\0").decode("ascii", errors="backslashreplace"),
        shape=(m, n),
        dtype_name=list(_DTYPES)[dtype],
        crc32=crc32,
        sections=tuple(zip(begins, ends.tolist(), strict=True)),
    )


def verify(packed: Bytes, header: Header, name: str = "packed weight") -> None:
    """Raise `InputError`, naming `name`, if the contents of `packed` do not have the checksum of its header."""
    content = as_array(packed)
    found = zlib.crc32(content[_HEADER.size :].data, zlib.crc32(content[:_CHECKSUM_AT].data))
    if found != header.crc32:
        raise InputError(f"{name}: checksum {found:08x}, its header says {header.crc32:08x}: the tensor is damaged")
