"""HBLLM (arXiv 2512.00862), its row variant, and HBVLA's pairing: Haar coefficients, a mean and two scales per band.

Blocks of columns are quantized one after another with error feedback between them. In a block

1. the columns of largest saliency, by the Euclidean norm of ``w^2 / u^2``, are salient (u as in BiLLM);
2. rows are Haar transformed. A row's coefficients of a band are ``mean +- scale``, with one scale for those near the
   mean and one for those far from it; of all ways to split them the one of least squared error is taken;
3. what is left of salient columns is transformed along the column and binarized in the same manner, band by band.

With ``fill: neighbours`` step 2 sees in the place of a salient column the mean of the ordinary columns next to it: it
then widens no scales, but all of it is left to step 3. That pays only where salient columns are many times larger
than others. ``pairing: greedy`` first orders the block's columns so that neighbours are alike, as HBVLA does; its
second moment with weighted tokens is a setting of calibration.

The papers report 1.0 to 1.09 bits: a sign per weight and a second one in salient columns. A decoder needs the group of
every coefficient and six float16 numbers per row and block as well: 2 + 96 / block + 2 * salient_share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.numerics.binary import normalised, saliency, to_stored
from bivlm.numerics.error_feedback import BLOCK, feed_back, input_factor
from bivlm.numerics.haar import haar
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.packing import wavelet


class HBLLMSettings(MethodSettings):
    """Settings of `hbllm`."""

    method: Literal["hbllm"]
    block: int = Field(default=BLOCK, ge=2, le=wavelet.LARGEST_BLOCK, multiple_of=2)  # columns with scales of their own
    salient_share: float = Field(default=0.08, ge=0, le=0.5, allow_inf_nan=False)  # of the columns of a block
    fill: Literal["none", "neighbours"] = "none"  # what salient columns are while rows are coded
    pairing: Literal["none", "greedy"] = "none"
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)


class HBLLM(Method[HBLLMSettings]):
    """The method `hbllm`."""

    name: ClassVar[str] = "hbllm"
    version: ClassVar[int] = 1
    Settings = HBLLMSettings

    def needs(self, settings: HBLLMSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        p = plan.parameters
        factor = input_factor(inputs, p["damping"], self.name, weight_MN)
        diagonal_N = factor.upper_NN.diagonal()
        normal_MN, exponent = normalised(weight_MN)
        coded: list[wavelet.Coded] = []
        numbers: list[dict[str, torch.Tensor]] = []

        def quantize_block(begin: int, columns_BM: torch.Tensor) -> torch.Tensor:
            salient_B = most_salient(columns_BM, diagonal_N[begin : begin + len(columns_BM)], p["salient_share"])
            block, found = code_block(
                columns_BM, salient_B, paired=p["pairing"] == "greedy", filled=p["fill"] == "neighbours"
            )
            coded.append(block)
            numbers.append(found)
            return wavelet.rebuild(block, found).T

        feed_back(normal_MN, factor.upper_NN, quantize_block, p["block"])
        salient_N = torch.cat([block.salient_N for block in coded])
        orders = [block.order_N + i * p["block"] for i, block in enumerate(coded) if block.order_N is not None]
        whole = wavelet.Coded(
            torch.cat([block.symbols_MN for block in coded], dim=1),
            torch.cat([block.residual_MS for block in coded], dim=1),
            salient_N,
            torch.cat(orders) if orders else None,
            p["block"],
        )
        packed = wavelet.pack(
            whole,
            {
                "rows": torch.cat([found["rows"] for found in numbers], dim=1),
                "columns": torch.cat([found["columns"] for found in numbers]),
            },
            exponent=exponent,
            dtype=weight_MN.dtype,
        )
        return Quantized(packed, {**factor.figures(), "salient_columns": int(salient_N.sum())})


def most_salient(columns_BM: torch.Tensor, diagonal_B: torch.Tensor, share: float) -> torch.Tensor:
    """Return the `share` of columns, to the next integer, whose saliencies have the largest norm: bool (B,)."""
    norms = saliency(columns_BM, diagonal_B).norm(dim=1)
    salient_B = torch.zeros_like(norms, dtype=torch.bool)
    salient_B[norms.argsort(descending=True, stable=True)[: round(share * len(norms))]] = True
    return salient_B


def code_block(
    columns_BM: torch.Tensor, salient_B: torch.Tensor, *, paired: bool, filled: bool
) -> tuple[wavelet.Coded, dict[str, torch.Tensor]]:
    """Return a block's symbols, and its numbers as `wavelet` stores them: rows (M, 1, 2, 3), columns (S, 2, 3)."""
    width, rows = columns_BM.shape
    order_B = pair_columns(columns_BM) if paired else torch.arange(width, device=columns_BM.device)
    ordered_BM = columns_BM[order_B]
    if filled:
        ordered_BM = fill_salient(ordered_BM, salient_B[order_B])
    row_symbols_MB, row_numbers = binarize_bands(haar(ordered_BM, 0).T)
    residual_MS = torch.empty(rows, 0, dtype=torch.uint8, device=columns_BM.device)
    coded = wavelet.Coded(row_symbols_MB, residual_MS, salient_B, order_B if paired else None, block=width + width % 2)
    numbers = {"rows": row_numbers[:, None]}
    left_BM = columns_BM - wavelet.rebuild_rows(coded, numbers["rows"]).T
    residual_SM, numbers["columns"] = binarize_bands(haar(left_BM[salient_B], 1))
    return replace(coded, residual_MS=residual_SM.T), numbers


