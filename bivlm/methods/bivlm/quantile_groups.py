"""Gaussian quantile grouping: cut-offs (4), (5), (6) and one scalar per group (18); or evenly spaced levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from bivlm.numerics.weight_statistics import LayerStatistics, exact_sum

_HALF_BITS = 11  # significant bits of a float16
_MOST_STEPS = 100  # it settles within twenty or so, more groups later


def cut_offs(mean: float, std: float, p_sal: float, groups: int) -> np.ndarray:
    """Return the groups' upper ends of unsalient magnitudes, float64 (K,), ascending; the last bounds the salient ones.

    ``z_k = Phi^-1((1 + k p_uns) / 2)`` with ``p_uns = (1 - p_sal) / K`` and k = 1..K (4), (5); the cut-off is
    ``mean + std z_k`` (6). Without salient weights the last is infinite.
    """
    k = np.arange(1, groups + 1)
    z_K = ndtri((1 + k * ((1 - p_sal) / groups)) / 2)
    if p_sal == 0:
        z_K[-1] = np.inf
    # A constant weight has std 0, and 0 * inf is not what "no upper end" means.
    return np.where(np.isinf(z_K), np.inf, mean + std * np.where(np.isinf(z_K), 0, z_K))


@dataclass(frozen=True)
class Groups:
    """The partition of a layer's unsalient weights at one salient share.

    Attributes:
        ranks_K: int64 (K,), group k holds the distinct magnitudes of rank ``ranks[k-1] .. ranks[k]-1``.
        counts_K: int64 (K,), weights in each group.
        scales_K: float64 (K,), mean magnitude of each group (18); 0 for an empty group.
        error: sum over the groups of ``||W_k - a_k B_k||^2``.
    """

    ranks_K: np.ndarray
    counts_K: np.ndarray
    scales_K: np.ndarray
    error: float


def group(statistics: LayerStatistics, p_sal: float, groups: int) -> Groups:
    """Partition the histogram of a layer; costs one pass over its distinct magnitudes.

    A weight of exactly zero counts as positive: a binary code has no third value.
    """
    magnitudes_V, counts_V = statistics.magnitudes_V, statistics.counts_V
    ends_K = cut_offs(statistics.mean, statistics.std, p_sal, groups)
    ranks_K = np.searchsorted(magnitudes_V, ends_K, side="right")
    count_K = np.zeros(groups, np.int64)
    scale_K = np.zeros(groups)
    errors = []
    for k, (begin, end) in enumerate(zip([0, *ranks_K[:-1]], ranks_K, strict=True)):
        values, counts = magnitudes_V[begin:end], counts_V[begin:end]
        count_K[k] = counts.sum()
        if count_K[k] == 0:
            continue
        total, squares = exact_sum(values * counts), exact_sum(values**2 * counts)
        scale_K[k] = total / count_K[k]
        errors.append(max(squares - total * scale_K[k], 0.0))
    return Groups(ranks_K, count_K, scale_K, float(np.sum(errors)))


def odd_group(statistics: LayerStatistics, groups: int) -> Groups:
    """Partition the histogram of a layer by the nearest of the levels ``a, 3 a, ..., (2 K - 1) a``, none salient.

    ``a`` minimizes the error: least squares and the nearest levels in turn, from the groups of Gaussian quantiles,
    until no weight changes its group. It is rounded so that all levels are float16 numbers times one power of two: the
    ratios hold in the file, which then is a uniform grid without a zero.
    """
    magnitudes_V, counts_V = statistics.magnitudes_V, statistics.counts_V
    odd_K = np.arange(1, 2 * groups, 2)

    def nearest(least: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the ranks of the groups, and the multiple of `least` that each magnitude is nearest to."""
        ranks_K = np.searchsorted(magnitudes_V, least * (odd_K + 1), side="right")
        ranks_K[-1] = len(magnitudes_V)
        return ranks_K, np.repeat(odd_K, np.diff(ranks_K, prepend=0))

    ranks_K = group(statistics, 0.0, groups).ranks_K
    odd_V = np.repeat(odd_K, np.diff(ranks_K, prepend=0))
    for _ in range(_MOST_STEPS):
        least = exact_sum(magnitudes_V * counts_V * odd_V) / exact_sum(counts_V * odd_V**2)
        before, (ranks_K, odd_V) = ranks_K, nearest(least)
        if np.array_equal(ranks_K, before):
            break
    least = _few_bits(least, int(odd_K[-1]))
    ranks_K, odd_V = nearest(least)
    error = exact_sum(counts_V * (magnitudes_V - least * odd_V) ** 2)
    counts_K = np.array([part.sum() for part in np.split(counts_V, ranks_K[:-1])])
    return Groups(ranks_K, counts_K, least * odd_K, float(error))


def _few_bits(number: float, largest: int) -> float:
    """Return a number rounded so that its multiples up to `largest` have as many bits as a float16 or fewer."""
    fraction, exponent = math.frexp(number)
    bits = _HALF_BITS - (largest - 1).bit_length()
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
