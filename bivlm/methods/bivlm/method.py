"""Bi-VLM (arXiv 2509.18763): Gaussian-quantile groups of binary weights, a few bits for the salient ones.

With ``refit: false`` and ``objective: error`` it is the paper's algorithm 3 to the letter. ``refit: true`` solves the
row scales of algorithm 1 once more after its last step has rounded B, which the paper leaves out and which halves the
error; ``objective: rate`` also counts the bits needed to store salient positions.

The paper looks at weights alone. ``saliency`` chooses the searched number of salient weights by another metric
(`bivlm.numerics.saliency`). ``feedback: true`` quantizes column by column and compensates the error of earlier columns
in later ones (`bivlm.numerics.error_feedback`): a weight then takes the nearest of its layer's levels, which are those
of the weights as they were.

``levels: odd`` fits levels at 1, 3, 5, ... times one number instead of one scale for each group, without salient
weights. Formats of uniform grids, such as GGUF's Q2_K, then hold the weight exactly. The cut-offs follow from the
levels, not from quantiles: on a Gaussian 2 groups err 15 % less, 1.1 % more than the best four levels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from bivlm.methods.base import (
    GRADIENTS,
    INPUTS,
    WEIGHTS,
    CurvePoint,
    LayerPlan,
    Method,
    MethodSettings,
    Need,
    Quantized,
)
from bivlm.methods.bivlm.salient_share import Candidate, Levels, evaluate_share, search_share
from bivlm.methods.bivlm.salient_weights import SalientCode, quantize_salient
from bivlm.numerics.error_feedback import feed_back, feed_back_columns, input_factor
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.saliency import Metric, most_salient, scores
from bivlm.numerics.weight_statistics import CHUNK_WEIGHTS, LayerStatistics, weights_above
from bivlm.packing import quantile

_CODE = frozenset({"salient_bits", "alpha", "iterations", "refit"})  # settings of how salient weights are coded


class BiVLMSettings(MethodSettings):
    """Settings of `bivlm`, in the paper's symbols."""

    method: Literal["bivlm"]
    groups: int = Field(ge=1, le=quantile.LARGEST_GROUPS)  # N_uns
    p_max: float = Field(ge=0, le=0.5, allow_inf_nan=False)  # largest nominal salient share
    salient_bits: int = Field(default=2, ge=1, le=quantile.LARGEST_SALIENT_BITS)  # N_b
    alpha: float = Field(default=1.4, gt=0, le=10, allow_inf_nan=False)  # (14)
    iterations: int = Field(default=10, ge=1, le=1000)  # of algorithm 1
    refit: bool = True
    objective: Literal["error", "rate"] = "error"
    saliency: Metric = "magnitude"
    feedback: bool = False
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)  # of the second moment
    levels: Levels = "free"

    @model_validator(mode="after")
    def _odd_levels_stand_alone(self) -> BiVLMSettings:
        if self.levels == "odd" and (self.p_max, self.saliency) != (0, "magnitude"):
            raise ValueError("levels: odd: expected p_max: 0 and no other saliency, because no weight is salient")
        return self

    @model_serializer(mode="wrap")
    def _as_before_there_were_levels(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave free levels out, so that steps recorded earlier are still found."""
        data = serialize(self)
        if self.levels == "free":
            data.pop("levels", None)
        return data


class BiVLM(Method[BiVLMSettings]):
    """The method `bivlm`."""

    name: ClassVar[str] = "bivlm"
    version: ClassVar[int] = 1
    Settings = BiVLMSettings

    def needs(self, settings: BiVLMSettings) -> frozenset[Need]:
        if settings.saliency == "gradient":
            return GRADIENTS
        return INPUTS if settings.feedback or settings.saliency != "magnitude" else WEIGHTS

    def tail_share(self, settings: BiVLMSettings) -> float:
        return settings.p_max

    def curve(self, statistics: LayerStatistics, settings: BiVLMSettings) -> list[CurvePoint]:
        """Return points for up to 8 groups, without salient weights and with the searched share of them."""
        points = []
        for groups in range(1, 9):
            for p_max in sorted({0.0, settings.p_max}):
                chosen = settings.model_copy(update={"groups": groups, "p_max": p_max})
                best = _search(statistics, chosen)
                bits = _stored_bits(statistics, chosen, best)
                points.append(CurvePoint(chosen.model_dump(mode="json"), bits, best.error))
        return points

    def plan(self, statistics: LayerStatistics, settings: BiVLMSettings) -> LayerPlan:
        """Return the plan of algorithm 3's search. It holds the cut-offs as bit patterns and the group scales."""
        best = _search(statistics, settings)
        # A rank of 0 means that no magnitude is small enough for the group; -1 is below every pattern.
        boundaries = [int(statistics.patterns_V[rank - 1]) if rank else -1 for rank in best.groups.ranks_K]
        return LayerPlan(
            method=self.name,
            version=self.version,
            shape=statistics.shape,
            parameters={
                **settings.model_dump(include={*_CODE, "saliency", "feedback", "damping"}),
                "p_sal": best.p_sal,
                "salient": len(best.positions_S),
                "predicted_error": best.error,
                "boundaries": boundaries,
                "group_scales": best.groups.scales_K.tolist(),
            },
        )

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        p, figures = plan.parameters, {}
        shape, scales_K = plan.shape, np.array(p["group_scales"])
        symbols = quantile.by_magnitude(weight_MN, p["boundaries"])
        if p["saliency"] == "magnitude":
            positions_S, weights_S = weights_above(weight_MN, p["boundaries"][-1])
        else:
            metric = scores(p["saliency"], weight_MN, inputs, damping=p["damping"])
            positions_S = most_salient(metric, p["salient"])
            weights_S = _at(weight_MN, positions_S)
            # Other weights than the plan thought are salient, so that the groups have other members.
            scales_K = _group_scales(weight_MN, symbols, positions_S, scales_K)
        settings = {key: p[key] for key in ("alpha", "iterations", "refit")}
        code = quantize_salient(weights_S, positions_S // shape[1], shape[0], bits=p["salient_bits"], **settings)
        levels_S = code.levels_S
        if p["feedback"]:
            factor = input_factor(inputs, p["damping"], self.name, weight_MN)
            figures = factor.figures()
            symbols_MN = _fed_back(weight_MN, factor.upper_NN, scales_K, code, positions_S)
            levels_S = _at(symbols_MN, positions_S).astype(np.uint8)
            symbols = quantile.ready(symbols_MN)
        packed = quantile.pack(
            shape,
            weight_MN.dtype,
            symbols,
            group_scales_K=scales_K,
            salient_bits=p["salient_bits"],
            positions_S=positions_S,
            levels_S=levels_S,
            centres_L=code.centres_L,
            row_scales_M=code.row_scales_M,
        )
        return Quantized(packed, figures)

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return {
            "groups": len(plan.parameters["boundaries"]),
            "p_sal_nominal": plan.parameters["p_sal"],
            "p_sal_actual": plan.parameters["salient"] / (plan.shape[0] * plan.shape[1]),
        }


def _at(matrix_MN: torch.Tensor, positions_S: np.ndarray) -> np.ndarray:
    """Return the entries (S,) at flat positions; floating-point numbers as float32."""
    found = matrix_MN.reshape(-1)[torch.from_numpy(positions_S).to(matrix_MN.device)].cpu()
    return (found.to(torch.float32) if found.is_floating_point() else found).numpy()


def _group_scales(
    weight_MN: torch.Tensor,
    symbols: Callable[[int, int], torch.Tensor],
    positions_S: np.ndarray,
    otherwise_K: np.ndarray,
) -> np.ndarray:
    """Return the mean magnitude of every group's unsalient weights, float64 (K,); `otherwise_K` for an empty group."""
    groups, columns = len(otherwise_K), weight_MN.shape[1]
    counts, sums = np.zeros(groups + 1), np.zeros(groups + 1)
    step = max(1, CHUNK_WEIGHTS // columns)  # counting takes 16 bytes per weight
    for begin in range(0, len(weight_MN), step):
        part = weight_MN[begin : begin + step]
        group = (symbols(begin, begin + len(part)) >> 1).view(-1)
        first, last = np.searchsorted(positions_S, [begin * columns, (begin + len(part)) * columns])
        group[torch.from_numpy(positions_S[first:last] - begin * columns).to(group.device)] = groups
        counts += torch.bincount(group, minlength=groups + 1).cpu().numpy()
        magnitudes = part.reshape(-1).abs().double()
        sums += torch.bincount(group, weights=magnitudes, minlength=groups + 1).cpu().numpy()
    return np.where(counts[:groups] > 0, sums[:groups] / np.maximum(counts[:groups], 1), otherwise_K)


def _fed_back(
    weight_MN: torch.Tensor,
    upper_NN: torch.Tensor,
    scales_K: np.ndarray,
    code: SalientCode,
    positions_S: np.ndarray,
) -> torch.Tensor:
    """Return symbols, uint8 (M, N): the level of a salient weight, ``2 * group + (w < 0)`` of any other.

    Column by column a weight takes the nearest of its levels (the group scales with both signs, or its row's scaled
    centres), and its error is fed into the columns to come.
    """
    device = upper_NN.device
    salient_NM = torch.zeros(weight_MN.shape, dtype=torch.bool, device=device)
    salient_NM.view(-1)[torch.from_numpy(positions_S).to(device)] = True
    salient_NM = salient_NM.T.contiguous()
    symbols_NM = torch.empty(salient_NM.shape, dtype=torch.uint8, device=device)
    levels = _NearestLevel(scales_K, device)
    centres_L = torch.from_numpy(code.centres_L).to(device, torch.float32)
    rows_M = torch.from_numpy(code.row_scales_M).to(device, torch.float32)

    def block(begin: int, columns_BM: torch.Tensor) -> torch.Tensor:
        end = begin + len(columns_BM)

        def column(index: int, weight_M: torch.Tensor) -> torch.Tensor:
            symbol_M, rebuilt_M = levels(weight_M)
            where = torch.nonzero(salient_NM[begin + index]).view(-1)
            if len(where):
                scale = rows_M[where]
                relative = weight_M[where] / torch.where(scale != 0, scale, 1.0)  # refitted, it may be negative
                level = (relative[:, None] - centres_L).abs().argmin(-1)
                symbol_M[where] = level.to(torch.uint8)
                rebuilt_M[where] = scale * centres_L[level]
            symbols_NM[begin + index] = symbol_M
            return rebuilt_M

        return feed_back_columns(columns_BM, upper_NN[begin:end, begin:end], column)

    feed_back(weight_MN.to(device), upper_NN, block)
    return symbols_NM.T.contiguous()


class _NearestLevel:
    """Finds the nearest of ``+-scales`` to every weight of a column."""

    def __init__(self, scales_K: np.ndarray, device: torch.device) -> None:
        # Groups are in order of magnitude, and so are their scales, unless a group had no weight to tell.
        order = np.argsort(scales_K, kind="stable")
        ascending = scales_K[order]
        self._scales = torch.from_numpy(ascending).to(device, torch.float32)
        self._between = torch.from_numpy((ascending[:-1] + ascending[1:]) / 2).to(device, torch.float32)
        self._symbols = torch.from_numpy(2 * order).to(device, torch.uint8)

    def __call__(self, weight_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return symbols ``2 * group + (w < 0)``, uint8 (M,), and their rebuilt weights, float32 (M,)."""
        rank = torch.bucketize(weight_M.abs(), self._between)
        symbols = self._symbols[rank] + torch.signbit(weight_M).to(torch.uint8)  # what copysign goes by
        return symbols, torch.copysign(self._scales[rank], weight_M)


def _search(statistics: LayerStatistics, settings: BiVLMSettings) -> Candidate:
    return search_share(
        lambda p_sal: _evaluate(statistics, settings, p_sal),
        settings.p_max,
        settings.objective,
        lambda candidate: _stored_bits(statistics, settings, candidate),
    )


def _evaluate(statistics: LayerStatistics, settings: BiVLMSettings, p_sal: float) -> Candidate:
    chosen = settings.model_dump(include={*_CODE, "groups"})
    return evaluate_share(statistics, p_sal, levels=settings.levels, **chosen)


def _stored_bits(statistics: LayerStatistics, settings: BiVLMSettings, candidate: Candidate) -> float:
    nbytes = quantile.packed_nbytes(statistics.shape, settings.groups, settings.salient_bits, candidate.positions_S)
    return 8 * nbytes / statistics.size
