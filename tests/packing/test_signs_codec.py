import numpy as np
import pytest
import torch
from codec_checks import DTYPES, check_damage_is_named
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.packing import format_bits, signs, unpack


def contents(rows, columns, share, seed):
    """Random signs, positions and levels, and numbers that float16 holds."""
    random = np.random.default_rng(seed)
    negative = torch.from_numpy(random.random((rows, columns)) < 0.5)
    positions = np.flatnonzero(random.random(rows * columns) < share)
    names = ("row_scales", "row_steps", "row_zeros") if len(positions) else ("row_scales",)
    halves = random.normal(size=(len(names), rows)).astype(np.float16).astype(np.float32)
    numbers = dict(zip(names, torch.from_numpy(halves), strict=True))
    return negative, positions, random.integers(0, 256, len(positions)), numbers


def pack(rows, columns, share, seed=0, dtype=torch.float32):
    return signs.pack(*contents(rows, columns, share, seed), exponent=-3, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    share=st.sampled_from([0.0, 0.01, 0.1, 0.6, 1.0]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-12, 3),
    seed=st.integers(0, 1000),
)
def test_rebuilt_weight_is_that_of_its_signs_and_levels_bit_for_bit(rows, columns, share, dtype, exponent, seed):
    negative, positions, levels, numbers = contents(rows, columns, share, seed)
    packed = signs.pack(negative, positions, levels, numbers, exponent=exponent, dtype=dtype)
    expected = np.where(negative, -1, 1).astype(np.float32) * numbers["row_scales"].numpy()[:, None]
    for position, level in zip(positions, levels, strict=True):
        row, column = divmod(position, columns)
        step, zero = (numbers[name].numpy()[row] for name in ("row_steps", "row_zeros"))
        expected[row, column] = np.float32(level) * step + zero
    assert torch.equal(unpack(packed), (torch.from_numpy(expected) * 2.0**exponent).to(dtype))
    assert format_bits(packed).stored == 8 * packed.numel()


@pytest.mark.parametrize(("share", "position_bits"), [(0.01, 0.0809), (0.1, 0.469), (0.3, 0.8813), (0.5, 1.0)])
def test_positions_cost_their_entropy_or_a_bitmap(share, position_bits):
    rows, columns = 512, 512
    packed = pack(rows, columns, share)
    bits, size = format_bits(packed), rows * columns
    salient = len(contents(rows, columns, share, 0)[1])
    assert bits.nominal == size + 7 * salient
    numbers = 3 * 16 * rows
    assert bits.entropy / size == pytest.approx((size + 7 * salient + numbers) / size + position_bits, rel=0.005)
    assert bits.entropy < bits.stored < size * (1 + min(1, 1.1 * position_bits)) + 7 * salient + numbers + 1000


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        (0, b"\0\0\0\0", "4 bytes of parameters, expected 8"),
        (0, b"\7\0\0\0\1\0\0\0", "damaged parameters: mode 7, expected 0 to 1"),
        (0, b"\0\x63\0\0\1\0\0\0", "damaged parameters: Rice parameter 99, expected 0 to 8"),
        (0, b"\0\1\0\0\xff\0\0\0", "salient weights 255, expected 0 to 200"),
        (1, b"\0", "1 bytes of row numbers, expected 30"),
        (2, b"\0\0", "2 bytes of signs, expected 25"),
        (3, b"", "0 bytes of levels, expected"),
        (5, b"", "0 bytes of position remainders, expected"),
        (6, b"", "7 sections, codec 'signs' has 6"),
    ],
)
def test_a_damaged_section_is_named(section, content, message):
    check_damage_is_named(pack(5, 40, 0.1), section, content, message)
