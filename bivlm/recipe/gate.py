"""What a recipe says about its gate; apart from the decision, which knows what was measured."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_CONFIDENCE = 0.999  # of a thousandth of its means a bootstrap of 2,000 has two


class AccuracyGate(BaseModel):
    """How much accuracy may be lost against full precision, on each benchmark by itself.

    Attributes:
        largest_loss: percentage points; what may be lost with `confidence` has to stay within them, not only what was
            lost on these questions.
        confidence: one-sided. Every benchmark has to pass, so the confidence is that of each and of all together
            (Berger's intersection-union test, Technometrics 24, 1982).
        benchmarks: of the recipe's evaluation; all of them if none is named.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    largest_loss: float = Field(ge=0, le=100, allow_inf_nan=False)
    confidence: float = Field(default=0.95, ge=0.5, le=LARGEST_CONFIDENCE, allow_inf_nan=False)
    benchmarks: tuple[str, ...] | None = Field(default=None, min_length=1)

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class BitsGate(BaseModel):
    """Stored bits at most, counted from the files; at least one of the two.

    Attributes:
        linears: a weight of the packed linears.
        whole_model: a parameter of the whole model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    linears: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    whole_model: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _says_something(self) -> BitsGate:
        if self.linears is None and self.whole_model is None:
            raise ValueError("expected linears, whole_model, or both")
        return self


class GateSettings(BaseModel):
    """What a candidate has to keep to become champion; at least one of the two."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    accuracy: AccuracyGate | None = None
    bits: BitsGate | None = None

    @model_validator(mode="after")
    def _says_something(self) -> GateSettings:
        if self.accuracy is None and self.bits is None:
            raise ValueError("expected accuracy, bits, or both")
        return self
