"""Pack one layer from its weight and plan, and measure the error of the weight rebuilt from those bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict

from bivlm.errors import InputError
from bivlm.methods import method
from bivlm.methods.base import LayerPlan
from bivlm.numerics.input_statistics import SiteStatistics
from bivlm.numerics.weight_statistics import CHUNK_WEIGHTS, check_weight
from bivlm.packing import open_packed

_ROWS_TOGETHER = 256  # of a weight in one product with a second moment: enough for its speed, however wide it is


class LayerBits(BaseModel):
    """Bits per weight of one packed layer, see `bivlm.packing.FormatBits`."""

    model_config = ConfigDict(frozen=True)

    nominal: float
    entropy: float
    stored: float


class LayerRecord(BaseModel):
    """The record of packing a layer.

    Attributes:
        error: ``||W - W_rebuilt||^2 / ||W||^2``.
        output_error: ``tr(E H E^T) / tr(W H W^T)``, the relative squared error of the layer's outputs over the
            calibration tokens; None for a method that does not look at inputs.
        bits: bits per weight.
        nbytes: the packed tensor's length.
        figures: those of the method, see `bivlm.methods.Quantized`.
    """

    model_config = ConfigDict(frozen=True)

    error: float
    output_error: float | None = None
    bits: LayerBits
    nbytes: int
    figures: dict[str, int | float] = {}


def relative_error(weight_MN: torch.Tensor, rebuilt_MN: torch.Tensor) -> float:
    """Return ``||W - W_rebuilt||^2 / ||W||^2``, both (M, N), summed in float64; 0 if both are all zero."""
    error = total = 0.0
    chunks = zip(weight_MN.reshape(-1).split(CHUNK_WEIGHTS), rebuilt_MN.reshape(-1).split(CHUNK_WEIGHTS), strict=True)
    for weight, rebuilt in chunks:
        weight = weight.to(torch.float64)
        total += float(weight.square().sum())
        error += float((weight - rebuilt.to(torch.float64)).square_().sum())
    if total == 0:
        return 0.0 if error == 0 else float("inf")
    return error / total


def output_error(weight_MN: torch.Tensor, rebuilt_MN: torch.Tensor, inputs: SiteStatistics) -> float:
    """Return ``tr(E H E^T) / tr(W H W^T)``, E the difference of two weights (M, N), H the inputs' second moment.

    0 if both weights, or all inputs, are zero; infinite if only W gives outputs of zero.
    """
    moment = inputs.second_moment_NN.to(weight_MN.device)
    # A ratio: of weights that are scaled to 1 no square overflows.
    largest = max(abs(float(end)) for end in weight_MN.aminmax()) or 1.0
    lost = total = 0.0
    rows = max(_ROWS_TOGETHER, CHUNK_WEIGHTS // weight_MN.shape[1])
    for some_mN, rebuilt_mN in zip(weight_MN.split(rows), rebuilt_MN.split(rows), strict=True):
        weight = (some_mN.to(torch.float64) / largest).to(torch.float32)
        error = (rebuilt_mN.to(torch.float64) / largest).to(torch.float32) - weight
        lost += float(((error @ moment) * error).sum(dtype=torch.float64))
        total += float(((weight @ moment) * weight).sum(dtype=torch.float64))
    if total <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / total


def pack_layer(
    weight_MN: torch.Tensor, plan: LayerPlan, name: str = "weight", inputs: SiteStatistics | None = None
) -> tuple[torch.Tensor, LayerRecord]:
    """Return the packed weight, uint8 (bytes,), and its record, measured on the weight rebuilt from those bytes.

    `inputs` are the statistics of the layer's site, for a method that needs them. Raises `InputError` naming `name` if
    `plan` was made for another shape or by another version of the method, the inputs have other channels, or what the
    method packed does not rebuild finite weights.
    """
    check_weight(weight_MN, name)
    chosen = method(plan.method)
    if tuple(weight_MN.shape) != plan.shape:
        raise InputError(f"{name}: the plan is for shape {plan.shape}, the weight has {tuple(weight_MN.shape)}")
    if plan.version != chosen.version:
        raise InputError(
            f"{name}: planned by {plan.method} version {plan.version}, this is version {chosen.version}: plan it again"
        )
    if inputs is not None and len(inputs.mean_N) != plan.shape[1]:
        raise InputError(f"{name}: inputs of {len(inputs.mean_N)} channels, the weight has {plan.shape[1]} columns")
    quantized = chosen.quantize(weight_MN, plan, inputs)
    made = f"{name}, packed by {plan.method}"
    return quantized.packed, measure(weight_MN, quantized.packed, made, inputs, quantized.figures)


def measure(
    weight_MN: torch.Tensor,
    packed: torch.Tensor,
    name: str = "weight",
    inputs: SiteStatistics | None = None,
    figures: Mapping[str, int | float] | None = None,
) -> LayerRecord:
    """Return the record of a packed weight, measured on what it rebuilds; `figures` are those of its method.

    Raises `InputError` naming `name` for a packed weight that no checkpoint may hold, such as one that does not rebuild
    finite weights.
    """
    codec, header = open_packed(packed, name)
    bits, size, rebuilt_MN = codec.bits(packed, header), weight_MN.numel(), codec.unpack(packed, header)
    return LayerRecord(
        error=relative_error(weight_MN, rebuilt_MN),
        output_error=None if inputs is None else output_error(weight_MN, rebuilt_MN, inputs),
        bits=LayerBits(nominal=bits.nominal / size, entropy=bits.entropy / size, stored=bits.stored / size),
        nbytes=packed.numel(),
        figures=dict(figures or {}),
    )
