"""Binarization of a block of columns: signs and scales, groups by magnitude, salient columns that are binarized twice.

Blocks come as columns (B, M), one column of the weight a row of the matrix, as `bivlm.numerics.error_feedback` gives
them out: every number below belongs to one of M rows of the weight. "Centred" means ``mean + scale * sign(w - mean)``,
as in BiLLM (arXiv 2402.04291); otherwise it is ``scale * sign(w)``, as in ARB-LLM_RC (arXiv 2410.03129).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bivlm.numerics.half_scales import exponent_of

PERCENTILES = 81  # of the magnitudes, from 10 to 90 %, tried as the boundary of the two groups
_LARGEST_HALF = torch.finfo(torch.float16).max
_LEAST_EXPONENT = -126
_CHUNK_ROWS = 4096  # rows of the weight looked at together, so that temporaries stay in the processor's cache


@dataclass(frozen=True)
class Binarized:
    """``mean + scale * sign`` of the weights of a block that belong to a group.

    Attributes:
        mean_M, scale_M: (M,), zero where a row has no weight in the group.
        negative_BM: bool (B, M), true below the mean; of no meaning outside the group.
    """

    mean_M: torch.Tensor
    scale_M: torch.Tensor
    negative_BM: torch.Tensor


def normalised(weight_MN: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return float32 ``weight * 2^-exponent``, its largest magnitude between 2^10 and 2^11, and the exponent.

    Squares of such weights neither overflow nor vanish, and float16 holds whatever error feedback makes of them. The
    weights stay smaller where 2^exponent would not be a normal float32.
    """
    exponent = max(exponent_of(float(weight_MN.abs().max())), _LEAST_EXPONENT)
    return weight_MN.to(torch.float32, copy=True).mul_(2.0**-exponent), exponent


def to_stored(values: torch.Tensor) -> torch.Tensor:
    """Return values rounded to float16 and back to float32: what a decoder will see of normalised numbers."""
    return values.clamp(-_LARGEST_HALF, _LARGEST_HALF).to(torch.float16).to(torch.float32)


def binarize(columns_BM: torch.Tensor, inside_BM: torch.Tensor | None = None) -> Binarized:
    """Return the least-squares mean, then scale, of the weights `inside` (by default all), row by row."""
    if inside_BM is None:
        inside_BM = torch.ones_like(columns_BM, dtype=torch.bool)
    count_M = inside_BM.sum(0).clamp_min_(1)
    mean_M = columns_BM.mul(inside_BM).sum(0) / count_M
    centred_BM = columns_BM - mean_M
    scale_M = centred_BM.abs().mul_(inside_BM).sum(0) / count_M
    return Binarized(mean_M, scale_M, centred_BM < 0)


def residual(columns_BM: torch.Tensor, first: Binarized) -> torch.Tensor:
    """Return what a first binarization leaves of all `columns`."""
    signed = torch.where(first.negative_BM, -first.scale_M, first.scale_M)
    return columns_BM - first.mean_M - signed


def saliency(columns_BM: torch.Tensor, diagonal_B: torch.Tensor) -> torch.Tensor:
    """Return ``w^2 / u^2`` (B, M), u (B,) the inverse factor's diagonal: twice the cost of losing a weight in OBQ."""
    return (columns_BM / diagonal_B.unsqueeze(-1)).square_()


def choose_salient(columns_BM: torch.Tensor, diagonal_B: torch.Tensor, most: int, *, centred: bool) -> torch.Tensor:
    """Return which columns of a block are binarized twice, bool (B,).

    Columns are ranked by their summed saliency; of the first 1 to `most` that number is chosen that leaves the smallest
    squared error if all other columns are binarized once, as one group. None if `most` is 0.
    """
    salient_B = torch.zeros(len(columns_BM), dtype=torch.bool, device=columns_BM.device)
    most = min(most, len(columns_BM))
    if most:
        order = saliency(columns_BM, diagonal_B).sum(1).argsort(descending=True, stable=True)
        chunks = columns_BM[order].split(_CHUNK_ROWS, dim=1)
        none = torch.zeros((), device=columns_BM.device)
        errors = sum((_errors_by_count(chunk, most, centred) for chunk in chunks), start=none)
        salient_B[order[: int(errors.argmin()) + 1]] = True
    return salient_B


