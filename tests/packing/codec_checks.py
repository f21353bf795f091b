"""Valid tensors of every codec, and the check that damage is named."""

import struct

import numpy as np
import pytest
import torch
from raw_codec import pack_raw

from bivlm.errors import InputError
from bivlm.numerics.trellis import steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import container, format_bits, grouped, open_packed, quantile, rowblock, signs, trellis, unpack
from bivlm.packing import wavelet as wavelets

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = ((5, 40), (16, 24), (3, 7), (1, 1), (33, 130))


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
        steps = np.concatenate([steps_of(rate, length) for length in Tiles(shape, sides).lengths]).astype(np.int64)
        symbols = torch.randint(8, (len(steps),), generator=rng).numpy() & ((1 << steps) - 1)
        magnitudes = trellis.stored_magnitudes(np.linspace(0.1, 3.0, 8), -3)
        layout = trellis.Layout(state_bits, rate, sides, rotated, seed=7)
        yield trellis.pack(symbols.astype(np.uint8), magnitudes, layout, shape, exponent=-3, dtype=dtype)


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


def check_damage_is_named(packed, section, content, message):
    """With other bytes in one section, the envelope intact, the weight is refused by shape and reason."""
    codec, header = open_packed(packed)
    sections = [container.section(packed, header, index).numpy() for index in range(len(header.sections))]
    sections[section : section + 1] = [np.frombuffer(content, np.uint8)]  # one behind the last is one more
    damaged = container.write(codec.name, header.shape, header.dtype, sections)
    rows, columns = header.shape
    for read in (unpack, format_bits):
        with pytest.raises(InputError, match=f"shape \\({rows}, {columns}\\): .*{message}"):
            read(damaged)
