"""Uniform grids of grouped integers: every row of a weight is cut into groups of g columns, each with its own grid.

A weight is rebuilt as ``(code - zero) * scale`` with codes of b bits. This is the asymmetric grid of GPTQ and AWQ: the
range of a group is widened to hold 0, ``scale = (max - min) / (2^b - 1)``, and the zero point is the integer
``round(-min / scale)``, which then lies in [0, 2^b - 1]. A scale is a float16 times a power of two of the whole layer,
and codes are chosen for the scale as it is stored. Clipping takes c times the range: the grid is finer, and what lies
beyond its ends is rounded to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bivlm.numerics.half_scales import exponent_of
from bivlm.numerics.weight_statistics import CHUNK_WEIGHTS, LayerStatistics

_LARGEST_HALF = 65504.0
# Below it 2^exponent is not a normal float32; float16 has 24 more binades of its own.
_LEAST_EXPONENT = -126
_RANGE_QUANTILES = 32


@dataclass(frozen=True)
class GroupedCodes:
    """A weight (M, N) on the grids of its G groups of columns.

    Attributes:
        codes_MN: uint8 (M, N), below 2^bits.
        scales_MG: float32 (M, G), each a float16 times 2^exponent.
        zeros_MG: uint8 (M, G), below 2^bits.
        bits: b, bits of a code.
        width: g, columns of a group; the last group of a row may have fewer.
        exponent: the layer's power of two.
    """

    codes_MN: torch.Tensor
    scales_MG: torch.Tensor
    zeros_MG: torch.Tensor
    bits: int
    width: int
    exponent: int

    def rebuilt(self, begin: int, end: int) -> torch.Tensor:
        """Return ``(code - zero) * scale`` of rows `begin` to `end`, float32 (rows, N), exact."""
        columns = self.codes_MN.shape[1]
        scales, zeros = self.scales_MG[begin:end], self.zeros_MG[begin:end]
        codes = torch.nn.functional.pad(self.codes_MN[begin:end], (0, scales.shape[1] * self.width - columns))
        grouped = codes.view(*scales.shape, self.width).to(torch.float32)
        levels = grouped.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
        return levels.view(len(scales), -1)[:, :columns]


def group_width(columns: int, group_size: int) -> int:
    """Return the columns of a group: `group_size`, or the whole row where that is 0 or more than the row has."""
    return min(group_size or columns, columns)


def layer_exponent(weight_MN: torch.Tensor, bits: int) -> int:
    """Return the power of two by which a layer's scales are stored.

    The scale of the layer's whole range comes near 2^10, a 64th of the largest float16: error feedback may widen a
    group's range by that much before its scale is cut.
    """
    lowest, highest = weight_MN.aminmax()
    return range_exponent(float(lowest), float(highest), bits)


def range_exponent(lowest: float, highest: float, bits: int) -> int:
    """Return the `layer_exponent` of a layer whose weights lie between these ends."""
    return max(exponent_of((max(highest, 0.0) - min(lowest, 0.0)) / (2**bits - 1)), _LEAST_EXPONENT)


def fit_grid(
    lowest: torch.Tensor, highest: torch.Tensor, bits: int, exponent: int, clip: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scales as stored and zero points, both float32, of groups with these extremes (any shape) times `clip`.

    A group of zeros, or one too small beside the layer's largest for a float16, has scale 0 and zero point 0.
    """
    lowest = clip * lowest.to(torch.float64).clamp(max=0.0)
    steps = (clip * highest.to(torch.float64).clamp(min=0.0) - lowest) / (2**bits - 1)
    halves = (steps * 2.0**-exponent).clamp(max=_LARGEST_HALF).to(torch.float16)
    scales = halves.to(torch.float64) * 2.0**exponent
    zeros = torch.where(scales > 0, -lowest / scales, 0.0).round_().clamp_(0, 2**bits - 1)
    return scales.to(torch.float32), zeros.to(torch.float32)


def divisor(scales: torch.Tensor) -> torch.Tensor:
    """Return what weights are divided by to get their codes: the scale, or 1 where that is 0 and every code gives 0."""
    return torch.where(scales > 0, scales, 1.0)


