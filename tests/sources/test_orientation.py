"""An image is turned by its orientation alone, in whatever kind of file and with whatever other metadata."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_files import exif, png, tiff
from PIL import Image

from bivlm.sources.images import decode_image

# What a viewer shows, as an operation on the array of rows and columns.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
SCENE = np.kron(np.array([[0, 90, 250], [40, 150, 200]]), np.ones((16, 16), int))
SCENE_RGB = np.repeat(SCENE[..., None], 3, -1)
SHORT = 3


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def orientation_entry(value, order="<"):
    return (0x0112, SHORT, 1, struct.pack(order + "HH", value, 0))


def jpeg_with(metadata):
    return saved(Image.fromarray(SCENE_RGB.astype(np.uint8)), format="JPEG", quality=100, exif=metadata)


def xmp(value):
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{value}"/></x:xmpmeta>'.encode()


def raw_profile(value):
    data = exif(orientation_entry(value))
    text = f"\nexif\n{len(data):8}\n{data.hex()}\n".encode()
    return b"Raw profile type exif\0\0" + zlib.compress(text)


CARRIERS = {
    "JPEG": lambda value: jpeg_with(exif(orientation_entry(value))),
    "JPEG, big-endian": lambda value: jpeg_with(exif(orientation_entry(value, ">"), order=">")),
    "JPEG, LONG": lambda value: jpeg_with(exif((0x0112, 4, 1, struct.pack("<I", value)))),
    "JPEG, BYTE": lambda value: jpeg_with(exif((0x0112, 1, 1, struct.pack("<I", value)))),
    "PNG eXIf": lambda value: png(SCENE_RGB, 8, 2, (b"eXIf", exif(orientation_entry(value))[6:])),
    "PNG, raw profile": lambda value: png(SCENE_RGB, 8, 2, (b"zTXt", raw_profile(value))),
    "PNG, XMP": lambda value: png(SCENE_RGB, 8, 2, (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(value))),
    "PNG I;16": lambda value: png(SCENE_RGB[..., :1] * 257, 16, 0, (b"eXIf", exif(orientation_entry(value))[6:])),
    "WEBP": lambda value: saved(
        Image.fromarray(SCENE_RGB.astype(np.uint8)), format="WEBP", lossless=True, exif=exif(orientation_entry(value))
    ),
    "WEBP, XMP": lambda value: saved(
        Image.fromarray(SCENE_RGB.astype(np.uint8)), format="WEBP", lossless=True, xmp=xmp(value)
    ),
    "TIFF": lambda value: tiff(SCENE_RGB.astype(np.uint8), 2, orientation=value),
    "TIFF I;16B": lambda value: tiff((SCENE_RGB[..., :1] * 257).astype(np.uint16), 1, ">", orientation=value),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_image_is_turned_upright(carrier, orientation):
    image = decode_image(CARRIERS[carrier](orientation), carrier)
    expected = UPRIGHT[orientation](SCENE_RGB)
    found = np.asarray(image, dtype=int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 4  # JPEG
    again = decode_image(saved(image, format="PNG"), "saved again")
    assert np.array_equal(np.asarray(again), np.asarray(image))


OTHER_TAGS = {
    "a text as a number": (0x010F, SHORT, 1, b"\1\0\0\0"),
    "a number as a text": (0x011A, 2, 4, b"abcd"),
    "a value outside the data": (0x010E, 2, 5000, b"\xff\xff\xff\x7f"),
    "a value of gigabytes": (0x010E, 2, 2**31, b"\x10\0\0\0"),
    "a type that is none": (0x010E, 99, 1, b"\0\0\0\0"),
    "a directory that is none": (0x8769, 4, 1, b"\xff\xff\xff\xff"),
    "a fraction by zero": (0x011A, 5, 1, b"\0\0\0\0"),
}


@pytest.mark.parametrize("tag", OTHER_TAGS)
@pytest.mark.parametrize("first", [True, False])
def test_the_orientation_does_not_depend_on_other_tags(tag, first):
    entries = [OTHER_TAGS[tag], orientation_entry(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's
        image = decode_image(jpeg_with(exif(*(entries if first else entries[::-1]))), "turned.jpg")
    assert np.abs(np.asarray(image, dtype=int) - np.rot90(SCENE_RGB, -1)).max() <= 4


@pytest.mark.parametrize(
    "metadata",
    [
        *(exif(orientation_entry(value)) for value in (0, 9, 255, 65535)),
        exif((0x0112, 2, 2, b"6\0\0\0")),
        exif((0x0112, 5, 1, b"\6\0\0\0")),
        exif((0x0112, SHORT, 1, b"\6\0\0\0"))[:20],
        exif(),
        b"Exif\0\0",
        b"Exif\0\0no EXIF at all",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ],
)
def test_an_orientation_that_cannot_be_read_is_upright(metadata):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = decode_image(jpeg_with(metadata), "upright.jpg")
    assert image.size == (48, 32)
