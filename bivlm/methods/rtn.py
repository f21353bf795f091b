"""Round to nearest: every weight on the nearest point of its group's uniform grid. The baseline of all others."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from bivlm.methods.base import CurvePoint, LayerPlan, Method, MethodSettings, Quantized
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.uniform_grid import expected_error, group_width, round_to_nearest
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import grouped

CURVE_BITS = (2, 3, 4)
CURVE_GROUP_SIZES = (32, 64, 128, 256)


class RTNSettings(MethodSettings):
    """Settings of `rtn`."""

    method: Literal["rtn"]
    bits: grouped.CodeBits = 2
    group_size: int = Field(default=128, ge=0, le=grouped.LARGEST_GROUP)  # input columns; 0: one group per row
    clip: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)  # share of a group's range that its grid spans


class RTN(Method[RTNSettings]):
    """The method `rtn`."""

    name: ClassVar[str] = "rtn"
    version: ClassVar[int] = 1
    Settings = RTNSettings

    def curve(self, statistics: LayerStatistics, settings: RTNSettings) -> list[CurvePoint]:
        """Return points for 2, 3 and 4 bits in groups of 32 to 256 columns, at stored bytes, clipped by `settings`.

        Errors are those expected of independent weights, see `bivlm.numerics.uniform_grid.expected_error`.
        """
        # In a row narrower than several of the sizes they are the same choice.
        sizes = {group_width(statistics.shape[1], size): size for size in reversed(CURVE_GROUP_SIZES)}
        points = []
        for bits in CURVE_BITS:
            for group_size in sorted(sizes.values()):
                chosen = settings.model_copy(update={"bits": bits, "group_size": group_size})
                stored = 8 * grouped.packed_nbytes(statistics.shape, bits, group_size) / statistics.size
                error = expected_error(statistics, bits, group_size, settings.clip)
                points.append(CurvePoint(chosen.model_dump(mode="json"), stored, error))
        return points

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        p = plan.parameters
        coded = round_to_nearest(weight_MN, p["bits"], p["group_size"], p["clip"])
        return Quantized(grouped.pack(coded, weight_MN.dtype))

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return dict(plan.parameters)
