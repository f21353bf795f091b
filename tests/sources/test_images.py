"""Every kind of image file becomes the RGB that its format says, upright; or is refused by name."""

import colorsys
import io
import os
import struct
import zlib

import numpy as np
import pytest
from image_files import png, tiff
from PIL import Image, ImageOps
from published_data import vizwiz_rows, write_set

from bivlm.calibration.frozen import load_samples
from bivlm.errors import InputError
from bivlm.evaluation.benchmark import load_benchmark
from bivlm.sources.images import as_rgb, converts_as_clipped, decode_image, open_image

ONE_PERCENT = 2.55
RAMP = np.arange(256).reshape(4, 64)  # every level once
FULL = np.full_like(RAMP, 255)
WIDE = RAMP * 257 + 100 * (RAMP < 255)  # 16 bits, more than the high byte
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1)
ALPHA = RAMP[::-1, ::-1]
PALETTE = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2], -1)
CMYK = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1], RAMP // 2], -1)
YCC = np.stack([64 + RAMP // 2, 118 + RAMP // 12, 138 - RAMP // 12], -1)
LAB = np.stack([32 + RAMP * 3 // 4, 118 + RAMP // 12, 138 - RAMP // 12], -1)  # 128 is zero
HSV = np.stack([RAMP, 255 - RAMP // 2, ALPHA], -1)


def grey(levels):
    return np.repeat(np.asarray(levels, float)[..., None], 3, -1)


def on_white(colours, alpha):
    share = np.asarray(alpha, float)[..., None] / 255
    return colours * share + 255 * (1 - share)


def of_cmyk(cmyk):
    return (255 - cmyk[..., :3]) * (255.0 - cmyk[..., 3:]) / 255


def of_ycc(ycc):  # JFIF 1.02
    y, cb, cr = (ycc[..., channel].astype(float) - (0, 128, 128)[channel] for channel in range(3))
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1).clip(0, 255)


def of_lab(lab):
    """CIELAB of illuminant D50 as sRGB (matrix of Bruce Lindbloom, adapted by Bradford)."""
    lightness, a, b = lab[..., 0] / 2.55, lab[..., 1] - 128.0, lab[..., 2] - 128.0
    f_y = (lightness + 16) / 116
    f = np.stack([f_y + a / 500, f_y, f_y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.96422, 1.0, 0.82521)
    matrix = [
        [3.1338561, -1.6168667, -0.4906146],
        [-0.9787684, 1.9161415, 0.0334540],
        [0.0719453, -0.2289914, 1.4052427],
    ]
    linear = (xyz @ np.array(matrix).T).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def of_hsv(hsv):
    return np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv.reshape(-1, 3) / 255]).reshape(hsv.shape) * 255


def stacked(*channels):
    return np.stack(channels, -1)


def saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


def array_image(array, mode):
    bands = [Image.fromarray(array[..., channel].astype(np.uint8)) for channel in range(array.shape[-1])]
    return Image.merge(mode, bands)


def paletted(indices=RAMP):
    image = Image.fromarray(indices.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(PALETTE.astype(np.uint8).tobytes())
    return image


def netpbm(kind, maximum, samples):
    dtype = "u1" if maximum < 256 else ">u2"
    header = f"{kind}\n64 4\n{maximum}\n".encode()
    if kind in ("P2", "P3"):
        return header + " ".join(map(str, samples.ravel())).encode() + b"\n"
    return header + samples.astype(dtype).tobytes()


U8, U16 = np.uint8, np.uint16
MIXED = np.where(RAMP == 77, 0, 255)
LA = stacked(RAMP, ALPHA)
RGBA = np.concatenate([COLOURS, ALPHA[..., None]], -1)
PREMULTIPLIED = np.concatenate([(COLOURS * ALPHA[..., None]) // 255, ALPHA[..., None]], -1)
PLTE = (b"PLTE", PALETTE.astype(U8).tobytes())
TIFF_PALETTE = [int(level) * 257 for level in PALETTE.T.ravel()]


def one(levels):
    return levels[..., None]


FILES = {
    "PNG 1": (png(one(RAMP % 2), 1, 0), grey(RAMP % 2 * 255)),
    "PNG L of 2 bits": (png(one(RAMP % 4), 2, 0), grey(RAMP % 4 * 85)),
    "PNG L of 4 bits": (png(one(RAMP % 16), 4, 0), grey(RAMP % 16 * 17)),
    "PNG L": (png(one(RAMP), 8, 0), grey(RAMP)),
    "PNG I;16": (png(one(WIDE), 16, 0), grey(WIDE / 257)),
    "PNG I;16, low values": (png(one(RAMP), 16, 0), grey(RAMP / 257)),
    "PNG P": (png(one(RAMP), 8, 3, PLTE), PALETTE[RAMP]),
    "PNG LA": (png(LA, 8, 4), on_white(grey(RAMP), ALPHA)),
    "PNG LA of 16 bits": (png(LA * 257, 16, 4), on_white(grey(RAMP), ALPHA)),
    "PNG RGB": (png(COLOURS, 8, 2), COLOURS),
    "PNG RGB of 16 bits": (png(COLOURS * 257 // 2, 16, 2), COLOURS / 2),
    "PNG RGBA": (png(RGBA, 8, 6), on_white(COLOURS, ALPHA)),
    "PNG RGBA of 16 bits": (png(RGBA * 257, 16, 6), on_white(COLOURS, ALPHA)),
    "PNG RGBA, black ink": (png(np.where(np.arange(4) == 3, RGBA, 0), 8, 6), on_white(0 * COLOURS, ALPHA)),
    "PNG 1, white transparent": (png(one(RAMP % 2), 1, 0, (b"tRNS", b"\0\1")), grey(FULL - 255 * (RAMP % 2 == 0))),
    "PNG 1, black transparent": (png(one(RAMP % 2), 1, 0, (b"tRNS", b"\0\0")), grey(FULL)),
    "PNG L of 2 bits, a level transparent": (
        png(one(RAMP % 4), 2, 0, (b"tRNS", b"\0\1")),
        grey(np.where(RAMP % 4 == 1, 255, RAMP % 4 * 85)),
    ),
    "PNG L of 4 bits, a level transparent": (
        png(one(RAMP % 16), 4, 0, (b"tRNS", b"\0\7")),
        grey(np.where(RAMP % 16 == 7, 255, RAMP % 16 * 17)),
    ),
    "PNG L, a level transparent": (png(one(RAMP), 8, 0, (b"tRNS", b"\0\x4d")), on_white(grey(RAMP), MIXED)),
    "PNG I;16, a level transparent": (
        png(one(WIDE), 16, 0, (b"tRNS", struct.pack(">H", WIDE[1, 13]))),
        on_white(grey(RAMP), MIXED),
    ),
    "PNG RGB, a colour transparent": (
        png(COLOURS, 8, 2, (b"tRNS", struct.pack(">3H", *COLOURS[1, 13]))),
        on_white(COLOURS, MIXED),
    ),
    "PNG RGB of 16 bits, a colour transparent": (
        png(COLOURS * 257, 16, 2, (b"tRNS", struct.pack(">3H", *(COLOURS[1, 13] * 257)))),
        on_white(COLOURS, MIXED),
    ),
    "PNG P, an entry transparent": (
        png(one(RAMP), 8, 3, PLTE, (b"tRNS", b"\xff" * 77 + b"\0")),
        on_white(PALETTE[RAMP], MIXED),
    ),
    "PNG P, entries with alpha": (
        png(one(RAMP), 8, 3, PLTE, (b"tRNS", bytes(range(256)))),
        on_white(PALETTE[RAMP], RAMP),
    ),
    "JPEG L": (saved(Image.fromarray(RAMP.astype(U8)), format="JPEG", quality=100), grey(RAMP)),
    "JPEG RGB": (saved(array_image(YCC, "YCbCr"), format="JPEG", quality=100, subsampling=0), of_ycc(YCC)),
    "JPEG CMYK, inverted as Adobe does": (
        saved(array_image(np.repeat(one(RAMP // 2), 4, -1), "CMYK"), format="JPEG", quality=100, subsampling=0),
        of_cmyk(np.repeat(one(RAMP // 2), 4, -1)),
    ),
    "WEBP RGB": (saved(array_image(COLOURS, "RGB"), format="WEBP", lossless=True), COLOURS),
    "WEBP RGBA": (saved(array_image(RGBA, "RGBA"), format="WEBP", lossless=True, exact=True), on_white(COLOURS, ALPHA)),
    "GIF L": (saved(Image.fromarray(RAMP.astype(U8)), format="GIF"), grey(RAMP)),
    "GIF P": (saved(paletted(), format="GIF", optimize=False), PALETTE[RAMP]),
    "GIF P, an entry transparent": (
        saved(paletted(), format="GIF", optimize=False, transparency=77),
        on_white(PALETTE[RAMP], MIXED),
    ),
    "GIF, the first of two frames": (
        saved(
            paletted(),
            format="GIF",
            optimize=False,
            transparency=77,
            save_all=True,
            append_images=[paletted(RAMP[::-1])],
        ),
        on_white(PALETTE[RAMP], MIXED),
    ),
    "BMP 1": (saved(Image.fromarray(RAMP % 2 == 1), format="BMP"), grey(RAMP % 2 * 255)),
    "BMP L": (saved(Image.fromarray(RAMP.astype(U8)), format="BMP"), grey(RAMP)),
    "BMP P": (saved(paletted(), format="BMP"), PALETTE[RAMP]),
    "BMP RGB": (saved(array_image(COLOURS, "RGB"), format="BMP"), COLOURS),
    "PPM 1": (saved(Image.fromarray(RAMP % 2 == 1), format="PPM"), grey(RAMP % 2 * 255)),
    "PPM L": (netpbm("P5", 255, RAMP), grey(RAMP)),
    "PPM L up to 100": (netpbm("P5", 100, RAMP % 101), grey(RAMP % 101 * 2.55)),
    "PPM I up to 1023": (netpbm("P5", 1023, RAMP * 4), grey(RAMP * 4 / 1023 * 255)),
    "PPM I up to 65535": (netpbm("P5", 65535, WIDE), grey(WIDE / 257)),
    "PPM I as text": (netpbm("P2", 1000, RAMP * 3), grey(RAMP * 0.765)),
    "PPM RGB": (netpbm("P6", 255, COLOURS), COLOURS),
    "PPM RGB up to 65535": (netpbm("P6", 65535, COLOURS * 257), COLOURS),
    "PPM RGB as text": (netpbm("P3", 255, COLOURS), COLOURS),
    "TIFF 1": (tiff(one(RAMP % 2).astype(U8), 1, bits=1), grey(RAMP % 2 * 255)),
    "TIFF L": (tiff(one(RAMP).astype(U8), 1), grey(RAMP)),
    "TIFF L, 0 is white": (tiff(one(RAMP).astype(U8), 0), grey(255 - RAMP)),
    "TIFF I;16": (tiff(one(WIDE).astype(U16), 1), grey(WIDE / 257)),
    "TIFF I;16B": (tiff(one(WIDE).astype(U16), 1, ">"), grey(WIDE / 257)),
    "TIFF I;16, 0 is white": (tiff(one(WIDE).astype(U16), 0), grey(255 - WIDE / 257)),
    "TIFF I;16 of 12 bits": (tiff(one(RAMP * 16).astype(U16), 1, bits=12), grey(RAMP * 16 / 4095 * 255)),
    "TIFF I;16, compressed": (
        saved(Image.fromarray(WIDE.astype(U16)), format="TIFF", compression="tiff_lzw"),
        grey(WIDE / 257),
    ),
    "TIFF P": (tiff(one(RAMP).astype(U8), 3, palette=TIFF_PALETTE), PALETTE[RAMP]),
    "TIFF PA": (tiff(LA.astype(U8), 3, palette=TIFF_PALETTE, extra=2), on_white(PALETTE[RAMP], ALPHA)),
    "TIFF LX": (tiff(LA.astype(U8), 1, extra=0), grey(RAMP)),
    "TIFF LA": (tiff(LA.astype(U8), 1, extra=2), on_white(grey(RAMP), ALPHA)),
    "TIFF La": (
        tiff(stacked(RAMP * ALPHA // 255, ALPHA).astype(U8), 1, extra=1),
        grey(RAMP * ALPHA // 255 + 255.0 - ALPHA),
    ),
    "TIFF RGB": (tiff(COLOURS.astype(U8), 2), COLOURS),
    "TIFF RGB of 16 bits": (tiff((COLOURS * 257).astype(U16), 2), COLOURS),
    "TIFF RGBX": (tiff(RGBA.astype(U8), 2, extra=0), COLOURS),
    "TIFF RGBA": (tiff(RGBA.astype(U8), 2, extra=2), on_white(COLOURS, ALPHA)),
    "TIFF RGBA of 16 bits": (tiff((RGBA * 257).astype(U16), 2, ">", extra=2), on_white(COLOURS, ALPHA)),
    "TIFF RGBa": (tiff(PREMULTIPLIED.astype(U8), 2, extra=1), PREMULTIPLIED[..., :3] + 255.0 - ALPHA[..., None]),
    "TIFF CMYK": (tiff(CMYK.astype(U8), 5), of_cmyk(CMYK)),
    "TIFF CMYK of 16 bits": (tiff((CMYK * 257).astype(U16), 5), of_cmyk(CMYK)),
    "TIFF YCbCr": (tiff(YCC.astype(U8), 6), of_ycc(YCC)),
    "TIFF LAB": (tiff(np.where(np.arange(3) == 0, LAB, LAB - 128).astype(U8), 8), of_lab(LAB)),
}
IN_MEMORY = {
    "RGBX": (array_image(np.concatenate([COLOURS, FULL[..., None]], -1), "RGBX"), COLOURS),
    "HSV": (array_image(HSV, "HSV"), of_hsv(HSV)),
    "YCbCr": (array_image(YCC, "YCbCr"), of_ycc(YCC)),
    "CMYK": (array_image(CMYK, "CMYK"), of_cmyk(CMYK)),
    "La": (
        Image.frombytes("La", (64, 4), stacked(RAMP * ALPHA // 255, ALPHA).astype(U8).tobytes()),
        grey(RAMP * ALPHA // 255 + 255.0 - ALPHA),
    ),
    "RGBa": (
        Image.frombytes("RGBa", (64, 4), PREMULTIPLIED.astype(U8).tobytes()),
        PREMULTIPLIED[..., :3] + 255.0 - ALPHA[..., None],
    ),
    "I;16": (Image.frombytes("I;16", (64, 4), WIDE.astype("<u2").tobytes()), grey(WIDE / 257)),
    "I;16L": (Image.frombytes("I;16L", (64, 4), WIDE.astype("<u2").tobytes()), grey(WIDE / 257)),
    "I;16B": (Image.frombytes("I;16B", (64, 4), WIDE.astype(">u2").tobytes()), grey(WIDE / 257)),
    "I;16N": (Image.frombytes("I;16N", (64, 4), WIDE.astype("=u2").tobytes()), grey(WIDE / 257)),
}


def assert_shows(image, expected):
    """Mean and extremes of every channel, and every pixel, within one percent of the range."""
    assert image.mode == "RGB"
    found, expected = np.asarray(image, dtype=float), np.asarray(expected, dtype=float)
    assert found.shape == expected.shape
    for figure in (np.mean, np.min, np.max):
        assert np.abs(figure(found, (0, 1)) - figure(expected, (0, 1))).max() <= ONE_PERCENT, figure.__name__
    assert np.abs(found - expected).max() <= ONE_PERCENT


@pytest.mark.parametrize("kind", FILES)
def test_a_gradient_of_every_kind_of_file_is_shown_as_its_format_says(kind, tmp_path):
    content, expected = FILES[kind]
    assert_shows(decode_image(content, kind), expected)
    (tmp_path / "image").write_bytes(content)
    assert_shows(open_image(tmp_path / "image"), expected)


@pytest.mark.parametrize("mode", IN_MEMORY)
def test_a_gradient_of_every_mode_is_shown(mode):
    image, expected = IN_MEMORY[mode]
    assert image.mode == mode
    assert_shows(as_rgb(image), expected)


UNKNOWN_WHITE = {
    "TIFF of signed 8 bits": (tiff(one(RAMP).astype(np.int8), 1, format=2), "signed integer values"),
    "TIFF of signed 16 bits": (tiff(one(RAMP).astype(np.int16), 1, format=2), "signed integer values"),
    "TIFF of signed 32 bits": (tiff(one(RAMP).astype(np.int32), 1, ">", format=2), "signed integer values"),
    "TIFF of unsigned 32 bits": (tiff(one(RAMP).astype(np.uint32), 1), "32-bit values"),
    "TIFF of floats": (tiff(one(RAMP / 255).astype(np.float32), 1, format=3), "float values"),
    "TIFF of NaN": (tiff(one(RAMP * np.nan).astype(np.float32), 1, format=3), "float values"),
    "PFM": (b"Pf\n64 4\n-1.0\n" + (RAMP / 255).astype("<f4").tobytes(), "float values"),
}


@pytest.mark.parametrize("kind", UNKNOWN_WHITE)
def test_a_file_whose_white_is_not_known_is_refused_by_name(kind, tmp_path):
    content, reason = UNKNOWN_WHITE[kind]
    (tmp_path / "image").write_bytes(content)
    with pytest.raises(
        InputError, match=rf"{tmp_path}/image: .*found {reason}, whose white is not known; convert them"
    ):
        open_image(tmp_path / "image")


def test_opaque_8_bit_images_keep_their_bytes(tmp_path):
    """As they were decoded before wide values and alpha had a conversion, so that recorded steps are found."""
    kinds = [kind for kind in FILES if kind.split()[1].strip(",") in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")]
    kinds = [kind for kind in kinds if "transparent" not in kind and "alpha" not in kind and "first" not in kind]
    opaque = {kind: FILES[kind][0] for kind in kinds}
    opaque["PNG RGBA, all opaque"] = png(np.where(np.arange(4) == 3, 255, RGBA), 8, 6)
    opaque["PNG P, unused entry transparent"] = png(one(RAMP // 2), 8, 3, PLTE, (b"tRNS", b"\xff" * 200 + b"\0"))
    assert len(opaque) > 25
    for kind, content in opaque.items():
        with Image.open(io.BytesIO(content)) as image:
            before = ImageOps.exif_transpose(image).convert("RGB").tobytes()
        (tmp_path / "image").write_bytes(content)
        assert open_image(tmp_path / "image").tobytes() == before, kind
        assert converts_as_clipped(tmp_path / "image"), kind
    for kind in ("PNG I;16", "PNG RGBA", "GIF P, an entry transparent", "TIFF I;16B"):
        (tmp_path / "image").write_bytes(FILES[kind][0])
        assert not converts_as_clipped(tmp_path / "image"), kind


@pytest.mark.parametrize("kind", ["PNG I;16", "PNG RGBA", "PNG P, entries with alpha", "PPM I up to 65535", "PNG LA"])
def test_published_sets_are_shown_as_lmms_eval_shows_them(kind, tmp_path):
    content = FILES[kind][0]
    rows = [row | {"image": {"bytes": content, "path": None}} for row in vizwiz_rows()]
    shown = next(iter(load_benchmark(f"vizwiz:{write_set('vizwiz', tmp_path, rows)}"))).image
    with Image.open(io.BytesIO(content)) as image:
        assert shown.tobytes() == image.convert("RGB").tobytes()
    assert shown.tobytes() != decode_image(content, kind).tobytes()


def test_a_set_is_another_one_where_its_images_are_shown_in_another_way(tmp_path, monkeypatch):
    line = '{"image": "a.png", "question": "What?", "answers": ["x"]}\n'
    digests = {}
    for name, kind in (("opaque", "PNG RGB"), ("wide", "PNG I;16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.jsonl").write_text(line)
        (tmp_path / name / "a.png").write_bytes(FILES[kind][0])
        digests[name] = load_benchmark(f"vqa:{tmp_path / name}").digest
    monkeypatch.setattr("bivlm.evaluation.vqa_folder.converts_as_clipped", lambda _: True)
    assert load_benchmark(f"vqa:{tmp_path / 'opaque'}").digest == digests["opaque"]
    assert load_benchmark(f"vqa:{tmp_path / 'wide'}").digest != digests["wide"]


def test_a_sample_frozen_before_alpha_had_a_conversion_is_still_read(tmp_path):
    from bivlm.calibration.drawing import image_digest

    with Image.open(io.BytesIO(FILES["GIF P, an entry transparent"][0])) as image:
        frozen = image.convert("RGB")
    frozen.save(tmp_path / "0.png")
    assert b"tRNS" in (tmp_path / "0.png").read_bytes()
    line = f'{{"image": "0.png", "image_sha256": "{image_digest(frozen)}", "user": "?", "assistant": "!"}}\n'
    (tmp_path / "conversations.jsonl").write_text(line)
    assert load_samples(tmp_path)[0].image.tobytes() == frozen.tobytes()


def test_what_is_no_file_of_its_own_is_refused_at_once(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("link.png", "folder.png", "empty.png", "pipe.png", "gone.png"):
        with pytest.raises(InputError, match=rf"{tmp_path}/{name}: expected an image"):
            open_image(tmp_path / name)


def test_an_image_of_too_many_pixels_is_refused():
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    content = png(COLOURS, 8, 2)
    start = content.index(b"IHDR") - 4
    chunk = b"IHDR" + header
    bomb = content[:start] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(InputError, match=r"bomb\.png: .*decompression bomb"):
        decode_image(bomb + content[start + 25 :], "bomb.png")


def test_a_lack_of_memory_is_no_damaged_image():
    def out_of_memory(_):
        raise MemoryError

    with pytest.raises(MemoryError):
        decode_image(FILES["PNG RGB"][0], "large.png", out_of_memory)
