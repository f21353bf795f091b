import numpy as np
import pytest
import torch
from codec_checks import DTYPES, check_damage_is_named
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.packing import container, format_bits, open_packed, rowblock, unpack


def contents(rows, columns, block, layout, seed):
    """Random symbols, salient columns, and numbers that float16 holds."""
    random = np.random.default_rng(seed)
    blocks = -(-columns // block)

    def halves(*shape):
        return torch.from_numpy(random.normal(size=shape).astype(np.float16).astype(np.float32))

    symbols = torch.from_numpy(random.integers(0, 4, (rows, columns)).astype(np.uint8))
    salient = torch.from_numpy(random.random(columns) < 0.3)
    numbers = {"scales": halves(rows, blocks, 4)}
    numbers |= {"means": halves(rows, blocks, 3)} if layout == "means" else {"factors": halves(2, columns)}
    return symbols, salient, numbers


def pack(rows, columns, block, layout="means", seed=0, dtype=torch.float32, exponent=-3):
    symbols, salient, numbers = contents(rows, columns, block, layout, seed)
    return rowblock.pack(symbols, salient, numbers, block=block, exponent=exponent, dtype=dtype)


def weight_by_weight(symbols, salient, numbers, block):
    """The head of the codec's module, one weight at a time in float32."""
    out = np.zeros(symbols.shape, np.float32)
    one = {name: values.numpy() for name, values in numbers.items()}
    for (m, n), symbol in np.ndenumerate(symbols.numpy()):
        scales, symbol = one["scales"][m, n // block], int(symbol)
        sign, other = 1 - 2 * (symbol >> 1), 1 - 2 * (symbol & 1)
        if "means" in one and salient[n]:
            out[m, n] = (one["means"][m, n // block, 2] + sign * scales[2]) + other * scales[3]
        elif "means" in one:
            out[m, n] = one["means"][m, n // block, symbol >> 1] + other * scales[symbol >> 1]
        elif salient[n]:
            out[m, n] = sign * scales[2] * one["factors"][0, n] + other * scales[3] * one["factors"][1, n]
        else:
            out[m, n] = other * scales[symbol >> 1] * one["factors"][symbol >> 1, n]
    return torch.from_numpy(out)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    block=st.sampled_from([1, 3, 16, 128]),
    layout=st.sampled_from(["means", "factors"]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 3),
    seed=st.integers(0, 1000),
)
def test_rebuilt_weight_is_that_of_its_symbols_bit_for_bit(rows, columns, block, layout, dtype, exponent, seed):
    symbols, salient, numbers = contents(rows, columns, block, layout, seed)
    packed = rowblock.pack(symbols, salient, numbers, block=block, exponent=exponent, dtype=dtype)
    expected = (weight_by_weight(symbols, salient, numbers, block) * 2.0**exponent).to(dtype)
    assert torch.equal(unpack(packed), expected)
    assert format_bits(packed).stored == 8 * packed.numel()


@pytest.mark.parametrize(("layout", "per_block", "per_column"), [("means", 7, 0), ("factors", 4, 2)])
def test_every_number_and_every_symbol_is_counted(layout, per_block, per_column):
    """Uniform symbols cannot be compressed: what is stored exceeds the entropy by the envelope and the bitmap alone."""
    rows, columns, block = 512, 512, 128
    packed = pack(rows, columns, block, layout)
    bits, size = format_bits(packed), rows * columns
    salient = int(contents(rows, columns, block, layout, 0)[1].sum())
    numbers = 16 * (per_block * rows * columns // block + per_column * columns)
    assert bits.nominal == size + rows * salient
    assert bits.stored == 2 * size + numbers + columns + 8 * (container.envelope_nbytes(5) + 8)
    assert 2 * size + numbers < bits.entropy + 100 < bits.stored


def test_symbols_that_are_all_alike_have_no_entropy():
    symbols, salient, numbers = contents(64, 64, 32, "means", 0)
    packed = rowblock.pack(symbols * 0, salient * 0 > 0, numbers, block=32, exponent=0, dtype=torch.float32)
    assert format_bits(packed).entropy == 16 * 7 * 64 * 2


@pytest.mark.parametrize("layout", ["means", "factors"])
def test_numbers_too_large_for_the_format_are_stored_as_its_largest(layout):
    packed = pack(4, 8, 8, layout)
    codec, header = open_packed(packed)
    parameters = codec.tunable(packed, header).parameters
    parameters["scales"] = parameters["scales"] * 1e30
    assert unpack(codec.retuned(packed, header, parameters)).isfinite().all()


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (0, b"\x10\0\0\0\0\0", "6 bytes of parameters, expected 8"),
        (0, b"\0\0\0\0\0\0\0\0", "damaged parameters: block 0, expected 1 to 4096"),
        (0, b"\x10\0\0\0\7\0\0\0", "damaged parameters: layout 7, expected 0 to 1"),
        (0, b"\x08\0\0\0\0\0\0\0", "210 bytes of row numbers, expected 350"),
        (1, b"\0", "1 bytes of salient columns, expected 5"),
        (3, b"\0\0", "2 bytes of symbols, expected 50"),
        (4, b"\0\0", "2 bytes of column factors, expected 0"),
        (5, b"", "6 sections, codec 'rowblock' has 5"),
    ],
)
def test_a_damaged_section_is_named(section, content, message):
    check_damage_is_named(pack(5, 40, 16), section, content, message)
