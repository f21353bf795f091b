"""BiLLM (arXiv 2402.04291): salient columns binarized twice, all other weights once in two groups by magnitude.

Blocks of columns are quantized one after another with error feedback between them. In each block the columns are in
the order of ``w^2 / u^2``, u on the diagonal of the inverse factor; how many of them are salient, and where the two
groups of the others part, is searched. The paper reports 1.08 bits: a sign per weight and a second one in salient
columns. A decoder needs the group of every weight and seven float16 numbers per row and block as well: 2 + 112 / block.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.methods.column_blocks import quantize_blocks
from bivlm.numerics.binary import binarize, choose_boundary, residual, to_stored
from bivlm.numerics.error_feedback import BLOCK
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.packing import rowblock


class BiLLMSettings(MethodSettings):
    """Settings of `billm`."""

    method: Literal["billm"]
    block: int = Field(default=BLOCK, ge=1, le=rowblock.LARGEST_BLOCK)  # columns that share scales
    salient_columns: int = Field(default=49, ge=0, le=4096)  # most of them in a block
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)


class BiLLM(Method[BiLLMSettings]):
    """The method `billm`."""

    name: ClassVar[str] = "billm"
    version: ClassVar[int] = 1
    Settings = BiLLMSettings

    def needs(self, settings: BiLLMSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        return quantize_blocks(weight_MN, plan, inputs, binarize_block, centred=True)


def binarize_block(columns_BM: torch.Tensor, salient_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a block's symbols, uint8 (B, M), and its `rowblock` numbers: means (M, 1, 3), scales (M, 1, 4)."""
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
