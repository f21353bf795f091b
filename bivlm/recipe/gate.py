"""Recipe settings of the gate, apart from the decision, which knows what was measured."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST_CONFIDENCE = 0.999  # of a thousandth of its means a bootstrap of 2,000 has two


class _Bounds(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _OneOfTwo(_Bounds):
    @model_validator(mode="after")
    def _says_something(self) -> _OneOfTwo:
        if not self.model_dump(exclude_none=True):
            raise ValueError(f"expected {', '.join(type(self).model_fields)}, or both")
        return self


class AccuracyGate(_Bounds):
    """How much accuracy may be lost against full precision, on each benchmark by itself.

    Attributes:
        largest_loss: percentage points; what may be lost with `confidence` has to stay within them, not only what was
            lost on these questions.
        confidence: one-sided. Every benchmark has to pass, so the confidence is that of each and of all together
            (Berger's intersection-union test, Technometrics 24, 1982).
        benchmarks: some of the recipe's evaluation; all of them by default.
    """

    largest_loss: float = Field(ge=0, le=100, allow_inf_nan=False)
    confidence: float = Field(default=0.95, ge=0.5, le=LARGEST_CONFIDENCE, allow_inf_nan=False)
    benchmarks: tuple[str, ...] | None = Field(default=None, min_length=1)

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class BitsGate(_OneOfTwo):
    """Upper bounds of stored bits, counted from the files: per weight of the packed linears, per parameter in all."""

    linears: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    whole_model: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class GateSettings(_OneOfTwo):
    """The bounds that a candidate has to keep to become champion."""

    accuracy: AccuracyGate | None = None
    bits: BitsGate | None = None
