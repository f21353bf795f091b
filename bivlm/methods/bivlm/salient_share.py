"""The salient share of a layer: Brent's bounded search over plans that are judged without quantizing the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import minimize_scalar

from bivlm.methods.bivlm.quantile_groups import Groups, group, odd_group
from bivlm.methods.bivlm.salient_weights import SalientCode, quantize_salient
from bivlm.numerics.weight_statistics import LayerStatistics

Objective = Literal["error", "rate"]
Levels = Literal["free", "odd"]

# Brent stops when the share is known to this part of p_max: 1 % of weights to one in 100,000.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Candidate:
    """A salient share and its result.

    Attributes:
        p_sal: nominal (Gaussian) salient share.
        groups: the partition of the unsalient weights.
        salient: algorithm 1's code of the others, in row-major order.
        positions_S: int64 (S,), where the salient weights are, ascending.
        error: J (20), relative to ``||W||^2``; 0 for a layer of zeros.
    """

    p_sal: float
    groups: Groups
    salient: SalientCode
    positions_S: np.ndarray
    error: float


def evaluate_share(
    statistics: LayerStatistics,
    p_sal: float,
    *,
    groups: int,
    salient_bits: int,
    alpha: float,
    iterations: int,
    refit: bool,
    levels: Levels = "free",
) -> Candidate:
    """Return the candidate at one salient share, its J from the histogram and the tail: the layer is not read.

    `p_sal` must not exceed the tail share of the statistics, and is 0 with `levels` "odd".
    """
    if p_sal > statistics.tail_share:
        raise ValueError(f"p_sal {p_sal} is above the tail share {statistics.tail_share} the statistics were made with")
    partition = odd_group(statistics, groups) if levels == "odd" else group(statistics, p_sal, groups)
    if partition.ranks_K[-1] == len(statistics.magnitudes_V):
        inside = np.zeros(len(statistics.tail_weights_S), bool)
    else:
        inside = np.abs(statistics.tail_weights_S) >= statistics.magnitudes_V[partition.ranks_K[-1]]
    positions_S = statistics.tail_positions_S[inside]
    salient = quantize_salient(
        statistics.tail_weights_S[inside],
        positions_S // statistics.shape[1],
        statistics.shape[0],
        bits=salient_bits,
        alpha=alpha,
        iterations=iterations,
        refit=refit,
    )
    total = statistics.square_sum
    return Candidate(
        p_sal=p_sal,
        groups=partition,
        salient=salient,
        positions_S=positions_S,
        error=(partition.error + salient.error) / total if total > 0 else 0.0,
    )


def search_share(
    evaluate: Callable[[float], Candidate],
    p_max: float,
    objective: Objective,
    stored_bits: Callable[[Candidate], float],
) -> Candidate:
    """Search the best salient share in [0, p_max] (algorithm 3): both ends, and Brent's bounded method between them.

    `objective` "error" is the paper's J (20). Once the row scale is refitted J falls up to p_max, so "error" ends
    there; "rate" also counts the bits: ``J * 4^stored_bits``, constant along the Gaussian rate-distortion curve.
    `stored_bits` returns a candidate's bits per weight. The cheaper of two equal candidates wins.
    """

    def cost_of(candidate: Candidate) -> float:
        return candidate.error * 4.0 ** stored_bits(candidate) if objective == "rate" else candidate.error

    chosen = evaluate(0.0)
    best = (cost_of(chosen), chosen.p_sal)

    def visit(p_sal: float) -> float:
        # Only the best is kept: a candidate holds the positions of its salient weights.
        nonlocal best, chosen
        candidate = evaluate(float(p_sal))
        cost = cost_of(candidate)
        if (cost, candidate.p_sal) < best:
            best, chosen = (cost, candidate.p_sal), candidate
        return cost

    if p_max > 0:
        visit(p_max)
        minimize_scalar(visit, bounds=(0.0, p_max), method="bounded", options={"xatol": TOLERANCE * p_max})
    return chosen
