"""Statistics of one layer's weights: an exact magnitude histogram, its moments and its largest weights.

A 16-bit float has at most 32,768 distinct magnitudes, so counting bit patterns loses nothing: the sum, the count and
the squares of the weights between any two cut-offs follow from the histogram, and the layer need not be read again.
The order of the bit patterns of non-negative floats is the order of their values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.special import log_ndtr, ndtri

from bivlm.errors import InputError

VERSION = 2
CHUNK_WEIGHTS = 1 << 20  # how many weights are looked at together: temporaries stay in the tens of megabytes
HISTOGRAM_EDGES = np.arange(-64, 65) / 8  # in standard deviations from the mean
_PATTERNS = {torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float32: np.uint32}
DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LayerStatistics:
    """Exact statistics of a weight (M, N).

    Attributes:
        shape: (M, N).
        dtype: of the weight: bfloat16, float16 or float32.
        patterns_V: uint32 (V,), the distinct magnitudes as bit patterns, ascending.
        counts_V: int64 (V,), how many weights have that magnitude.
        negatives_V: int64 (V,), how many of them are below zero (-0.0 counts as negative, which changes no sum).
        tail_share: the Gaussian share of largest magnitudes that `tail_positions_S` covers.
        tail_positions_S: int64 (S,), flat row-major positions of the weights above that cut-off, ascending.
        tail_weights_S: float32 (S,), those weights.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    patterns_V: np.ndarray
    counts_V: np.ndarray
    negatives_V: np.ndarray
    tail_share: float
    tail_positions_S: np.ndarray
    tail_weights_S: np.ndarray

    @classmethod
    def measure(cls, weight_MN: torch.Tensor, tail_share: float, name: str = "weight") -> LayerStatistics:
        """Measure a layer: one pass for the histogram, one comparison for the tail.

        `tail_share` in [0, 1) is a Gaussian share as in (6): the tail holds the weights with
        ``abs(w) > mean + std * Phi^-1(1 - tail_share / 2)``. Raises `InputError` naming `name` if the weight is not a
        2-D floating tensor with at least one entry, or has NaN or infinite entries.
        """
        check_weight(weight_MN, name)
        raw_counts = _count_patterns(weight_MN)
        patterns, counts, negatives = _merge_signs(*raw_counts, bits=16 if weight_MN.element_size() == 2 else 32)
        statistics = cls(
            shape=(weight_MN.shape[0], weight_MN.shape[1]),
            dtype=weight_MN.dtype,
            patterns_V=patterns,
            counts_V=counts,
            negatives_V=negatives,
            tail_share=tail_share,
            tail_positions_S=np.empty(0, np.int64),
            tail_weights_S=np.empty(0, np.float32),
        )
        if not np.isfinite(statistics.magnitudes_V[-1]):
            bad = int(counts[~np.isfinite(statistics.magnitudes_V)].sum())
            raise InputError(
                f"{name}: {bad} of {weight_MN.numel()} weights are NaN or infinite; expected finite weights"
            )
        first = statistics.rank_above(statistics.salient_cut_off(tail_share))
        if first == len(patterns):
            return statistics
        positions, weights = weights_above(weight_MN, int(patterns[first - 1]) if first else -1)
        return replace(statistics, tail_positions_S=positions, tail_weights_S=weights)

    @cached_property
    def magnitudes_V(self) -> np.ndarray:
        """float64 (V,): the distinct magnitudes, ascending."""
        return pattern_values(self.patterns_V, self.dtype)

    @property
    def size(self) -> int:
        """Number of weights, M * N."""
        return self.shape[0] * self.shape[1]

    @cached_property
    def mean(self) -> float:
        """Mean of the signed weights (mu)."""
        return exact_sum(self.magnitudes_V * (self.counts_V - 2 * self.negatives_V)) / self.size

    @cached_property
    def std(self) -> float:
        """Standard deviation of the signed weights over the whole layer (sigma, divided by M * N)."""
        return math.sqrt(self._central_moment(2))

    @cached_property
    def square_sum(self) -> float:
        """Sum of the squared weights, ||W||^2."""
        return exact_sum(self.magnitudes_V**2 * self.counts_V)

    def salient_cut_off(self, share: float) -> float:
        """Return mean + std * Phi^-1(1 - share / 2): magnitudes above it are salient (6); infinite for share 0."""
        if share == 0:
            return math.inf
        return self.mean + self.std * float(ndtri(1 - share / 2))

    def rank_above(self, cut_off: float) -> int:
        """Return how many of the distinct magnitudes are at most `cut_off`."""
        return int(np.searchsorted(self.magnitudes_V, cut_off, side="right"))

    def summary(self) -> dict[str, Any]:
        """Return mean, std, extremes, kurtosis, share of zeros, KL to the fitted Gaussian and `histogram` as JSON data.

        `kurtosis` is the fourth standardised moment (3 for a Gaussian); it, `kl_gaussian` and the histogram are None
        for a constant weight, which has none of them.
        """
        positive, negative = self.counts_V > self.negatives_V, self.negatives_V > 0
        lowest = -self.magnitudes_V[negative][-1] if negative.any() else self.magnitudes_V[positive][0]
        highest = self.magnitudes_V[positive][-1] if positive.any() else -self.magnitudes_V[negative][0]
        zeros = int(self.counts_V[0]) if self.patterns_V[0] == 0 else 0
        return {
            "mean": self.mean,
            "std": self.std,
            "min": float(lowest),
            "max": float(highest),
            "kurtosis": self._central_moment(4) / self.std**4 if self.std > 0 else None,
            "zeros": zeros / self.size,
            "kl_gaussian": self.kl_gaussian(),
            "histogram": None if self.std == 0 else self.histogram().tolist(),
        }

    def histogram(self) -> np.ndarray:
        """Return int64 (130,): how many signed weights lie below, between and above `HISTOGRAM_EDGES`.

        The edges are in standard deviations from the mean. The outermost bins are open, so that the figure does not
        depend on the size of the layer's largest weight. Raises ZeroDivisionError for a constant weight.
        """
        if self.std == 0:
            raise ZeroDivisionError("a constant weight has no standard deviation to measure its histogram in")
        signed = np.concatenate([-self.magnitudes_V, self.magnitudes_V])
        counts = np.concatenate([self.negatives_V, self.counts_V - self.negatives_V])
        bins = np.searchsorted(HISTOGRAM_EDGES, (signed - self.mean) / self.std, side="left")
        # Exact: float64 counts whole numbers up to 2^53.
        return np.bincount(bins, weights=counts, minlength=len(HISTOGRAM_EDGES) + 1).astype(np.int64)

    def kl_gaussian(self) -> float | None:
        """Return KL(`histogram` || fitted Gaussian) in nats, the paper's diagnostic (figures 5 and 6).

        None for a constant weight.
        """
        if self.std == 0:
            return None
        share = self.histogram() / self.size
        filled = share > 0
        return float(np.sum(share[filled] * (np.log(share[filled]) - _log_gaussian_mass(HISTOGRAM_EDGES)[filled])))

    def save(self, path: Path) -> None:
        """Write to a safetensors file; the same statistics give the same bytes."""
        arrays = {
            "patterns": self.patterns_V,
            "counts": self.counts_V,
            "negatives": self.negatives_V,
            "tail_positions": self.tail_positions_S,
            "tail_weights": self.tail_weights_S,
            "shape": np.array(self.shape, np.int64),
            "tail_share": np.array([self.tail_share], np.float64),
        }
        # One entry: several are written in an order that differs from process to process.
        save_file(arrays, path, metadata={"statistics": f"{VERSION} {DTYPE_NAMES[self.dtype]}"})

    @classmethod
    def load(cls, path: Path) -> LayerStatistics:
        """Read what `save` wrote; raises `InputError` for another version."""
        with safe_open(path, framework="np") as file:
            version, _, dtype = (file.metadata() or {}).get("statistics", "").partition(" ")
            if version != str(VERSION) or dtype not in _DTYPES:
                raise InputError(f"{path}: layer statistics version {version!r}, expected {VERSION}")
            return cls(
                shape=tuple(file.get_tensor("shape").tolist()),
                dtype=_DTYPES[dtype],
                patterns_V=file.get_tensor("patterns"),
                counts_V=file.get_tensor("counts"),
                negatives_V=file.get_tensor("negatives"),
                tail_share=float(file.get_tensor("tail_share")[0]),
                tail_positions_S=file.get_tensor("tail_positions"),
                tail_weights_S=file.get_tensor("tail_weights"),
            )

    def _central_moment(self, order: int) -> float:
        above = (self.magnitudes_V - self.mean) ** order * (self.counts_V - self.negatives_V)
        below = (-self.magnitudes_V - self.mean) ** order * self.negatives_V
        return exact_sum(np.concatenate([above, below])) / self.size


