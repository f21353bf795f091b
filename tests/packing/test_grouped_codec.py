"""Grouped integers: what is packed is rebuilt to the bit, in the bytes that were announced."""

import numpy as np
import pytest
import torch
from codec_checks import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.errors import InputError
from bivlm.numerics.uniform_grid import GroupedCodes, group_width, round_to_nearest
from bivlm.packing import container, format_bits, grouped, open_packed, unpack


def drawn(rows, columns, bits, group_size, seed, exponent=-12):
    """Codes, zero points and scales that no quantizer chose: any value that the format holds."""
    generator = torch.Generator().manual_seed(seed)
    width = group_width(columns, group_size)
    shape = (rows, -(-columns // width))
    halves = torch.rand(shape, generator=generator).mul_(1000).to(torch.float16)
    return GroupedCodes(
        codes_MN=torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8),
        scales_MG=halves.to(torch.float32) * 2.0**exponent,
        zeros_MG=torch.randint(0, 2**bits, shape, generator=generator).to(torch.uint8),
        bits=bits,
        width=width,
        exponent=exponent,
    )


def drawn_channels(columns, seed):
    return grouped.stored_channel_scales(torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01)


def rebuilt_by_hand(coded, dtype, channels=None):
    """One weight after the other, in numpy."""
    codes, zeros = coded.codes_MN.numpy().astype(int), coded.zeros_MG.numpy().astype(int)
    scales = coded.scales_MG.numpy()
    weight = np.empty(codes.shape, np.float32)
    for row, column in np.ndindex(*codes.shape):
        group = column // coded.width
        weight[row, column] = np.float32(codes[row, column] - zeros[row, group]) * scales[row, group]
        if channels is not None:
            weight[row, column] *= channels.numpy()[column]
    return torch.from_numpy(weight).to(dtype)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.sampled_from(grouped.BITS),
    group_size=st.sampled_from([0, 1, 2, 7, 16, 64, 1000]),
    dtype=st.sampled_from(DTYPES),
    channels=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_codes_are_rebuilt_to_the_bit_in_the_bytes_announced(
    rows, columns, bits, group_size, dtype, channels, seed
):
    coded = drawn(rows, columns, bits, group_size, seed)
    scales = drawn_channels(columns, seed) if channels else None
    packed = grouped.pack(coded, dtype, scales)
    codec, header = open_packed(packed)
    assert set(codec.tunable(packed, header).parameters) == {"scales", *(["channel_scales"] if channels else [])}
    assert torch.equal(unpack(packed), rebuilt_by_hand(coded, dtype, scales))
    assert packed.numel() == grouped.packed_nbytes((rows, columns), bits, group_size, channels)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_row_of_codes_begins_on_a_byte_lowest_bits_first(bits):
    coded = drawn(5, 37, bits, 16, 3)
    packed = grouped.pack(coded, torch.bfloat16)
    _, header = open_packed(packed)
    rows = container.section(packed, header, 3).view(5, -1).numpy()
    place = np.arange(37) * bits
    assert np.array_equal((rows[:, place // 8] >> (place % 8)) & (2**bits - 1), coded.codes_MN.numpy())


@pytest.mark.parametrize(("bits", "expected"), [(2, 2 + 18 / 128), (3, 3 + 19 / 128), (4, 4 + 20 / 128)])
def test_a_scale_and_a_zero_point_a_group_are_all_that_a_large_layer_pays(bits, expected):
    stored = 8 * grouped.packed_nbytes((4096, 4096), bits, 128) / 4096**2
    assert expected < stored < expected + 1e-4


def test_bits_count_the_codes_entropy_and_all_else_as_it_is_stored():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    for bits in grouped.BITS:
        coded = round_to_nearest(weight, bits, 64)
        found = format_bits(grouped.pack(coded, torch.float32))
        shares = np.unique(coded.codes_MN.numpy(), return_counts=True)[1] / weight.numel()
        beside = 8 * grouped.packed_nbytes((64, 256), bits, 64) - bits * weight.numel()
        assert found.nominal == bits * weight.numel()
        assert found.entropy == pytest.approx(-weight.numel() * (shares * np.log2(shares)).sum() + beside)
        assert found.entropy < found.stored == 8 * grouped.packed_nbytes((64, 256), bits, 64)


@pytest.mark.parametrize("damage", [{0: 5}, {1: 7}, {6: 0}, {6: 200}])
def test_parameters_that_do_not_fit_the_bytes_are_refused(damage):
    packed = grouped.pack(drawn(4, 100, 2, 32, 0), torch.bfloat16)
    _, header = open_packed(packed)
    head = container.section(packed, header, 0).numpy().copy()
    for at, value in damage.items():
        head[at] = value
    damaged = container.rewrite(packed, header, {0: head})
    if damage == {1: 7}:  # channel scales that are not there
        assert len(container.section(packed, header, 4)) == 0
    with pytest.raises(InputError, match="damaged parameters"):
        unpack(damaged)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e30])
def test_weights_of_any_size_keep_their_relative_error(scale):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for factor in (1.0, scale):
        given = (weight * factor).to(torch.bfloat16)
        rebuilt = unpack(grouped.pack(round_to_nearest(given, 4, 32), torch.bfloat16))
        errors.append(float((rebuilt.double() / factor - weight).norm() / weight.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)
