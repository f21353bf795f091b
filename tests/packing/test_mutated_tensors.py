"""Packed tensors that were changed and given the right checksum again, so that only `Codec.check` stands in the way.

Seeded. Each is refused with its name, or rebuilds the same finite weights in every way there is to read it.
"""

import random
import resource
import struct
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_codec import pack_raw

from bivlm import packing
from bivlm.errors import InputError
from bivlm.numerics.trellis import steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import (
    container,
    format_bits,
    grouped,
    open_packed,
    quantile,
    rowblock,
    signs,
    trellis,
    unpack,
    unpack_rows,
)
from bivlm.packing import wavelet as wavelets

NAME = "tower.blocks.7.fc1.weight"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((5, 40), (16, 24), (3, 7), (1, 1), (33, 130))
MEMORY = 1 << 30
SECONDS = 5.0
CHANGES = ("parameter", "parameter", "bits", "bits", "number", "random", "swap", "cut", "add", "count", "mix")
HALVES = (0x7C00, 0xFC00, 0x7E01, 0x7BFF, 0x0001, 0x8000)  # both infinities, NaN, the largest, the smallest, -0
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def grouped_pool(rng, shape, dtype):
    weight = torch.randn(shape, generator=rng).to(dtype)
    for bits, group, channels in ((2, 8, False), (3, 0, True), (4, 5, True), (8, 64, False)):
        scales = grouped.stored_channel_scales(torch.rand(shape[1], generator=rng) + 0.5) if channels else None
        yield grouped.pack(round_to_nearest(weight, bits, group), dtype, scales)


def quantile_pool(rng, shape, dtype):
    size = shape[0] * shape[1]
    for groups, bits, share in ((1, 2, 0.0), (2, 2, 0.1), (3, 1, 0.3), (5, 2, 0.05), (2, 4, 0.9), (1, 1, 0.02)):
        count = round(share * size)
        symbols = torch.randint(2 * groups, shape, generator=rng, dtype=torch.uint8)
        yield quantile.pack(
            shape,
            dtype,
            quantile.ready(symbols),
            group_scales_K=np.linspace(0.1, 1.0, groups),
            salient_bits=bits,
            positions_S=torch.randperm(size, generator=rng)[:count].sort().values.numpy(),
            levels_S=torch.randint(1 << bits, (count,), generator=rng).numpy(),
            centres_L=np.linspace(-1.5, 1.5, 1 << bits),
            row_scales_M=np.linspace(1.0, 2.0, shape[0]),
        )


def signs_pool(rng, shape, dtype):
    size = shape[0] * shape[1]
    for share in (0.0, 0.02, 0.1, 0.6):
        count = round(share * size)
        names = ("row_scales", "row_steps", "row_zeros")
        yield signs.pack(
            torch.rand(shape, generator=rng) < 0.5,
            torch.randperm(size, generator=rng)[:count].sort().values.numpy(),
            torch.randint(256, (count,), generator=rng).numpy(),
            {name: torch.rand(shape[0], generator=rng) for name in names},
            exponent=-3,
            dtype=dtype,
        )


