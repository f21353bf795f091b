"""Image files written byte by byte, with kinds of samples that Pillow reads and does not write."""

import struct
import zlib

import numpy as np


def png(samples_HWC: np.ndarray, bits: int, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Write a PNG of `bits` a sample; `colour` is its colour type, `chunks` stand before the pixels."""
    height, width, _ = samples_HWC.shape
    rows = samples_HWC.reshape(height, -1)
    packed = [_packed(row, bits) for row in rows]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in packed))
    every = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in every
    )


def tiff(samples_HWC: np.ndarray, photometric: int, order: str = "<", **tags: int | list[int]) -> bytes:
    """Write a TIFF of one strip in the samples' dtype.

    `tags` may be ``bits`` (if not the dtype's), ``format`` (1 unsigned, 2 signed, 3 float), ``extra`` and
    ``orientation``.
    """
    height, width, channels = samples_HWC.shape
    dtype = samples_HWC.dtype
    bits = tags.get("bits", 8 * dtype.itemsize)
    if bits == 8 * dtype.itemsize:
        data = samples_HWC.astype(dtype.newbyteorder(order)).tobytes()
    else:
        data = b"".join(_packed(row, bits) for row in samples_HWC.reshape(height, -1))
    strip = 8
    entries = {
        256: [width],
        257: [height],
        258: [bits] * channels,
        259: [1],
        262: [photometric],
        273: [strip],
        274: [tags.get("orientation", 1)],
        277: [channels],
        278: [height],
        279: [len(data)],
        339: [tags.get("format", 1)] * channels,
    }
    if "extra" in tags:
        entries[338] = [tags["extra"]]
    if "palette" in tags:
        entries[320] = tags["palette"]
    data += b"\0" * (len(data) % 2)
    directory = strip + len(data)
    beyond = directory + 2 + 12 * len(entries) + 4
    body, further = struct.pack(order + "H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        kind, letter = (4, "I") if tag in (273, 279) else (3, "H")
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            place = struct.pack(order + "I", beyond + len(further))
            further += content
        else:
            place = content.ljust(4, b"\0")
        body += struct.pack(order + "HHI", tag, kind, len(values)) + place
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", directory)
    return start + data + body + b"\0" * 4 + further


def exif(*entries: tuple[int, int, int, bytes], order: str = "<") -> bytes:
    """EXIF data of one directory with entries (tag, type, count, the four bytes of the value or of its place)."""
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    body = struct.pack(order + "H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(order + "HHI", tag, kind, count) + value
    return b"Exif\0\0" + start + body + b"\0" * 4


def _packed(samples: np.ndarray, bits: int) -> bytes:
    """Samples of a row, highest bit first, the first sample in the highest bits."""
    digits = (samples[:, None].astype(np.int64) >> np.arange(bits)[::-1]) & 1
    return np.packbits(digits.astype(np.uint8).ravel()).tobytes()
