"""Recipe settings of the search by block outputs, apart from the work itself, which needs transformers' models."""

from __future__ import annotations

import itertools
from math import prod
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bivlm.methods.base import MethodSettings
from bivlm.untrusted import short

_MOST_COMBINATIONS = 10_000
Value = bool | int | Annotated[float, Field(allow_inf_nan=False)] | str


class SearchSettings(BaseModel):
    """Recipe settings of the search, see `bivlm.compression.block_search`.

    Attributes:
        objective: what is made small: the squared error of what a group of blocks gives, relative to full precision.
        candidates: by setting of the methods the values to try. Of several settings every combination is tried; the
            first of them, the first value of each, is where the search starts.
        depth: how many blocks that depend on each other are searched together at most.
        rounds: passes over the layers of a group.
        samples: calibration samples that are looked at, at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    objective: Literal["block_output"] = "block_output"
    candidates: dict[str, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(min_length=1)
    depth: int = Field(default=3, ge=1)
    rounds: int = Field(default=1, ge=1)
    samples: int = Field(default=16, ge=1)

    @field_validator("candidates", mode="before")
    @classmethod
    def _lists_to_tuples(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(values, list | tuple) for values in value.values()):
            raise ValueError("expected lists of values by setting, for example {clip: [1.0, 0.9]}")
        if (count := prod(len(values) for values in value.values())) > _MOST_COMBINATIONS:
            raise ValueError(f"expected at most {_MOST_COMBINATIONS:,} combinations of values, found {short(count)}")
        return {key: tuple(values) for key, values in value.items()}

    def offered(self, settings: MethodSettings) -> list[MethodSettings]:
        """Return a method's settings with every combination of the candidates, the first one first.

        Raises ValueError naming the key, and the value found, that the method does not have.
        """
        kind = type(settings)
        known = [key for key in kind.model_fields if key != "method"]
        for key in self.candidates:
            if key not in known:
                raise ValueError(
                    f"candidates.{key}: no setting of the method {settings.method!r}; "
                    f"expected one of {', '.join(known)}"
                )
        combinations = itertools.product(*self.candidates.values())
        return [_checked(settings, dict(zip(self.candidates, each, strict=True))) for each in combinations]


def _checked(settings: MethodSettings, changes: dict[str, Any]) -> MethodSettings:
    try:
        return type(settings).model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["candidates", *map(str, first["loc"])])
        raise ValueError(f"{place}: {first['msg']}, found {short(first['input'])}") from None
