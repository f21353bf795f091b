"""Binarize weights block of columns by block with error feedback: what BiLLM and ARB-LLM_RC have in common.

Both choose the salient columns of a block, binarize the block, and feed its error into the blocks after it; how a
block is binarized is up to each. Notation and "centred" as in `bivlm.numerics.binary`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bivlm.methods.base import LayerPlan, Quantized
from bivlm.numerics.binary import choose_salient, normalised
from bivlm.numerics.error_feedback import feed_back, input_factor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.packing import rowblock

Binarize = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def quantize_blocks(
    weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None, binarize: Binarize, *, centred: bool
) -> Quantized:
    """Return the weight packed as `bivlm.packing.rowblock`, with the number of salient columns among the figures.

    `plan` has the parameters ``block``, ``salient_columns`` and ``damping``. `binarize` takes the columns (B, M) of a
    block and which of them are salient, bool (B,), and returns symbols uint8 (B, M) and numbers as `rowblock.pack`
    takes them for one block. Raises as `bivlm.numerics.error_feedback.input_factor`.
    """
    p = plan.parameters
    factor = input_factor(inputs, p["damping"], plan.method, weight_MN)
    diagonal_N = factor.upper_NN.diagonal()
    normal_MN, exponent = normalised(weight_MN)
    symbols_NM = torch.empty(weight_MN.shape[::-1], dtype=torch.uint8, device=weight_MN.device)
    salient_N = torch.zeros(weight_MN.shape[1], dtype=torch.bool, device=weight_MN.device)
    numbers: list[dict[str, torch.Tensor]] = []

    def quantize_block(begin: int, columns_BM: torch.Tensor) -> torch.Tensor:
        block = slice(begin, begin + len(columns_BM))
        salient_B = choose_salient(columns_BM, diagonal_N[block], p["salient_columns"], centred=centred)
        symbols_BM, found = binarize(columns_BM, salient_B)
        symbols_NM[block], salient_N[block] = symbols_BM, salient_B
        numbers.append(found)
        return rowblock.rebuild(symbols_BM.T, salient_B, found, len(columns_BM)).T

    feed_back(normal_MN, factor.upper_NN, quantize_block, p["block"])
    packed = rowblock.pack(
        symbols_NM.T,
        salient_N,
        {name: torch.cat([found[name] for found in numbers], dim=1) for name in numbers[0]},
        block=p["block"],
        exponent=exponent,
        dtype=weight_MN.dtype,
    )
    return Quantized(packed, {**factor.figures(), "salient_columns": int(salient_N.sum())})