def check_weight(weight_MN: torch.Tensor, name: str) -> None:
    """Raise `InputError` naming `name` unless the weight is 2-D, not empty and bfloat16, float16 or float32."""
    if weight_MN.dim() != 2 or weight_MN.numel() == 0:
        raise InputError(f"{name}: expected a matrix (out_features, in_features), found shape {tuple(weight_MN.shape)}")
    if weight_MN.dtype not in _PATTERNS:
        raise InputError(f"{name}: expected {', '.join(DTYPE_NAMES.values())}, found {weight_MN.dtype}")


def exact_sum(terms: np.ndarray) -> float:
    """Return the sum of float64 `terms`, rounded once where they are as few as 16-bit weights make them.

    A plan must not depend on the order in which a machine adds. A float32 layer has millions of distinct magnitudes;
    there numpy's pairwise sum serves.
    """
    return math.fsum(terms) if len(terms) <= 1 << 17 else float(np.sum(terms, dtype=np.float64))


def pattern_values(patterns_V: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the values, float64 (V,), of the bit patterns of non-negative floats of `dtype`."""
    if dtype == torch.bfloat16:
        return (patterns_V.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    kind = np.float16 if dtype == torch.float16 else np.float32
    return patterns_V.astype(_PATTERNS[dtype]).view(kind).astype(np.float64)


def magnitude_patterns(weight: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes' bit patterns: the weight's bits without the sign, int16 or int32 of its shape."""
    if weight.element_size() == 2:
        return weight.view(torch.int16) & 0x7FFF
    return weight.view(torch.int32) & 0x7FFFFFFF


def weights_above(weight_MN: torch.Tensor, boundary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return flat row-major positions, int64 (S,), and values, float32 (S,), of the weights above a magnitude.

    `boundary` is a magnitude bit pattern (-1 is below all of them); a 16-bit or 32-bit weight is exact in float32.
    """
    flat = weight_MN.contiguous().view(-1)
    positions, weights = [], []
    for begin in range(0, flat.numel(), CHUNK_WEIGHTS):
        chunk = flat[begin : begin + CHUNK_WEIGHTS]
        where = np.flatnonzero((magnitude_patterns(chunk) > boundary).cpu().numpy())
        positions.append(where + begin)
        weights.append(chunk[torch.from_numpy(where).to(chunk.device)].to(torch.float32).cpu().numpy())
    return np.concatenate(positions).astype(np.int64), np.concatenate(weights)


def _count_patterns(weight_MN: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return distinct bit patterns, sign included, and how often each occurs."""
    flat = weight_MN.contiguous().view(-1)
    if weight_MN.element_size() == 4:
        patterns, counts = np.unique(flat.view(torch.int32).cpu().numpy().view(np.uint32), return_counts=True)
        return patterns, counts.astype(np.int64)
    counts = np.zeros(1 << 16, np.int64)
    if flat.device.type == "cpu":
        codes = flat.view(torch.int16).numpy().view(np.uint16)
        for begin in range(0, len(codes), CHUNK_WEIGHTS):
            counts += np.bincount(codes[begin : begin + CHUNK_WEIGHTS], minlength=1 << 16)
    else:
        for chunk in flat.view(torch.int16).split(8 * CHUNK_WEIGHTS):
            counts += torch.bincount(chunk.to(torch.int32) & 0xFFFF, minlength=1 << 16).cpu().numpy()
    found = np.flatnonzero(counts)
    return found.astype(np.uint32), counts[found]


def _merge_signs(raw: np.ndarray, counts: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return magnitude patterns, counts and counts of negatives from patterns that still hold the sign bit."""
    sign = np.uint32(1 << (bits - 1))
    magnitudes, where = np.unique(raw & ~sign, return_inverse=True)
    total = np.zeros(len(magnitudes), np.int64)
    negative = np.zeros(len(magnitudes), np.int64)
    np.add.at(total, where, counts)
    np.add.at(negative, where, np.where(raw & sign, counts, 0))
    return magnitudes, total, negative


def _log_gaussian_mass(edges: np.ndarray) -> np.ndarray:
    """Return the log of the unit Gaussian's mass below, between and above `edges`, accurate in both tails."""
    lower = np.concatenate([[-np.inf], edges])
    upper = np.concatenate([edges, [np.inf]])
    # By symmetry a bin above zero is taken below it, where the difference of two CDFs keeps its digits.
    low, high = np.where(lower >= 0, -upper, lower), np.where(lower >= 0, -lower, upper)
    return log_ndtr(high) + np.log1p(-np.exp(log_ndtr(low) - log_ndtr(high)))