def choose_boundary(columns_BM: torch.Tensor, *, centred: bool) -> float:
    """Return the magnitude up to which weights belong to group 0, by the squared error of two groups binarized once.

    The candidates are 81 percentiles of the block's magnitudes, from the 10th to the 90th.
    """
    if not columns_BM.numel():
        return 0.0
    magnitudes = columns_BM.abs().flatten().sort().values
    ranks = torch.linspace(0.1, 0.9, PERCENTILES, dtype=torch.float64, device=columns_BM.device)
    ranks *= len(magnitudes) - 1
    below = ranks.long()
    between = (ranks - below).to(torch.float32)
    above = (below + 1).clamp_max_(len(magnitudes) - 1)
    boundaries_P = torch.lerp(magnitudes[below], magnitudes[above], between)
    explained = _explained_centred if centred else _explained_plain
    chunks, none = columns_BM.split(_CHUNK_ROWS, dim=1), torch.zeros((), device=columns_BM.device)
    gains = sum((explained(chunk, boundaries_P) for chunk in chunks), start=none)
    return float(boundaries_P[gains.argmax()])


def _errors_by_count(ordered_BM: torch.Tensor, most: int, centred: bool) -> torch.Tensor:
    """Return squared errors, float64 (most,), if the first 1, 2, ... columns are binarized twice and the rest once.

    Each binarization of x around its mean leaves the squares less ``count * scale^2``.
    """
    sums, squares = ordered_BM.double().cumsum(0), ordered_BM.double().square().cumsum(0)
    errors = torch.zeros(most, dtype=torch.float64, device=ordered_BM.device)
    for count in range(1, most + 1):
        first, rest = ordered_BM[:count], ordered_BM[count:]
        if centred:
            mean_M = sums[count - 1] / count
            first = first - mean_M.float()
        error_M = squares[-1].clone()
        if centred:
            error_M -= count * mean_M.square()
        magnitude = first.abs()
        scale_M = magnitude.mean(0)
        error_M -= count * scale_M.double().square()
        left = magnitude - scale_M
        if centred:
            left = torch.where(first < 0, -left, left)
            mean_M = left.mean(0)
            left -= mean_M
            error_M -= count * mean_M.double().square()
        error_M -= count * left.abs().mean(0).double().square()
        if len(rest):
            if centred:
                mean_M = (sums[-1] - sums[count - 1]) / len(rest)
                error_M -= len(rest) * mean_M.square()
                rest = rest - mean_M.float()
            error_M -= len(rest) * rest.abs().mean(0).double().square()
        errors[count - 1] = error_M.sum()
    return errors


def _explained_plain(columns_BM: torch.Tensor, boundaries_P: torch.Tensor) -> torch.Tensor:
    """Return how much of the squares two groups ``scale * sign`` explain at each boundary, float64 (P,)."""
    ordered = columns_BM.T.contiguous().abs_().sort(1).values
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    low = torch.searchsorted(ordered, boundaries_P.expand(len(ordered), -1).contiguous(), right=True)
    sum_low, count = sums.gather(1, low), ordered.shape[1]
    sum_high = sums[:, -1:] - sum_low
    return (sum_low.square() / low.clamp_min(1) + sum_high.square() / (count - low).clamp_min(1)).sum(0)


def _explained_centred(columns_BM: torch.Tensor, boundaries_P: torch.Tensor) -> torch.Tensor:
    """Return the same for ``mean + scale * sign``: ``count * (mean^2 + scale^2)`` of both groups, float64 (P,).

    In a row in ascending order group 0 is the run [begin, end), group 1 what is left and right of it. The deviations
    from a mean at rank r are ``mean * (ranks below r) - (sum below r) + (sum above r) - mean * (ranks above r)``.
    """
    ordered = columns_BM.T.contiguous().sort(1).values
    count = ordered.shape[1]
    sums = torch.nn.functional.pad(ordered.double().cumsum(1), (1, 0))
    limits = boundaries_P.expand(len(ordered), -1).contiguous()
    begin = torch.searchsorted(ordered, -limits)
    end = torch.searchsorted(ordered, limits, right=True)
    at_begin, at_end, total = sums.gather(1, begin), sums.gather(1, end), sums[:, -1:]

    low, sum_low = end - begin, at_end - at_begin
    mean = sum_low / low.clamp_min(1)
    rank = torch.searchsorted(ordered, mean.float()).clamp(begin, end)
    left = sums.gather(1, rank) - at_begin
    deviation = mean * (rank - begin) - left + (sum_low - left) - mean * (end - rank)
    explained = low * mean.square() + deviation.square() / low.clamp_min(1)

    high, sum_high = count - low, total - sum_low
    mean = sum_high / high.clamp_min(1)
    rank = torch.searchsorted(ordered, mean.float())
    outer, inner = torch.minimum(rank, begin), torch.maximum(rank, end)  # where the mean parts each of the two runs
    left = sums.gather(1, outer) + sums.gather(1, inner) - at_end
    ranks = outer + inner - end
    deviation = mean * ranks - left + (sum_high - left) - mean * (high - ranks)
    return (explained + high * mean.square() + deviation.square() / high.clamp_min(1)).sum(0)
