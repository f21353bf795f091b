"""Salient weights: a few bits each and one scale per row (algorithm 1), over the largest weights alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SalientCode:
    """Algorithm 1's result for the salient weights of a layer.

    Attributes:
        levels_S: uint8 (S,), index of each weight's centre.
        row_scales_M: float64 (M,), ``a``; 0 for a row without salient weights.
        centres_L: float64 (2^N_b,), ascending; a weight is rebuilt as ``a_i * centres[level]``.
        error: ``||W_sal - a B_sal||^2``.
    """

    levels_S: np.ndarray
    row_scales_M: np.ndarray
    centres_L: np.ndarray
    error: float


def quantize_salient(
    weights_S: np.ndarray,
    rows_S: np.ndarray,
    rows: int,
    *,
    bits: int,
    alpha: float,
    iterations: int,
    refit: bool,
) -> SalientCode:
    """Run algorithm 1 on the salient weights `weights_S` (S,), which stand in rows `rows_S` (S,), ascending.

    Alternate the least-squares row scale ``a_i = sum_j W_ij B_ij / sum_j B_ij^2`` and ``B = clip(W / a, -1, 1)`` from
    ``B = sign(W)``; then round B to the midpoints of ``2^bits + 1`` levels (14),
    ``r(d) = mu_B + sigma_B sign(d) (alpha exp(abs d) - 1)``. `refit` solves the row scale once more for the rounded B,
    which algorithm 1 leaves out. A row whose weights are all zero gets scale 0.
    """
    scales_M = np.zeros(rows)
    if len(weights_S) == 0:
        return SalientCode(np.empty(0, np.uint8), scales_M, np.zeros(1 << bits), 0.0)
    starts = np.concatenate([[0], 1 + np.flatnonzero(rows_S[1:] != rows_S[:-1])])
    lengths = np.diff(starts, append=len(rows_S))
    # W and B have the same sign throughout the iteration, so it runs on magnitudes. Few arrays are held at once: at 5 %
    # of a large layer each is as large as a fifth of the layer.
    magnitudes = np.abs(weights_S).astype(np.float64)
    relaxed = np.ones_like(magnitudes)
    for _ in range(iterations):
        scales = _row_scales(magnitudes, relaxed, starts)
        per_weight = np.repeat(scales, lengths)
        relaxed.fill(0)
        np.divide(magnitudes, per_weight, out=relaxed, where=per_weight > 0)
        np.minimum(relaxed, 1, out=relaxed)
    del magnitudes, per_weight
    signed = np.copysign(relaxed, weights_S, out=relaxed)
    nonzero = signed != 0
    mean, std = (
        (float(np.mean(signed, where=nonzero)), float(np.std(signed, where=nonzero))) if nonzero.any() else (0.0, 0.0)
    )
    centres = adaptive_centres(mean, std, bits, alpha)
    levels = np.searchsorted((centres[:-1] + centres[1:]) / 2, signed, side="left").astype(np.uint8)
    del relaxed, signed, nonzero
    rounded, weights = centres[levels], weights_S.astype(np.float64)
    if refit:
        scales = _row_scales(weights, rounded, starts)
    scales_M[rows_S[starts]] = scales
    rounded *= np.repeat(scales, lengths)
    error = float(np.sum(np.square(np.subtract(weights, rounded, out=rounded), out=rounded)))
    return SalientCode(levels, scales_M, centres, error)


def adaptive_centres(mean: float, std: float, bits: int, alpha: float) -> np.ndarray:
    """Return the centres, (2^bits,): midpoints of the levels (14) at 2^bits + 1 linear steps in [-1, 1]."""
    steps = np.linspace(-1, 1, (1 << bits) + 1)
    levels = mean + std * np.sign(steps) * (alpha * np.exp(np.abs(steps)) - 1)
    return (levels[:-1] + levels[1:]) / 2


def _row_scales(weights: np.ndarray, codes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the least-squares scale of each row that has salient weights; 0 where its code is all zero."""
    products = np.add.reduceat(weights * codes, starts)
    squares = np.add.reduceat(codes * codes, starts)
    return np.divide(products, squares, out=np.zeros_like(products), where=squares > 0)
