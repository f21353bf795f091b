"""Recipe settings of finishing, apart from the work itself, which needs transformers' models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class FinishSettings(BaseModel):
    """Recipe settings of finishing.

    Attributes:
        objective: what is minimised.
        steps: of Adam, at most; the learning rate falls to zero along a cosine of so many.
        batch: samples per step.
        learning_rate: how far a step may move a number, relative to the root mean square of its tensor; a third or a
            ninth of it where no step helps.
        judging_share: share of the calibration samples by which the number of steps and the rate are chosen: tuned on
            the others, those that leave the smallest divergence on these; then all are tuned on.
        seed: of the order of the samples and of the share.
        leftovers: whether norms, biases, embedding and head are tuned, too. They are stored in floating point anyway.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    objective: Literal["kl"] = "kl"
    steps: int = Field(default=100, ge=1)
    batch: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=0.01, gt=0, le=1, allow_inf_nan=False)
    judging_share: float = Field(default=0.25, gt=0, lt=1, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    leftovers: bool = False

    @model_serializer(mode="wrap")
    def _without_false(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `leftovers` if false, as it was before there was one: earlier steps are still found."""
        return {key: value for key, value in handler(self).items() if key != "leftovers" or value}