def fill_salient(columns_BM: torch.Tensor, salient_B: torch.Tensor) -> torch.Tensor:
    """Return the block with each salient column replaced by the mean of its nearest ordinary ones before and after.

    At an end of the block that is the nearest one; zero if all columns are salient.
    """
    ordinary, salient = (~salient_B).nonzero().view(-1), salient_B.nonzero().view(-1)
    if not len(ordinary):
        return torch.zeros_like(columns_BM)
    after = torch.searchsorted(ordinary, salient)
    before = ordinary[(after - 1).clamp_min(0)]
    after = ordinary[after.clamp_max(len(ordinary) - 1)]
    filled_BM = columns_BM.clone()
    filled_BM[salient] = (columns_BM[before] + columns_BM[after]) / 2
    return filled_BM


def pair_columns(columns_BM: torch.Tensor) -> torch.Tensor:
    """Return an order of columns, int64 (B,), by pairs: again and again the two nearest of those still single.

    Pairs stand in the order of their first columns; one without a partner comes last.
    """
    count = len(columns_BM)
    squares_B = columns_BM.square().sum(1)
    distances_BB = (squares_B[:, None] + squares_B - 2 * columns_BM @ columns_BM.T).cpu()
    distances_BB[torch.ones_like(distances_BB, dtype=torch.bool).tril()] = torch.inf
    pairs = []
    for _ in range(count // 2):
        pair = divmod(int(distances_BB.argmin()), count)
        pairs.append(pair)
        for column in pair:
            distances_BB[column] = distances_BB[:, column] = torch.inf
    order = [column for pair in sorted(pairs) for column in pair]
    single = set(range(count)) - set(order)
    return torch.tensor([*order, *single], device=columns_BM.device)


def binarize_bands(coefficients_XL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symbols uint8 (X, L) and numbers (X, 2, 3) of vectors of Haar coefficients, bands at even and odd places.

    The numbers are rounded as they will be stored.
    """
    symbols_XL = torch.empty_like(coefficients_XL, dtype=torch.uint8)
    numbers = []
    for band in (0, 1):
        symbols_XL[:, band::2], found = _binarize_band(coefficients_XL[:, band::2].contiguous())
        numbers.append(found)
    return symbols_XL, to_stored(torch.stack(numbers, dim=1))


def _binarize_band(coefficients_XL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return symbols (X, L) and mean, inner and outer scale (X, 3) of one band.

    With deviations d from the mean in ascending order, groups of the first k and of the others leave
    ``sum d^2 - (sum_inner d)^2 / k - (sum_outer d)^2 / (L - k)``; every k is tried.
    """
    count, length = coefficients_XL.shape
    if not length:
        return torch.empty_like(coefficients_XL, dtype=torch.uint8), coefficients_XL.new_zeros(count, 3)
    mean_X = coefficients_XL.mean(1)
    centred_XL = coefficients_XL - mean_X[:, None]
    deviation_XL = centred_XL.abs()
    ordered_XL = deviation_XL.sort(1).values
    sums_XL = ordered_XL.cumsum(1, dtype=torch.float64)
    inner_L = torch.arange(1, length + 1, device=coefficients_XL.device)
    gain_XL = sums_XL.square() / inner_L + (sums_XL[:, -1:] - sums_XL).square_() / (length - inner_L).clamp_min_(1)
    boundary_X1 = ordered_XL.gather(1, gain_XL.argmax(1, keepdim=True))
    outer_XL = deviation_XL > boundary_X1
    outer_X = outer_XL.sum(1)
    outer_sum_X = (deviation_XL * outer_XL).sum(1)
    inner_scale_X = (deviation_XL.sum(1) - outer_sum_X).clamp_min_(0) / (length - outer_X)
    outer_scale_X = outer_sum_X / outer_X.clamp_min(1)
    symbols_XL = 2 * outer_XL.to(torch.uint8) + (centred_XL < 0)
    return symbols_XL, torch.stack([mean_X, inner_scale_X, outer_scale_X], dim=-1)
