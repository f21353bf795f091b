"""The interface of a compression method: settings, a plan of a few kilobytes, packed bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict

from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import LayerStatistics

Need = Literal["weights", "inputs", "gradients", "moments", "block_outputs"]
WEIGHTS: frozenset[Need] = frozenset({"weights"})
INPUTS: frozenset[Need] = frozenset({"weights", "inputs"})
GRADIENTS: frozenset[Need] = frozenset({"weights", "inputs", "gradients"})
MOMENTS: frozenset[Need] = frozenset({"weights", "inputs", "moments"})


class MethodSettings(BaseModel):
    """The recipe settings of a method; every method extends them. Unknown keys are refused."""

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


@dataclass(frozen=True)
class CurvePoint:
    """The cost and error of a layer with one choice of settings.

    Attributes:
        settings: the method's settings, whole, ready for JSON.
        stored_bits: bits per weight.
        error: predicted ``||W - W_rebuilt||^2 / ||W||^2``.
    """

    settings: dict[str, Any]
    stored_bits: float
    error: float


@dataclass(frozen=True)
class Quantized:
    """A packed weight, uint8 (bytes,), see `bivlm.packing`; and figures on how it was made.

    `figures` are small numbers by name, for example the damping of a second moment or its dead channels.
    """

    packed: torch.Tensor
    figures: dict[str, int | float] = field(default_factory=dict)


S = TypeVar("S", bound=MethodSettings)


class Method(ABC, Generic[S]):
    """One file in `bivlm.methods` holds one subclass; that is all a new method needs.

    `version` enters the keys of the steps that ran the method: raise it when the bytes it makes change.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    scope: ClassVar[Literal["layer", "block", "model"]] = "layer"
    Settings: ClassVar[type[MethodSettings]]
    # Peak memory where it sees weights alone, see `bivlm.compression.estimate.layer_bytes`.
    bytes_a_weight: ClassVar[float] = 8.0

    def needs(self, settings: S) -> frozenset[Need]:
        """Return what the method has to see: by default the weights alone."""
        return WEIGHTS

    def tail_share(self, settings: S) -> float:
        """Return the Gaussian share of largest magnitudes that the statistics must keep with their rows."""
        return 0.0

    def curve(self, statistics: LayerStatistics, settings: S) -> list[CurvePoint]:
        """Return a point for each choice of settings worth having, without quantizing; none if there is no choice.

        The settings that the choice is not about stay as in `settings`.
        """
        return []

    def feeds_back(self, settings: S) -> bool:
        """Return whether `sensitivity` says what a weight error costs: errors are fed into other weights."""
        return False

    def sensitivity(self, inputs: SiteStatistics, gradient_trace: float, settings: S) -> float:
        """Return how much the divergence rises with a weight error's mean square, for a method that `feeds_back`.

        `inputs` are of calibration in full precision, `gradient_trace` is ``sum_t ||s_t||^2`` of its outputs.
        Of other methods the sum of the curvature's diagonal says it.
        """
        raise NotImplementedError

    def plan(self, statistics: LayerStatistics, settings: S) -> LayerPlan:
        """Decide how to quantize the layer from its statistics alone; by default there is nothing to decide."""
        parameters = settings.model_dump(mode="json", exclude={"method"})
        return LayerPlan(method=self.name, version=self.version, shape=statistics.shape, parameters=parameters)

    @abstractmethod
    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        """Quantize and pack; `inputs` are given if the method `needs` them, and those of N channels."""

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        """Return what the report adds to the plan's error and bits, for example `groups` and `p_sal_nominal`."""
        return {}
