"""Damaged images end in an image or in a refusal by name: no traceback, no hang, no gigabytes, no link followed."""

import os
import random
import resource
import struct
import time
import warnings
import zlib
from pathlib import Path

import pytest
from image_files import exif, png
from test_images import COLOURS, FILES, UNKNOWN_WHITE
from test_orientation import CARRIERS, orientation_entry

from bivlm.errors import InputError
from bivlm.sources.images import converts_as_clipped, decode_image, open_image
from bivlm.sources.rows import find_image

SOUND = {
    **{kind: content for kind, (content, _) in (FILES | UNKNOWN_WHITE).items()},
    **{carrier: write(6) for carrier, write in CARRIERS.items()},
    "PNG with everything": png(
        COLOURS, 8, 2, (b"gAMA", b"\0\0\xb1\x8f"), (b"pHYs", b"\0\0\x0b\x13" * 2 + b"\1"), (b"sBIT", b"\5\6\5"),
        (b"iCCP", b"p\0\0" + zlib.compress(b"profile")), (b"acTL", b"\0\0\0\1\0\0\0\0"),
        (b"fcTL", struct.pack(">5I2H2B", 0, 64, 4, 0, 0, 1, 1, 0, 0)), (b"eXIf", exif(orientation_entry(8))[6:]),
    ),
}  # fmt: skip
NUMBERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
SECONDS, GIGABYTE = 10, 2**20  # kibibytes


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The file with a few bytes, numbers or pieces of it changed; headers and directories more often than pixels."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = rng.choice((40, 200, len(data)))
        at = rng.randrange(min(end, len(data))) if rng.random() < 0.7 else len(data) - 1 - rng.randrange(len(data)) // 4
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.randrange(256)
            case 2 | 3:
                size, order = rng.choice((1, 2, 4)), rng.choice("<>")
                number = rng.choice(NUMBERS) % 256**size
                data[at : at + size] = struct.pack(order + {1: "B", 2: "H", 4: "I"}[size], number)
            case 4:
                del data[at : at + rng.choice((1, 2, 12, 100))]
            case 5:
                data[at:at] = data[at : at + rng.choice((1, 12, 100))] or b"\0"
            case 6:
                del data[rng.randrange(len(data)) :]
        if not data:
            break
    return with_checksums(bytes(data)) if rng.random() < 0.9 else bytes(data)


def with_checksums(content: bytes) -> bytes:
    """A PNG with the checksums that its chunks need, so that what is damaged is read."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    data, at = bytearray(content), 8
    while at + 12 <= len(data):
        end = at + 8 + struct.unpack(">I", data[at : at + 4])[0]
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return bytes(data)


def test_a_damaged_image_is_decoded_or_refused_by_name(tmp_path):
    seeds = range(1500)
    kinds, refused = sorted(SOUND), 0
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        rng = random.Random(seed)
        kind = kinds[seed % len(kinds)]
        content = damaged(SOUND[kind], rng)
        (tmp_path / f"{seed}.png").write_bytes(content)
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error" if seed % 3 == 0 else "ignore")
            refused += not shown(tmp_path, f"{seed}.png")
            try:
                assert decode_image(content, "cell").mode == "RGB"
            except InputError as error:
                assert str(error).startswith("cell: expected an image"), (seed, kind)
        assert time.perf_counter() - started < SECONDS, (seed, kind)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < GIGABYTE
    assert len(seeds) / 4 < refused < len(seeds)


def shown(folder: Path, name: str) -> bool:
    """Whether the image is shown; if not, it is refused as `find_image` and `open_image` say."""
    try:
        path = find_image(folder, name)
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(("an image (PNG", "the path of an image")), name
        return False
    try:
        image = open_image(path)
        assert (image.mode, min(image.size) > 0) == ("RGB", True)
        converts_as_clipped(path)
        return True
    except InputError as error:
        assert str(error).startswith(f"{path}: expected an image (PNG"), name
        return False


def test_whatever_stands_where_an_image_should_be_no_link_leads_out(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    secret = FILES["PNG RGB"][0]
    (outside / "secret.png").write_bytes(secret)
    folder = tmp_path / "folder"
    folder.mkdir()
    for seed in range(60):
        rng = random.Random(seed)
        place, name = folder / f"{seed}.png", f"{seed}.png"
        match seed % 6:
            case 0:
                place.symlink_to(outside / "secret.png")
            case 1:
                (folder / f"way{seed}").symlink_to(rng.choice((outside, Path("..") / "outside")))
                name = f"way{seed}/secret.png"
            case 2:
                place.symlink_to(place)
            case 3:
                os.mkfifo(place)
            case 4:
                place.mkdir()
            case 5:
                place.symlink_to("/dev/zero")
        assert not shown(folder, name)


@pytest.mark.parametrize("change", ["link", "pipe", "folder", "gone"])
def test_an_image_that_is_exchanged_after_it_was_found_is_refused(tmp_path, change):
    outside = tmp_path / "secret.png"
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in (outside, folder / "a.png"):
        file.write_bytes(FILES["PNG RGB"][0])
    found = find_image(folder, "a.png")
    (folder / "a.png").unlink()
    if change == "link":
        (folder / "a.png").symlink_to(outside)
    elif change == "pipe":
        os.mkfifo(folder / "a.png")
    elif change == "folder":
        (folder / "a.png").mkdir()
    with pytest.raises(InputError, match=r"a\.png: expected an image"):
        open_image(found)


def test_a_file_that_is_cut_anywhere_is_refused_or_complete():
    for kind in ("PNG I;16", "JPEG RGB", "WEBP RGBA", "GIF P", "TIFF RGB of 16 bits", "PPM RGB", "BMP P"):
        content = SOUND[kind]
        whole = decode_image(content, kind).tobytes()
        for end in range(0, len(content), max(1, len(content) // 40)):
            try:
                image = decode_image(content[:end], "cut")
            except InputError as error:
                assert str(error).startswith("cut: expected an image")
            else:
                assert image.tobytes() == whole, (kind, end)
