import math

import numpy as np
import pytest
import torch
from codec_checks import DTYPES, check_damage_is_named
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.packing import container, format_bits, unpack, wavelet

HALF = np.float32(math.sqrt(0.5))


def contents(rows, columns, block, ordered, seed):
    """Random symbols, salient columns and order, and numbers that float16 holds."""
    random = np.random.default_rng(seed)

    def halves(*shape):
        return torch.from_numpy(random.normal(size=shape).astype(np.float16).astype(np.float32))

    salient = torch.from_numpy(random.random(columns) < 0.3)
    symbols, residual = (
        torch.from_numpy(random.integers(0, 4, (rows, count)).astype(np.uint8))
        for count in (columns, int(salient.sum()))
    )
    order = [begin + random.permutation(min(block, columns - begin)) for begin in range(0, columns, block)]
    coded = wavelet.Coded(
        symbols, residual, salient, torch.from_numpy(np.concatenate(order)) if ordered else None, block
    )
    return coded, {"rows": halves(rows, len(order), 2, 3), "columns": halves(int(salient.sum()), 2, 3)}


def pack(rows, columns, block, ordered=True, seed=0, dtype=torch.float32):
    coded, numbers = contents(rows, columns, block, ordered, seed)
    return wavelet.pack(coded, numbers, exponent=-3, dtype=dtype)


def level(numbers, symbol):
    scale = numbers[1 + int(symbol) // 2]
    return numbers[0] + (-scale if symbol % 2 else scale)


def inverse(coefficients):
    """Sums and differences of neighbours, one pair at a time in float32."""
    out = coefficients.copy()
    for i in range(0, len(out) - 1, 2):
        low, high = coefficients[i], coefficients[i + 1]
        out[i], out[i + 1] = (low + high) * HALF, (low - high) * HALF
    return out


def weight_by_weight(coded, numbers):
    """The head of the codec's module, one coefficient at a time in float32."""
    symbols, rows, columns = coded.symbols_MN.numpy(), numbers["rows"].numpy(), numbers["columns"].numpy()
    out = np.zeros(symbols.shape, np.float32)
    order = np.arange(symbols.shape[1]) if coded.order_N is None else coded.order_N.numpy()
    for m, row in enumerate(symbols):
        coefficients = [level(rows[m, n // coded.block, n % 2], symbol) for n, symbol in enumerate(row)]
        out[m, order] = inverse(np.array(coefficients, np.float32))
    for s, n in enumerate(np.flatnonzero(coded.salient_N.numpy())):
        coefficients = [level(columns[s, m % 2], symbol) for m, symbol in enumerate(coded.residual_MS[:, s].numpy())]
        out[:, n] += inverse(np.array(coefficients, np.float32))
    return torch.from_numpy(out)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    block=st.sampled_from([2, 6, 16, 128]),
    ordered=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 3),
    seed=st.integers(0, 1000),
)
def test_rebuilt_weight_is_that_of_its_symbols_bit_for_bit(rows, columns, block, ordered, dtype, exponent, seed):
    coded, numbers = contents(rows, columns, block, ordered, seed)
    packed = wavelet.pack(coded, numbers, exponent=exponent, dtype=dtype)
    expected = (weight_by_weight(coded, numbers) * 2.0**exponent).to(dtype)
    assert torch.equal(unpack(packed), expected)
    assert format_bits(packed).stored == 8 * packed.numel()


@pytest.mark.parametrize("ordered", [True, False])
def test_every_number_symbol_and_place_is_counted(ordered):
    rows, columns, block = 512, 512, 128
    packed = pack(rows, columns, block, ordered)
    bits, size = format_bits(packed), rows * columns
    salient = int(contents(rows, columns, block, ordered, 0)[0].salient_N.sum())
    numbers = 16 * 6 * (rows * columns // block + salient)
    places = columns + (7 * columns if ordered else 0)
    assert bits.nominal == size + rows * salient
    residual = 8 * rows * -(-salient // 4)  # rows begin on whole bytes
    assert bits.stored == 2 * size + residual + numbers + places + 8 * (container.envelope_nbytes(7) + 8)
    order = 4 * math.log2(math.factorial(128) / math.factorial(64)) if ordered else 0
    assert bits.entropy == pytest.approx(2 * size + 2 * rows * salient + numbers + 0.88 * columns + order, abs=120)
    assert bits.entropy < bits.stored


def test_symbols_that_are_all_alike_have_no_entropy():
    coded, numbers = contents(64, 64, 32, False, 0)
    coded = wavelet.Coded(coded.symbols_MN * 0, coded.residual_MS[:, :0], coded.salient_N & False, None, 32)
    packed = wavelet.pack(coded, {**numbers, "columns": numbers["columns"][:0]}, exponent=0, dtype=torch.float32)
    assert format_bits(packed).entropy == 16 * 6 * 64 * 2


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (0, b"\x10\0\0\0\0\0", "6 bytes of parameters, expected 8"),
        (0, b"\x0f\0\0\0\0\0\0\0", "damaged parameters: block 15, expected an even number from 2 to 1024"),
        (0, b"\x10\0\0\0\7\0\0\0", "damaged parameters: order 7, expected 0 to 1"),
        (0, b"\x08\0\0\0\1\0\0\0", "180 bytes of row numbers, expected 300"),
        (1, b"\0", "1 bytes of salient columns, expected 5"),
        (1, b"\0\0\0\0\0", "bytes of column numbers, expected 0"),
        (3, b"\0\0", "2 bytes of symbols, expected 50"),
        (6, b"\0\0", "2 bytes of order, expected 20"),
        (7, b"", "8 sections, codec 'wavelet' has 7"),
    ],
)
def test_a_damaged_section_is_named(section, content, message):
    check_damage_is_named(pack(5, 40, 16), section, content, message)
