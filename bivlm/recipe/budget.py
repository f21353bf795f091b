"""Recipe settings of the bits across layers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Importance = Literal["energy", "curvature"]


class BudgetSettings(BaseModel):
    """Recipe settings of the bits across layers.

    Attributes:
        bits: stored bits per weight, over all linears that the recipe packs.
        importance: what a layer's relative error is multiplied by. ``energy``: ``||W||^2``, so that the squared
            error of all weights is made small. ``curvature``: how much the divergence from full precision rises,
            ``mean(w^2) sum_ij F_ij`` with F the diagonal of its curvature (`bivlm.calibration.blocks.gradients`), or
            what the method's error feedback leaves of it (`bivlm.methods.base.Method.sensitivity`).
        least: stored bits per weight below which no layer goes. The divergence is predicted as a square of errors,
            which is too little where they are large.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    bits: float = Field(gt=0, le=16, allow_inf_nan=False)
    importance: Importance = "curvature"
    least: float | None = Field(default=None, gt=0, le=16, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _without_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `least` where it is not given, as it was before there was one: earlier steps are still found."""
        return {key: value for key, value in handler(self).items() if value is not None}
