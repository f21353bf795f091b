"""BiLLM (arXiv 2402.04291): salient columns binarized twice, all other weights once in two groups by magnitude.

Blocks of columns are quantized one after another with error feedback between them. In each block the columns stand in
the order of ``w^2 / u^2``, u on the diagonal of the inverse factor; how many of them are salient, and where the two
groups of the others part, is tried out. The paper reports 1.08 bits: a sign a weight and a second one in salient
columns. A decoder needs the group of every weight and seven float16 numbers a row and block as well: 2 + 112 / block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from bivlm.binary import (
    binarize,
    choose_boundary,
    choose_salient,
    normalised,
    residual,
    to_stored,
)
from bivlm.feedback import BLOCK, factor_figures, feed_back, input_factor
from bivlm.inputs import SiteStatistics
from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.packing import rowblock


class BiLLMSettings(MethodSettings):
    """Settings of `billm`."""

    method: Literal["billm"]
    block: int = Field(default=BLOCK, ge=1, le=4096)  # columns that share scales
    salient_columns: int = Field(default=49, ge=0, le=4096)  # most of them in a block
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)


class BiLLM(Method):
    """The method `billm`."""

    name: ClassVar[str] = "billm"
    version: ClassVar[int] = 1
    Settings = BiLLMSettings

    def needs(self, settings: BiLLMSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        p = plan.parameters
        factor = input_factor(inputs, p["damping"], self.name, weight_MN)
        diagonal_N = factor.upper_NN.diagonal()
        normal_MN, exponent = normalised(weight_MN)
        symbols_NM = torch.empty(weight_MN.shape[::-1], dtype=torch.uint8, device=weight_MN.device)
        salient_N = torch.zeros(weight_MN.shape[1], dtype=torch.bool, device=weight_MN.device)
        numbers: dict[str, list[torch.Tensor]] = {"means": [], "scales": []}

        def quantize_block(begin: int, columns_BM: torch.Tensor) -> torch.Tensor:
            block = slice(begin, begin + len(columns_BM))
            salient_B = choose_salient(columns_BM, diagonal_N[block], p["salient_columns"], centred=True)
            symbols_BM, found = binarize_block(columns_BM, salient_B)
            symbols_NM[block], salient_N[block] = symbols_BM, salient_B
            for name, values in found.items():
                numbers[name].append(values)
            return rowblock.rebuild(symbols_BM.T, salient_B, found, len(columns_BM)).T

        feed_back(normal_MN, factor.upper_NN, quantize_block, p["block"])
        packed = rowblock.pack(
            symbols_NM.T,
            salient_N,
            {name: torch.cat(blocks, dim=1) for name, blocks in numbers.items()},
            block=p["block"],
            exponent=exponent,
            dtype=weight_MN.dtype,
        )
        return Quantized(packed, {**factor_figures(factor, inputs), "salient_columns": int(salient_N.sum())})


def binarize_block(columns_BM: torch.Tensor, salient_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Symbols uint8 (B, M) of a block, and its numbers as `rowblock` stores them: means (M, 1, 3), scales (M, 1, 4)."""
    symbols_BM = torch.empty_like(columns_BM, dtype=torch.uint8)
    ordinary, twice = columns_BM[~salient_B], columns_BM[salient_B]
    high = ordinary.abs() > choose_boundary(ordinary, centred=True)
    low_group, high_group = binarize(ordinary, ~high), binarize(ordinary, high)
    negative = torch.where(high, high_group.negative_BM, low_group.negative_BM)
    symbols_BM[~salient_B] = 2 * high.to(torch.uint8) + negative

    first = binarize(twice)
    second = binarize(residual(twice, first))
    symbols_BM[salient_B] = 2 * first.negative_BM.to(torch.uint8) + second.negative_BM
    means = [low_group.mean_M, high_group.mean_M, first.mean_M + second.mean_M]
    scales = [low_group.scale_M, high_group.scale_M, first.scale_M, second.scale_M]
    found = {"means": means, "scales": scales}
    return symbols_BM, {name: to_stored(torch.stack(values, dim=-1)[:, None]) for name, values in found.items()}
