"""Bi-VLM's groups on a trellis: sign, quantile group and salient level of a weight, and no bits for their index.

A weight is rotated on both sides, which makes its entries Gaussian; Bi-VLM's groups of a Gaussian's magnitudes are then
one code for all layers, trained once (`bivlm.numerics.trellis`): at two bits it errs by .071 of the variance, near
Shannon's bound of .0625, where two groups without a trellis err by .139. Errors are fed into later columns, as in GPTQ,
and with ``feedback: both`` also into later rows, by the second moment of the gradients of the layer's outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from bivlm.errors import InputError
from bivlm.methods.base import INPUTS, MOMENTS, WEIGHTS, CurvePoint, LayerPlan, Method, MethodSettings, Need, Quantized
from bivlm.numerics.error_feedback import InverseFactor, inverse_factor, left_over
from bivlm.numerics.hadamard import rotate_moment
from bivlm.numerics.half_scales import exponent_of
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.trellis import RATES, StateBits, levels_of, trellis_code
from bivlm.numerics.trellis_feedback import one_sided, two_sided
from bivlm.numerics.weight_statistics import LayerStatistics
from bivlm.packing import trellis as packing
from bivlm.packing.trellis import INPUTS as ROTATED_INPUTS
from bivlm.packing.trellis import OUTPUTS as ROTATED_OUTPUTS
from bivlm.packing.trellis import Layout

_ROTATED = {"none": 0, "inputs": ROTATED_INPUTS, "outputs": ROTATED_OUTPUTS, "both": ROTATED_INPUTS | ROTATED_OUTPUTS}


class TrellisSettings(MethodSettings):
    """Settings of `trellis`.

    Attributes:
        rate: bits per weight.
        state_bits: of the trellis; more of them err less and take four or sixteen times as long, and no processor
            multiplies with their bits as they are.
        feedback: where errors are fed: nowhere, into later inputs, or into later inputs and outputs.
        rotate: which sides are rotated.
        damping: share of the mean diagonal of the inputs' second moment that is added to it.
        output_damping: the same of the gradients' second moment. It is measured on few draws, and does not depend on
            the inputs as the formulas say: with as little as for inputs, errors gather where it is wrongly low.
        seed: of the rotations.
    """

    method: Literal["trellis"]
    rate: float = 2.0
    state_bits: StateBits = 12
    feedback: Literal["none", "inputs", "both"] = "inputs"
    rotate: Literal["none", "inputs", "outputs", "both"] = "both"
    damping: float = Field(default=0.01, ge=0, le=1, allow_inf_nan=False)
    output_damping: float = Field(default=0.5, ge=0, le=1, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0, lt=2**32)

    @field_validator("rate")
    @classmethod
    def _is_a_rate(cls, value: float) -> float:
        if value not in RATES:
            raise ValueError(f"expected one of {', '.join(f'{rate:g}' for rate in RATES)}")
        return value


class Trellis(Method[TrellisSettings]):
    """The method `trellis`."""

    name: ClassVar[str] = "trellis"
    version: ClassVar[int] = 2
    Settings = TrellisSettings
    bytes_a_weight: ClassVar[float] = 26.0

    def needs(self, settings: TrellisSettings) -> frozenset[Need]:
        return {"none": WEIGHTS, "inputs": INPUTS, "both": MOMENTS}[settings.feedback]

    def curve(self, statistics: LayerStatistics, settings: TrellisSettings) -> list[CurvePoint]:
        """Return a point for each rate, at stored bytes; the error is the code's on a unit Gaussian."""
        sides, points = 2 if settings.feedback == "both" else 1, []
        for rate in RATES:
            chosen = settings.model_copy(update={"rate": rate})
            stored = 8 * packing.packed_nbytes(statistics.shape, rate, sides) / statistics.size
            error = trellis_code(settings.state_bits, rate).error
            points.append(CurvePoint(chosen.model_dump(mode="json"), stored, error))
        return points

    def feeds_back(self, settings: TrellisSettings) -> bool:
        return settings.feedback != "none"

    def sensitivity(self, inputs: SiteStatistics, gradient_trace: float, settings: TrellisSettings) -> float:
        """Return ``sum_ij 1 / (U_Gii^2 U_Hjj^2)``, one-sided ``tr(G) sum_j 1 / U_Hjj^2``."""
        layout = _layout(settings)
        with _one_thread():
            remains = left_over(_rotated(inputs.second_moment_NN, layout, ROTATED_INPUTS), settings.damping)
            if settings.feedback == "inputs" or inputs.gradient_moment_MM is None:
                return remains * gradient_trace
            moment_MM = _rotated(inputs.gradient_moment_MM, layout, ROTATED_OUTPUTS)
            return remains * left_over(moment_MM, settings.output_damping)

    def quantize(self, weight_MN: torch.Tensor, plan: LayerPlan, inputs: SiteStatistics | None = None) -> Quantized:
        """Pack the weight; figures are those of the second moments that were used."""
        settings = TrellisSettings.model_validate({"method": self.name, **plan.parameters})
        layout = _layout(settings)
        code = layout.code
        # Scaled to 1 no sum overflows.
        largest = max(abs(float(end)) for end in weight_MN.aminmax()) or 1.0
        rotated = layout.rotate(weight_MN.cpu().to(torch.float32) / largest).contiguous().numpy()
        deviation = math.sqrt(sum(float(np.square(row, dtype=np.float64).sum()) for row in rotated) / rotated.size)
        magnitudes = code.magnitudes.astype(np.float64) * deviation * largest
        exponent = exponent_of(float(magnitudes[-1]))
        magnitudes = packing.stored_magnitudes(magnitudes, exponent)
        levels = levels_of(magnitudes / ((deviation or 1.0) * largest))
        symbols, figures = self._symbols(rotated / np.float32(deviation or 1.0), layout, levels, settings, inputs)
        packed = packing.pack(
            symbols, magnitudes, layout, (rotated.shape[0], rotated.shape[1]), exponent=exponent, dtype=weight_MN.dtype
        )
        return Quantized(packed, figures)

    def _symbols(
        self,
        weight_MN: np.ndarray,
        layout: Layout,
        levels: np.ndarray,
        settings: TrellisSettings,
        inputs: SiteStatistics | None,
    ) -> tuple[np.ndarray, dict[str, int | float]]:
        """Return the symbols of the rotated weight of unit variance, and figures of the second moments."""
        threads = torch.get_num_threads()
        if settings.feedback == "none":
            return one_sided(weight_MN, None, layout.code, levels, threads), {}
        if inputs is None:
            raise InputError(f"method {self.name!r} needs the second moment of the layer's inputs; none was given")
        factor = _factor(inputs.second_moment_NN, layout, ROTATED_INPUTS, settings.damping)
        figures = {**factor.figures(), "tokens": inputs.total_tokens}
        shares_NN, importance_N = _shares(factor)
        if settings.feedback == "inputs":
            return one_sided(weight_MN, shares_NN, layout.code, levels, threads), figures
        if inputs.gradient_moment_MM is None:
            # Nothing of the layer reaches the answer: no output counts more than another.
            outputs = InverseFactor(torch.eye(len(weight_MN)), settings.output_damping, 0)
        else:
            outputs = _factor(inputs.gradient_moment_MM, layout, ROTATED_OUTPUTS, settings.output_damping)
        figures |= {"output_damping": outputs.damping}
        shares_MM, importance_M = _shares(outputs)
        sides = (shares_MM, shares_NN, importance_M, importance_N)
        return two_sided(weight_MN, *sides, layout.code, levels, threads), figures

    def describe(self, plan: LayerPlan) -> dict[str, Any]:
        return {key: plan.parameters[key] for key in ("rate", "state_bits", "feedback")}


def _layout(settings: TrellisSettings) -> Layout:
    sides = 2 if settings.feedback == "both" else 1
    return Layout(settings.state_bits, settings.rate, sides, _ROTATED[settings.rotate], settings.seed)


def _factor(moment: torch.Tensor, layout: Layout, side: int, damping: float) -> InverseFactor:
    """Return the factor of a second moment, rotated as the weight's side is."""
    with _one_thread():
        return inverse_factor(_rotated(moment, layout, side), damping)


def _rotated(moment: torch.Tensor, layout: Layout, side: int) -> torch.Tensor:
    moment = moment.cpu()
    return rotate_moment(moment, layout.seed_of(side)) if layout.rotated & side else moment


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch in one thread: the sums of its factorizations then have one order, however many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _shares(factor: InverseFactor) -> tuple[np.ndarray, np.ndarray]:
    """Return ``diag(U)^-1 U``, float32 (N, N), and ``1 / U_jj^2`` with a mean of 1, float32 (N,)."""
    upper = factor.upper_NN.numpy()
    diagonal = upper.diagonal()
    importance = 1 / np.square(diagonal, dtype=np.float64)
    return np.ascontiguousarray(upper / diagonal[:, None]), (importance / importance.mean()).astype(np.float32)
