"""Turn image files into upright 8-bit RGB, every kind of file in one defined way.

================================= ====================================================================================
a file holds                      which becomes
================================= ====================================================================================
8-bit grey, RGB, palettes, 1 bit  the same values
alpha, transparent colours        the image on white
grey of 9 to 16 bits              scaled by the range of the format: 65535 of 16 bits becomes 255; inverted where the
                                  file says that 0 is white
RGB, RGBA, CMYK of 16 bits        the high byte of every value; Pillow drops the low one
CMYK, YCbCr, CIELAB               Pillow's conversion; inverted JPEGs of Adobe are set right, profiles are ignored
several frames or pages           the first
signed, 32-bit and float samples  refused: the format does not say which value is white
================================= ====================================================================================

ICC profiles, gamma and significant bits (PNG's sBIT) are ignored. A file is turned by its EXIF orientation, or by that
of its XMP where EXIF has none. Only this entry is read: whatever else is wrong with the metadata does not matter.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from bivlm.errors import InputError

# Pillow also opens formats that start another program (EPS); these are decoded in this process alone.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

ToRgb = Callable[[Image.Image], Image.Image]

_ORIENTATION = 0x0112
_UPRIGHT = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}  # of EXIF data
_EXIF_SIZES = {1: 1, 3: 2, 4: 4}  # bytes of the integer types
_GREY_BITS = {"1": 1, "L;2": 2, "L;4": 4, "L": 8}  # by the raw mode of a PNG
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2


def open_image(path: Path, to_rgb: ToRgb | None = None) -> Image.Image:
    """Return the image of a file, decoded, upright and in RGB.

    `to_rgb` converts the colours, `as_rgb` by default. Raises `InputError` naming the file when it is no image, is
    damaged, or is neither a file of its own nor one that `as_rgb` has a conversion for.
    """
    with _refusing(str(path)), _open_file(path) as stream:
        return _decoded(stream, to_rgb or as_rgb)


def decode_image(content: bytes, name: str, to_rgb: ToRgb | None = None) -> Image.Image:
    """Return the image that these bytes of a file hold, as `open_image`; raises `InputError` with `name`."""
    with _refusing(name):
        return _decoded(io.BytesIO(content), to_rgb or as_rgb)


def check_image(path: Path) -> None:
    """Raise ValueError, which says what is valid, unless the file begins as an image does."""
    try:
        with _open_file(path) as stream, Image.open(stream, formats=FORMATS):
            return
    except MemoryError:
        raise
    except Exception as error:  # as in `_refusing`
        raise ValueError(f"an image ({', '.join(FORMATS)}): {_reason(error)}") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the image in RGB by the table of this module; raises ValueError for values of an unknown range."""
    if image.mode == "F" or _SIGNED in _tag(image, _SAMPLE_FORMAT):
        kind = "float" if image.mode == "F" else "signed integer"
        raise ValueError(f"found {kind} values, whose white is not known; convert them to unsigned 8 or 16 bits")
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("found 32-bit values, whose white is not known; convert them to unsigned 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _narrowed(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # which converts to LA alone
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def clipped_rgb(image: Image.Image) -> Image.Image:
    """Return the image as lmms-eval converts it: wide values are clipped at 255, alpha is dropped."""
    return image.convert("RGB")


def converts_as_clipped(path: Path) -> bool:
    """Return whether `as_rgb` gives what `clipped_rgb` does, as it does for 8-bit images without transparency.

    Images of other kinds are decoded. Raises `InputError` as `open_image`.
    """
    plain = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")
    with _refusing(str(path)), _open_file(path) as stream, Image.open(stream, formats=FORMATS) as image:
        if image.mode in plain and not image.has_transparency_data and _SIGNED not in _tag(image, _SAMPLE_FORMAT):
            return True
    return open_image(path).tobytes() == open_image(path, clipped_rgb).tobytes()


def _open_file(path: Path) -> BinaryIO:
    """Open a file for reading; raises OSError for a link, and at once for a pipe, which may never be written to."""
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError("found no regular file")


def _decoded(source: BinaryIO, to_rgb: ToRgb) -> Image.Image:
    with Image.open(source, formats=FORMATS) as image:
        _prepare(image)
        image.load()
        rgb = to_rgb(image)
        if (turn := _TURNS.get(_orientation(image) or _UPRIGHT)) is not None:
            rgb = rgb.transpose(turn)
            for key in _METADATA:
                rgb.info.pop(key, None)
        return rgb


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn what Pillow raises within the block into `InputError` with `name`; lack of memory, which may pass, stays."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises whatever its parsing stumbles over
        reason = f"cannot decode it: {_reason(error)}"
        raise InputError(f"{name}: expected an image ({', '.join(FORMATS)}), {reason}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # whose text names the open file, not what is wrong
        return "the content is none of these"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _prepare(image: ImageFile.ImageFile) -> None:
    """Set right what Pillow would stumble over, or take wrongly, when it decodes an opened file."""
    if not isinstance(image.info.get("xmp", b""), bytes | str):  # a TIFF is turned on loading, and all its XMP searched
        del image.info["xmp"]
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or key is None:
        return
    # A transparent colour is stored as it is in the file; the pixels will have 8 bits.
    raw_mode = str(image.tile[0].args)
    if image.mode == "RGB":
        shift = 8 if raw_mode == "RGB;16B" else 0
        image.info["transparency"] = tuple(value >> shift & 255 for value in key)
    else:
        highest = 2 ** _GREY_BITS[raw_mode] - 1
        image.info["transparency"] = (key & highest) * 255 // highest


def _narrowed(image: Image.Image) -> Image.Image:
    """Return an image of wide unsigned integers in 8 bits, mode L, or LA if a value of it is transparent."""
    values = np.asarray(image)
    if image.mode == "I":  # of 16 bits
        values = values.clip(0, 65535).astype(np.uint16)
    bits, *_ = _tag(image, _BITS_PER_SAMPLE) or (16,)
    highest = 2**bits - 1
    levels = ((np.arange(65536) * 255 + highest // 2) // highest).clip(max=255).astype(np.uint8)
    if 0 in _tag(image, _PHOTOMETRIC):  # 0 is white, which Pillow sets right of 8 bits alone
        levels = 255 - levels
    grey = Image.fromarray(levels[values])
    if (key := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))))


def _tag(image: Image.Image, tag: int) -> tuple[Any, ...]:
    """Return the values of a tag of a TIFF; none if the file has no such tag or is no TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, ())
    return value if isinstance(value, tuple) else (value,)


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of a decoded image, else that of its XMP; None if there is none to be read."""
    if image.format == "TIFF":  # Pillow has turned it
        return None
    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:  # of old PNG files, as hexadecimal text
        with suppress(ValueError, AttributeError):
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    found = _exif_orientation(exif) if isinstance(exif, bytes) else None
    if found is not None:
        return found
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
    return int(match[1]) if match else None


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF data; None without one, 0 if it is no integer.

    Pillow stops reading at the first entry that is damaged, which may stand before the orientation.
    """
    exif = re.sub(rb"^(Exif\x00\x00){1,2}", b"", exif)
    order = _BYTE_ORDERS.get(exif[:2])
    if order is None:
        return None

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    directory = number(4, 4)
    for at in range(directory + 2, min(directory + 2 + 12 * number(directory, 2), len(exif) - 11), 12):
        if number(at, 2) == _ORIENTATION:
            return number(at + 8, _EXIF_SIZES.get(number(at + 2, 2), 0))
    return None
