"""Bi-VLM (arXiv 2509.18763): Gaussian-quantile groups of binary weights, a few bits for the salient ones.

With ``refit: false`` and ``objective: error`` it is the paper's algorithm 3 to the letter. ``refit: true`` solves the
row scales of algorithm 1 once more after its last step has rounded B, which the paper leaves out and which halves the
error; ``objective: rate`` makes the search pay for salient positions.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from bivlm.inputs import SiteStatistics
from bivlm.methods.base import CurvePoint, LayerPlan, Method, MethodSettings, Quantized
from bivlm.packing import quantile
from bivlm.salient import quantize_salient
from bivlm.search import Candidate, evaluate_share, search_share
from bivlm.statistics import LayerStatistics, weights_above


class BiVLMSettings(MethodSettings):
    """Settings of `bivlm`, in the paper's symbols."""

    method: Literal["bivlm"]
    groups: int = Field(ge=1, le=16)  # N_uns
    p_max: float = Field(ge=0, le=0.5, allow_inf_nan=False)  # largest nominal salient share
    salient_bits: int = Field(default=2, ge=1, le=4)  # N_b
    alpha: float = Field(default=1.4, gt=0, le=10, allow_inf_nan=False)  # (14)
    iterations: int = Field(default=10, ge=1, le=1000)  # of algorithm 1
    refit: bool = True
    objective: Literal["error", "rate"] = "error"


class BiVLM(Method):
    """The method `bivlm`."""

    name: ClassVar[str] = "bivlm"
    version: ClassVar[int] = 1
    Settings = BiVLMSettings

    def tail_share(self, settings: BiVLMSettings) -> float:
        return settings.p_max

    def curve(self, statistics: LayerStatistics, settings: BiVLMSettings) -> list[CurvePoint]:
        """Every number of groups up to 8, without salient weights and with the searched share of them."""
        points = []
        for groups in range(1, 9):
            for p_max in sorted({0.0, settings.p_max}):
                chosen = settings.model_copy(update={"groups": groups, "p_max": p_max})
                best = _search(statistics, chosen)
                bits = _stored_bits(statistics, chosen, best)
                points.append(CurvePoint(chosen.model_dump(mode="json"), bits, best.error))
        return points

    def plan(self, statistics: LayerStatistics, settings: BiVLMSettings) -> LayerPlan:
        """Algorithm 3's search. The plan holds the cut-offs as bit patterns and the group scales."""
        best = _search(statistics, settings)
        # A rank of 0 means that no magnitude is small enough for the group; -1 is below every pattern.
        boundaries = [int(statistics.patterns_V[rank - 1]) if rank else -1 for rank in best.groups.ranks_K]
        return LayerPlan(
            method=self.name,
            version=self.version,
            shape=statistics.shape,
            parameters={
                **settings.model_dump(include={"salient_bits", "alpha", "iterations", "refit"}),
                "p_sal": best.p_sal,
                "salient": len(best.positions_S),
                "predicted_error": best.error,
                "boundaries": boundaries,
                "group_scales": best.groups.scales_K.tolist(),
            },
        )

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        p = plan.parameters
        positions_S, weights_S = weights_above(weight_MN, p["boundaries"][-1])
        salient = quantize_salient(
            weights_S,
            positions_S // weight_MN.shape[1],
            weight_MN.shape[0],
            bits=p["salient_bits"],
            alpha=p["alpha"],
            iterations=p["iterations"],
            refit=p["refit"],
        )
        packed = quantile.pack(
            weight_MN,
            boundaries_K=p["boundaries"],
            group_scales_K=np.array(p["group_scales"]),
            salient_bits=p["salient_bits"],
            positions_S=positions_S,
            levels_S=salient.levels_S,
            centres_L=salient.centres_L,
            row_scales_M=salient.row_scales_M,
        )
        return Quantized(packed)

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return {
            "groups": len(plan.parameters["boundaries"]),
            "p_sal_nominal": plan.parameters["p_sal"],
            "p_sal_actual": plan.parameters["salient"] / (plan.shape[0] * plan.shape[1]),
        }


def _search(statistics: LayerStatistics, settings: BiVLMSettings) -> Candidate:
    return search_share(
        lambda p_sal: _evaluate(statistics, settings, p_sal),
        settings.p_max,
        settings.objective,
        lambda candidate: _stored_bits(statistics, settings, candidate),
    )


def _evaluate(statistics: LayerStatistics, settings: BiVLMSettings, p_sal: float) -> Candidate:
    chosen = settings.model_dump(include={"groups", "salient_bits", "alpha", "iterations", "refit"})
    return evaluate_share(statistics, p_sal, **chosen)


def _stored_bits(statistics: LayerStatistics, settings: BiVLMSettings, candidate: Candidate) -> float:
    nbytes = quantile.packed_nbytes(statistics.shape, settings.groups, settings.salient_bits, candidate.positions_S)
    return 8 * nbytes / statistics.size