def round_to_nearest(
    weight_MN: torch.Tensor, bits: int, group_size: int, clip: float = 1.0, exponent: int | None = None
) -> GroupedCodes:
    """Round every weight to the nearest point of its group's grid, a few rows at a time to keep temporaries small.

    The grid spans `clip` times the group's range, 0 < clip <= 1. `exponent` is the whole layer's if these are only
    some of its rows.
    """
    rows, columns = weight_MN.shape
    width = group_width(columns, group_size)
    exponent = layer_exponent(weight_MN, bits) if exponent is None else exponent
    groups = -(-columns // width)
    device = weight_MN.device
    codes_MN = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    scales_MG = torch.empty(rows, groups, device=device)
    zeros_MG = torch.empty(rows, groups, dtype=torch.uint8, device=device)
    step = max(1, CHUNK_WEIGHTS // columns)
    for begin in range(0, rows, step):
        # Zeros fill the last group up: its range holds 0 in any case.
        filled = torch.nn.functional.pad(weight_MN[begin : begin + step].float(), (0, groups * width - columns))
        grouped = filled.view(len(filled), groups, width)
        scales, zeros = fit_grid(*grouped.aminmax(dim=-1), bits, exponent, clip)
        codes = (grouped / divisor(scales).unsqueeze(-1)).round_().add_(zeros.unsqueeze(-1)).clamp_(0, 2**bits - 1)
        codes_MN[begin : begin + step] = codes.view(len(filled), -1)[:, :columns]
        scales_MG[begin : begin + step], zeros_MG[begin : begin + step] = scales, zeros
    return GroupedCodes(codes_MN, scales_MG, zeros_MG, bits, width, exponent)


def expected_error(statistics: LayerStatistics, bits: int, group_size: int, clip: float = 1.0) -> float:
    """Return the expected ``||W - W_rebuilt||^2 / ||W||^2`` of `round_to_nearest` on independent draws.

    With F the layer's distribution the extremes of g draws have ``P(a < min, max <= b) = (F(b) - F(a))^g``, and the
    other draws are distributed as F between them. For 32 x 32 pairs of extremes of equal marginal probability the
    error on their grid is summed over the exact histogram, not taken as ``scale^2 / 12``, which at two bits is far
    off. 0 for a layer of zeros. Rows or channels of different sizes make the true error smaller.
    """
    if statistics.square_sum == 0:
        return 0.0
    sums = _SignedSums(statistics)
    columns = statistics.shape[1]
    width = group_width(columns, group_size)
    whole, rest = divmod(columns, width)
    error = whole * width * sums.group_error(bits, width, clip)
    if rest:
        error += rest * sums.group_error(bits, rest, clip)
    return error / columns * statistics.size / statistics.square_sum


class _SignedSums:
    """Sums of 1, w and w^2 over the signed weights of a layer up to each distinct value."""

    def __init__(self, statistics: LayerStatistics):
        values = np.concatenate([-statistics.magnitudes_V[::-1], statistics.magnitudes_V])
        counts = np.concatenate([statistics.negatives_V[::-1], statistics.counts_V - statistics.negatives_V])
        self.values, counts = values[counts > 0], counts[counts > 0]
        powers = np.stack([counts, counts * self.values, counts * self.values**2])
        self.sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)

    def group_error(self, bits: int, width: int, clip: float) -> float:
        """Return the expected squared error of one weight in a group of `width` independent draws."""
        probability, lowest, highest = self._extremes(width)
        steps = 2**bits - 1
        below, above = clip * np.minimum(lowest, 0.0), clip * np.maximum(highest, 0.0)
        scale = (above - below) / steps
        scale = np.where(scale > 0, scale, 1.0)
        zero = np.clip(np.rint(-below / scale), 0, steps)
        levels = (np.arange(steps + 1) - zero[:, None]) * scale[:, None]
        inner = self._squared_error(lowest, highest, levels, scale)
        nearest = [(np.clip(np.rint(end / scale) + zero, 0, steps) - zero) * scale for end in (lowest, highest)]
        ends = (lowest - nearest[0]) ** 2 + (highest - nearest[1]) ** 2
        drawn = (max(width - 2, 0) * inner + min(width, 2) * ends / 2) / width
        return float(probability @ drawn)

    def _squared_error(
        self, lowest: np.ndarray, highest: np.ndarray, levels: np.ndarray, scale: np.ndarray
    ) -> np.ndarray:
        """Return the mean squared distance of weights between two ends (P,) from the nearest of `levels` (P, 2^b)."""
        first = np.searchsorted(self.values, lowest, side="left")[:, None]
        last = np.searchsorted(self.values, highest, side="right")[:, None]
        between = np.searchsorted(self.values, levels[:, :-1] + scale[:, None] / 2)
        edges = np.concatenate([first, np.clip(between, first, last), last], axis=1)
        counts, sums, squares = np.diff(self.sums[:, edges], axis=-1)
        return (squares - 2 * levels * sums + levels**2 * counts).sum(-1) / counts.sum(-1)

    def _extremes(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return probability (P,), least and largest weight (P,) of a group, by cells of their joint distribution."""
        edges = np.linspace(0, 1, _RANGE_QUANTILES + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        with np.errstate(divide="ignore"):  # the last edge is log(0)
            low, high = -np.expm1(np.log1p(-edges) / width), np.exp(np.log(edges) / width)
        inside = np.maximum(high[None, :] - low[:, None], 0.0) ** width
        probability = inside[:-1, 1:] - inside[1:, 1:] - inside[:-1, :-1] + inside[1:, :-1]
        lowest = self._quantile(-np.expm1(np.log1p(-middles) / width))
        highest = self._quantile(np.exp(np.log(middles) / width))
        lowest, highest = np.broadcast_arrays(lowest[:, None], highest[None, :])
        return probability.reshape(-1), np.minimum(lowest, highest).reshape(-1), np.maximum(lowest, highest).reshape(-1)

    def _quantile(self, share: np.ndarray) -> np.ndarray:
        """Return the least value that at least this share of the weights does not exceed."""
        counts = self.sums[0, 1:]
        return self.values[np.minimum(np.searchsorted(counts, share * counts[-1]), len(self.values) - 1)]
