"""What a compression method is: settings, a plan of a few kilobytes, packed bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from bivlm.statistics import LayerStatistics


class MethodSettings(BaseModel):
    """What a recipe may say about a method; every method extends it. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    method: str


class LayerPlan(BaseModel):
    """How one layer will be quantized: a small record that travels between tasks as JSON.

    `parameters` are the method's own; together with the weight they determine the packed bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    version: int
    shape: tuple[int, int]
    parameters: dict[str, Any]


class Method(ABC):
    """One file in `bivlm.methods` holds one subclass; that is all a new method needs.

    `version` enters the keys of the steps that ran the method: raise it when the bytes it makes change.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    scope: ClassVar[Literal["layer", "block", "model"]]
    needs: ClassVar[frozenset[Literal["weights", "inputs", "block_outputs"]]]
    Settings: ClassVar[type[MethodSettings]]

    @abstractmethod
    def tail_share(self, settings: MethodSettings) -> float:
        """The Gaussian share of largest magnitudes that the statistics must keep with their rows."""

    @abstractmethod
    def curve(self, statistics: LayerStatistics, settings: MethodSettings) -> list[tuple[float, float]]:
        """(stored bits a weight, relative squared error) of the settings worth choosing from, without quantizing."""

    @abstractmethod
    def plan(self, statistics: LayerStatistics, settings: MethodSettings) -> LayerPlan:
        """Decide how to quantize the layer from its statistics alone."""

    @abstractmethod
    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        """The packed weight, uint8 of shape (bytes,), see `bivlm.packing`."""

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        """What the report says of the plan beside error and bits, for example `groups` and `p_sal_nominal`."""
        return {}
