"""AWQ (arXiv 2306.00978): input channels that carry large activations are scaled up before rounding to nearest.

``s_j = mean(abs(x_j))^beta``, divided by ``sqrt(max s * min s)``; of 20 values of beta in [0, 1) the one whose rebuilt
weight has the least output error ``tr(E H E^T)``. The published code folds 1 / s into the layer before; here it is
stored, 16 bits per input channel, and the rebuilt weight stands alone. For beta = 0 there is nothing to store. The
published search for clipped ranges is not part of this method.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from bivlm.errors import InputError
from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.uniform_grid import GroupedCodes, round_to_nearest
from bivlm.packing import grouped

BETAS = tuple(step / 20 for step in range(20))
# As float16 times a power of two a scale has 11 bits over 34 binades; these are 27 of them.
_LARGEST_SCALE = 1e4
_PRODUCT_WEIGHTS = 1 << 23  # how many errors are multiplied with H together


class AWQSettings(MethodSettings):
    """Settings of `awq`."""

    method: Literal["awq"]
    bits: grouped.CodeBits = 2
    group_size: int = Field(default=128, ge=0, le=grouped.LARGEST_GROUP)  # input columns; 0: one group per row


class AWQ(Method[AWQSettings]):
    """The method `awq`."""

    name: ClassVar[str] = "awq"
    version: ClassVar[int] = 1
    Settings = AWQSettings

    def needs(self, settings: AWQSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        """Pack the weight; figures are the chosen `beta`, the `dead_channels` (magnitude 0) and the `tokens` seen.

        Of several best betas the smallest is taken: 0, which is `rtn`, where no token was seen.
        """
        if inputs is None:
            raise InputError(f"method {self.name!r} needs the magnitudes of the layer's inputs; none were given")
        bits, group_size = plan.parameters["bits"], plan.parameters["group_size"]
        magnitude_N = inputs.magnitude_N.to(weight_MN.device)
        moment_NN = inputs.second_moment_NN.to(weight_MN.device)
        chosen = 0.0
        best = round_scaled(weight_MN, None, bits, group_size)
        least = _output_error(weight_MN, *best, moment_NN)
        for beta in BETAS[1:]:
            candidate = round_scaled(weight_MN, channel_scales(magnitude_N, beta), bits, group_size)
            error = _output_error(weight_MN, *candidate, moment_NN)
            if error < least:
                least, chosen, best = error, beta, candidate
        coded, multipliers_N = best
        dead = int((magnitude_N <= 0).sum())
        figures = {"beta": chosen, "dead_channels": dead, "tokens": inputs.total_tokens}
        return Quantized(grouped.pack(coded, weight_MN.dtype, multipliers_N), figures)

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return dict(plan.parameters)


def channel_scales(magnitude_N: torch.Tensor, beta: float) -> torch.Tensor | None:
    """Return s (N,), float32, from ``mean(abs(x))``; None where all are 1.

    A dead channel is scaled as the quietest live one. Scales are kept within [1e-4, 1e4].
    """
    live = magnitude_N > 0
    if beta == 0 or not bool(live.any()):
        return None
    least = magnitude_N[live].min()
    # In logarithms nothing overflows, however large or small the activations are.
    logarithms = beta * magnitude_N.clamp(min=least).to(torch.float64).log()
    scales = (logarithms - (logarithms.max() + logarithms.min()) / 2).exp()
    return scales.clamp(1 / _LARGEST_SCALE, _LARGEST_SCALE).to(torch.float32)


def round_scaled(
    weight_MN: torch.Tensor, scales_N: torch.Tensor | None, bits: int, group_size: int
) -> tuple[GroupedCodes, torch.Tensor | None]:
    """Return codes of the columns times s, and the factors of the rebuilt columns: 1 / s as it is stored, (N,)."""
    if scales_N is None:
        return round_to_nearest(weight_MN, bits, group_size), None
    multipliers_N = grouped.stored_channel_scales(1 / scales_N)
    return round_to_nearest(weight_MN.to(torch.float32) / multipliers_N, bits, group_size), multipliers_N


def _output_error(
    weight_MN: torch.Tensor, coded: GroupedCodes, multipliers_N: torch.Tensor | None, moment_NN: torch.Tensor
) -> float:
    """Return ``tr(E H E^T)`` of the weight rebuilt in its dtype, some rows of E at a time."""
    rows, columns = weight_MN.shape
    total, step = 0.0, max(1, _PRODUCT_WEIGHTS // columns)
    for begin in range(0, rows, step):
        weight_RN, rebuilt_RN = weight_MN[begin : begin + step], coded.rebuilt(begin, min(begin + step, rows))
        if multipliers_N is not None:
            rebuilt_RN.mul_(multipliers_N)
        error_RN = rebuilt_RN.to(weight_MN.dtype).to(torch.float32) - weight_RN.to(torch.float32)
        total += float(((error_RN @ moment_NN) * error_RN).sum(dtype=torch.float64))
    return total
