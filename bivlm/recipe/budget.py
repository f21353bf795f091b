"""Recipe settings of the bits across layers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Importance = Literal["energy", "curvature"]


class BudgetSettings(BaseModel):
    """Recipe settings of the bits across layers.

    Attributes:
        bits: stored bits per weight, over all linears that the recipe packs.
        importance: what a layer's relative error is multiplied by. ``energy``: ``||W||^2``, so that the squared
            error of all weights is made small. ``curvature``: how much the divergence from full precision rises,
            ``mean(w^2) sum_ij F_ij`` with F the diagonal of its curvature (`bivlm.calibration.blocks.gradients`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: float = Field(gt=0, le=16, allow_inf_nan=False)
    importance: Importance = "curvature"
