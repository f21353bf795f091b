"""GPTQ (arXiv 2210.17323): column by column on a uniform grid, each error compensated by the columns after it.

The grid of a group of input columns is fitted when its first column is reached, from weights into which the errors of
all columns before it have been fed. (The published code feeds errors into later columns in blocks of 128, so that the
second group of such a block gets its grid from weights without the errors of the first.) Columns keep their order.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.numerics.error_feedback import feed_back, feed_back_columns, input_factor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.uniform_grid import GroupedCodes, divisor, fit_grid, group_width, layer_exponent
from bivlm.packing import grouped


class GPTQSettings(MethodSettings):
    """Settings of `gptq`."""

    method: Literal["gptq"]
    bits: grouped.CodeBits = 2
    group_size: int = Field(default=64, ge=0, le=grouped.LARGEST_GROUP)  # input columns; 0: one group per row
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)  # share of the mean diagonal of H


class GPTQ(Method[GPTQSettings]):
    """The method `gptq`."""

    name: ClassVar[str] = "gptq"
    version: ClassVar[int] = 1
    Settings = GPTQSettings

    def needs(self, settings: GPTQSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        """Pack the weight; figures are the `damping` that H needed, its `dead_channels`, and the `tokens` behind it.

        Dead channels, and all of them where no token was seen, are rounded to nearest.
        """
        p = plan.parameters
        factor = input_factor(inputs, p["damping"], self.name, weight_MN)
        coded = feed_back_groups(weight_MN, factor.upper_NN, p["bits"], p["group_size"])
        return Quantized(grouped.pack(coded, weight_MN.dtype), factor.figures())

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return {key: plan.parameters[key] for key in ("bits", "group_size")}


def feed_back_groups(weight_MN: torch.Tensor, upper_NN: torch.Tensor, bits: int, group_size: int) -> GroupedCodes:
    """Return a weight's codes; U is the upper triangular factor of `bivlm.numerics.error_feedback`."""
    rows, columns = weight_MN.shape
    width, exponent = group_width(columns, group_size), layer_exponent(weight_MN, bits)
    device = weight_MN.device
    codes_NM = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    scales_GM = torch.empty(-(-columns // width), rows, device=device)
    zeros_GM = torch.empty_like(scales_GM, dtype=torch.uint8)
    level_M = torch.empty(rows, device=device)
    rebuilt_M = torch.empty_like(level_M)

    def group(begin: int, columns_BM: torch.Tensor) -> torch.Tensor:
        end, index = begin + len(columns_BM), begin // width
        scale_M, zero_M = fit_grid(columns_BM.amin(0), columns_BM.amax(0), bits, exponent)
        by_M, least_M, most_M = divisor(scale_M), -zero_M, 2**bits - 1 - zero_M

        def column(offset: int, column_M: torch.Tensor) -> torch.Tensor:
            torch.div(column_M, by_M, out=level_M).round_()
            torch.clamp(level_M, least_M, most_M, out=level_M)
            torch.mul(level_M, scale_M, out=rebuilt_M)
            codes_NM[begin + offset] = level_M.add_(zero_M)
            return rebuilt_M

        scales_GM[index], zeros_GM[index] = scale_M, zero_M
        return feed_back_columns(columns_BM, upper_NN[begin:end, begin:end], column)

    feed_back(weight_MN, upper_NN, group, width)
    return GroupedCodes(codes_NM.T, scales_GM.T.contiguous(), zeros_GM.T.contiguous(), bits, width, exponent)
