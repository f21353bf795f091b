"""ARB-LLM_RC (arXiv 2410.03129): signs times a scale of the row and one of the column, refined alternately.

Columns are blocked, found salient and fed back as in BiLLM (`bivlm.methods.billm`). What is binarized is rebuilt as
``row_scale * column_scale * sign`` without a mean; the two scales are solved for one after the other by least squares.
A block has such a product for each of the two groups of ordinary columns and two, added up, for the salient columns:
four float16 numbers per row and block, two per column: 2 + 64 / block + 32 / M bits. Splitting the salient columns into
groups as well, which the paper's column-group bitmap also allows, would take a third bit for them and is left out.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from bivlm.methods.base import INPUTS, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.methods.column_blocks import quantize_blocks
from bivlm.numerics.binary import choose_boundary, to_stored
from bivlm.numerics.error_feedback import BLOCK
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.packing import rowblock


class ARBSettings(MethodSettings):
    """Settings of `arb_rc`."""

    method: Literal["arb_rc"]
    block: int = Field(default=BLOCK, ge=1, le=rowblock.LARGEST_BLOCK)  # columns that share row scales
    salient_columns: int = Field(default=49, ge=0, le=4096)  # most of them in a block
    iterations: int = Field(default=15, ge=0, le=1000)  # alternations of row and column scales
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)


class ARB(Method[ARBSettings]):
    """The method `arb_rc`."""

    name: ClassVar[str] = "arb_rc"
    version: ClassVar[int] = 1
    Settings = ARBSettings

    def needs(self, settings: ARBSettings) -> frozenset[Need]:
        return INPUTS

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        iterations = plan.parameters["iterations"]

        def binarize(columns_BM: torch.Tensor, salient_B: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return binarize_block(columns_BM, salient_B, iterations)

        return quantize_blocks(weight_MN, plan, inputs, binarize, centred=False)


def binarize_block(
    columns_BM: torch.Tensor, salient_B: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a block's symbols, uint8 (B, M), and its `rowblock` numbers: scales (M, 1, 4), factors (2, B)."""
    symbols_BM = torch.empty_like(columns_BM, dtype=torch.uint8)
    factors_2B = torch.empty(2, len(columns_BM), device=columns_BM.device)
    ordinary, twice = columns_BM[~salient_B], columns_BM[salient_B]
    high = ordinary.abs() > choose_boundary(ordinary, centred=False)
    symbols_BM[~salient_B] = 2 * high.to(torch.uint8) + (ordinary < 0)
    low_row, low_column = alternate(ordinary, ~high, iterations)
    high_row, high_column = alternate(ordinary, high, iterations)
    factors_2B[:, ~salient_B] = torch.stack([low_column, high_column])

    rows_2M, columns_2S, positive_2SM = alternate_twice(twice, iterations)
    symbols_BM[salient_B] = 2 * (~positive_2SM[0]).to(torch.uint8) + ~positive_2SM[1]
    factors_2B[:, salient_B] = columns_2S
    scales = torch.stack([low_row, high_row, *rows_2M], dim=-1)[:, None]
    return symbols_BM, {"scales": to_stored(scales), "factors": to_stored(factors_2B)}


def alternate(columns_BM: torch.Tensor, inside_BM: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row scales (M,) and column scales (B,) of ``r_m c_b sign(w_bm)`` over the weights `inside`.

    With magnitudes a and sums over the weights inside, ``r_m = sum_b a c_b / sum_b c_b^2`` and
    ``c_b = sum_m a r_m / sum_m r_m^2`` in turns, from ``r_m = mean_b a`` and ``c_b = mean_m (a / r_m)``. No step raises
    the squared error. Signs stay, because the scales are never negative.
    """
    inside = inside_BM.to(columns_BM.dtype)
    magnitude_BM = columns_BM.abs() * inside
    row_M = magnitude_BM.sum(0) / inside.sum(0).clamp_min_(1)
    inverse_M = _divide(torch.ones_like(row_M), row_M, torch.zeros_like(row_M))
    column_B = (magnitude_BM @ inverse_M) / inside.sum(1).clamp_min_(1)
    for _ in range(iterations):
        row_M = _divide(column_B @ magnitude_BM, column_B.square() @ inside, row_M)
        column_B = _divide(magnitude_BM @ row_M, inside @ row_M.square(), column_B)
    return row_M, column_B


def alternate_twice(columns_SM: torch.Tensor, iterations: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return row scales (2, M), column scales (2, S) and signs, bool (2, S, M), of ``r c sign + r' c' sign'``.

    The second product starts from the residual of the first. Each turn solves for the scales of the first, with the
    second subtracted, then for those of the second, and then gives every weight the closest of its four levels.
    """
    everywhere = torch.ones_like(columns_SM, dtype=torch.bool)
    rows, columns, signs = [], [], []
    left_SM = columns_SM
    for _ in range(2):
        row_M, column_S = alternate(left_SM, everywhere, 0)
        rows.append(row_M)
        columns.append(column_S)
        signs.append(torch.where(left_SM < 0, -1.0, 1.0))
        left_SM = columns_SM - signs[0] * rows[0] * columns[0][:, None]
    for _ in range(iterations):
        for this, other in ((0, 1), (1, 0)):
            signed_SM = (columns_SM - signs[other] * rows[other] * columns[other][:, None]).mul_(signs[this])
            squares = columns[this].square().sum()
            rows[this] = _divide(columns[this] @ signed_SM, squares, rows[this])
            columns[this] = _divide(signed_SM @ rows[this], rows[this].square().sum(), columns[this])
        first, second = (row * column[:, None] for row, column in zip(rows, columns, strict=True))
        below, above = columns_SM + first, columns_SM - first
        closest = (above.abs() - second.abs()).abs() <= (below.abs() - second.abs()).abs()
        signs[0] = torch.where(closest, 1.0, -1.0)
        signs[1] = torch.where((torch.where(closest, above, below) < 0) == (second < 0), 1.0, -1.0)
    return torch.stack(rows), torch.stack(columns), torch.stack(signs) > 0


def _divide(numerator: torch.Tensor, denominator: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Return the quotient, or `otherwise` where it is not defined."""
    return torch.where(denominator > 0, numerator / denominator, otherwise)
