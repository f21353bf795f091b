"""Packed weights of random symbols, for products with them."""

import numpy as np
import torch

from bivlm.numerics.trellis import steps_of
from bivlm.numerics.trellis_tiles import Tiles
from bivlm.numerics.uniform_grid import round_to_nearest
from bivlm.packing import grouped, quantile, trellis


def grouped_weight(rows, columns, bits, group, channels=False, scale=1.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    scales = grouped.stored_channel_scales(torch.rand(columns, generator=rng) + 0.5) if channels else None
    coded = round_to_nearest(torch.randn(rows, columns, generator=rng) * scale + scale / 4, bits, group)
    return grouped.pack(coded, torch.float32, scales)


def quantile_weight(rows, columns, groups, salient_bits=2, share=0.0, scale=1.0, seed=0):
    rng, size = np.random.default_rng(seed), rows * columns
    count = round(share * size)
    return quantile.pack(
        (rows, columns),
        torch.float32,
        quantile.ready(torch.from_numpy(rng.integers(0, 2 * groups, (rows, columns), dtype=np.uint8))),
        group_scales_K=np.sort(rng.random(groups) + 0.05) * scale,
        salient_bits=salient_bits,
        positions_S=np.sort(rng.choice(size, count, replace=False)),
        levels_S=rng.integers(0, 1 << salient_bits, count),
        centres_L=np.sort(rng.standard_normal(1 << salient_bits)),
        row_scales_M=(rng.random(rows) + 1) * scale,
    )


def trellis_weight(rows, columns, rate, sides, rotated=0, scale=1.0, seed=0):
    layout = trellis.Layout(12, rate, sides, rotated, seed)
    steps = np.concatenate([steps_of(rate, length) for length in Tiles((rows, columns), sides).lengths.tolist()])
    symbols = np.random.default_rng(seed).integers(0, 8, len(steps)).astype(np.uint8) & ((1 << steps) - 1)
    exponent = 0 if scale == 1 else int(np.log2(scale))
    magnitudes = trellis.stored_magnitudes(layout.code.magnitudes * scale, exponent)
    return trellis.pack(
        symbols.astype(np.uint8), magnitudes, layout, (rows, columns), exponent=exponent, dtype=torch.float32
    )
