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
from codec_checks import POOLS, pool

from bivlm import packing
from bivlm.errors import InputError
from bivlm.packing import container, format_bits, open_packed, unpack, unpack_rows

NAME = "tower.blocks.7.fc1.weight"
MEMORY = 1 << 30
SECONDS = 5.0
CHANGES = ("parameter", "parameter", "bits", "bits", "number", "random", "swap", "cut", "add", "count", "mix")
HALVES = (0x7C00, 0xFC00, 0x7E01, 0x7BFF, 0x0001, 0x8000)  # both infinities, NaN, the largest, the smallest, -0
EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


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
