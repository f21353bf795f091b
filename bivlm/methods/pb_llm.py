"""PB-LLM (arXiv 2310.00034): the largest magnitudes of a layer at eight bits, all other weights a sign and a row scale.

The row scale of the others is the mean of their magnitudes, which leaves the least squared error. A salient weight lies
on the even grid of 256 points from its row's least to its largest salient weight. The paper counts 1.7 bits at a share
of 0.1; a decoder also has to know which weights are salient.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from bivlm.methods.base import LayerPlan, Method, MethodSettings, Quantized
from bivlm.numerics.binary import normalised, to_stored
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.saliency import most_salient
from bivlm.packing import signs


class PBLLMSettings(MethodSettings):
    """Settings of `pb_llm`."""

    method: Literal["pb_llm"]
    share: float = Field(default=0.1, ge=0, le=1, allow_inf_nan=False)  # of the weights, at eight bits


class PBLLM(Method[PBLLMSettings]):
    """The method `pb_llm`."""

    name: ClassVar[str] = "pb_llm"
    bytes_a_weight: ClassVar[float] = 24.0
    version: ClassVar[int] = 1
    Settings = PBLLMSettings

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        normal_MN, exponent = normalised(weight_MN)
        positions_S = most_salient(normal_MN.abs(), round(plan.parameters["share"] * normal_MN.numel()))
        positions = torch.from_numpy(positions_S).to(normal_MN.device)
        salient_MN = torch.zeros_like(normal_MN, dtype=torch.bool)
        salient_MN.view(-1)[positions] = True
        ordinary_M = (~salient_MN).sum(1).clamp_min(1)
        numbers = {"row_scales": to_stored(normal_MN.abs().masked_fill_(salient_MN, 0).sum(1) / ordinary_M)}
        levels = torch.empty(0, dtype=torch.int64)
        if len(positions_S):
            least_M, largest_M = salient_range(normal_MN, salient_MN)
            top = (1 << signs.LEVEL_BITS) - 1
            zero_M, step_M = to_stored(least_M), to_stored((largest_M - least_M) / top)
            numbers |= {"row_steps": step_M, "row_zeros": zero_M}
            rows = positions // normal_MN.shape[1]
            step = torch.where(step_M > 0, step_M, 1.0)[rows]
            levels = ((normal_MN.view(-1)[positions] - zero_M[rows]) / step).round_().clamp_(0, top).to(torch.int64)
        packed = signs.pack(
            normal_MN < 0,
            positions_S,
            levels.cpu().numpy().astype(np.int64),
            numbers,
            exponent=exponent,
            dtype=weight_MN.dtype,
        )
        return Quantized(packed, {"salient_weights": len(positions_S)})


def salient_range(weight_MN: torch.Tensor, salient_MN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and largest salient weight of each row, (M,) each; zero where a row has none."""
    least_M = weight_MN.masked_fill(~salient_MN, torch.inf).amin(1)
    largest_M = weight_MN.masked_fill(~salient_MN, -torch.inf).amax(1)
    none_M = ~salient_MN.any(1)
    return least_M.masked_fill_(none_M, 0), largest_M.masked_fill_(none_M, 0)