def rowblock_pool(rng, shape, dtype):
    for block, kind in ((8, "means"), (5, "factors"), (64, "means"), (128, "factors")):
        blocks = -(-shape[1] // block)
        numbers = {"scales": torch.rand(shape[0], blocks, 4, generator=rng)}
        if kind == "means":
            numbers["means"] = torch.randn(shape[0], blocks, 3, generator=rng)
        else:
            numbers["factors"] = torch.rand(2, shape[1], generator=rng) + 0.5
        symbols = torch.randint(4, shape, generator=rng, dtype=torch.uint8)
        salient = torch.rand(shape[1], generator=rng) < 0.2
        yield rowblock.pack(symbols, salient, numbers, block=block, exponent=2, dtype=dtype)


def wavelet_pool(rng, shape, dtype):
    rows, columns = shape
    for block, ordered, share in ((8, True, 0.2), (16, False, 0.0), (12, True, 0.3), (64, False, 0.5)):
        salient = torch.rand(columns, generator=rng) < share
        count = int(salient.sum())
        places = [torch.randperm(min(block, columns - at), generator=rng) + at for at in range(0, columns, block)]
        coded = wavelets.Coded(
            torch.randint(4, shape, generator=rng, dtype=torch.uint8),
            torch.randint(4, (rows, count), generator=rng, dtype=torch.uint8),
            salient,
            torch.cat(places) if ordered else None,
            block,
        )
        numbers = {
            "rows": torch.randn(rows, -(-columns // block), 2, 3, generator=rng),
            "columns": torch.randn(count, 2, 3, generator=rng),
        }
        yield wavelets.pack(coded, numbers, exponent=-1, dtype=dtype)


def trellis_pool(rng, shape, dtype):
    for state_bits, rate, sides, rotated in ((12, 2.0, 1, 3), (12, 0.5, 2, 1), (14, 1.25, 1, 0), (12, 2.75, 2, 2)):
        steps = trellis_steps(shape, rate, sides)
        symbols = torch.randint(8, (len(steps),), generator=rng).numpy() & ((1 << steps) - 1)
        magnitudes = trellis.stored_magnitudes(np.linspace(0.1, 3.0, 8), -3)
        layout = trellis.Layout(state_bits, rate, sides, rotated, seed=7)
        yield trellis.pack(symbols.astype(np.uint8), magnitudes, layout, shape, exponent=-3, dtype=dtype)


def trellis_steps(shape, rate, sides):
    return np.concatenate([steps_of(rate, length) for length in Tiles(shape, sides).lengths]).astype(np.int64)


def raw_pool(rng, shape, dtype):
    yield pack_raw(torch.randn(shape, generator=rng).to(torch.bfloat16))


POOLS = {
    "grouped": (grouped_pool, grouped._PARAMETERS),
    "quantile": (quantile_pool, quantile._PARAMETERS),
    "rowblock": (rowblock_pool, rowblock._PARAMETERS),
    "signs": (signs_pool, signs._PARAMETERS),
    "top-byte": (raw_pool, struct.Struct("<B")),
    "trellis": (trellis_pool, trellis._PARAMETERS),
    "wavelet": (wavelet_pool, wavelets._PARAMETERS),
}


def pool(codec, shapes=SHAPES, dtypes=DTYPES):
    make, rng = POOLS[codec][0], torch.Generator().manual_seed(1)
    return [packed for shape in shapes for dtype in dtypes for packed in make(rng, shape, dtype)]


def edge(rng, nbytes, value):
    """Another value of an unsigned field: one at an end of a range, a neighbour, or any."""
    near = [value - 1, value + 1, 2 * value, value // 2, value ^ (1 << rng.randrange(8 * nbytes))]
    return rng.choice([*EDGES, *near, rng.getrandbits(8 * nbytes)]) % (1 << 8 * nbytes)


def change_field(rng, raw, at, nbytes):
    value = int.from_bytes(raw[at : at + nbytes], "little")
    raw[at : at + nbytes] = edge(rng, nbytes, value).to_bytes(nbytes, "little")


def change_sections(rng, sections, others, layout):
    """One change to a list of sections, in place."""
    at = rng.randrange(len(sections))
    other = rng.randrange(len(sections))
    match rng.choice(CHANGES):
        case "parameter":
            begin, offsets = 0, []
            for kind in layout.format.lstrip("<"):
                nbytes = struct.calcsize("<" + kind)
                offsets.append((begin, nbytes))
                begin += nbytes
            begin, nbytes = rng.choice(offsets)
            if len(sections[0]) >= begin + nbytes:
                change_field(rng, sections[0], begin, nbytes)
        case "bits":
            for _ in range(rng.choice((1, 1, 2, 8))):
                if sections[at]:
                    sections[at][rng.randrange(len(sections[at]))] ^= 1 << rng.randrange(8)
        case "number":
            if len(sections[at]) >= 2:
                begin = rng.randrange(len(sections[at]) // 2) * 2
                sections[at][begin : begin + 2] = struct.pack("<H", rng.choice(HALVES))
        case "random":
            sections[at][:] = rng.randbytes(len(sections[at]))
        case "swap":
            sections[at], sections[other] = sections[other], sections[at]
        case "cut":
            del sections[at][rng.randrange(len(sections[at]) + 1) :]
        case "add":
            sections[at] += rng.choice((bytes(1), rng.randbytes(1), rng.randbytes(rng.randrange(1, 200)), bytes(3000)))
        case "count":
            if rng.random() < 0.5 and len(sections) > 1:
                del sections[at]
            else:
                sections.insert(at, bytearray(sections[other]))
        case "mix":
            sections[at] = bytearray(others[min(at, len(others) - 1)])


def sections_of(packed):
    header = container.read_header(packed)
    return [bytearray(container.section(packed, header, i).numpy().tobytes()) for i in range(len(header.sections))]


def mutated(rng, tensors, layout):
    """A packed tensor that was changed once or more, with the checksum of what it now is."""
    packed = rng.choice(tensors)
    header, sections = container.read_header(packed), sections_of(packed)
    kind = rng.choice(("sections", "sections", "sections", "header"))
    if kind == "sections":
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change_sections(rng, sections, sections_of(rng.choice(tensors)), layout)
    arrays = [np.frombuffer(bytes(content), np.uint8) for content in sections]
    raw = bytearray(container.write(header.codec, header.shape, header.dtype, arrays).numpy().tobytes())
    if kind == "header" or rng.random() < 0.1:
        match rng.choice(("shape", "shape", "vast", "dtype", "turned", "bytes", "codec", "lengths")):
            case "shape":
                change_field(rng, raw, rng.choice((16, 20)), 4)
            case "vast":
                raw[16:24] = b"\xff" * 8
            case "dtype":
                change_field(rng, raw, 5, 1)
            case "turned":
                raw[16:24] = raw[20:24] + raw[16:20]
            case "bytes":
                change_field(rng, raw, rng.randrange(16), 1)
            case "codec":
                raw[8:16] = rng.choice((*POOLS, rng.randbytes(8).decode("latin-1"))).encode("latin-1").ljust(8, b"\0")
            case "lengths":
                change_field(rng, raw, 28 + 4 * rng.randrange(len(sections)), 4)
    return with_checksum(raw)


def with_checksum(raw):
    """A packed tensor of changed bytes, with the checksum that they have now."""
    raw[24:28] = zlib.crc32(raw[28:], zlib.crc32(raw[:24])).to_bytes(4, "little")
    return torch.frombuffer(raw, dtype=torch.uint8)


@contextmanager
def no_more_memory(nbytes):
    """Let this process take at most so much more memory."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def bit_patterns(weight):
    return weight.contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)


def check_every_reading(packed):
    """Return "refused" if a tensor is refused by name, "read" if all ways to read it give the same finite weights."""
    try:
        codec, header = open_packed(packed, NAME)
    except InputError as error:
        assert NAME in str(error)
        return "refused"
    weight = unpack(packed, NAME)
    opened = codec.tunable(packed, header)
    assert weight.shape == header.shape and weight.dtype == header.dtype
    assert weight.isfinite().all()
    assert all(values.isfinite().all() for values in opened.parameters.values())
    for other in (
        opened.rebuild(opened.parameters).to(header.dtype),
        unpack_rows(packed, torch.arange(header.shape[0]), NAME),
    ):
        assert torch.equal(bit_patterns(other), bit_patterns(weight))
    bits = format_bits(packed, NAME)
    assert bits.stored == 8 * packed.numel()
    assert np.isfinite([bits.nominal, bits.entropy]).all() and bits.entropy >= 0
    return "read"


def test_every_codec_is_tried():
    assert set(POOLS) == set(packing._codecs())


@pytest.mark.parametrize("codec", POOLS)
def test_tensors_that_were_not_changed_are_read(codec):
    assert {check_every_reading(packed) for packed in pool(codec)} == {"read"}


@pytest.mark.parametrize("codec", POOLS)
def test_every_bit_behind_the_parameters_means_something(codec):
    """A bit that is flipped is refused, or it changes a weight or a number: none is padding that nobody looks at."""
    refused = read = 0
    for packed in pool(codec, shapes=((2, 9),), dtypes=(torch.float16,)):
        header, before = container.read_header(packed), everything(packed)
        first = header.sections[0][0] + (0 if codec == "top-byte" else POOLS[codec][1].size)
        for bit in range(8 * first, 8 * packed.numel()):
            raw = bytearray(packed.numpy().tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            try:
                assert everything(with_checksum(raw)) != before, f"bit {bit} of sections {header.sections}"
                read += 1
            except InputError:
                refused += 1
    assert read > 50 and (refused > 10 or codec == "top-byte")


def everything(packed):
    codec, header = open_packed(packed)
    opened = codec.tunable(packed, header)
    weight = opened.rebuild(opened.parameters).to(header.dtype)
    return [bit_patterns(values).numpy().tobytes() for values in (weight, *opened.parameters.values())]


@pytest.mark.parametrize("codec", ["quantile", "signs"])
def test_another_rice_parameter_is_refused(codec):
    """Of few salient weights another parameter needs as many bytes, and would put them elsewhere."""
    at = POOLS[codec][1].format.lstrip("<").index("h") - 1  # the Rice parameter is the byte before the exponent
    changed = 0
    for packed in pool(codec):
        begin, _ = container.read_header(packed).sections[0]
        for rice in range(256):
            raw = bytearray(packed.numpy().tobytes())
            if raw[begin + at] != rice:
                raw[begin + at] = rice
                with pytest.raises(InputError, match=NAME):
                    open_packed(with_checksum(raw), NAME)
                changed += 1
    assert changed > 10_000


def test_a_small_tensor_does_not_ask_for_gigabytes():
    packed = pool("quantile", shapes=((33, 130),))[1]
    raw = bytearray(packed.numpy().tobytes())
    begin, _ = container.read_header(packed).sections[0]
    raw[begin + 6 : begin + 10] = b"\xff" * 4
    with no_more_memory(MEMORY >> 6), pytest.raises(InputError, match="salient weights 4294967295, expected 0 to 4290"):
        open_packed(with_checksum(raw), NAME)


def test_columns_that_stand_in_two_places_are_refused():
    packed = pool("wavelet", shapes=((5, 40),))[0]
    sections, header = sections_of(packed), container.read_header(packed)
    sections[6][:] = bytes(len(sections[6]))  # column 0 of its block everywhere
    arrays = [np.frombuffer(bytes(content), np.uint8) for content in sections]
    with pytest.raises(InputError, match=f"{NAME}: .*the order of columns is no permutation of each block of 8"):
        open_packed(container.write("wavelet", header.shape, header.dtype, arrays), NAME)


@pytest.mark.parametrize("cases", [150, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("codec", POOLS)
def test_a_changed_tensor_is_refused_by_name_or_read_the_same_way_everywhere(codec, cases):
    rng, tensors, layout = random.Random(f"{codec} {cases}"), pool(codec), POOLS[codec][1]
    counts, slowest = Counter(), 0.0
    with no_more_memory(MEMORY):
        for number in range(cases):
            packed = mutated(rng, tensors, layout)
            begin = time.perf_counter()
            try:
                counts[check_every_reading(packed)] += 1
            except Exception as error:
                raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
            slowest = max(slowest, time.perf_counter() - begin)
    print(f"\n{codec}: {cases} changed tensors, 0 wrong: {dict(counts)}; slowest {slowest:.2f} s")
    assert slowest < SECONDS
    assert counts["refused"] > cases / 4 and counts["read"] > cases / 50
