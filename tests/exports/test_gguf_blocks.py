"""A block type holds a packed weight to the last bit, by the reference decoders of the gguf package."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from bivlm.exports.gguf_blocks import TYPES, smallest_type, why_none
from bivlm.numerics.uniform_grid import GroupedCodes
from bivlm.packing import grouped, integers, quantile, unpack

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def packed_grouped(seed, shape, bits, width, zeros=None, dtype=torch.bfloat16, scale=0.01):
    """A grouped weight of random codes; `zeros` is a zero point for all groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = (shape[0], -(-shape[1] // width))
    codes = torch.randint(1 << bits, shape, generator=generator).to(torch.uint8)
    points = torch.randint(1 << bits, groups, generator=generator) if zeros is None else torch.full(groups, zeros)
    scales = (torch.rand(groups, generator=generator) * scale + scale / 8).to(torch.float16).to(torch.float32)
    return grouped.pack(GroupedCodes(codes, scales, points.to(torch.uint8), bits, width, 0), dtype)


def packed_signs(seed, shape, scales, dtype=torch.bfloat16, salient=0):
    """A weight with levels at plus and minus `scales`."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(2 * len(scales), shape, generator=generator).to(torch.uint8)
    positions = np.arange(salient, dtype=np.int64)
    return quantile.pack(
        shape,
        dtype,
        quantile.ready(symbols),
        group_scales_K=np.array(scales),
        salient_bits=2,
        positions_S=positions,
        levels_S=np.zeros(salient, np.uint8),
        centres_L=np.linspace(-1, 1, 4),
        row_scales_M=np.ones(shape[0]),
    )


def decoded(packed, block, rows=None):
    """What the reference decoder makes of the blocks of some rows."""
    opened = integers(packed)
    rows = torch.arange(len(opened.scales_MG)) if rows is None else rows
    return torch.from_numpy(dequantize(block.rows(opened, rows), GGMLQuantizationType[block.name]))


@pytest.mark.parametrize("block", TYPES, ids=lambda block: block.name)
def test_a_type_has_the_size_that_the_format_gives_it(block):
    assert (block.columns, block.nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[block.name]]


def test_types_are_in_the_order_of_their_bits():
    assert [block.bits for block in TYPES] == sorted(block.bits for block in TYPES)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([2, 3, 4, 8]),
    width=st.sampled_from([32, 64, 96, 128, 256, 512]),
    rows=st.integers(1, 5),
    columns=st.sampled_from([256, 288, 512]),
    zeros=st.none() | st.integers(0, 255),
    dtype=DTYPES,
)
def test_every_type_that_fits_decodes_to_the_packed_weight(seed, bits, width, rows, columns, zeros, dtype):
    zeros = None if zeros is None else zeros % (1 << bits)
    packed = packed_grouped(seed, (rows, columns), bits, min(width, columns), zeros, dtype)
    fitting = [block for block in TYPES if block.fits(integers(packed), columns)]
    for block in fitting:
        assert torch.equal(decoded(packed, block).to(dtype), unpack(packed)), block.name
    assert smallest_type(integers(packed), columns) == (fitting[0] if fitting else None)
    assert fitting or bits == 8


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 8), rows=st.integers(1, 3), dtype=DTYPES)
def test_levels_at_odd_multiples_decode_to_the_packed_weight(seed, groups, rows, dtype):
    packed = packed_signs(seed, (rows, 512), 0.0078125 * np.arange(1, 2 * groups, 2), dtype)
    fitting = [block for block in TYPES if block.fits(integers(packed), 512)]
    for block in fitting:
        assert torch.equal(decoded(packed, block).to(dtype), unpack(packed)), block.name
    assert fitting[0].name == ("Q2_K" if groups <= 2 else "Q4_0" if groups <= 4 else "Q4_K")


@pytest.mark.parametrize(
    ("bits", "width", "zeros", "name"),
    [
        (2, 256, None, "Q2_K"),
        (2, 512, None, "Q2_K"),
        (2, 128, None, "Q4_0"),
        (3, 256, None, "Q4_0"),
        (4, 256, None, "Q4_K"),
        (4, 256, 8, "Q4_0"),
        (4, 128, None, "Q5_0"),
        (4, 32, 8, "Q4_0"),
        (4, 32, 4, "Q4_1"),
        (8, 32, 128, "Q8_0"),
    ],
)
def test_the_smallest_type_is_taken(bits, width, zeros, name):
    assert smallest_type(integers(packed_grouped(1, (4, 512), bits, width, zeros)), 512).name == name


def test_rows_may_come_in_any_order():
    packed = packed_grouped(3, (6, 512), 2, 256)
    rows = torch.tensor([4, 0, 5])
    block = smallest_type(integers(packed), 512)
    assert torch.equal(decoded(packed, block, rows).to(torch.bfloat16), unpack(packed)[rows])


@pytest.mark.parametrize(
    ("packed", "columns", "why"),
    [
        (packed_grouped(0, (2, 300), 2, 64), 300, "rows of 300 columns"),
        (packed_grouped(0, (2, 256), 2, 48), 256, "groups of 48 columns"),
        (packed_grouped(0, (2, 256), 8, 64, 120), 256, "8 bits fit with zero points of 128 alone"),
    ],
)
def test_what_no_type_holds_is_named(packed, columns, why):
    assert smallest_type(integers(packed), columns) is None
    assert why in why_none(integers(packed), columns)


def test_a_scale_that_is_no_float16_fits_nowhere():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (2, 256), generator=generator).to(torch.uint8)
    scales = torch.tensor([[1.0], [1025.0]]) * 2.0**-30
    packed = grouped.pack(GroupedCodes(codes, scales, torch.ones(2, 1, dtype=torch.uint8), 2, 256, -30), torch.float32)
    assert torch.equal(unpack(packed), (codes.float() - 1) * scales)
    assert smallest_type(integers(packed), 256) is None
    assert "is no float16" in why_none(integers(packed), 256)


def test_other_weights_are_no_integers():
    assert integers(packed_signs(0, (2, 256), [0.01, 0.0301])) is None
    assert integers(packed_signs(0, (2, 256), [0.0078125, 0.0234375], salient=3)) is None
    coded = GroupedCodes(
        torch.zeros(2, 256, dtype=torch.uint8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8), 2, 256, 0
    )
    assert integers(grouped.pack(coded, torch.bfloat16, torch.full((256,), 0.5))) is None
