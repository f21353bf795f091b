"""Saliency: which weights matter most to a layer's output.

========== =============================================================================================
metric     score of weight ``w_ij``
========== =============================================================================================
magnitude  ``abs(w)``: the paper's choice; the Hessian is "expensive with limited benefit" (3.2.1)
activation ``abs(w) mean_t abs(x_tj)``, after AWQ
hessian    ``w^2 / U_jj^2``, U the upper Cholesky factor of the inverse second moment (BiLLM, SparseGPT)
gradient   ``w^2 sum_t s_ti^2 x_tj^2``: how much the divergence rises if the weight is left out, by the
           diagonal of its curvature (optimal brain damage)
========== =============================================================================================
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from bivlm.numerics.error_feedback import inverse_factor
from bivlm.numerics.input_statistics import SiteStatistics

Metric = Literal["magnitude", "activation", "hessian", "gradient"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def scores(
    metric: Metric, weight_MN: torch.Tensor, inputs: SiteStatistics | None = None, *, damping: float = 0.01
) -> torch.Tensor:
    """Return the score of every weight, float32 (M, N); larger is more salient. See the module's table.

    Where the inputs say nothing, because no token was seen, or none that reaches the answer, it is the magnitude.
    Raises ValueError for a metric without input statistics.
    """
    weight_MN = weight_MN.to(torch.float32)
    silent = inputs is not None and (
        inputs.total_tokens == 0 or (metric == "gradient" and inputs.gradient_square_MN is None)
    )
    if metric == "magnitude" or silent:
        return weight_MN.abs()
    if inputs is None:
        raise ValueError(f"saliency {metric!r} needs input statistics that are not given")
    if metric == "activation":
        return weight_MN.abs() * inputs.magnitude_N
    if metric == "hessian":
        return (weight_MN / inverse_factor(inputs.second_moment_NN, damping).upper_NN.diagonal()).square_()
    assert inputs.gradient_square_MN is not None  # else it is silent
    return weight_MN.square() * inputs.gradient_square_MN


def most_salient(scores_MN: torch.Tensor, count: int) -> np.ndarray:
    """Return flat row-major positions, int64 (count,), ascending, of the largest scores; of equal ones the first."""
    flat = scores_MN.reshape(-1)
    if count == 0:
        return np.empty(0, np.int64)
    threshold = torch.kthvalue(flat, len(flat) - count + 1).values
    above = torch.nonzero(flat > threshold).view(-1)
    equal = torch.nonzero(flat == threshold).view(-1)[: count - len(above)]
    return torch.cat([above, equal]).sort().values.cpu().numpy()
